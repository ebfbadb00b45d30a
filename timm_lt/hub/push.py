"""Pushing a checkpoint folder.

A commit to a repo: all or nothing.

What of a checkpoint folder is pushed.

Publishing one more head of a repo.
"""

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


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        url: The repo's page.
        commit: The commit that now has the checkpoint.
        changed: Whether that commit is new; otherwise the repo had it all.
    """

    url: str
    commit: str
    changed: bool


def commit(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    additions: Mapping[str, Path | bytes],
    removed: Iterable[str],
    *,
    before: str,
    message: str,
) -> Pushed:
    """Commits all at once; what the repo has already is not uploaded.

    Args:
        api: The client, with the token.
        repo_id: ``namespace/name``.
        revision: The branch; None is the main one.
        additions: What is written, by path in the repo.
        removed: Paths that go.
        before: The commit that the branch must still be at.
        message: Title of the commit.

    Raises:
        UsageError: If the Hub refuses, cannot be reached, or the branch moved on.
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


def check_nothing_is_ignored(repo_id: str, there: Iterable[str]) -> None:
    """Raises UsageError for a repo whose ``.gitignore`` may keep files out of a commit."""
    if ".gitignore" in there:
        # The client would leave out what it names, and say nothing.
        raise UsageError(f"{repo_id} has a .gitignore, which may keep files out; delete it there")


def remote_text(repo: Repo, path: str, there: Iterable[str]) -> str | None:
    """Returns a text of a repo, None if it is not among the files that are there."""
    if path not in there:
        return None
    return read_text(repo.fetch(path, limit=TEXT_LIMIT))


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
    read_shapes(folder, info)
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

    The backbone is read, to check that the head belongs to it, and not pushed.

    Args:
        repo_id: ``namespace/name``, or ``namespace/name@branch``.
        name: Name that the head gets.
        head: A fitted head, or a mapping of paths to heads for a model with several classifiers, as
            in :func:`timm_lt.save_checkpoint`.
        metrics: Its figures on the test split.
        overwrite: Replace a head of that name.
        dtype: Type in which its tensors are stored.
        commit_message: Title of the commit.
        cache_dir: Where downloads are kept; None is the cache of the Hub's libraries.
        token: As everywhere on the Hub: None takes the one that is logged in or set.

    Raises:
        UsageError: If the head does not belong to the repo's backbone, the name is taken, the
            metrics have other shot groups than the repo's, or the Hub refuses; the repo is as it
            was then, also if it changed meanwhile.
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
    api = HfApi(token=token, library_name="timm_lt")
    with hub_errors(repo.repo_id, repo.revision):
        there = api.list_repo_files(repo.repo_id, revision=folder.name)
    check_nothing_is_ignored(repo.repo_id, there)
    if content is not None:
        additions[entry["file"]] = content
    additions[CARD] = _card_with_head(pinned, parse_text(folder, text), there).encode()
    old = info.heads[name].file if name in info.heads else None
    removed = [old] if old is not None and content is None else []
    message = commit_message or f"Add head {name}"
    return commit(
        api, repo.repo_id, repo.revision, additions, removed, before=folder.name, message=message
    )


def _card_with_head(repo: Repo, info: CheckpointInfo, there: list[str]) -> str:
    """Renders the card of a repo with a new config, into the card that it has."""
    plots = [path.removeprefix(f"{PLOTS}/") for path in there if path.startswith(f"{PLOTS}/")]
    fresh = render_card(
        info,
        name=repo.repo_id.rpartition("/")[2],
        repo_id=repo.repo_id,
        plots=plots,
        recipe=remote_text(repo, RECIPE, there),
    )
    old = remote_text(repo, CARD, there)
    return fresh if old is None else update_card(old, fresh)


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
