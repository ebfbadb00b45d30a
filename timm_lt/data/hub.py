"""hub: any image-classification data set of the Hub, or local parquet and arrow files."""

import glob
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from timm_lt.data.columns import UNLABELLED, arrow_column, image_column, label_column, read_labels
from timm_lt.data.decode import is_remote
from timm_lt.data.folder import visible_files
from timm_lt.data.images import label_names, label_tensor, relabelled
from timm_lt.data.list_files import note_unused
from timm_lt.data.sources import SPLIT_WORDS, Split, register_dataset
from timm_lt.data.splits import hold_out_split, leave_out_small
from timm_lt.utils.checks import Problems, UsageError, check_choice, check_number, shown_names
from timm_lt.utils.hub import hub_errors, split_revision

if TYPE_CHECKING:
    from datasets import Dataset

# Files of save_to_disk.
SAVED = ("state.json", "dataset_dict.json")
SHARD = re.compile(r"-\d+-of-\d+$")

Incomplete = Literal["raise", "drop"]


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
    cache_dir: str | Path | None = None,
) -> "dict[Split, Dataset]":
    """Builds the splits of a data set of the Hub, or of local files.

    Splits are found by name, see :func:`choose_splits`, and columns by type and name, see
    :func:`~timm_lt.data.columns.image_column` and :func:`~timm_lt.data.columns.label_column`. With
    a training split alone, a part of each class becomes the test split. No code of a repo is run.

    Args:
        repo: ``namespace/name`` or ``namespace/name@revision`` of a data set on the Hub.
        revision: Branch, tag or commit, if ``repo`` has none.
        config: One of several configurations; for local files, a subfolder.
        image: Column of images.
        label: Column of labels: a ``ClassLabel``, integers 0 to C - 1, or texts, which become the
            class names.
        train: Name of the training split.
        val: Name of the validation split; that of ``train`` holds out a part of it.
        test: Name of the test split; that of ``train`` takes ``test_fraction`` of it.
        root: Local files in place of a repo: a parquet or arrow file, a folder of them with the
            names of the Hub (``train.parquet``, ``data/train-00000-of-00001.parquet``,
            ``train/0000.parquet``), or a folder written by ``save_to_disk``.
        test_fraction: Fraction of the training images of each class for a missing test split, in
            (0, 1).
        min_images: Classes with fewer training images are left out; None leaves out none.
        incomplete: Rows without a label or an image are an error (``"raise"``) or left out
            (``"drop"``).
        cache_dir: Cache of the ``datasets`` library; None is its own.

    Returns:
        The splits, each with the columns ``image`` and ``label``.

    Raises:
        UsageError: If the data set cannot be read; if a split or column is missing or ambiguous;
            if rows have no label or image; or if the labels are not those of classes.
    """
    check_choice("incomplete of data set 'hub':", incomplete, get_args(Incomplete))
    check_number("test_fraction of data set 'hub'", test_fraction, "(0, 1)")
    if (repo is None) == (root is None) or (revision and (root or "@" in str(repo))):
        raise UsageError(
            "data set 'hub' needs either repo, NAMESPACE/NAME on the Hub with at most one "
            "revision, or root, local parquet or arrow files"
        )
    if root is not None:
        tables = _read_local(Path(root).expanduser(), config, cache_dir)
    else:
        tables = _read_repo(str(repo), revision, config, cache_dir)
    names = choose_splits(list(tables), train=train, val=val, test=test)
    problems = Problems(str(repo or root))
    tables = {name: tables[name] for name in dict.fromkeys(names.values())}
    for name, table in tables.items():
        with problems.collected(f"split {name!r}: "):
            image, label = image_column(table, image), label_column(table, label)
    problems.check()
    unused = {*tables[names["train"]].column_names} - {image, label}
    note_unused(problems.owner, sorted(unused))
    with _readable(f"column {label!r}"):
        labels, class_names = read_labels(tables, str(label))
        rows = {
            name: _labelled(table, str(image), labels[name], class_names)
            for name, table in tables.items()
        }
    for name in rows:
        split = next(split for split in names if names[split] == name)
        with problems.collected(f"split {name!r} "):
            rows[name] = _complete(rows[name], labels[name], split, incomplete)
    problems.check()
    splits = _without_small({split: rows[name] for split, name in names.items()}, min_images)
    if names["test"] == names["train"]:
        del splits["test"]
        return hold_out_split(splits, "test", test_fraction, root=root)
    return splits


