"""Weights of a pretrained model: from the Hub repo, URL or file that its configuration names.

timm would cache a URL by its last part, which two published files share, would read a local pickle
whatever it holds, and would ask an unreachable Hub for a pickle as well.

Weights by URL: downloaded once, resumed after a cut, checked before they get their name.
"""

import logging
import os
import re
import string
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.message import Message
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path, PurePosixPath
from time import sleep
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from filelock import FileLock
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from timm.models._builder import resolve_pretrained_cfg
from timm.models._hub import get_cache_dir
from timm.models._pretrained import PretrainedCfg
from torch import Tensor, nn

from timm_lt.checkpoint import (
    BLOCK,
    CONFIG,
    WEIGHTS,
    find_entry,
    is_statistic,
    load_model_head,
    read_checkpoint,
    read_config,
)
from timm_lt.heads import HEADS, Head, LWSHead, check_head_options, get_head, set_head
from timm_lt.models.published import PUBLISHED
from timm_lt.models.repo import Repo
from timm_lt.models.third_party import Weights, check_weights, read_weights
from timm_lt.utils.checks import UsageError, unknown_name
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


class PretrainedSource:
    """Where the weights of a pretrained model come from.

    Attributes:
        name: What is loaded, for messages.
        config: timm's configuration, with the caller's changes.
        head: The head that is wanted.
        url: The file to download; None for a local one, or for one that timm finds.
        own_head: The file is that of the wanted head, not of the joint classifier.
        repo_id: The Hub repo to download from, in place of a file.
        folder: The decoupled checkpoint in which the weights lie, once they are there.
        weights: What was read.
    """

    def __init__(
        self, name: str, config: PretrainedCfg, head: str | None, url: str | None, own_head: bool
    ) -> None:
        self.name, self.config, self.head = name, config, head
        self.url, self.own_head = url, own_head
        by_timm = config.state_dict or config.file or config.hf_hub_filename
        on_hub = not by_timm and config.source in (None, "", "hf-hub")
        self.repo_id = config.hf_hub_id if on_hub and config.hf_hub_id else None
        file = Path(config.file or "")
        inside = url is None and file.name == WEIGHTS and (file.parent / CONFIG).is_file()
        self.folder = file.parent if inside else None
        self.weights: Weights | None = None

    @classmethod
    def find(
        cls, variant: str, head: str | None, head_options: dict[str, Any], options: dict[str, Any]
    ) -> "PretrainedSource":
        """Finds the source of a model, before anything is built or downloaded.

        Raises:
            UsageError: If the head's options are wrong, or it is one that must have been published
                and is not.
        """
        config = resolve_pretrained_cfg(
            variant, options.get("pretrained_cfg"), options.get("pretrained_cfg_overlay")
        )
        name = f"{variant}.{config.tag}" if config.tag else variant
        urls = PUBLISHED[name].urls if name in PUBLISHED else {}
        by_timm = config.source or config.state_dict or config.file or config.hf_hub_id
        url = None if by_timm or not isinstance(config.url, str) else config.url
        if head is None or url is None or url != urls.get("linear"):
            return cls(name, config, head, url, own_head=False)
        wanted, fitted = check_head_options(head, head_options), check_head_options(head, {})
        if head in urls and head != "linear":
            for key in HEADS[head].fixed_options:
                if wanted[key] != fitted[key]:
                    raise UsageError(
                        f"the published {head} head of {name} was fitted with "
                        f"{key}={fitted[key]!r}, which cannot change afterwards"
                    )
            return cls(name, config, head, urls[head], own_head=True)
        if head == "crt":
            raise UsageError(
                f"{name} has no published crt head (published: {', '.join(urls)}); fit one with "
                "timm_lt.fit_head('crt', ...)"
            )
        return cls(name, config, head, url, own_head=False)

    @classmethod
    def kind(cls, variant: str, head: str, options: dict[str, Any]) -> str:
        """Returns the registered head behind a name that a model's checkpoint has for one.

        Raises:
            UsageError: If the model has no decoupled checkpoint, or that has no head of that name.
        """
        config = resolve_pretrained_cfg(
            variant, options.get("pretrained_cfg"), options.get("pretrained_cfg_overlay")
        )
        source = cls(variant, config, head, None, own_head=False)
        if source.repo_id is not None:
            repo = Repo.parse(source.repo_id, cache_dir=options.get("cache_dir"))
            return find_entry(repo.read_info(), head, str(repo)).kind
        if source.folder is not None:
            return find_entry(read_checkpoint(source.folder), head, str(source.folder)).kind
        raise unknown_name("head", head, list(HEADS))

    @property
    def remote(self) -> bool:
        """Whether something may have to be downloaded."""
        return self.url is not None or self.repo_id is not None

    def read(
        self, expected: Mapping[str, Tensor], cache_dir: str | Path | None = None
    ) -> Weights | None:
        """Reads the weights; returns None where timm reads them itself.

        Args:
            expected: The state dict that they must have, on any device.
            cache_dir: Where downloads are kept; None is timm's cache, for a repo that of the Hub.

        Raises:
            UsageError: If they cannot be had or are not those of the architecture, or have learned
                scales and the head is not theirs.
        """
        place = self.url or self.config.file or ""
        if self.repo_id is not None:
            folder = Repo.parse(self.repo_id, cache_dir=cache_dir).download(head=self.head)
            self.folder = folder if BLOCK in read_config(folder) else None
            self.weights = load_file(folder / WEIGHTS, self.name, expected)
        elif self.url is not None:
            self.weights = load_url(self.url, self.name, expected, cache_dir)
        elif self.config.file and not self.config.source:
            self.weights = load_file(self.config.file, self.name, expected)
        if self.weights is not None and self.weights.scale is not None and self.head != "lws":
            raise UsageError(f"{place} has the learned scales of an lws head: pass head='lws'")
        return self.weights

    def put_head(self, model: nn.Module, head: str, options: dict[str, Any]) -> nn.Module:
        """Puts the head on a model that has the weights."""
        if self.folder is not None:
            return load_model_head(self.folder, model, head, **options)
        set_head(model, head, **options)
        if self.weights is None:
            return model
        new = get_head(model)
        if isinstance(new, LWSHead) and self.weights.scale is not None:
            new.load_state_dict({**new.state_dict(), "scale": self.weights.scale})
        if isinstance(new, Head) and self.own_head:
            new.backbone_statistics = batch_norm_statistics(self.weights.tensors)
        return model


