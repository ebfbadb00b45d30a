"""The checkpoint that commands take: a folder, a repo of the Hub, or a published name."""

from pathlib import Path

from timm_lt.checkpoint import BLOCK, CheckpointInfo, read_checkpoint, read_config
from timm_lt.cli.model_argument import HUB_PREFIX, REPO
from timm_lt.models.create import LOCAL_DIR
from timm_lt.models.published import PUBLISHED
from timm_lt.models.repo import Repo
from timm_lt.utils.checks import UsageError


def find_checkpoint(given: str) -> tuple[str, Path | None]:
    """Finds the checkpoint that a user named; of a repo, downloads the configuration.

    Args:
        given: ``local-dir:FOLDER`` or just the folder, ``hf-hub:NAMESPACE/NAME`` or just that,
            with ``@REVISION`` for a certain one, or a name of timm's registry.

    Returns:
        The name for :func:`timm_lt.create_model`, and the folder that has the configuration; None
        if the name is one of a registry whose weights are no checkpoint on this disk.

    Raises:
        UsageError: If the repo cannot be read.
    """
    name = given
    if not given.startswith((LOCAL_DIR, HUB_PREFIX)) and Path(given).is_dir():
        name = f"{LOCAL_DIR}{given}"
    elif REPO.fullmatch(given):
        name = f"{HUB_PREFIX}{given}"
    if name.startswith(LOCAL_DIR):
        return name, Path(name.removeprefix(LOCAL_DIR))
    if not name.startswith(HUB_PREFIX):
        return name, PUBLISHED[name].folder if name in PUBLISHED else None
    repo = Repo.parse(name)
    try:
        folder = repo.download(weights=False)
    except UsageError as error:
        if name == given:
            raise
        raise UsageError(
            f"there is no folder {given}, and as a repo of the Hub: {error}"
        ) from error
    # The branch may move on while one head is loaded after the other.
    return f"{HUB_PREFIX}{repo.repo_id}@{folder.name}", folder


def decoupled_info(folder: Path | None) -> CheckpointInfo | None:
    """Returns what a decoupled checkpoint says of itself; None for one of timm's own."""
    if folder is None or BLOCK not in read_config(folder):
        return None
    return read_checkpoint(folder)
