"""hub: any image-classification data set of the Hub, or local parquet and arrow files.

Which split of somebody's data set trains, which validates and which tests.

Tables of images, as the Hub or a folder has them, opened with the ``datasets`` library.
"""

import glob
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from timm_lt.data.columns import UNLABELLED, find_image_column, find_label_column, read_labels
from timm_lt.data.damaged import find_damaged, note_damaged
from timm_lt.data.decode import is_remote
from timm_lt.data.folder import visible_files
from timm_lt.data.images import label_names, label_tensor, relabelled
from timm_lt.data.list_files import note_unused
from timm_lt.data.sources import SPLIT_WORDS, Split, register_dataset
from timm_lt.data.splits import hold_out, image_keys, leave_out_small
from timm_lt.utils.checks import (
    Problems,
    UsageError,
    check_choice,
    check_number,
    shown_names,
    unknown_name,
)
from timm_lt.utils.hub import hub_errors, split_revision

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, Features
    from huggingface_hub import HfFileSystem


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


SAVED = ("state.json", "dataset_dict.json")
FORMATS = ("parquet", "arrow")
SHARD = re.compile(r"-\d+-of-\d+$")


@dataclass(frozen=True)
class StoredTables:
    """A data set that is known, though perhaps not yet downloaded.

    Attributes:
        name: What messages call it.
        splits: The names of its splits.
        features: Its columns with their types, where that is known beforehand.
        read: Returns splits, given their names.
    """

    name: str
    splits: list[str]
    features: "Features | None"
    read: "Callable[[list[str]], dict[str, Dataset]]"


def open_repo(
    repo_id: str, revision: str | None, config: str | None, cache_dir: str | Path | None
) -> StoredTables:
    """Opens a data set of the Hub; what is prepared in the cache is not downloaded again.

    Args:
        repo_id: ``namespace/name``.
        revision: A branch, tag or commit; None is the main branch.
        config: One of several configurations.
        cache_dir: Where the ``datasets`` library keeps what it prepares.

    Raises:
        UsageError: If there is no such data set, revision or configuration, it is gated, it is a
            script, the Hub cannot be reached and the cache lacks it.
    """
    from datasets import load_dataset_builder

    commit, unreachable = _commit(repo_id, revision)
    name = f"{repo_id}@{revision}" if revision else repo_id
    # Without hf://, a folder of that name here would be taken instead.
    path = f"hf://datasets/{repo_id}"
    with _errors(repo_id, revision, unreachable), _configs(name, path, config, commit or revision):
        builder = load_dataset_builder(
            path, config, revision=commit or revision, cache_dir=_text(cache_dir)
        )
    cached = type(builder).__module__.endswith("cache.cache")
    if cached and revision is not None and builder.hash not in (commit, revision):
        raise UsageError(
            f"the cache has {repo_id} as of commit {builder.hash}, and whether that is {revision} "
            f"cannot be known: {unreachable or 'the Hub did not answer'}"
        )

    def read(splits: list[str]) -> "dict[str, Dataset]":
        with _errors(repo_id, revision, unreachable):
            _check_same_classes(name, builder)
            builder.download_and_prepare()
            return {split: builder.as_dataset(split) for split in splits}

    return StoredTables(name, _split_names(builder), builder.info.features, read)


def open_local(root: Path, config: str | None, cache_dir: str | Path | None) -> StoredTables:
    """Opens local files.

    Args:
        root: A parquet or arrow file, a folder of them, or what ``save_to_disk`` wrote.
        config: One of several subfolders.
        cache_dir: Where the ``datasets`` library keeps what it prepares.

    Raises:
        UsageError: If there is nothing of the kind.
    """
    if not root.exists():
        raise UsageError(f"root {str(root)!r} is not there")
    if any((root / file).is_file() for file in SAVED):
        return _open_saved(root)
    splits = {"train": [root]} if root.is_file() else find_tables(root, config)
    kind = next(iter(splits.values()))[0].suffix[1:]
    if kind not in FORMATS:
        raise UsageError(f"root {str(root)!r} is no parquet or arrow file")

    def read(names: list[str]) -> "dict[str, Dataset]":
        return {name: _read_files(kind, splits[name], cache_dir) for name in names}

    first = next(iter(splits.values()))[0]
    features = _parquet_features(first) if kind == "parquet" else None
    return StoredTables(str(root), list(splits), features, read)


def find_tables(root: Path, config: str | None = None) -> dict[str, list[Path]]:
    """Finds the parquet files of a folder, or else its arrow files, by split.

    A file's split is the folder that is called like one, or its own name without the number of the
    shard. If no name is a split's, all files together are ``train``.

    Raises:
        UsageError: If there are none, or several subfolders have a data set of their own.
    """
    for kind in FORMATS:
        if files := visible_files(root, f"*.{kind}"):
            break
    else:
        shown = shown_names(sorted(path.name for path in root.iterdir())) or "nothing"
        raise UsageError(
            f"root {str(root)!r} has no parquet and no arrow file, but {shown}; a folder of images "
            "is data set 'folder'"
        )
    configs: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        folders = file.relative_to(root).parts[:-1]
        within = [part for part in folders if part.lower() in SPLIT_WORDS]
        others = [part for part in folders if part not in within and part != "data"]
        split = within[-1] if within else SHARD.sub("", file.stem)
        configs["/".join(others)][split].append(file)
    if config is None and len(configs) > 1:
        raise UsageError(
            f"root {str(root)!r} has several configs: {', '.join(configs)}; say which with config="
        )
    if config is not None and config not in configs:
        raise unknown_name(f"config of {str(root)!r}:", config, list(configs))
    splits = configs[config] if config is not None else next(iter(configs.values()))
    if not any(split.lower() in SPLIT_WORDS for split in splits):
        return {"train": [file for parts in splits.values() for file in parts]}
    return dict(splits)


