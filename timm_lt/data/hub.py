"""hub: any image-classification data set of the Hub, or local parquet and arrow files."""

import glob
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from timm_lt.data.decode import is_remote
from timm_lt.data.items import image_column, label_column, label_kind, type_name
from timm_lt.data.list_files import note_unused
from timm_lt.data.sources import SPLIT_WORDS, Split, label_feature, register_dataset
from timm_lt.data.splits import LabelArray, hold_out_split, leave_out_small
from timm_lt.utils.checks import Problems, UsageError, check_choice, shown_names
from timm_lt.utils.hub import hub_errors, split_revision

if TYPE_CHECKING:
    from datasets import Dataset

# Files of save_to_disk.
SAVED = ("state.json", "dataset_dict.json")
UNLABELLED = -1

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

    Splits are found by name, and columns by type and name. With a training split alone, a part of
    each class becomes the test split. No code of a repo is run.

    Args:
        repo: ``namespace/name`` or ``namespace/name@revision`` of a data set on the Hub.
        revision: Branch, tag or commit, if ``repo`` has none.
        config: One of several configurations; for local files, a subfolder.
        image: Column of images.
        label: Column of labels: a ``ClassLabel``, integers 0 to C - 1, or texts, which become the
            class names.
        train: Name of the training split.
        val: Name of the validation split; that of ``train`` holds out a part of it.
        test: Name of the test split; that of ``train`` holds out ``test_fraction`` of it.
        root: Local files in place of a repo: a parquet or arrow file, a folder of them with the
            names of the Hub (``train.parquet``, ``data/train-00000-of-00001.parquet``,
            ``train/0000.parquet``), or a folder written by ``save_to_disk``.
        test_fraction: Part of each class in (0, 1) for a missing test split.
        min_images: Classes with fewer training images are left out; None leaves out none.
        incomplete: ``"raise"`` or ``"drop"`` rows without a label or an image.
        cache_dir: Cache of the ``datasets`` library; None is its own.

    Returns:
        The splits, each with the columns ``image`` and ``label``.

    Raises:
        UsageError: If the data set cannot be read, a split or column is missing or ambiguous, rows
            have no label or image, or labels are not those of classes.
    """
    from datasets import Image

    check_choice("incomplete of data set 'hub':", incomplete, get_args(Incomplete))
    if (repo is None) == (root is None) or (revision and (root or "@" in str(repo))):
        raise UsageError(
            "data set 'hub' needs either repo, NAMESPACE/NAME on the Hub with at most one "
            "revision, or root, local parquet or arrow files"
        )
    if root is not None:
        tables = _read_local(Path(root).expanduser(), config, cache_dir)
    else:
        tables = _read_repo(str(repo), revision, config, cache_dir)
    chosen = choose_splits(list(tables), train=train, val=val, test=test)
    is_held_out = chosen["test"] == chosen["train"]
    if is_held_out:
        del chosen["test"]
    problems = Problems(str(repo or root))
    columns: dict[Split, Dataset] = {}
    for split, name in chosen.items():
        table = tables[name]
        with problems.collected(f"split {name!r}: "):
            image, label = image_column(table, image), label_column(table, label)
            columns[split] = table.with_format(None).select_columns([image, label])
    problems.check()
    unused = {*tables[chosen["train"]].column_names} - {image, label}
    note_unused(problems.owner, sorted(unused))
    with _readable(f"column {label!r}"):
        labels, class_names = _read_labels(columns, str(label))
        rows = {
            split: table.select_columns(image)
            .rename_columns({image: "image"})
            .cast_column("image", Image(mode="RGB"))
            for split, table in columns.items()
        }
    kept: dict[Split, LabelArray] = {}
    for split, name in chosen.items():
        with problems.collected(f"split {name!r} "):
            kept[split] = _complete(rows[split], labels[split], split, incomplete)
    problems.check()
    if min_images is not None:
        complete = {split: labels[split][kept[split]] for split in kept}
        large, numbers, class_names = leave_out_small(complete, class_names, min_images)
        for split in kept:
            kept[split] = kept[split][large[split]]
            labels[split] = np.full_like(labels[split], UNLABELLED)
            labels[split][kept[split]] = numbers[split]
    feature = label_feature(class_names)
    splits = {
        split: rows[split].add_column("label", labels[split], feature=feature).select(kept[split])
        for split in rows
    }
    return hold_out_split(splits, "test", test_fraction, root=root) if is_held_out else splits


def choose_splits(
    available: Sequence[str],
    *,
    train: str | None = None,
    val: str | None = None,
    test: str | None = None,
) -> dict[Split, str]:
    """Chooses the splits for training, validation and testing, by their names unless given.

    Without a test split, it is the validation split, else the training split, of which a part is
    then held out. ``"val"`` is missing where validation images are held out of train.
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
    chosen: dict[Split, str | None] = {"train": trained, "val": validated, "test": tested}
    if validated == trained:
        del chosen["val"]
    return {split: name for split, name in chosen.items() if name is not None}


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
    from huggingface_hub import try_to_load_from_cache

    repo_id, own_revision = split_revision(repo)
    revision = own_revision or revision
    with hub_errors(repo), _readable(repo):
        # Without hf://, a local folder of this name would be read instead.
        path = f"hf://datasets/{repo_id}"
        builder = load_dataset_builder(path, config, revision=revision, cache_dir=cache_dir)
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
        builder.download_and_prepare()
        return dict(builder.as_dataset())


