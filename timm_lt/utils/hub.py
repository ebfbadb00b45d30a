"""Ids of Hub repos, and errors of the Hub's client as one sentence that says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from httpx2 import HTTPError
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
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
    """Splits ``namespace/name@revision``, with or without ``hf-hub:`` or a revision."""
    repo_id, at, revision = name.removeprefix(HF_HUB).partition("@")
    if "/" not in repo_id or (at and not revision) or ".." in revision:
        raise UsageError(
            f"{name!r} is not a valid repo id; expected 'namespace/name' or "
            "'namespace/name@revision'"
        )
    return repo_id, revision or None


@contextmanager
def hub_errors(
    repo_id: str, revision: str | None = None, file: str | None = None
) -> Iterator[None]:
    """Turns errors of the Hub's client about a repo into a UsageError that says what to do."""
    try:
        yield
    except UsageError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UsageError(_message(error, repo_id, revision, file)) from error


def _message(error: Exception, repo_id: str, revision: str | None, file: str | None) -> str:
    subject = f"{file} of {repo_id}" if file else repo_id
    match error:
        case HFValidationError():
            return f"{repo_id!r} is not a valid repo id: {_line(error)}"
        case RevisionNotFoundError():
            return f"{repo_id} has no branch, tag or commit {revision!r}"
        case GatedRepoError():
            page = f"{constants.ENDPOINT}/{repo_id}"
            return f"{repo_id} is gated: ask for access at {page} and {LOGIN}"
        case RepositoryNotFoundError():
            return f"there is no model repo {repo_id}, or it is private; {LOGIN}"
        case LocalEntryNotFoundError():
            return f"{subject} is not in the cache, and {_reason(error, subject)}"
        case EntryNotFoundError():
            return f"{repo_id} has no file {file}"
    return f"{subject}: {_reason(error, subject)}"


def _reason(error: BaseException, subject: str) -> str:
    """Returns the reason of a failed request, and what can be done."""
    specific = (HfHubHTTPError, HTTPError, OfflineModeIsEnabled)
    cause: BaseException | None = error
    # For uploads and forced downloads the client wraps its errors in built-in ones.
    while cause is not None and not isinstance(cause, specific):
        cause = cause.__cause__
    match cause:
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set; unset it to reach the Hub"
        case HfHubHTTPError():
            return _status_reason(cause)
        case HTTPError():
            return f"{constants.ENDPOINT} cannot be reached ({_line(cause)}); try again"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or subject} cannot be read or written: {error.strerror}"
    return _line(error)


def _status_reason(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    reason, advice = {
        401: ("the token is not valid", LOGIN),
        403: ("the token has no permission", f"{LOGIN} with one that has"),
        409: ("the branch has changed meanwhile", "try again"),
        412: ("the branch has changed meanwhile", "try again"),
    }.get(status, (f"the Hub answered {status}", "try again later" if status >= 429 else ""))
    text = error.server_message or (_line(error) if not advice else "")
    return reason + (f" ({text})" if text else "") + (f"; {advice}" if advice else "")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
