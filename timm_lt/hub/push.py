"""Pushing a checkpoint folder."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import HfApi

from timm_lt.checkpoint import (
    CARD,
    CONFIG,
    METRICS,
    PLOTS,
    RECIPE,
    TEXT_LIMIT,
    CheckpointInfo,
    read_checkpoint,
)
from timm_lt.hub.card_update import folder_card, merge_cards, stated_license
from timm_lt.hub.commit import Pushed, check_nothing_is_ignored, commit, remote_text
from timm_lt.hub.files import checkpoint_files
from timm_lt.models.repo import Repo
from timm_lt.report.plots import PLOT_FILES
from timm_lt.utils.checks import UsageError
from timm_lt.utils.files import read_text
from timm_lt.utils.hub_errors import HF_HUB, LOGIN, hub_errors


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> Pushed:
    """Pushes a checkpoint folder to a model repo of the Hub in one commit.

    The repo is made if it is missing. Only safetensors, JSON, YAML, Markdown and PNG files of the
    checkpoint are pushed, and of these only what has changed; what stands in the recipe, paths
    included, can be read there. Until the commit is there, a repo stays as it was, a new one empty.
    The model card gets the repo's name in its examples; where a person has written into it, only
    the generated parts change, and where that was done here and on the Hub, the card here counts.

    Args:
        folder: A decoupled checkpoint, such as the folder of a run.
        repo_id: ``namespace/name``.
        private: Whether a new repo is private; None is the namespace's default. An existing repo
            must be what is asked for.
        revision: Branch to push to, made if it is missing; None is the main branch.
        license: Licence of the weights for the model card, by its identifier on the Hub, such as
            ``"apache-2.0"``.
        overwrite: Remove heads of the repo that the folder does not have.
        commit_message: Title of the commit.
        token: As everywhere on the Hub: None takes the one that is logged in or set.

    Raises:
        UsageError: If the folder is not whole, the repo has heads that the folder lacks or a
            ``.gitignore``, or the Hub refuses or cannot be reached; the repo is as it was then.
    """
    folder = Path(folder)
    _check_name(repo_id)
    info = read_checkpoint(folder)
    files = checkpoint_files(folder, info)
    # All that lies here is looked at before anything is made there.
    _card_to_push(folder, repo_id, None, license)
    api = HfApi(token=token, library_name="timm_lt")
    with hub_errors(repo_id, revision):
        before, there = _open_repo(api, repo_id, private=private, revision=revision)
    repo = Repo(repo_id, before, token=token)
    if not overwrite:
        _check_no_head_is_lost(repo, there, info)
    card = _card_to_push(folder, repo_id, remote_text(repo, CARD, there), license)
    additions: dict[str, Path | bytes] = {CARD: card.encode(), **files}
    message = commit_message or f"Push {repo_id.rpartition('/')[2]} with timm_lt"
    gone = _stale(there, files)
    return commit(api, repo_id, revision, additions, gone, before=before, message=message)


def check_push(
    repo_id: str, *, private: bool | None = None, token: str | bool | None = None
) -> None:
    """Checks, without pushing, that :func:`push_to_hub` may write the repo.

    Args:
        repo_id: ``namespace/name``.
        private: As for the push.
        token: As everywhere on the Hub.

    Raises:
        UsageError: If it may not, or the Hub cannot be reached.
    """
    _check_name(repo_id)
    api = HfApi(token=token, library_name="timm_lt")
    with hub_errors(repo_id):
        # The client checks the name, before the Hub is asked.
        there = api.repo_exists(repo_id)
        user = api.whoami()
        now = api.model_info(repo_id).private if there else private
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UsageError(f"the token may only read: {LOGIN} with one that may write")
    spaces = [user.get("name"), *(org.get("name") for org in user.get("orgs", []))]
    if repo_id.partition("/")[0] not in spaces:
        raise UsageError(f"{repo_id}: the token is for {', '.join(map(str, spaces))}")
    _check_private(repo_id, private, now=now)


def _check_name(repo_id: str) -> None:
    if repo_id.startswith(HF_HUB) or Repo.parse(repo_id).revision is not None:
        raise UsageError(f"{repo_id!r} must be NAMESPACE/NAME; a branch is given by revision")


def _check_private(repo_id: str, private: bool | None, *, now: bool | None) -> None:
    if private is not None and bool(now) != private:
        raise UsageError(
            f"{repo_id} exists and is {'private' if now else 'public'}; change that in its "
            "settings on the Hub"
        )


def _open_repo(
    api: HfApi, repo_id: str, *, private: bool | None, revision: str | None
) -> tuple[str, list[str]]:
    """Makes the repo and the branch if they are missing; returns its commit and its files."""
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    info = api.model_info(repo_id, revision=revision)
    _check_private(repo_id, private, now=info.private)
    there = [sibling.rfilename for sibling in info.siblings or []]
    check_nothing_is_ignored(repo_id, there)
    assert info.sha is not None
    return info.sha, there


def _check_no_head_is_lost(repo: Repo, there: Iterable[str], info: CheckpointInfo) -> None:
    """Refuses a push that would take heads away that somebody has added to the repo."""
    if CONFIG not in there:
        return
    config = repo.fetch(CONFIG, limit=TEXT_LIMIT)
    try:
        lost = [name for name in read_checkpoint(config.parent).heads if name not in info.heads]
    except UsageError:
        # No decoupled checkpoint, or none that this version reads.
        return
    if lost:
        raise UsageError(
            f"{repo.repo_id} has heads that the folder lacks ({', '.join(lost)}); remove them with "
            "overwrite=True, or --overwrite of timm-lt push"
        )


def _stale(there: Iterable[str], files: Mapping[str, Path]) -> list[str]:
    """Returns the files of a checkpoint that the repo has and the folder has not."""
    ours = {METRICS, RECIPE, *(f"{PLOTS}/{name}" for name in PLOT_FILES)}
    return [
        path
        for path in there
        if path not in files
        and (path in ours or (path.startswith("heads/") and path.endswith(".safetensors")))
    ]


def _card_to_push(folder: Path, repo_id: str, old: str | None, license_id: str | None) -> str:
    """Renders the card for the repo, into what a person has written here or there."""
    name = repo_id.rpartition("/")[2]
    fresh = folder_card(folder, name=name, repo_id=repo_id, license=license_id)
    card = merge_cards(read_text(folder / CARD), old, fresh)
    if license_id is not None and stated_license(card) != license_id:
        raise UsageError(
            f"the model card ({CARD}) is somebody's own: state the licence {license_id!r} in it"
        )
    return card