def choose_splits(
    available: Sequence[str],
    *,
    train: str | None = None,
    val: str | None = None,
    test: str | None = None,
) -> dict[Split, str]:
    """Chooses the splits for training, validation and testing.

    A split without a given name is found by :data:`~timm_lt.data.sources.SPLIT_WORDS`. Without a
    test split, the validation split is the test split, unless its name is given; without either,
    the training split is (a part of it is then held out). ``"val"`` is missing where validation
    images are held out of the training split.

    >>> choose_splits(["train", "validation"])
    {'train': 'train', 'test': 'validation'}
    >>> choose_splits(["train", "validation", "test"], val="train")
    {'train': 'train', 'test': 'test'}

    Raises:
        UsageError: If a name is unknown, several splits could be meant, there is no training split,
            or one split would be both validation and test.
    """
    trained = _find_split("train", train, available)
    validated, tested = _find_split("val", val, available), _find_split("test", test, available)
    if val is None and tested is None:
        validated, tested = None, validated
    if val is None and validated == test:
        validated = None
    tested = tested or trained
    if validated == tested != trained:
        raise UsageError(
            f"split {tested!r} cannot be validation and test at once: name another one with val= "
            f"or test=, or {trained!r} to hold out a part of it"
        )
    if validated in (None, trained):
        return {"train": str(trained), "test": str(tested)}
    return {"train": str(trained), "val": str(validated), "test": str(tested)}


def _find_split(split: Split, name: str | None, available: Sequence[str]) -> str | None:
    if name is not None:
        check_choice(f"split for {split}=:", name, tuple(available))
        return name
    found = [known for known in available if SPLIT_WORDS.get(known.lower()) == split]
    if len(found) > 1 or (split == "train" and not found):
        raise UsageError(
            f"{'several' if found else 'none'} of the splits {', '.join(found or available)} could "
            f"be the {split} split; name one with {split}="
        )
    return found[0] if found else None


def _read_repo(
    repo: str, revision: str | None, config: str | None, cache_dir: str | Path | None
) -> "dict[str, Dataset]":
    """Reads all splits of a data set of the Hub, which are downloaded unless they are cached."""
    from datasets import load_dataset_builder
    from datasets.packaged_modules.cache.cache import Cache
    from huggingface_hub import HfFileSystem, try_to_load_from_cache

    repo_id, own_revision = split_revision(repo)
    revision = own_revision or revision
    with hub_errors(repo), _readable(repo):
        builder = load_dataset_builder(
            # Without hf://, a local folder of this name would be read instead.
            f"hf://datasets/{repo_id}",
            config,
            revision=revision,
            cache_dir=cache_dir and str(cache_dir),
        )
        if revision is not None and isinstance(builder, Cache):
            # The Hub cannot be reached, and the library takes any commit in its cache.
            card = try_to_load_from_cache(
                repo_id, "README.md", revision=revision, repo_type="dataset"
            )
            if builder.hash not in (revision, Path(str(card)).parent.name):
                raise UsageError(
                    f"the Hub cannot be reached, and the cache has commit {builder.hash} of "
                    f"{repo_id}, which may not be {revision}"
                )
        if not Path(builder.cache_dir).is_dir():
            files = [str(paths[0]) for paths in (builder.config.data_files or {}).values()]
            _check_class_names(files, HfFileSystem())
        builder.download_and_prepare()
        return dict(builder.as_dataset())


def _read_local(
    root: Path, config: str | None, cache_dir: str | Path | None
) -> "dict[str, Dataset]":
    """Reads all splits of a parquet or arrow file, a folder of them, or of save_to_disk."""
    from datasets import Dataset, load_dataset, load_from_disk

    folder = root / (config or "")
    if any((folder / name).is_file() for name in SAVED):
        with _readable(folder):
            saved = load_from_disk(str(folder))
            return {"train": saved} if isinstance(saved, Dataset) else dict(saved)
    files = {"train": [folder]} if folder.is_file() else find_tables(folder)
    kind = next((paths[0].suffix for paths in files.values()), "")
    if kind not in (".parquet", ".arrow"):
        raise UsageError(
            f"root {str(folder)!r} does not exist or has no parquet or arrow file; a folder of "
            "images is data set 'folder'"
        )
    tables = {}
    for split, paths in files.items():
        _check_class_names(map(str, paths))
        with _readable(paths[0]):
            # The library takes the paths for patterns.
            tables[split] = load_dataset(
                kind[1:],
                data_files=[glob.escape(str(path.absolute())) for path in paths],
                split="train",
                cache_dir=cache_dir and str(cache_dir),
            )
    return tables


