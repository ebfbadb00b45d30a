"""The folder of a run: whether it may be written, which process runs in it, and its files."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from timm_lt.checkpoint import CARD, CONFIG, METRICS, PLOTS, RECIPE, WEIGHTS
from timm_lt.run.recipe import Recipe
from timm_lt.utils.checks import Problems, UsageError, shown_names, user_errors
from timm_lt.utils.files import read_json, read_yaml, write_atomic, write_json

STATE = "state"
LOGS = "logs"
PER_CLASS = "per_class.csv"
REPORT = "report.html"
# In the training state: number and digest of the images that it was trained on.
IMAGES = "images.json"
LOCK = ".lock"
# Keys of the recipe that a resumed run may change: if all images were read, they had no effect.
MAY_DIFFER = {"data.unreadable", "data.verify"}
# Keys that only matter after training, which a run that has not finished may change.
AFTER_TRAINING = {"features", "heads", "objective"}
# All that a run writes; a folder with anything else in it is never deleted.
ENTRIES = {RECIPE, STATE, LOGS, CONFIG, WEIGHTS, "heads", METRICS, PER_CLASS, PLOTS, CARD, REPORT}
CHECKPOINT_ENTRIES = ENTRIES - {STATE, LOGS}


def check_run_folder(
    folder: Path | None, recipe: Recipe, *, resume: bool = False, overwrite: bool = False
) -> None:
    """Checks that a run may write its folder (None: nothing) and the cache of its features."""
    problems, root = Problems(), recipe.data.root if recipe.data.name == "folder" else None
    cache = None if recipe.features.cache_dir is None else Path(recipe.features.cache_dir)
    for name, path in {"--output": folder, "features.cache_dir": cache}.items():
        if path is not None and root is not None and _lies_in(path, Path(root).expanduser()):
            problems.add(
                f"{name} {path} lies in data.root {root}, where the next run would take it for a "
                "class; choose a folder elsewhere"
            )
    if folder is not None and (reason := _refusal(folder, recipe, resume, overwrite)):
        problems.add(f"{folder} {reason}choose another --output")
    if cache is not None and folder is not None and _lies_in(cache, folder):
        problems.add(f"features.cache_dir {cache} lies in the folder of the run; choose another")
    problems.check()
    if cache is not None:
        with user_errors(f"features.cache_dir {cache} cannot be written"):
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=cache):
                pass


def _refusal(folder: Path, recipe: Recipe, resume: bool, overwrite: bool) -> str | None:
    """Returns why a run may not use a folder; None if it may."""
    names = _entries(folder)
    foreign = sorted(names - ENTRIES if RECIPE in names else names)
    if folder.exists() and not folder.is_dir():
        return "is a file; "
    if foreign:
        return f"holds files that are not a run ({shown_names(foreign, 3)}); "
    if names and not overwrite and not resume:
        return "holds a run; continue it with --resume, delete it with --overwrite, or "
    if names and not overwrite:
        free = MAY_DIFFER if (folder / METRICS).exists() else MAY_DIFFER | AFTER_TRAINING
        if other := [*_differences(read_yaml(folder / RECIPE), asdict(recipe), free)]:
            return f"holds a run of another recipe ({'; '.join(other)}); use it, --overwrite, or "
    return None


def _lies_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _differences(
    there: Mapping[str, Any], here: Mapping[str, Any], free: set[str], prefix: str = ""
) -> Iterator[str]:
    """Yields the keys of two recipes that differ, except the free ones, with both values."""
    for name in {**there, **here}:
        key, old, new = f"{prefix}{name}", there.get(name), here.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping) and key not in free:
            yield from _differences(old, new, free, f"{key}.")
        elif old != new and key not in free:
            yield f"{key} {old!r} there, {new!r} now"


def check_images(folder: Path, images: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses to resume a run on other images, since some of them were held out before."""
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
    recipe: Recipe,
    *,
    overwrite: bool = False,
    images: Mapping[str, Mapping[str, Any]] | None = None,
) -> FileLock:
    """Locks a folder and writes the recipe into it, and ``images`` for :func:`check_images`."""
    with user_errors(f"{folder} cannot be written"):
        folder = folder.resolve()
        lock = lock_folder(folder)
        if overwrite and _entries(folder):
            # Renamed first, so that a kill leaves no half of the old run.
            doomed = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.deleted."))
            folder.rename(doomed / folder.name)
            shutil.rmtree(doomed)
            lock.release()
            lock = lock_folder(folder)
        for leftover in _temporaries(folder):
            leftover.unlink()
        write_atomic(folder / RECIPE, recipe.to_yaml())
        if images is not None:
            write_json(folder / STATE / IMAGES, dict(images))
    return lock


def lock_folder(folder: Path) -> FileLock:
    """Creates a folder and locks it until the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UsageError(
            f"another process runs in {folder}: wait for it, or choose another --output"
        ) from error
    return lock


def _temporaries(folder: Path) -> list[Path]:
    """Returns the files of atomic writes that a kill cut off."""
    patterns = [f".{name}.*" for name in ENTRIES]
    patterns += ["heads/.*.safetensors.*", f"{STATE}/.{IMAGES}.*"]
    return [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]


def _entries(folder: Path) -> set[str]:
    temporaries = {LOCK, *(path.name for path in _temporaries(folder))}
    return {path.name for path in folder.iterdir()} - temporaries if folder.is_dir() else set()
