"""Which split of somebody's data set trains, which validates and which tests."""

from collections.abc import Sequence

from timm_lt.data.sources import SPLIT_WORDS, Split
from timm_lt.utils.checks import Problems, UsageError, unknown_name


def choose_splits(
    available: Sequence[str], *, train: str | None, val: str | None, test: str | None
) -> dict[Split, str]:
    """Finds the three splits where they are not named.

    ``train`` is the split of that name, and validation and test likewise by
    :data:`~timm_lt.data.sources.SPLIT_WORDS`. A data set without a test split is tested on its
    validation split, unless that was named, and one with neither on a part of train. ``"val"`` is
    missing where it is to be held out of train. A part of train is asked for by naming the training
    split once more.

    >>> choose_splits(["train", "validation"], train=None, val=None, test=None)
    {'train': 'train', 'test': 'validation'}
    >>> choose_splits(["train", "test"], train=None, val=None, test="train")
    {'train': 'train', 'test': 'train'}

    Args:
        available: The names of the splits that there are.
        train: Name of a split, or None.
        val: Name of a split, or None.
        test: Name of a split, or None.

    Raises:
        UsageError: If a name is not among the splits, several could be meant, none is for training,
            or one split would be both validation and test; lists the splits.
    """
    problems = Problems()
    named: dict[Split, str | None] = {"train": train, "val": val, "test": test}
    found: dict[Split, str | None] = {}
    for split, name in named.items():
        found[split] = None
        with problems.collected():
            found[split] = _find(split, name, available)
    problems.check()
    chosen, validation, tested = found["train"], found["val"], found["test"]
    if val is None and validation in (train, test):
        validation = None
    if chosen is None:
        raise UsageError(
            f"no split is called train, only {', '.join(available)}: say which with train="
        )
    if tested is None and val is None:
        tested, validation = validation, None
    if validation == tested and validation not in (None, chosen):
        raise UsageError(
            f"split {tested!r} cannot be validation and test at once: name another with val= or "
            f"test=, or {chosen!r} to take a part of it; there are {', '.join(available)}"
        )
    result: dict[Split, str] = {"train": chosen}
    if validation not in (None, chosen):
        result["val"] = str(validation)
    return {**result, "test": tested or chosen}


def _find(split: Split, name: str | None, available: Sequence[str]) -> str | None:
    if name is not None:
        if name not in available:
            raise unknown_name(f"split for {split}=:", name, list(available))
        return name
    candidates = [known for known in available if SPLIT_WORDS.get(known.lower()) == split]
    if len(candidates) > 1:
        raise UsageError(f"several splits could be {split}: {', '.join(candidates)}; name it")
    return candidates[0] if candidates else None
