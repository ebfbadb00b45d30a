"""Pushing to the Hugging Face Hub: a checkpoint folder, or one more head of a repo."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from torch import nn

from timm_lt.checkpoint import (
    BLOCK,
    CARD,
    CONFIG,
    METRICS,
    PLOTS,
    RECIPE,
    TEXT_LIMIT,
    WEIGHTS,
    CheckpointInfo,
    head_entry,
    parse_text,
    read_checkpoint,
    read_shapes,
)
from timm_lt.hub.card import folder_card, merge_cards, render_card, stated_license, update_card
from timm_lt.metrics import ShotReport
from timm_lt.models.create import create_model
from timm_lt.models.repo import Repo
from timm_lt.report.plots import PLOT_FILES
from timm_lt.utils.checks import UsageError
from timm_lt.utils.files import file_sha256, read_json, read_text, read_yaml
from timm_lt.utils.hub import HF_HUB, LOGIN, hub_errors

PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Pushed:
    """Result of a push.

    Attributes:
        url: Page of the repo.
        commit: Commit that has the checkpoint.
        changed: Whether the push made that commit; False if the repo had everything already.
    """

    url: str
    commit: str
    changed: bool


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

    A missing repo is created. Only safetensors, JSON, YAML, Markdown and PNG files of the
    checkpoint are pushed, and of these only those that changed. The recipe becomes public as it
    is, with its paths. A push that fails leaves the repo unchanged, and a new one empty.

    The examples in the model card name the repo. A card that somebody edited, here or else on the
    Hub, keeps its text; then only its metadata is updated.

    Args:
        folder: A decoupled checkpoint, such as the folder of a run.
        repo_id: ``namespace/name``.
        private: Whether a new repo is private; None is the namespace's default. An existing repo
            must agree.
        revision: Branch to push to, created if missing; None is the main branch.
        license: Licence of the weights for the model card, by its identifier on the Hub, such as
            ``"apache-2.0"``; None keeps the licence that the card states.
        overwrite: Remove heads of the repo that the folder does not have.
        commit_message: Title of the commit.
        token: A token of the Hub; None takes the one that is logged in or set.

    Raises:
        UsageError: If the folder is not whole, the repo has heads that the folder lacks or a
            ``.gitignore``, or the Hub refuses or cannot be reached.
    """
    folder = Path(folder)
    api = _client(repo_id, token)
    info = read_checkpoint(folder)
    files = _checkpoint_files(folder, info)
    # Errors in the folder come before anything is created on the Hub.
    _card_to_push(folder, repo_id, None, license)
    with hub_errors(repo_id, revision):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before, there, now_private = _read_repo(api, repo_id, revision)
    _check_private(repo_id, private, now=now_private)
    repo = Repo(repo_id, before, token=token)
    lost = [] if overwrite else [name for name in _heads(repo, there) if name not in info.heads]
    if lost:
        raise UsageError(
            f"{repo_id} has heads that the folder lacks ({', '.join(lost)}); remove them with "
            "overwrite=True, or --overwrite of timm-lt push"
        )
    card = _card_to_push(folder, repo_id, _remote_text(repo, CARD, there), license)
    message = commit_message or f"Push {repo_id.rpartition('/')[2]} with timm_lt"
    additions: dict[str, Path | bytes] = {CARD: card.encode(), **files}
    stale = [path for path in there if _is_ours(path) and path not in files]
    return _commit(api, repo_id, revision, additions, stale, before=before, message=message)


def check_push(
    repo_id: str, *, private: bool | None = None, token: str | bool | None = None
) -> None:
    """Checks, without pushing, that :func:`push_to_hub` may write to the repo.

    Args:
        repo_id: ``namespace/name``.
        private: As for the push.
        token: As for the push.

    Raises:
        UsageError: If it may not, or the Hub cannot be reached.
    """
    api = _client(repo_id, token)
    with hub_errors(repo_id):
        # The client checks the name before it asks the Hub.
        there = api.repo_exists(repo_id)
        user = api.whoami()
        now = api.model_info(repo_id).private if there else private
    spaces = [user.get("name"), *(org.get("name") for org in user.get("orgs", []))]
    reader = user.get("auth", {}).get("accessToken", {}).get("role") == "read"
    if reader or repo_id.partition("/")[0] not in spaces:
        allows = "may only read" if reader else f"is for {', '.join(map(str, spaces))}"
        raise UsageError(f"{repo_id}: the token {allows}; {LOGIN} with one that may write there")
    _check_private(repo_id, private, now=now)


