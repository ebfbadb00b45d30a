"""Model repos of the Hugging Face Hub: what is read from them, and what went wrong.

A repo is untrusted. The config is read first and checked as a whole; then exactly the files that
are wanted are downloaded, all of one commit, into the cache that every Hub library shares.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from httpx2 import HTTPError
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from timm_lt.checkpoint import (
    BLOCK,
    CONFIG,
    TEXT_LIMIT,
    WEIGHTS,
    CheckpointInfo,
    HeadEntry,
    find_entry,
    read_checkpoint,
    read_config,
)
from timm_lt.files import file_sha256
from timm_lt.registry import UsageError

HF_HUB = "hf-hub:"
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Repo:
    """A model repo, and how it is read.

    Attributes:
        repo_id: ``namespace/name``.
        revision: Branch, tag or commit; None is the main branch.
        cache_dir: Where downloads are kept; None is the cache of the Hub's libraries.
        token: As everywhere on the Hub: None takes the one that is logged in or set.
    """

    repo_id: str
    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None

    @classmethod
    def parse(
        cls, name: str, *, cache_dir: str | Path | None = None, token: str | bool | None = None
    ) -> "Repo":
        """Parses ``namespace/name`` or ``namespace/name@revision``, with or without ``hf-hub:``.

        >>> Repo.parse("hf-hub:me/birds@v1").revision
        'v1'

        Raises:
            UsageError: If it is neither.
        """
        repo_id, at, revision = name.removeprefix(HF_HUB).partition("@")
        if "/" not in repo_id or (at and not revision) or ".." in revision:
            raise UsageError(
                f"{name!r} is no repo; write namespace/name or namespace/name@revision"
            )
        return cls(repo_id, revision or None, cache_dir, token)

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id

    def read_info(self) -> CheckpointInfo:
        """Downloads the config of a decoupled checkpoint and returns what it says.

        Raises:
            UsageError: If it cannot be had, or is no decoupled checkpoint's.
        """
        return read_checkpoint(self._download_config())

    def download(self, *, weights: bool = True, head: str | None = None) -> Path:
        """Downloads a checkpoint: the config, and what is asked for beside it.

        What is in the cache is not downloaded again. A file that is not the one that the config
        describes is downloaded once more, and leaves the cache if that does not help.

        Args:
            weights: Download the backbone with the joint classifier.
            head: A head whose file is downloaded, if it has one. Of a plain timm repo it has none.

        Returns:
            The folder of the commit in the cache; all files are of that commit.

        Raises:
            UsageError: If there is no such head, or a file cannot be had or is not the one that the
                config describes.
        """
        folder = self._download_config()
        info = read_checkpoint(folder) if BLOCK in read_config(folder) else None
        # The branch may move on between two files.
        commit = Repo(self.repo_id, folder.name, self.cache_dir, self.token)
        entry = find_entry(info, head, str(self)) if info and head is not None else None
        if weights:
            commit._download_checked(WEIGHTS, info.weights_sha256 if info else None)
        if entry is not None and entry.file is not None:
            commit._download_checked(entry.file, entry.sha256)
        return folder

    def fetch(self, file: str, *, limit: int | None = None, force: bool = False) -> Path:
        """Downloads a file into the cache, or finds it there.

        Args:
            file: Path in the repo.
            limit: Most bytes that it may have; checked before it is downloaded.
            force: Download it although it is in the cache.

        Raises:
            UsageError: If it cannot be had.
        """
        options: dict[str, Any] = {
            "revision": self.revision,
            "cache_dir": self.cache_dir,
            "token": self.token,
            "library_name": "timm_lt",
        }
        with hub_errors(self.repo_id, self.revision, file):
            if limit is not None:
                size = hf_hub_download(self.repo_id, file, dry_run=True, **options).file_size
                if size is not None and size > limit:
                    raise UsageError(f"{file} of {self} has {size:,} bytes, more than {limit:,}")
            return Path(hf_hub_download(self.repo_id, file, force_download=force, **options))

    def _download_config(self) -> Path:
        return self.fetch(CONFIG, limit=TEXT_LIMIT).parent

    def _download_checked(self, file: str, digest: str | None) -> None:
        path = self.fetch(file)
        if digest is None or file_sha256(path) == digest:
            return
        damaged = f"{file} of {self.repo_id} is not the one that {CONFIG} describes"
        if constants.is_offline_mode():
            raise UsageError(f"{damaged} (SHA-256 differs); load it once while online")
        try:
            path = self.fetch(file, force=True)
        except UsageError as error:
            raise UsageError(f"{damaged} (SHA-256 differs); fetching it again: {error}") from error
        if file_sha256(path) != digest:
            blob = path.resolve()
            path.unlink(missing_ok=True)
            # What has its own digest as its name is whole, and may be another commit's.
            if blob.is_file() and file_sha256(blob) != blob.name:
                blob.unlink()
            raise UsageError(f"{damaged} (SHA-256 differs); it was not kept in the cache")


def list_repo_heads(
    repo_id: str, *, cache_dir: str | Path | None = None, token: str | bool | None = None
) -> dict[str, HeadEntry]:
    """Lists the heads of a Hub repo with options and metrics; downloads its config only.

    Args:
        repo_id: ``namespace/name`` or ``namespace/name@revision``.
        cache_dir: Where downloads are kept; None is the cache of the Hub's libraries.
        token: As everywhere on the Hub: None takes the one that is logged in or set.

    Returns:
        The heads by name.

    Raises:
        UsageError: If the repo cannot be read or holds no decoupled checkpoint.
    """
    return Repo.parse(repo_id, cache_dir=cache_dir, token=token).read_info().heads


@contextmanager
def hub_errors(
    repo_id: str, revision: str | None = None, file: str | None = None
) -> Iterator[None]:
    """Turns what the Hub's client raises into a UsageError that says what to do.

    Args:
        repo_id: The repo that is read or written.
        revision: The revision.
        file: The file that is wanted.
    """
    what = f"{file} of {repo_id}" if file else repo_id
    try:
        yield
    except UsageError:
        raise
    except HFValidationError as error:
        raise UsageError(f"{repo_id!r} is no repo of the Hub: {_line(error)}") from error
    except RevisionNotFoundError as error:
        raise UsageError(f"{repo_id} has no branch, tag or commit {revision!r}") from error
    except GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{repo_id}"
        raise UsageError(f"{repo_id} is gated: ask for access at {page} and {LOGIN}") from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"there is no model repo {repo_id}, or it is private and you have no access to it: "
            f"{LOGIN}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UsageError(f"{what} is not in the cache, and {_reason(error, what)}") from error
    except EntryNotFoundError as error:
        raise UsageError(f"{repo_id} has no file {file}") from error
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{what}: {_reason(error, what)}") from error


def _reason(error: BaseException, what: str) -> str:
    """Says why a request failed and what can be done."""
    known = (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, FileMetadataError)
    cause: BaseException | None = error
    # The client wraps what happened, for uploads and forced downloads in bare built-in errors.
    while cause is not None and not isinstance(cause, known):
        cause = cause.__cause__
    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to reach the Hub"
    if isinstance(cause, HfHubHTTPError):
        return _status_reason(cause)
    if isinstance(cause, HTTPError):
        return f"{constants.ENDPOINT} cannot be reached ({_line(cause)}); try again"
    if isinstance(cause, FileMetadataError):
        return f"{constants.ENDPOINT} does not answer as the Hub does ({_line(cause)})"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or what} cannot be read or written: {error.strerror}"
    return _line(error)


def _status_reason(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    said = f" ({error.server_message})" if error.server_message else ""
    if status == 401:
        return f"the token is not valid{said}: {LOGIN}"
    if status == 403:
        return f"the token has no permission{said}: {LOGIN} with one that has"
    if status == 409:
        return f"it changed meanwhile{said}; try again"
    if status == 412:
        return f"the branch moved on meanwhile{said}; try again"
    if status == 429:
        after = error.response.headers.get("Retry-After")
        wait = f" after {after} seconds" if after else " later"
        return f"the Hub has had too many requests{said}; try again{wait}"
    if status >= 500:
        return f"the Hub has an error of its own ({status}){said}; try again later"
    return f"the Hub answered {status}{said or f' ({_line(error)})'}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
