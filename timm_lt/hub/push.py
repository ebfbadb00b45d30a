"""Pushing to the Hugging Face Hub: a checkpoint folder, or one more head of a repo."""

import fnmatch
import json
from collections.abc import Iterable, Mapping
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
from timm_lt.hub.card import folder_card, is_edited, render_card, stated_license, update_card
from timm_lt.metrics import ShotReport
from timm_lt.models.create import create_model
from timm_lt.models.repo import Repo
from timm_lt.report.plots import PLOT_FILES
from timm_lt.utils.checks import UsageError
from timm_lt.utils.files import file_sha256, read_json, read_text, read_yaml
from timm_lt.utils.hub import HF_HUB, LOGIN, hub_errors

PNG = b"\x89PNG\r\n\x1a\n"
PLOT_PATHS = tuple(f"{PLOTS}/{name}" for name in PLOT_FILES)


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

    Only the changed safetensors, JSON, YAML, Markdown and PNG files of the checkpoint are uploaded.
    The recipe becomes public unaltered, with its paths. A push that fails leaves the repo
    unchanged, and a new one empty. A card that somebody edited, in the folder or else on the Hub,
    keeps its text; then only its metadata is updated.

    Args:
        folder: A decoupled checkpoint, such as the folder of a run.
        repo_id: ``namespace/name``; created if missing.
        private: Whether a new repo is private; None is the namespace's default. An existing repo
            must agree.
        revision: Branch to push to, created if missing; None is the main branch.
        license: Licence of the weights for the model card, by its identifier on the Hub, such as
            ``"apache-2.0"``; None keeps the licence that the card states.
        overwrite: Remove heads of the repo that the folder does not have.
        commit_message: Title of the commit.
        token: A token of the Hub; None is the one that is logged in or set.

    Raises:
        UsageError: If the folder is incomplete, the repo has heads that the folder lacks or a
            ``.gitignore``, or the Hub refuses or cannot be reached.
    """
    folder = Path(folder)
    api = _client(repo_id, token)
    info = read_checkpoint(folder)
    files: dict[str, Path | bytes] = dict(_checkpoint_files(folder, info))
    # Errors in the folder come before anything is created on the Hub.
    _merged_card(folder, repo_id, None, license)
    with hub_errors(repo_id, revision):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    branch = _Branch(api, Repo(repo_id, revision, token=token))
    _check_private(repo_id, private, now=branch.private)
    lost = [] if overwrite else [name for name in branch.head_names() if name not in info.heads]
    if lost:
        raise UsageError(
            f"{repo_id} has heads that the folder lacks ({', '.join(lost)}); remove them with "
            "overwrite=True, or --overwrite of timm-lt push"
        )
    files[CARD] = _merged_card(folder, repo_id, branch.read(CARD), license).encode()
    optional = [METRICS, RECIPE, *PLOT_PATHS, *fnmatch.filter(branch.files, "heads/*.safetensors")]
    stale = [path for path in branch.files if path in optional and path not in files]
    message = commit_message or f"Push {repo_id.rpartition('/')[2]} with timm_lt"
    return branch.commit(files, stale, message)


def check_push(repo_id: str, *, private: bool | None = None) -> None:
    """Checks, without pushing, that :func:`push_to_hub` may write to the repo."""
    api = _client(repo_id, None)
    with hub_errors(repo_id):
        # The client checks the name before it asks the Hub.
        exists = api.repo_exists(repo_id)
        user = api.whoami()
        now = api.model_info(repo_id).private if exists else private
    namespaces = [user.get("name"), *(org.get("name") for org in user.get("orgs", []))]
    may_only_read = user.get("auth", {}).get("accessToken", {}).get("role") == "read"
    if may_only_read or repo_id.partition("/")[0] not in namespaces:
        scope = "may only read" if may_only_read else f"is for {', '.join(map(str, namespaces))}"
        raise UsageError(f"{repo_id}: the token {scope}; {LOGIN} with one that may write there")
    _check_private(repo_id, private, now=now)


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

    The backbone is only read, to check that the head belongs to it.

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
        token: A token of the Hub; None is the one that is logged in or set.

    Raises:
        UsageError: If the head does not belong to the repo's backbone, the name is taken, the
            metrics have other shot groups than the repo's, the repo changed meanwhile, or the Hub
            refuses. The repo stays unchanged.
    """
    repo = Repo.parse(repo_id, cache_dir=cache_dir, token=token)
    branch = _Branch(_client(repo.repo_id, token), repo)
    folder = branch.repo.download()
    info = read_checkpoint(folder)
    if name in info.heads and not overwrite:
        raise UsageError(
            f"{repo.repo_id} has a head {name!r} already; replace it with overwrite=True"
        )
    if isinstance(metrics, ShotReport):
        if info.shot_rule not in (None, metrics.rule):
            raise UsageError(
                f"metrics have the shot rule {metrics.rule!r}, the repo's heads {info.shot_rule!r}"
            )
        metrics = metrics.summary()
    model = create_model(f"{HF_HUB}{branch.repo}", cache_dir=cache_dir, token=token)
    entry, content = head_entry(
        name, head, model, class_counts=info.class_counts, metrics=metrics, dtype=dtype
    )
    config = read_json(folder / CONFIG)
    config[BLOCK]["heads"][name] = entry
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    old_card = branch.read(CARD)
    card = render_card(
        parse_text(folder, text),
        name=repo.repo_id.rpartition("/")[2],
        repo_id=repo.repo_id,
        plots=[path.removeprefix(f"{PLOTS}/") for path in branch.files],
        recipe=branch.read(RECIPE),
        license=stated_license(old_card),
    )
    card = update_card(old_card, card)
    files: dict[str, Path | bytes] = {CONFIG: text.encode(), CARD: card.encode()}
    replaced = info.heads[name].file if name in info.heads else None
    removed = [replaced] if replaced is not None and content is None else []
    if content is not None:
        files[entry["file"]] = content
    return branch.commit(files, removed, commit_message or f"Add head {name}")


