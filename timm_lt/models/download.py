"""Weights by URL: downloaded once, resumed after a cut, checked before they get their name."""

import logging
import os
import re
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path, PurePosixPath
from time import sleep
from typing import IO
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from filelock import FileLock
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from timm.models._hub import get_cache_dir

from timm_lt.utils.checks import UsageError
from timm_lt.utils.console import advance, console, log
from timm_lt.utils.files import read_json, sha256, write_json

ATTEMPTS = 5
RETRY_DELAY = 1.0  # seconds before the second attempt, doubled before each further one
LONGEST_DELAY = 60.0  # seconds; a server that asks for more is not asked again
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 20
LOAD_A_FILE = "load a file with pretrained_cfg_overlay=dict(file=...)"


def cached_name(url: str) -> str:
    """Returns the file name under which a URL is cached: readable, and another one for each URL.

    It is the end of the path for people, a digest of the whole URL because servers and folders
    use the same names, and the URL's suffix: at most 133 characters, safe on every file system.

    >>> cached_name("https://example.org/weights/ImageNet_LT/models/resnet50.pth")
    'ImageNet_LT--models--resnet50.1b5702488603d1d6.pth'
    """
    parts = urlsplit(url)
    path = PurePosixPath(parts.hostname or "", unquote(parts.path).strip("/"))
    suffix = path.suffix if re.fullmatch(r"\.[A-Za-z0-9]{1,15}", path.suffix) else ""
    words = "--".join(path.parts[-3:]).removesuffix(suffix)
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", words)[-100:].lstrip("-.")
    return f"{readable}.{sha256(url.encode())[:16]}{suffix}"


def download(
    url: str, *, cache_dir: str | Path | None = None, check: Callable[[Path], None] | None = None
) -> Path:
    """Returns the path of a URL's file in the cache, after downloading it if it is not there.

    A file gets its name when it is complete and checked; from then on it is returned as it is,
    without a request. An interrupted download stays as ``<name>.incomplete``: the next call
    fetches the rest, or the whole file if it has changed on the server.

    Args:
        url: An http or https address.
        cache_dir: The cache; None takes timm's, ``checkpoints`` in the folder of ``torch.hub``.
            The files lie in its subfolder ``timm_lt``.
        check: Called with the path of the complete file, still named ``<name>.incomplete``. What
            it raises is passed on, after the file is deleted.

    Raises:
        UsageError: If the file cannot be downloaded or written; says why and what to do.
    """
    address = _address(url)
    with _disk_trouble("the cache"):
        target = Path(cache_dir or get_cache_dir(), "timm_lt", cached_name(url))
        if target.is_file():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{target}.lock")
        lock.acquire()
    try:
        # Another process may have downloaded it while this one waited for the lock.
        if not target.is_file():
            _fill(_Partial(address, target), check)
    finally:
        lock.release()
    return target


def _address(url: str) -> str:
    """Returns a URL in printable ASCII, as it is requested and named in messages."""
    try:
        address = quote(url, safe=string.punctuation)
        parts = urlsplit(address)
        _ = parts.port
    except ValueError as error:
        raise UsageError(f"{url!r} is not a URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{url!r} is not an http:// or https:// URL; {LOAD_A_FILE}")
    return address


@contextmanager
def _disk_trouble(what: object) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{what} cannot be written: {error}; make room, or choose another folder with "
            "cache_dir or the environment variable TORCH_HOME"
        ) from error


class _TryAgainError(Exception):
    """Trouble that may pass; ``delay`` is the wait in seconds that the server asks for."""

    def __init__(self, reason: str, delay: float | None = None) -> None:
        super().__init__(reason)
        self.delay = delay


class _Partial:
    """What has arrived of a file, and which of the server's versions of the file that is.

    ``validator`` is the version's ETag or else its date, ``size`` its bytes; None is unknown.
    """

    def __init__(self, url: str, target: Path) -> None:
        self.url = url
        self.target = target
        self.path = target.with_name(f"{target.name}.incomplete")
        self.record = target.with_name(f"{target.name}.incomplete.json")
        try:
            known = read_json(self.record)
        except UsageError:
            known = {}
        self.validator: str | None = known.get("validator")
        self.size: int | None = known.get("size")

    @property
    def arrived(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def start(self) -> int:
        """The byte to go on at: 0 where nothing can tell whether the version is still the same."""
        return self.arrived if self.validator else 0

    def begin(self, headers: Message, size: int | None) -> None:
        # Emptied before the record changes: old bytes must never meet a new validator.
        self.path.write_bytes(b"")
        # A weak ETag, W/"...", promises the same meaning but not the same bytes.
        etag = headers.get("ETag", "")
        self.validator = etag if etag.startswith('"') else headers.get("Last-Modified")
        self.size = size
        write_json(self.record, {"url": self.url, "validator": self.validator, "size": size})

    def same_version(self, headers: Message) -> bool:
        """Whether an answer is about the version that has arrived, as far as it says."""
        name = "ETag" if str(self.validator).startswith('"') else "Last-Modified"
        total = _content_range(headers)[1]
        same_size = total is None or self.size is None or total == self.size
        return same_size and headers.get(name, self.validator) == self.validator

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.record.unlink(missing_ok=True)

    def changed(self) -> _TryAgainError:
        self.discard()
        return _TryAgainError("the file has changed on the server", delay=0)


def _fill(partial: _Partial, check: Callable[[Path], None] | None) -> None:
    with _disk_trouble(partial.target):
        _fetch(partial)
    try:
        if check is not None:
            check(partial.path)
    except Exception:
        partial.discard()
        raise
    with _disk_trouble(partial.target):
        partial.path.replace(partial.target)
        partial.discard()


def _fetch(partial: _Partial) -> None:
    """Makes attempts until the file is complete."""
    log.info("downloading %s to %s", partial.url, partial.target)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    hidden = not console.is_terminal or log.level > logging.INFO
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden
    ) as bar:
        bar.add_task("downloading", total=partial.size)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                _attempt(partial, bar)
                return
            except _TryAgainError as trouble:
                delay = RETRY_DELAY * 2 ** (attempt - 1) if trouble.delay is None else trouble.delay
                if attempt == ATTEMPTS or delay > LONGEST_DELAY:
                    raise _surrender(partial, trouble, attempt) from trouble
                log.info("%s: %s; trying again", partial.url, trouble)
                sleep(delay)


