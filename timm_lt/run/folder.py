"""The folder of a run: whether it may be written, who is writing it, and what is in it."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from timm_lt.checkpoint import CARD, CONFIG, METRICS, PLOTS, RECIPE, WEIGHTS
from timm_lt.run.recipe import Recipe
from timm_lt.utils.checks import Problems, UsageError, shown_names
from timm_lt.utils.files import read_json, read_yaml, write_atomic, write_json

STATE = "state"
LOGS = "logs"
PER_CLASS = "per_class.csv"
REPORT = "report.html"
# In the training state: number and digest of the images that it was trained on.
IMAGES = "images.json"
# Lock file of the process that runs in the folder.
LOCK = ".lock"
# Start of the message that another process has the lock.
OCCUPIED = "another process runs in"
# Keys of the recipe that a resumed run may change: if all images were read, they had no effect.
MAY_DIFFER = {"data.unreadable", "data.verify"}
# Keys that only matter after training, which a run that has not finished may change.
AFTER_TRAINING = ("features", "heads", "objective")
# All that a run writes; a folder with anything else in it is never deleted.
ENTRIES = {RECIPE, STATE, LOGS, CONFIG, WEIGHTS, "heads", METRICS, PER_CLASS, PLOTS, CARD, REPORT}
CHECKPOINT_ENTRIES = ENTRIES - {STATE, LOGS}


def check_run_folder(folder: Path, recipe: str, *, resume: bool, overwrite: bool) -> None:
    """Checks that a run may use a folder, without touching it.

    Args:
        folder: The folder; it need not exist.
        recipe: The run's resolved recipe, YAML.
        resume: The run goes on with what is there.
        overwrite: The run deletes what is there.

    Raises:
        UsageError: If the folder has another run in it, or anything else than a run.
    """
    if resume and overwrite:
        raise UsageError("--resume goes on with a run and --overwrite deletes it: choose one")
    reason = None
    names = _entries(folder)
    foreign = sorted(names - ENTRIES if RECIPE in names else names)
    if folder.exists() and not folder.is_dir():
        reason = "is a file; "
    elif foreign:
        reason = f"holds files that are not a run ({shown_names(foreign, 3)}); "
    elif names and not overwrite and not resume:
        reason = "holds a run; go on with it with --resume, delete it with --overwrite, or "
    elif names and not overwrite and (other := recipe_differences(folder, recipe)):
        reason = f"holds a run of another recipe ({'; '.join(other)}); use it, --overwrite, or "
    if reason is not None:
        raise UsageError(f"{folder} {reason}choose another --output")


def recipe_differences(folder: Path, recipe: str) -> list[str]:
    """Returns the differences between the recipe in a folder and that of a run to be resumed.

    Args:
        folder: The folder, with a recipe in it.
        recipe: The resolved recipe of the run, YAML.

    Raises:
        UsageError: If the recipe in the folder cannot be read.
    """
    finished = METRICS in _entries(folder)
    lines = differences(read_yaml(folder / RECIPE), yaml.safe_load(recipe))
    return [
        line
        for line in lines
        if line.split()[0] not in MAY_DIFFER
        and (finished or line.split()[0].split(".")[0] not in AFTER_TRAINING)
    ]


def differences(there: object, here: object, prefix: str = "") -> list[str]:
    """Returns the differences of two YAML values, a line each with its key in front.

    >>> differences({"a": {"b": 1}}, {"a": {"b": 2}})
    ['a.b 1 there, 2 now']
    """
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            line
            for key in dict.fromkeys([*there, *here])
            for line in differences(there.get(key), here.get(key), f"{prefix}{key}.")
        ]
    return [] if there == here else [f"{prefix[:-1]} {there!r} there, {here!r} now"]


def check_places(recipe: Recipe, folder: Path | None) -> None:
    """Checks that no run writes among images, and that the features' cache can be written.

    Args:
        recipe: The recipe.
        folder: Folder of the run; None writes nothing.

    Raises:
        UsageError: If not.
    """
    cache, problems = recipe.features.cache_dir, Problems()
    places = {"--output": folder, "features.cache_dir": None if cache is None else Path(cache)}
    for name, path in places.items():
        root = recipe.data.root if recipe.data.name == "folder" else None
        if path is not None and root is not None and _lies_in(path, Path(root).expanduser()):
            problems.add(
                f"{name} {path} lies in data.root {root}, where the next run would take it for a "
                "class; choose a folder elsewhere"
            )
    if cache is not None and folder is not None and _lies_in(Path(cache), folder):
        problems.add(f"features.cache_dir {cache} lies in the folder of the run; choose another")
    problems.check()
    if cache is None:
        return
    try:
        Path(cache).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise UsageError(f"features.cache_dir {cache} cannot be written: {error}") from error


def _lies_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def check_images(folder: Path, images: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks that a resumed run has the images that it was started on.

    With others, images that were held out before might be trained on.

    Args:
        folder: The folder; without a training state, nothing was trained.
        images: Number and digest by split, from :func:`~timm_lt.data.splits.split_digests`.

    Raises:
        UsageError: If a split has other images; names the splits.
    """
    if not (folder / STATE / IMAGES).is_file():
        return
    stored = read_json(folder / STATE / IMAGES)
    other = [
        f"{split}: {stored.get(split, {}).get('images', 0)} images there, {now['images']} now"
        for split, now in images.items()
        if stored.get(split) != now
    ]
    if other:
        raise UsageError(
            f"{folder} holds a run on other images or labels ({'; '.join(other)}); put the images "
            "back as they were, start again with --overwrite, or choose another --output"
        )