class _Branch:
    """A branch of a repo at its newest commit."""

    def __init__(self, api: HfApi, repo: Repo) -> None:
        self._api, self._revision = api, repo.revision
        with hub_errors(repo.repo_id, repo.revision):
            info = api.model_info(repo.repo_id, revision=repo.revision)
        self.repo = Repo(repo.repo_id, info.sha, repo.cache_dir, repo.token)
        self.files = [sibling.rfilename for sibling in info.siblings or []]
        self.private = info.private
        if ".gitignore" in self.files:
            # The client would silently skip the files that it names.
            raise UsageError(
                f"{repo.repo_id} has a .gitignore, which may keep files out; delete it there"
            )

    def read(self, path: str) -> str | None:
        """Returns a text file; None if it does not exist."""
        return read_text(self.repo.fetch(path, limit=TEXT_LIMIT)) if path in self.files else None

    def head_names(self) -> list[str]:
        """Returns the heads; none if the repo has no checkpoint that this version can read."""
        config = self.read(CONFIG)
        try:
            return [] if config is None else list(parse_text(Path(), config).heads)
        except UsageError:
            return []

    def commit(
        self, additions: Mapping[str, Path | bytes], removed: Iterable[str], message: str
    ) -> Pushed:
        """Makes one commit if the branch has not moved; unchanged files are not uploaded."""
        operations: list[Any] = [
            *(CommitOperationAdd(path, content) for path, content in additions.items()),
            *map(CommitOperationDelete, removed),
        ]
        repo_id, before = self.repo.repo_id, self.repo.revision
        at: dict[str, Any] = {"revision": self._revision, "parent_commit": before}
        with hub_errors(repo_id, self._revision):
            done = self._api.create_commit(repo_id, operations, commit_message=message, **at)
        return Pushed(f"{self._api.endpoint}/{repo_id}", done.oid, changed=done.oid != before)


def _checkpoint_files(folder: Path, info: CheckpointInfo) -> dict[str, Path]:
    """Returns the files to push by their path in the repo, without the card, all checked."""
    read_shapes(folder, info)
    for name, read in ((METRICS, read_json), (RECIPE, read_yaml)):
        if (folder / name).is_file():
            read(folder / name)
    digests = {entry.file: entry.sha256 for entry in info.heads.values() if entry.file is not None}
    optional = [p for p in (METRICS, RECIPE, *PLOT_PATHS) if (folder / p).is_file()]
    files = {path: folder / path for path in (CONFIG, WEIGHTS, *digests, *optional)}
    for path, file in (*files.items(), (CARD, folder / CARD)):
        wrong = None
        if not _stays_inside(folder, file):
            wrong = "is a link to a file outside of the folder; copy the file, or delete the link"
        elif path in digests and (not file.is_file() or file_sha256(file) != digests[path]):
            wrong = "is missing or altered"
        elif path in PLOT_PATHS and not file.read_bytes().startswith(PNG):
            wrong = "is not a PNG file"
        if wrong:
            raise UsageError(f"{file} {wrong}")
    return files


def _stays_inside(folder: Path, path: Path) -> bool:
    """Returns False for a link to elsewhere; the Hub's cache has links to its blobs."""
    root, target = folder.resolve(), path.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    return target.is_relative_to(root) or target.is_relative_to(blobs)


def _client(repo_id: str, token: str | bool | None) -> HfApi:
    if repo_id.startswith(HF_HUB) or Repo.parse(repo_id).revision is not None:
        raise UsageError(f"{repo_id!r} must be NAMESPACE/NAME; a branch is given by revision")
    return HfApi(token=token, library_name="timm_lt")


def _check_private(repo_id: str, private: bool | None, *, now: bool | None) -> None:
    if private is not None and bool(now) != private:
        raise UsageError(
            f"{repo_id} exists and is {'private' if now else 'public'}; change that in its "
            "settings on the Hub"
        )


def _merged_card(folder: Path, repo_id: str, remote: str | None, license_id: str | None) -> str:
    """Returns the card for the repo. An edit in the folder comes before one on the Hub."""
    local = read_text(folder / CARD)
    license_id = license_id or stated_license(local) or stated_license(remote)
    name = repo_id.rpartition("/")[2]
    card = update_card(local, folder_card(folder, name=name, repo_id=repo_id, license=license_id))
    return card if local is not None and is_edited(local) else update_card(remote, card)