def _checkpoint_files(folder: Path, info: CheckpointInfo) -> dict[str, Path]:
    """Returns the files to push by their path in the repo, all but the card.

    A file that is missing, altered, not of its type, or a link to another place is refused.
    """
    read_shapes(folder, info)
    digests = {entry.file: entry.sha256 for entry in info.heads.values() if entry.file is not None}
    optional: dict[str, Callable[[Path], object]] = {METRICS: read_json, RECIPE: read_yaml}
    for path, read in optional.items():
        if (folder / path).is_file():
            read(folder / path)
    plots = [f"{PLOTS}/{name}" for name in PLOT_FILES]
    more = [path for path in (*optional, *plots) if (folder / path).is_file()]
    files = {path: folder / path for path in (CONFIG, WEIGHTS, *digests, *more)}
    for path, file in (*files.items(), (CARD, folder / CARD)):
        wrong = None
        if not _stays_inside(folder, file):
            wrong = "is a link to a file outside of the folder; copy the file, or delete the link"
        elif path in digests and (not file.is_file() or file_sha256(file) != digests[path]):
            wrong = "is missing or altered"
        elif path in plots and not _starts_with(file, PNG):
            wrong = "is not a PNG file"
        if wrong:
            raise UsageError(f"{file} {wrong}")
    return files


def _starts_with(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start


def _stays_inside(folder: Path, path: Path) -> bool:
    """Returns False for a link to another place, whose target would become public.

    The Hub's cache has links to its blobs.
    """
    root, target = folder.resolve(), path.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    return target.is_relative_to(root) or target.is_relative_to(blobs)


def _client(repo_id: str, token: str | bool | None) -> HfApi:
    """Returns the client of the Hub for a repo."""
    if repo_id.startswith(HF_HUB) or Repo.parse(repo_id).revision is not None:
        raise UsageError(f"{repo_id!r} must be NAMESPACE/NAME; a branch is given by revision")
    return HfApi(token=token, library_name="timm_lt")


def _read_repo(
    api: HfApi, repo_id: str, revision: str | None
) -> tuple[str, list[str], bool | None]:
    """Returns the commit and the files of a repo, and whether it is private."""
    info = api.model_info(repo_id, revision=revision)
    files = [sibling.rfilename for sibling in info.siblings or []]
    if ".gitignore" in files:
        # The client would silently skip the files that it names.
        raise UsageError(f"{repo_id} has a .gitignore, which may keep files out; delete it there")
    assert info.sha is not None
    return info.sha, files, info.private


def _check_private(repo_id: str, private: bool | None, *, now: bool | None) -> None:
    if private is not None and bool(now) != private:
        raise UsageError(
            f"{repo_id} exists and is {'private' if now else 'public'}; change that in its "
            "settings on the Hub"
        )


def _heads(repo: Repo, there: Iterable[str]) -> list[str]:
    """Returns the heads of a repo; none if it has no checkpoint that this version can read."""
    if CONFIG not in there:
        return []
    config = repo.fetch(CONFIG, limit=TEXT_LIMIT)
    try:
        return list(read_checkpoint(config.parent).heads)
    except UsageError:
        return []


def _is_ours(path: str) -> bool:
    """Returns whether a file of a repo is an optional one of a checkpoint."""
    return path in {METRICS, RECIPE, *(f"{PLOTS}/{name}" for name in PLOT_FILES)} or (
        path.startswith("heads/") and path.endswith(".safetensors")
    )


def _card_to_push(folder: Path, repo_id: str, remote: str | None, license_id: str | None) -> str:
    """Returns the card for the repo; see :func:`merge_cards`."""
    local = read_text(folder / CARD)
    license_id = license_id or stated_license(local) or stated_license(remote)
    name = repo_id.rpartition("/")[2]
    fresh = folder_card(folder, name=name, repo_id=repo_id, license=license_id)
    return merge_cards(local, remote, fresh)


def _remote_text(repo: Repo, path: str, there: Iterable[str]) -> str | None:
    """Returns a text file of a repo, None if it is not among the files that are there."""
    return read_text(repo.fetch(path, limit=TEXT_LIMIT)) if path in there else None


def _commit(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    additions: Mapping[str, Path | bytes],
    removed: Iterable[str],
    *,
    before: str,
    message: str,
) -> Pushed:
    """Makes one commit on a branch that is still at ``before``.

    Files that the repo has already are not uploaded.
    """
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path, content) for path, content in additions.items()
    ]
    operations += [CommitOperationDelete(path) for path in removed]
    with hub_errors(repo_id, revision):
        done = api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            revision=revision,
            parent_commit=before,
        )
    return Pushed(f"{api.endpoint}/{repo_id}", done.oid, changed=done.oid != before)


