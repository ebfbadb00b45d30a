"""hub: any image-classification data set of the Hub, or local parquet and arrow files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from timm_lt.data.holdout import hold_out, leave_out_small
from timm_lt.data.hub.columns import find_image_column, find_label_column
from timm_lt.data.hub.labels import UNLABELLED, read_labels
from timm_lt.data.hub.splits import choose_splits
from timm_lt.data.hub.tables import StoredTables, open_local, open_repo
from timm_lt.data.identity import image_keys
from timm_lt.data.images import label_names, label_tensor, relabelled
from timm_lt.data.lists.columns import note_unused
from timm_lt.data.readable import note_damaged
from timm_lt.data.reading import is_remote
from timm_lt.data.sources import Split, register_dataset
from timm_lt.data.verification import find_damaged
from timm_lt.utils.checks import Problems, UsageError, check_choice, check_number, shown_names
from timm_lt.utils.hub_errors import split_revision

if TYPE_CHECKING:
    from datasets import Dataset, Features

Incomplete = Literal["raise", "drop"]

ROWS = 1000  # whose images are looked at together


@register_dataset("hub")
def hub(
    *,
    repo: str | None = None,
    revision: str | None = None,
    config: str | None = None,
    image: str | None = None,
    label: str | None = None,
    train: str | None = None,
    val: str | None = None,
    test: str | None = None,
    root: str | Path | None = None,
    test_fraction: float = 0.2,
    min_images: int | None = None,
    incomplete: Incomplete = "raise",
    streaming: bool = False,
    cache_dir: str | Path | None = None,
) -> "dict[Split, Dataset]":
    """Builds the splits of a data set of the Hub, or of local files.

    Splits that are not named are found: ``train``; ``validation``, ``valid``, ``val`` or ``dev``;
    ``test``. Without a test split the validation split is the test split, for that is what results
    are reported on, and a run holds validation images out of train. With a training split alone, a
    part of each class becomes the test split. Columns that are not named are found, too: see
    :func:`~timm_lt.data.hub.columns.find_image_column` and
    :func:`~timm_lt.data.hub.columns.find_label_column`. No code of a repo is ever run.

    Args:
        repo: ``namespace/name`` or ``namespace/name@revision`` of a data set on the Hub.
        revision: A branch, tag or commit, if ``repo`` has none.
        config: Which of several configurations; for local files, which subfolder.
        image: Column of images.
        label: Column of labels: a ``ClassLabel``, integers 0 to C - 1, or texts, which are the
            class names.
        train: Name of the split for training.
        val: Name of the split for validation; that of ``train`` holds a part of it out.
        test: Name of the split for testing; that of ``train`` takes ``test_fraction`` of it.
        root: Instead of a repo: a parquet or arrow file, a folder of them named like on the Hub
            (``train.parquet``, ``data/train-00000-of-00001.parquet``, ``train/0000.parquet``), or
            what ``save_to_disk`` wrote.
        test_fraction: Part of the training images of each class that becomes the test split where
            there is none, in (0, 1).
        min_images: Classes with fewer training images are left out, and named in the log; None
            leaves out none.
        incomplete: What happens to rows without a label or an image: ``"raise"``, or ``"drop"``.
        streaming: Refused: class counts and samplers need the whole data set.
        cache_dir: Where the ``datasets`` library keeps what it prepares; None is its own place.

    Returns:
        The splits, each with the columns ``image`` and ``label``.

    Raises:
        UsageError: If the data set cannot be had, a split or column is not to be found or could be
            several, a split lacks labels, an image is missing or empty (then also those that are
            damaged), or labels are not those of classes.
    """
    if streaming:
        raise UsageError(
            "data set 'hub' takes no streaming=True: a stream has no length, no class counts and "
            "no random access, which samplers and heads need; leave it out"
        )
    check_choice("incomplete of data set 'hub':", incomplete, get_args(Incomplete))
    check_number("test_fraction of data set 'hub'", test_fraction, "(0, 1)")
    stored = _open(repo, revision, config, root, cache_dir)
    problems = Problems(stored.name)
    names: dict[Split, str] = {}
    with problems.collected():
        names = choose_splits(stored.splits, train=train, val=val, test=test)
    if stored.features is not None:
        with problems.collected():
            _find_columns(stored.features, image, label)
    problems.check()
    tables = stored.read(list(dict.fromkeys(names.values())))
    with problems.collected():
        columns = _find_columns(tables[names["train"]].features, image, label)
        found, labels = _labelled(tables, columns)
        note_unused(stored.name, [c for c in tables[names["train"]].features if c not in columns])
    problems.check()
    # A split that test is a part of, too, is looked at once: as that for training.
    purposes = {name: split for split, name in reversed(names.items())}
    for name, split in purposes.items():
        with problems.collected(f"split {name!r} "):
            found[name] = _complete(found[name], labels[name], split, list(labels), incomplete)
    splits: dict[Split, Dataset] = {}
    if not problems.found:
        with problems.collected():
            found = _without_small(found, names, min_images)
            splits = _dealt(found, names, test_fraction, root)
    if problems.found:
        _note_damaged(problems, found)
    problems.check()
    return splits


def _open(
    repo: str | None,
    revision: str | None,
    config: str | None,
    root: str | Path | None,
    cache_dir: str | Path | None,
) -> StoredTables:
    if (repo is None) == (root is None):
        raise UsageError(
            "data set 'hub' needs either repo, NAMESPACE/NAME on the Hub, or root, local parquet "
            f"or arrow files: got {'neither' if repo is None else 'both'}"
        )
    if root is not None:
        if revision is not None:
            raise UsageError("revision is of a data set on the Hub: leave it out with root")
        return open_local(Path(root).expanduser(), config, cache_dir)
    repo_id, own_revision = split_revision(str(repo))
    if own_revision and revision and own_revision != revision:
        raise UsageError(f"{repo!r} names a revision, and revision={revision!r} another")
    return open_repo(repo_id, own_revision or revision, config, cache_dir)


def _find_columns(features: "Features", image: str | None, label: str | None) -> tuple[str, str]:
    problems = Problems()
    found = []
    for find, column in ((find_image_column, image), (find_label_column, label)):
        with problems.collected():
            found.append(find(features, column))
    problems.check()
    return found[0], found[1]


def _labelled(
    tables: "Mapping[str, Dataset]", columns: tuple[str, str]
) -> "tuple[dict[str, Dataset], dict[str, NDArray[np.int64]]]":
    """Returns the splits with the columns image and label alone, and their labels."""
    from datasets import ClassLabel, Image, Value

    image, label = columns
    for split, table in tables.items():
        if missing := [name for name in columns if name not in table.column_names]:
            raise UsageError(
                f"split {split!r} has no column {' and no '.join(map(repr, missing))}, only "
                f"{', '.join(table.column_names)}"
            )
    labels, names = read_labels(tables, label)
    feature = Value("int64") if names is None else ClassLabel(names=names)
    found = {}
    for split, table in tables.items():
        rows = table.with_format(None).select_columns(image)
        rows = rows if image == "image" else rows.rename_column(image, "image")
        rows = rows.cast_column("image", Image(mode="RGB"))
        found[split] = rows.add_column("label", labels[split], feature=feature)
    return found, labels


def _complete(
    table: "Dataset",
    labels: NDArray[np.int64],
    split: Split,
    available: Sequence[str],
    incomplete: Incomplete,
) -> "Dataset":
    """Returns a split without the rows that lack something, or raises that there are some."""
    missing = np.flatnonzero(labels == UNLABELLED)
    if len(missing) and len(missing) == len(labels):
        raise UsageError(
            f"has no labels (all are -1 or empty), so it cannot be the {split} split: name another "
            f"with {split}= (there are {', '.join(available)}); the name of the training split "
            "takes a part of that"
        )
    problems = Problems()
    lacking = {"label": missing.tolist(), **rows_without_image(table)}
    for what, rows in lacking.items():
        if rows:
            problems.add(
                f"has {len(rows)} of {len(table)} rows without {what}: {shown_names(rows)}; mend "
                "them, or leave them out with incomplete=drop"
            )
    if incomplete == "raise":
        problems.check()
    dropped = [row for rows in lacking.values() for row in rows]
    if not dropped:
        return table
    return table.select(np.setdiff1d(np.arange(len(table)), dropped))


def _without_small(
    found: "Mapping[str, Dataset]", names: Mapping[Split, str], min_images: int | None
) -> "dict[str, Dataset]":
    """Returns the splits without the classes that have too few training images."""
    if min_images is None:
        return dict(found)
    labels = {split: label_tensor(found[name]).numpy() for split, name in names.items()}
    class_names = label_names(found[names["train"]])
    rows, labels, class_names = leave_out_small(labels, class_names, min_images)
    return {
        name: relabelled(found[name].select(rows[split]), labels[split], class_names)
        for split, name in names.items()
    }


def rows_without_image(table: "Dataset") -> dict[str, list[int]]:
    """Finds the rows that have no image, an empty one, or a file that is not there.

    No image is decoded, and of those that are stored in the table only the sizes are read.

    Returns:
        The rows by what they lack, in words for a message.
    """
    found: dict[str, list[int]] = {"image": [], "bytes in their image": [], "the image file": []}
    encoded = table.select_columns("image").with_format("arrow")
    for start in range(0, len(table), ROWS):
        column = cast(pa.Table, encoded[start : start + ROWS]).column(0).combine_chunks()
        sizes = pc.binary_length(pc.struct_field(column, "bytes"))
        paths = pc.struct_field(column, "path")
        pairs = zip(sizes.to_pylist(), paths.to_pylist(), strict=True)
        lost = [size is None and _is_lost(path) for size, path in pairs]
        masks = (
            pc.and_(sizes.is_null(), paths.is_null()),
            pc.equal(sizes, 0).fill_null(False),
            lost,
        )
        for what, mask in zip(found, masks, strict=True):
            found[what] += (start + np.flatnonzero(mask)).tolist()
    return found


def _note_damaged(problems: Problems, found: "Mapping[str, Dataset]") -> None:
    """Notes damaged images too, of a data set that has to be mended anyway."""
    for name, table in found.items():
        lacking = {row for rows in rows_without_image(table).values() for row in rows}
        damaged = [one for one in find_damaged(table) if one.row not in lacking]
        note_damaged(problems, repr(name), damaged, len(table))


def _is_lost(path: str | None) -> bool:
    return path is not None and not is_remote(path) and not Path(path).is_file()


def _dealt(
    found: "Mapping[str, Dataset]",
    names: Mapping[Split, str],
    test_fraction: float,
    root: str | Path | None,
) -> "dict[Split, Dataset]":
    """Returns the splits by what they are for; a test split that there is none of is dealt out."""
    splits = {split: found[name] for split, name in names.items()}
    if names["test"] == names["train"]:
        whole = splits["train"]
        kept, dealt = hold_out(
            label_tensor(whole),
            test_fraction,
            keys=image_keys(whole, root),
            purpose="test",
            names=label_names(whole),
        )
        splits |= {"train": whole.select(kept), "test": whole.select(dealt)}
    return splits
