"""What goes wrong between this machine and the Hub, in one sentence that says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from httpx2 import HTTPError
from huggingface_hub import constants
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

from timm_lt.utils.checks import UsageError

HF_HUB = "hf-hub:"
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def split_revision(name: str) -> tuple[str, str | None]:
    """Splits ``namespace/name@revision``, with or without ``hf-hub:`` or a revision.

    >>> split_revision("hf-hub:me/birds@v1"), split_revision("me/birds")
    (('me/birds', 'v1'), ('me/birds', None))

    Raises:
        UsageError: If it is neither.
    """
    repo_id, at, revision = name.removeprefix(HF_HUB).partition("@")
    if "/" not in repo_id or (at and not revision) or ".." in revision:
        raise UsageError(f"{name!r} is no repo; write namespace/name or namespace/name@revision")
    return repo_id, revision or None


@contextmanager
def hub_errors(
    repo_id: str,
    revision: str | None = None,
    file: str | None = None,
    *,
    repo_type: Literal["model", "dataset"] = "model",
) -> Iterator[None]:
    """Turns what the Hub's client raises into a UsageError that says what to do.

    Args:
        repo_id: The repo that is read or written.
        revision: The revision.
        file: The file that is wanted.
        repo_type: What the repo holds.
    """
    what = f"{file} of {repo_id}" if file else repo_id
    noun, folder = ("data set", "datasets/") if repo_type == "dataset" else ("model repo", "")
    try:
        yield
    except UsageError:
        raise
    except HFValidationError as error:
        raise UsageError(f"{repo_id!r} is no repo of the Hub: {_line(error)}") from error
    except RevisionNotFoundError as error:
        raise UsageError(f"{repo_id} has no branch, tag or commit {revision!r}") from error
    except GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{folder}{repo_id}"
        raise UsageError(f"{repo_id} is gated: ask for access at {page} and {LOGIN}") from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"there is no {noun} {repo_id}, or it is private and you have no access to it: {LOGIN}"
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