def prepare_run_folder(
    folder: Path,
    recipe: str,
    *,
    overwrite: bool,
    images: Mapping[str, Mapping[str, Any]] | None = None,
) -> FileLock:
    """Creates the folder that :func:`check_run_folder` allowed and writes the recipe into it.

    A run that is to be deleted is renamed first, so that a kill leaves no half of it.

    Args:
        folder: The folder.
        recipe: The run's resolved recipe, YAML.
        overwrite: Delete what is there.
        images: Number and digest by split, for :func:`check_images` when the run is resumed.

    Returns:
        The lock on the folder, for :func:`release_run_folder`; it ends with this process, too.

    Raises:
        UsageError: If the folder cannot be written, or another process runs in it.
    """
    try:
        folder = folder.resolve()
        lock = lock_folder(folder)
        if overwrite and _entries(folder):
            doomed = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.deleted."))
            folder.rename(doomed / folder.name)
            shutil.rmtree(doomed)
            lock.release()
            lock = lock_folder(folder)
        for leftover in _temporaries(folder):
            leftover.unlink()
        write_atomic(folder / RECIPE, recipe)
        if images is not None:
            write_json(folder / STATE / IMAGES, dict(images))
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error}") from error
    return lock


def lock_folder(folder: Path) -> FileLock:
    """Creates a folder and locks it, until :func:`release_run_folder` or the process ends.

    Raises:
        UsageError: If another process has locked it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UsageError(f"{OCCUPIED} {folder}: wait for it, or choose another --output") from error
    return lock


def release_run_folder(lock: FileLock) -> None:
    """Unlocks a folder."""
    # Delete the file while it is locked: nobody waits for it, and the next process makes a new one.
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def is_running(folder: Path) -> bool:
    """Returns whether a process runs in a folder."""
    if not (folder / LOCK).exists():
        return False
    try:
        release_run_folder(lock_folder(folder))
    except UsageError:
        return True
    return False


@contextmanager
def new_folder(
    destination: Path, names: Set[str], *, overwrite: bool, source: Path | None = None
) -> Iterator[Path]:
    """Yields a folder to fill, which becomes the destination when the block ends without error.

    Args:
        destination: Folder to write. If it exists, it may hold nothing but what such a command
            writes: a checkpoint, or folders that each hold one.
        names: Files and folders that such a command writes.
        overwrite: Replace the destination if it exists.
        source: Folder that is read meanwhile, which must be another.

    Raises:
        UsageError: If the destination exists and may not be replaced, or cannot be written.
    """
    try:
        # A symbolic link stays: the folder that it points to is replaced.
        target = destination.resolve()
        if source is not None and target.exists() and target == source.resolve():
            raise UsageError("source and destination are the same folder")
        if destination.exists():
            _check_replaceable(destination, names, overwrite=overwrite)
        parent = next(parent for parent in target.parents if parent.is_dir())
        with tempfile.TemporaryDirectory(dir=parent, prefix=".timm_lt.") as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            yield new
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target.rename(Path(scratch) / "old")
            new.rename(target)
    except OSError as error:
        raise UsageError(f"{destination} cannot be written: {error.strerror or error}") from error


def _check_replaceable(destination: Path, names: Set[str], *, overwrite: bool) -> None:
    inside = list(destination.iterdir())
    if inside and not overwrite:
        raise UsageError(f"{destination} exists; replace it with --overwrite")
    foreign = sorted({path.name for path in inside} - names - {LOCK})
    whole = (destination / CONFIG).is_file() or all((path / CONFIG).is_file() for path in inside)
    if foreign or not whole:
        culprits = shown_names(foreign, 3) or f"no {CONFIG}"
        raise UsageError(f"{destination} holds more than a checkpoint, or none: {culprits}")


def _temporaries(folder: Path) -> list[Path]:
    """Returns the files of atomic writes that a kill cut off."""
    patterns = [f".{name}.*" for name in ENTRIES]
    patterns += ["heads/.*.safetensors.*", f"{STATE}/.{IMAGES}.*"]
    return [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]


def _entries(folder: Path) -> set[str]:
    if not folder.is_dir():
        return set()
    temporaries = {path.name for path in _temporaries(folder)}
    return {path.name for path in folder.iterdir()} - temporaries - {LOCK}
