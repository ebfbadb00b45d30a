"""What of a checkpoint folder is pushed."""

from collections.abc import Callable
from pathlib import Path

from timm_lt.checkpoint import (
    CARD,
    CONFIG,
    METRICS,
    PLOTS,
    RECIPE,
    WEIGHTS,
    CheckpointInfo,
    check_weights_file,
)
from timm_lt.report.plots import PLOT_FILES
from timm_lt.utils.checks import UsageError
from timm_lt.utils.files import file_sha256, read_json, read_yaml

PNG = b"\x89PNG\r\n\x1a\n"


def checkpoint_files(folder: Path, info: CheckpointInfo) -> dict[str, Path]:
    """Finds the files of a checkpoint but for its card, and checks that each is what it should be.

    Args:
        folder: The checkpoint's folder.
        info: What it says of itself.

    Returns:
        The files by their path in the repo; nothing else is ever pushed.

    Raises:
        UsageError: If a file is missing, altered, or not of its type.
    """
    check_weights_file(folder, info)
    files = {CONFIG: folder / CONFIG, WEIGHTS: folder / WEIGHTS}
    for name, entry in info.heads.items():
        if entry.file is None:
            continue
        files[entry.file] = folder / entry.file
        if not files[entry.file].is_file() or file_sha256(files[entry.file]) != entry.sha256:
            raise UsageError(f"the file of head {name!r} in {folder} is missing or altered")
    checks: dict[str, Callable[[Path], object]] = {METRICS: read_json, RECIPE: read_yaml}
    for path, check in checks.items():
        if (folder / path).is_file():
            check(folder / path)
            files[path] = folder / path
    for name in PLOT_FILES:
        plot = folder / PLOTS / name
        if not plot.is_file():
            continue
        with plot.open("rb") as file:
            if file.read(len(PNG)) != PNG:
                raise UsageError(f"{plot} is no PNG file")
        files[f"{PLOTS}/{plot.name}"] = plot
    for place in [*files.values(), folder / CARD]:
        _check_stays_inside(folder, place)
    return files


def _check_stays_inside(folder: Path, path: Path) -> None:
    """Refuses a link to elsewhere, but for those of the Hub's cache: its target would be public."""
    root, target = folder.resolve(), path.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not (target.is_relative_to(root) or target.is_relative_to(blobs)):
        raise UsageError(
            f"{path} is a link to a file outside of the folder; copy it in, or delete it"
        )
