"""The folder of a run: whose it is, whether it may be written, and what goes on in it."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from timm_lt.checkpoint import CARD, CONFIG, METRICS, PLOTS, RECIPE, WEIGHTS
from timm_lt.utils.checks import UsageError
from timm_lt.utils.files import read_json, write_atomic, write_json

STATE = "state"
LOGS = "logs"
PER_CLASS = "per_class.csv"
REPORT = "report.html"
# In the training state: which images it was trained on.
IMAGES = "images.json"
# Held by the process that runs in the folder, as long as it lives.
LOCK = ".lock"
# How the message begins that it is held by another.
OCCUPIED = "another process runs in"
# What a resumed run may have otherwise: as long as all images were read, it changed nothing.
MAY_DIFFER = {"data.unreadable", "data.verify"}
# And what comes after training, which may have stopped there, as long as nothing is made of it.
AFTER_TRAINING = ("features", "heads", "objective")
# Everything that a run writes; a folder with anything else in it is never deleted.
ENTRIES = {
    RECIPE,
    STATE,
    LOGS,
    CONFIG,
    WEIGHTS,
    "heads",
    METRICS,
    PER_CLASS,
    PLOTS,
    CARD,
    REPORT,
}
# What is left of it without the training state.
CHECKPOINT_ENTRIES = ENTRIES - {STATE, LOGS}


def check_run_folder(folder: Path, recipe: str, *, resume: bool, overwrite: bool) -> None:
    """Checks that a run may use a folder, without touching it.

    Args:
        folder: The folder; it need not exist.
        recipe: The run's resolved recipe, YAML.
        resume: The run goes on with what is there.
        overwrite: The run deletes what is there.

    Raises:
        UsageError: If the folder holds another run, or anything else than a run.
    """
    if resume and overwrite:
        raise UsageError("--resume goes on with a run and --overwrite deletes it: choose one")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; choose another --output")
    names = _entries(folder)
    if not names:
        return
    foreign = sorted(names - ENTRIES) or ([] if RECIPE in names else sorted(names))
    if foreign:
        shown = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
        raise UsageError(
            f"{folder} holds files that are not a run ({shown}); choose another --output"
        )
    if overwrite:
        return
    if not resume:
        raise UsageError(
            f"{folder} holds a run; go on with it with --resume, delete it with --overwrite, or "
            "choose another --output"
        )
    other = recipe_differences(folder, recipe)
    if other:
        raise UsageError(
            f"{folder} holds a run of another recipe ({'; '.join(other)}); use that recipe, "
            "--overwrite, or another --output"
        )


def recipe_differences(folder: Path, recipe: str) -> list[str]:
    """Returns where the recipe of a run in a folder differs, so that the run cannot go on.

    Args:
        folder: The folder, with a recipe in it.
        recipe: The resolved recipe with which the run is to go on, YAML.

    Raises:
        UsageError: If the recipe in the folder cannot be read.
    """
    finished = METRICS in _entries(folder)
    return [
        line
        for line in differences(_stored_recipe(folder / RECIPE), yaml.safe_load(recipe))
        if not _may_differ(line.split()[0], finished=finished)
    ]


def is_running(folder: Path) -> bool:
    """Returns whether a process runs in a folder."""
    if not (folder / LOCK).exists():
        return False
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    release_run_folder(lock)
    return False


def _may_differ(key: str, *, finished: bool) -> bool:
    """Returns whether a resumed run may have another value of a key of the recipe."""
    after = key.split(".")[0] in AFTER_TRAINING
    return key in MAY_DIFFER or (after and not finished)


def check_images(folder: Path, images: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks that a run that goes on has the images that it was started on.

    Else images that were held out before might be trained on.

    Args:
        folder: The folder; without a training state, nothing was trained.
        images: Number and digest by split, of :func:`~timm_lt.data.splits.split_digests`.

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
    """Makes the folder that :func:`check_run_folder` allowed and writes the recipe into it.

    A run that is to be deleted is renamed first, so a kill leaves no half of it in its place.

    Args:
        folder: The folder.
        recipe: The run's resolved recipe, YAML.
        overwrite: What is there is deleted.
        images: What :func:`check_images` compares when the run goes on.

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


def release_run_folder(lock: FileLock) -> None:
    """Lets another process run in a folder."""
    # While it is held: nobody waits for it, and whoever comes later makes a new one.
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def lock_folder(folder: Path) -> FileLock:
    """Makes a folder and locks it, until :func:`release_run_folder` or the end of this process.

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


@contextmanager
def new_folder(
    destination: Path, names: Set[str], *, overwrite: bool, source: Path | None = None
) -> Iterator[Path]:
    """Yields a folder to fill, which takes the destination's place when the block ends well.

    Args:
        destination: What is written. If it is there, it may hold nothing but what such a command
            writes: a checkpoint, or folders that each hold one.
        names: Files and folders that such a command writes.
        overwrite: The destination may be replaced.
        source: What is read meanwhile, which the destination must not be.

    Raises:
        UsageError: If the destination is there and may not be replaced, or cannot be written.
    """
    try:
        # Not a link to it, which would be replaced in its stead.
        target = destination.resolve()
        if source is not None and target.exists() and target == source.resolve():
            raise UsageError("source and destination are the same folder")
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
    if not destination.exists():
        return
    if not destination.is_dir():
        raise UsageError(f"{destination} is a file, not a folder")
    inside = list(destination.iterdir())
    if inside and not overwrite:
        raise UsageError(f"{destination} exists; replace it with --overwrite")
    foreign = sorted({path.name for path in inside} - names - {LOCK})
    whole = (destination / CONFIG).is_file() or all((path / CONFIG).is_file() for path in inside)
    if foreign or not whole:
        culprits = ", ".join(foreign[:3]) or f"no {CONFIG}"
        raise UsageError(f"{destination} holds more than a checkpoint, or none: {culprits}")


def _temporaries(folder: Path) -> list[Path]:
    """Returns files of atomic writes that a kill cut off."""
    patterns = [
        *(f".{name}.*" for name in ENTRIES),
        "heads/.*.safetensors.*",
        f"{STATE}/.{IMAGES}.*",
    ]
    return [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]


def _entries(folder: Path) -> set[str]:
    if not folder.is_dir():
        return set()
    temporaries = {path.name for path in _temporaries(folder)}
    return {path.name for path in folder.iterdir()} - temporaries - {LOCK}


def _stored_recipe(path: Path) -> object:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read, so the run cannot be resumed; start it again with "
            f"--overwrite: {error}"
        ) from error


def differences(there: object, here: object, prefix: str = "") -> list[str]:
    """Returns where two values of YAML differ, a line each with its key in front.

    >>> differences({"a": {"b": 1}}, {"a": {"b": 2}})
    ['a.b 1 there, 2 now']
    """
    if isinstance(there, dict) and isinstance(here, dict):
        keys = list(dict.fromkeys([*there, *here]))
        pairs = [(key, there.get(key), here.get(key)) for key in keys]
        return [
            line for key, old, new in pairs for line in differences(old, new, f"{prefix}{key}.")
        ]
    return [] if there == here else [f"{prefix[:-1]} {there!r} there, {here!r} now"]
