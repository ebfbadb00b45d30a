"""A commit to a repo: all or nothing."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from timm_lt.checkpoint import (
    TEXT_LIMIT,
)
from timm_lt.models.repo import Repo
from timm_lt.utils.checks import UsageError
from timm_lt.utils.files import read_text
from timm_lt.utils.hub_errors import hub_errors


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