def find_tables(root: Path) -> dict[str, list[Path]]:
    """Finds the parquet files of a folder, or else its arrow files, by split.

    The split of a file is a folder that is named like a split, or its own name without the number
    of the shard. If no name is that of a split, all files are ``train``.
    """
    files = visible_files(root, "*.parquet") or visible_files(root, "*.arrow")
    splits: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        folders = [f for f in file.relative_to(root).parts[:-1] if f.lower() in SPLIT_WORDS]
        splits[folders[-1] if folders else SHARD.sub("", file.stem)].append(file)
    if files and not any(split.lower() in SPLIT_WORDS for split in splits):
        return {"train": files}
    return dict(splits)


def _check_class_names(files: Iterable[str], filesystem: object = None) -> None:
    """Checks that parquet files have the same class names; the library takes the first ones."""
    from datasets import ClassLabel, Features

    first: dict[str, tuple[str, list[str]]] = {}
    for file in files:
        if not file.endswith(".parquet"):
            continue
        with _readable(file):
            features = Features.from_arrow_schema(pq.read_schema(file, filesystem=filesystem))
        for column, feature in features.items():
            if not isinstance(feature, ClassLabel):
                continue
            other, names = first.setdefault(column, (file, feature.names))
            if feature.names != names:
                raise UsageError(
                    f"{file} and {other} have different class names in column {column!r}; write "
                    "both files with the same ClassLabel"
                )


@contextmanager
def _readable(name: object) -> Iterator[None]:
    """Turns an error of the ``datasets`` library into a UsageError of one line."""
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    try:
        yield
    except UsageError:
        raise
    except (DatasetsError, OSError, ValueError, LookupError, RuntimeError, TypeError) as error:
        cause: BaseException = error
        while isinstance(cause, DatasetGenerationError) and cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise UsageError(f"{name} cannot be read: {reason}") from error


def _labelled(
    table: "Dataset", image: str, labels: NDArray[np.int64], names: list[str] | None
) -> "Dataset":
    """Returns a table with the columns image and label alone."""
    from datasets import ClassLabel, Image, Value

    rows = table.with_format(None).select_columns(image)
    rows = rows if image == "image" else rows.rename_column(image, "image")
    feature = Value("int64") if names is None else ClassLabel(names=names)
    return rows.cast_column("image", Image(mode="RGB")).add_column("label", labels, feature=feature)


def _complete(
    rows: "Dataset", labels: NDArray[np.int64], split: Split, incomplete: Incomplete
) -> "Dataset":
    """Returns a split without its incomplete rows, or raises if there are any."""
    unlabelled = np.flatnonzero(labels == UNLABELLED).tolist()
    without_image = rows_without_image(rows)
    problems = Problems()
    if unlabelled and len(unlabelled) == len(labels):
        problems.add(
            f"has no labels, so it cannot be the {split} split; name another one with {split}=, or "
            "the training split to hold out a part of it"
        )
    elif incomplete == "raise":
        for noun, found in (("a label", unlabelled), ("an image", without_image)):
            if found:
                problems.add(
                    f"has {len(found)} of {len(rows)} rows without {noun}: {shown_names(found)}; "
                    "add what is missing, or leave out these rows with incomplete=drop"
                )
    problems.check()
    dropped = unlabelled + without_image
    return rows.select(np.setdiff1d(np.arange(len(rows)), dropped)) if dropped else rows


def rows_without_image(rows: "Dataset") -> list[int]:
    """Finds the rows without an image, with an empty one, or with a file that does not exist."""
    images = arrow_column(rows, "image")
    sizes = pc.binary_length(pc.struct_field(images, "bytes")).to_pylist()
    paths = pc.struct_field(images, "path").to_pylist()
    return [
        row
        for row, (size, path) in enumerate(zip(sizes, paths, strict=True))
        if not size and (size == 0 or path is None or not (is_remote(path) or Path(path).is_file()))
    ]


def _without_small(
    splits: "Mapping[Split, Dataset]", min_images: int | None
) -> "dict[Split, Dataset]":
    """Returns the splits without the classes that have too few training images."""
    if min_images is None:
        return dict(splits)
    labels = {split: label_tensor(rows).numpy() for split, rows in splits.items()}
    kept, labels, names = leave_out_small(labels, label_names(splits["train"]), min_images)
    return {
        split: relabelled(rows.select(kept[split]), labels[split], names)
        for split, rows in splits.items()
    }