def _surrender(partial: _Partial, trouble: _TryAgainError, attempts: int) -> UsageError:
    total = "an unknown number of" if partial.size is None else partial.size
    again = "resumes" if partial.start else "starts anew"
    return UsageError(
        f"{partial.url} cannot be downloaded: {trouble}; {partial.arrived} of {total} bytes have "
        f"arrived after attempt {attempts}; calling again {again}, or put the file by hand at "
        f"{partial.target}"
    )


def _attempt(partial: _Partial, bar: Progress) -> None:
    """Sends one request and appends what arrives; raises _TryAgainError if that is not all."""
    response = _open(partial)
    if response is None:
        return
    with response:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise UsageError(f"{partial.url} cannot be downloaded: the server compresses it")
        if partial.start and response.status == 206:
            first, total = _content_range(response.headers)
            if first != partial.start or not partial.same_version(response.headers):
                raise partial.changed()
            # A size that was never announced is what this answer brings it to, if it says so.
            end = None if response.length is None else first + response.length
            partial.size = total or partial.size or end
        elif response.status == 200:
            partial.begin(response.headers, response.length)
        else:
            raise UsageError(f"{partial.url} answers with an unexpected HTTP {response.status}")
        bar.update(bar.task_ids[0], total=partial.size, completed=partial.arrived)
        _append(response, partial.path, bar)
    if partial.size not in (None, partial.arrived):
        raise _TryAgainError("the connection was cut")


def _append(response: HTTPResponse, path: Path, bar: Progress) -> None:
    with path.open("ab") as file:
        while data := _read(response):
            file.write(data)
            advance(bar, len(data))
        file.flush()
        os.fsync(file.fileno())


def _read(response: HTTPResponse) -> bytes:
    try:
        # Unlike read, read1 loses nothing of what arrived before a cut.
        return response.read1(CHUNK)
    except (OSError, HTTPException) as error:
        raise _TryAgainError(_reason(error)) from error


def _open(partial: _Partial) -> HTTPResponse | None:
    """Asks for what is missing; returns None if the server says that nothing is."""
    headers = {"User-Agent": "timm_lt", "Accept-Encoding": "identity"}
    if partial.start:
        headers |= {"Range": f"bytes={partial.start}-", "If-Range": str(partial.validator)}
    request = Request(partial.url, headers=headers)
    try:
        response: HTTPResponse = build_opener(_Redirects).open(request, timeout=TIMEOUT)
    except HTTPError as error:
        with error:
            if error.code == 416 and partial.start:
                at_end = _content_range(error.headers)[1] == partial.start
                if at_end and partial.same_version(error.headers):
                    return None
                raise partial.changed() from error
            raise _refusal(partial, error) from error
    except ConnectionError as error:
        raise _TryAgainError(_reason(error)) from error
    except (OSError, HTTPException, ValueError) as error:
        raise UsageError(
            f"{partial.url} cannot be reached: {_reason(error)}; try again, or put the file by "
            f"hand at {partial.target}"
        ) from error
    return response


def _refusal(partial: _Partial, error: HTTPError) -> Exception:
    reason = f"HTTP {error.code}, {_reason(error)}"
    if error.code == 429 or error.code >= 500:
        wait = error.headers.get("Retry-After", "")
        if wait.isdecimal():
            return _TryAgainError(f"{reason}, which asks to wait {wait} s", float(wait))
        return _TryAgainError(reason)
    if error.code in (401, 403, 404, 410):
        moved = "the address has moved" if error.code in (404, 410) else "access is refused"
        advice = f"{moved}, {LOAD_A_FILE}"
    else:
        advice = f"put the file by hand at {partial.target}"
    return UsageError(f"{partial.url} cannot be downloaded: {reason}; {advice}")


class _Redirects(HTTPRedirectHandler):
    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        """Refuses what would leave http and https, or the encryption; raises HTTPError."""
        allowed = ("https",) if req.type == "https" else ("http", "https")
        if urlsplit(newurl).scheme not in allowed:
            raise HTTPError(newurl, code, f"redirect to {newurl} not followed", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _content_range(headers: Message) -> tuple[int | None, int | None]:
    """Returns the first byte and the file's size from ``Content-Range``, None where unknown."""
    pattern = r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)"
    found = re.fullmatch(pattern, headers.get("Content-Range", ""))
    first, total = found.groups() if found else (None, None)
    return (int(first) if first else None), (int(total) if total else None)


def _reason(error: Exception) -> str:
    """Returns the cause of an error in one line."""
    return " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
