"""Publishing one more head of a repo."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import nn

from timm_lt.checkpoint import (
    BLOCK,
    CARD,
    CONFIG,
    PLOTS,
    RECIPE,
    CheckpointInfo,
    check_text,
    head_entry,
    read_checkpoint,
)
from timm_lt.hub.card import render_card
from timm_lt.hub.card_update import update_card
from timm_lt.hub.commit import Pushed, check_nothing_is_ignored, commit, remote_text
from timm_lt.metrics import ShotReport
from timm_lt.models.create import create_model
from timm_lt.models.repo import Repo
from timm_lt.utils.checks import UsageError
from timm_lt.utils.files import read_json
from timm_lt.utils.hub_errors import HF_HUB, hub_errors


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
    additions[CARD] = _card_with_head(pinned, check_text(folder, text), there).encode()
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
