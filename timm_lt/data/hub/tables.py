"""Tables of images, as the Hub or a folder has them, opened with the ``datasets`` library."""

import glob
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from timm_lt.data.folder.files import visible_files
from timm_lt.data.sources import SPLIT_WORDS
from timm_lt.utils.checks import UsageError, shown_names, unknown_name
from timm_lt.utils.hub_errors import hub_errors

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, Features
    from huggingface_hub import HfFileSystem

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