def batch_norm_statistics(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the batch-norm statistics among the tensors of a model."""
    return {key: value for key, value in tensors.items() if is_statistic(key)}


def load_file(
    path: str | Path, name: str, expected: Mapping[str, Tensor], place: str | None = None
) -> Weights:
    """Reads the weights of a model and checks them.

    Args:
        path: A file in one of the layouts of :func:`timm_lt.models.third_party.read_weights`.
        name: What the model is called in messages.
        expected: The state dict that they must have, on any device.
        place: What the file is called in messages; None is its path.

    Raises:
        UsageError: If the file cannot be read, or is not of this model.
    """
    return check_weights(read_weights(path, place).select(expected, name), expected, name)


def load_url(
    url: str, name: str, expected: Mapping[str, Tensor], cache_dir: str | Path | None = None
) -> Weights:
    """Downloads the weights of a model, or takes them from the cache.

    Args:
        url: A file as for :func:`load_file`.
        name: What the model is called in messages.
        expected: The state dict that they must have, on any device.
        cache_dir: The cache; None is timm's.

    Raises:
        UsageError: If the file cannot be had, or is not of this model and so not kept in the cache.
    """
    read: list[Weights] = []
    path = download(
        url,
        cache_dir=cache_dir,
        check=lambda path: read.append(load_file(path, name, expected, url)),
    )
    if read:
        return read[0]
    try:
        return load_file(path, name, expected, url)
    except UsageError as error:
        raise UsageError(f"{error}; delete {path} to download it again") from error