def _read_local(
    root: Path, config: str | None, cache_dir: str | Path | None
) -> "dict[str, Dataset]":
    """Reads all splits of a parquet or arrow file, a folder of them, or of save_to_disk."""
    from datasets import Dataset, load_dataset, load_from_disk
    from datasets.data_files import DataFilesDict, get_data_patterns

    folder = root / (config or "")
    with _readable(folder):
        if any((folder / name).is_file() for name in SAVED):
            saved = load_from_disk(str(folder))
            return {"train": saved} if isinstance(saved, Dataset) else dict(saved)
        # The library takes paths for patterns.
        base = glob.escape(str(folder.absolute()))
        files = {}
        with suppress(FileNotFoundError):
            patterns = {"train": [base]} if folder.is_file() else get_data_patterns(base)
            files = DataFilesDict.from_patterns(patterns, base_path=base)
        for kind in ("parquet", "arrow"):
            tables = {}
            # One by one: splits may have their class names in another order.
            for split, paths in files.items():
                if found := [glob.escape(path) for path in paths if path.endswith(f".{kind}")]:
                    options = {"split": "train", "cache_dir": cache_dir}
                    tables[str(split)] = load_dataset(kind, data_files=found, **options)
            if tables:
                return tables
    raise UsageError(
        f"root {str(folder)!r} does not exist or has no parquet or arrow file; a folder of "
        "images is data set 'folder'"
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
        is_general = isinstance(error, DatasetGenerationError) and error.__cause__ is not None
        cause = error.__cause__ if is_general else error
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise UsageError(f"{name} cannot be read: {reason}") from error


def _read_labels(
    tables: "Mapping[Split, Dataset]", column: str
) -> tuple[dict[Split, LabelArray], list[str] | None]:
    """Reads the labels of all splits as integers, -1 where one is missing, and the class names.

    Splits whose ``ClassLabel`` has another order than train are renumbered.
    """
    expected = tables["train"].features[column]
    names: list[str] | None = getattr(expected, "names", None)
    values = {}
    for split, table in tables.items():
        feature, array = table.features[column], _arrow_column(table, column)
        own: list[str] | None = getattr(feature, "names", None)
        other = sorted({*(own or ())} - {*(names or ())})
        if other or label_kind(feature) != label_kind(expected):
            raise UsageError(
                f"the labels of split {split!r}, {shown_names(other) or type_name(feature)}, are "
                f"not among those of split 'train' ({type_name(expected)})"
            )
        if own is not None:
            numbers = pc.if_else(pc.less(array, 0), None, array)
            array = pa.chunked_array([pa.array(own, pa.string())]).take(numbers)
        values[split] = array
    if label_kind(expected) != "integers":
        texts = {text for array in values.values() for text in pc.unique(array).to_pylist()}
        names = names or sorted(text for text in texts if text and text.strip())
        known = pa.array(names, pa.string())
        for split, array in values.items():
            values[split] = pc.index_in(array.cast(pa.string()), value_set=known)
    labels = {
        split: np.array(array.cast(pa.int64()).fill_null(UNLABELLED))
        for split, array in values.items()
    }
    return labels, names


def _arrow_column(table: "Dataset", column: str) -> pa.ChunkedArray:
    return cast(pa.Table, table.select_columns(column).with_format("arrow")[:]).column(0)


def _complete(
    rows: "Dataset", labels: LabelArray, split: Split, incomplete: Incomplete
) -> LabelArray:
    """Returns the rows with an image and a label, or raises if others are an error."""
    unlabelled = np.flatnonzero(labels == UNLABELLED).tolist()
    if 0 < len(unlabelled) == len(labels):
        raise UsageError(
            f"has no labels, so it cannot be the {split} split; name another one with {split}=, or "
            "the training split to hold out a part of it"
        )
    without_image = _rows_without_image(rows)
    problems = Problems()
    for noun, found in (("a label", unlabelled), ("an image", without_image)):
        if found and incomplete == "raise":
            problems.add(
                f"has {len(found)} of {len(rows)} rows without {noun}: {shown_names(found)}; add "
                "what is missing, or leave out these rows with incomplete=drop"
            )
    problems.check()
    return np.setdiff1d(np.arange(len(rows)), unlabelled + without_image)


def _rows_without_image(rows: "Dataset") -> list[int]:
    """Finds the rows without an image, with an empty one, or with a file that does not exist."""
    images = _arrow_column(rows, "image")
    sizes = pc.binary_length(pc.struct_field(images, "bytes")).to_pylist()
    paths = pc.struct_field(images, "path").to_pylist()
    return [
        row
        for row, (size, path) in enumerate(zip(sizes, paths, strict=True))
        if not size and (size == 0 or path is None or not (is_remote(path) or Path(path).is_file()))
    ]