def _open_saved(root: Path) -> StoredTables:
    from datasets import Dataset, load_from_disk

    try:
        saved: Any = load_from_disk(str(root))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(
            f"root {str(root)!r} cannot be read as what save_to_disk wrote: {_line(error)}"
        ) from error
    splits = {"train": saved} if isinstance(saved, Dataset) else dict(saved)
    return StoredTables(
        str(root),
        list(splits),
        next(iter(splits.values())).features,
        lambda names: {name: splits[name] for name in names},
    )


def _read_files(kind: str, files: list[Path], cache_dir: str | Path | None) -> "Dataset":
    """Reads files of one split, each of which must have the same classes."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    if kind == "parquet":
        _check_class_names({str(file): _parquet_features(file) for file in files})
    # What is a pattern to the library is a name here.
    patterns = {"train": [glob.escape(str(file.absolute())) for file in files]}
    try:
        builder = load_dataset_builder(kind, data_files=patterns, cache_dir=_text(cache_dir))
        builder.download_and_prepare()
        return builder.as_dataset("train")
    except (DatasetsError, OSError, ValueError) as error:
        raise UsageError(
            f"{files[0]}{' and others' if len(files) > 1 else ''} cannot be read: {_root(error)}"
        ) from error


def _parquet_features(file: Path | str, filesystem: "HfFileSystem | None" = None) -> "Features":
    import pyarrow.parquet as pq
    from datasets import Features

    try:
        return Features.from_arrow_schema(pq.read_schema(file, filesystem=filesystem))
    except pa.ArrowInvalid as error:
        raise UsageError(f"{file} is damaged, or no parquet file: {_line(error)}") from error


def _check_class_names(tables: "dict[str, Features]") -> None:
    """Checks class names file by file: the library gives all files those of the first."""
    from datasets import ClassLabel

    known: dict[str, tuple[str, list[str]]] = {}
    for file, features in tables.items():
        for column, feature in features.items():
            if not isinstance(feature, ClassLabel):
                continue
            first, names = known.setdefault(column, (file, feature.names))
            if feature.names != names:
                raise UsageError(
                    f"{file} lists the classes of column {column!r} otherwise than {first}, and "
                    "the labels count on one list: write both with the same ClassLabel"
                )


def _check_same_classes(name: str, builder: "DatasetBuilder") -> None:
    """Checks the class names of the first parquet file of each split, before all are downloaded."""
    from huggingface_hub import HfFileSystem

    files = dict(builder.config.data_files or {})
    firsts = [str(paths[0]) for paths in files.values() if len(paths)]
    if Path(builder.cache_dir).is_dir() or not all(f.endswith(".parquet") for f in firsts):
        return
    if len(firsts) > 1:
        system = HfFileSystem()
        _check_class_names({file: _parquet_features(file, system) for file in firsts})


def _commit(repo_id: str, revision: str | None) -> tuple[str | None, UsageError | None]:
    """Returns the commit that is meant; or, if the Hub cannot be reached, what is the matter."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    options: Any = {"repo_type": "dataset", "revision": revision}
    api = HfApi(library_name="timm_lt")
    try:
        with hub_errors(repo_id, revision, repo_type="dataset"):
            try:
                card = api.hf_hub_download(repo_id, "README.md", **options)
                return Path(card).parent.name, None
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                return api.dataset_info(repo_id, revision=revision).sha, None
    except UsageError as error:
        if not isinstance(error.__cause__, LocalEntryNotFoundError):
            raise
        return None, error


@contextmanager
def _configs(name: str, path: str, config: str | None, revision: str | None) -> Iterator[None]:
    """Explains a configuration that is wrong or missing."""
    from datasets import get_dataset_config_names

    try:
        yield
    except ValueError as error:
        if "config" not in str(error).lower():
            raise
        names = get_dataset_config_names(path, revision=revision)
        if config is not None and config not in names:
            raise unknown_name(f"config of {name}:", config, names) from error
        raise UsageError(
            f"{name} has several configs: {', '.join(names)}; say which with config="
        ) from error


@contextmanager
def _errors(repo_id: str, revision: str | None, unreachable: UsageError | None) -> Iterator[None]:
    """Turns what the library raises into a UsageError that says what to do."""
    from datasets.exceptions import DatasetsError

    with hub_errors(repo_id, revision, repo_type="dataset"):
        try:
            yield
        except ConnectionError as error:
            raise (unreachable or UsageError(f"{repo_id}: {_line(error)}")) from error
        except (DatasetsError, FileNotFoundError) as error:
            if unreachable is not None:
                raise unreachable from error
            raise UsageError(f"{repo_id} cannot be read: {_root(error)}") from error
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            raise UsageError(
                f"{repo_id} is a loading script, and code of a repo is never run: take the "
                f"Hub's own conversion, {repo_id}@refs/convert/parquet, if it has one"
            ) from error


def _split_names(builder: "DatasetBuilder") -> list[str]:
    return [str(split) for split in builder.info.splits or builder.config.data_files or {}]


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def _root(error: BaseException) -> str:
    """Returns what was the matter first, of errors that were raised from one another."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _line(error)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


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
    :func:`~timm_lt.data.columns.find_image_column` and
    :func:`~timm_lt.data.columns.find_label_column`. No code of a repo is ever run.

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