def add_head(
    repo_id: str,
    name: str,
    head: nn.Linear | Mapping[str, nn.Linear],
    *,
    metrics: ShotReport | Mapping[str, Any] | None = None,
    overwrite: bool = False,
    dtype: torch.dtype = torch.float32,
    commit_message: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> Pushed:
    """Publishes one more head of a repo: its file, its entry in the config and its row in the card.

    The backbone is only read, to check that the head belongs to it. A card that somebody edited
    keeps its text; then only its metadata is updated.

    Args:
        repo_id: ``namespace/name``, or ``namespace/name@branch``.
        name: Name of the head in the repo.
        head: A fitted head, or a mapping of paths to heads for a model with several classifiers, as
            in :func:`timm_lt.save_checkpoint`.
        metrics: Its figures on the test split.
        overwrite: Replace a head of that name.
        dtype: Type of the stored tensors.
        commit_message: Title of the commit.
        cache_dir: Folder for downloads; None is the cache of the Hub's libraries.
        token: A token of the Hub; None takes the one that is logged in or set.

    Raises:
        UsageError: If the head does not belong to the repo's backbone, the name is taken, the
            metrics have other shot groups than the repo's, the repo changed meanwhile, or the Hub
            refuses; the repo stays as it was.
    """
    repo = Repo.parse(repo_id, cache_dir=cache_dir, token=token)
    folder = repo.download()
    info = read_checkpoint(folder)
    if name in info.heads and not overwrite:
        raise UsageError(
            f"{repo.repo_id} has a head {name!r} already; replace it with overwrite=True"
        )
    pinned = Repo(repo.repo_id, folder.name, cache_dir, token)
    model = create_model(f"{HF_HUB}{pinned}", cache_dir=cache_dir, token=token)
    entry, content = head_entry(
        name,
        head,
        model,
        class_counts=info.class_counts,
        metrics=_summary(metrics, info),
        dtype=dtype,
    )
    config = read_json(folder / CONFIG)
    config[BLOCK]["heads"][name] = entry
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    additions = {CONFIG: text.encode()}
    api = _client(repo.repo_id, token)
    with hub_errors(repo.repo_id, repo.revision):
        before, there, _ = _read_repo(api, repo.repo_id, folder.name)
    if content is not None:
        additions[entry["file"]] = content
    additions[CARD] = _card_with_head(pinned, parse_text(folder, text), there).encode()
    old = info.heads[name].file if name in info.heads else None
    removed = [old] if old is not None and content is None else []
    message = commit_message or f"Add head {name}"
    return _commit(
        api, repo.repo_id, repo.revision, additions, removed, before=before, message=message
    )


def _card_with_head(repo: Repo, info: CheckpointInfo, there: list[str]) -> str:
    """Returns the card of a repo for its new config."""
    old = _remote_text(repo, CARD, there)
    fresh = render_card(
        info,
        name=repo.repo_id.rpartition("/")[2],
        repo_id=repo.repo_id,
        plots=[path.removeprefix(f"{PLOTS}/") for path in there if path.startswith(f"{PLOTS}/")],
        recipe=_remote_text(repo, RECIPE, there),
        license=stated_license(old),
    )
    return update_card(old, fresh)


def _summary(
    metrics: ShotReport | Mapping[str, Any] | None, info: CheckpointInfo
) -> Mapping[str, Any] | None:
    if not isinstance(metrics, ShotReport):
        return metrics
    if info.shot_rule is not None and metrics.rule != info.shot_rule:
        raise UsageError(
            f"metrics have the shot rule {metrics.rule!r}, the repo's heads {info.shot_rule!r}"
        )
    return metrics.summary()
