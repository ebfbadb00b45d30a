"""Weights of a pretrained model, from a Hub repo, a URL or a file.

timm would cache a URL under its last part, which two published files share, would read a local
pickle whatever it holds, and would ask an unreachable Hub for a pickle as well.
"""

import logging
import re
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit

from filelock import FileLock
from timm.models._builder import resolve_pretrained_cfg
from timm.models._hub import get_cache_dir
from timm.models._pretrained import PretrainedCfg
from torch import Tensor, nn
from torch.hub import download_url_to_file

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
from timm_lt.utils.console import console, log
from timm_lt.utils.files import sha256

T = TypeVar("T")


def cached_name(url: str) -> str:
    """Returns the file name under which a URL is cached.

    It consists of the end of the path, a digest of the whole URL and the suffix: readable, unique
    to the URL, at most 133 characters, and valid on every file system.

    >>> cached_name("https://example.org/weights/ImageNet_LT/models/resnet50.pth")
    'ImageNet_LT--models--resnet50.1b5702488603d1d6.pth'
    """
    parts = urlsplit(url)
    path = PurePosixPath(parts.hostname or "", unquote(parts.path).strip("/"))
    suffix = path.suffix if re.fullmatch(r"\.[A-Za-z0-9]{1,15}", path.suffix) else ""
    words = "--".join(path.parts[-3:]).removesuffix(suffix)
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", words)[-100:].lstrip("-.")
    return f"{readable}.{sha256(url.encode())[:16]}{suffix}"


def read_url(url: str, read: Callable[[Path], T], cache_dir: str | Path | None = None) -> T:
    """Reads the file behind a URL, which is downloaded unless it is in the cache.

    Only a file that was read without an error is kept in the cache.

    Args:
        url: An http or https address.
        read: Called with the path of the complete file; raises UsageError if it is not valid.
        cache_dir: The cache; None is timm's. The files are in its subfolder ``timm_lt``.

    Returns:
        The result of ``read``.

    Raises:
        UsageError: If the file cannot be downloaded or is not valid.
    """
    if not re.match("https?://", url):
        raise UsageError(f"{url!r} is not an http:// or https:// URL")
    path = Path(cache_dir or get_cache_dir(), "timm_lt", cached_name(url))
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Processes that start together download the file once.
            with FileLock(f"{path}.lock"):
                if not path.is_file():
                    return _download(url, path, read)
    except UsageError:
        raise
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, HTTPError):
            error.close()
        raise UsageError(
            f"{url} cannot be downloaded: {error}; try again, or put the file at {path}"
        ) from error
    try:
        return read(path)
    except UsageError as error:
        raise UsageError(f"{error}; delete {path} to download it again") from error


def _download(url: str, path: Path, read: Callable[[Path], T]) -> T:
    """Downloads a file that gets its name after it was read."""
    partial = path.with_name(f"{path.name}.incomplete")
    log.info("downloading %s to %s", url, path)
    shown = console.is_terminal and log.isEnabledFor(logging.INFO)
    try:
        download_url_to_file(url, str(partial), progress=shown)
        result = read(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return result


class PretrainedSource:
    """Source of the weights of a pretrained model.

    Attributes:
        name: Name of the model, for messages.
        config: timm's configuration, with the caller's changes.
        head: Requested head.
        url: URL of the weights; None for a local file, or where timm finds the weights.
        own_head: The file contains the requested head instead of the joint classifier.
        repo_id: Hub repo with the weights, in place of a file.
        folder: Decoupled checkpoint with the weights, once it is local.
        weights: The weights, once they are read.
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
            UsageError: If an option of the head is not valid, or the head needs published weights
                and has none.
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
        """Returns the kind of a head, which the model's decoupled checkpoint has under a name.

        Raises:
            UsageError: If there is no such checkpoint, or no such head in it.
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
        """Whether the weights may have to be downloaded."""
        return self.url is not None or self.repo_id is not None

    def read(
        self, expected: Mapping[str, Tensor], cache_dir: str | Path | None = None
    ) -> Weights | None:
        """Reads the weights; returns None where timm reads them itself.

        Args:
            expected: A state dict with the expected names and shapes, on any device.
            cache_dir: Cache for downloads; None is timm's cache, or the Hub's for a repo.

        Raises:
            UsageError: If the weights cannot be read, do not fit the architecture, or contain the
                learned scales of an lws head while another head is requested.
        """
        if self.repo_id is not None:
            folder = Repo.parse(self.repo_id, cache_dir=cache_dir).download(head=self.head)
            self.folder = folder if BLOCK in read_config(folder) else None
            self.weights = _load_file(folder / WEIGHTS, self.name, expected)
        elif self.url is not None:
            self.weights = read_url(
                self.url,
                lambda path: _load_file(path, self.name, expected, self.url),
                cache_dir,
            )
        elif self.config.file and not self.config.source:
            self.weights = _load_file(self.config.file, self.name, expected)
        if self.weights is not None and self.weights.scale is not None and self.head != "lws":
            place = self.url or self.config.file
            raise UsageError(f"{place} has the learned scales of an lws head; pass head='lws'")
        return self.weights

    def put_head(self, model: nn.Module, head: str, options: dict[str, Any]) -> nn.Module:
        """Sets the head of a model whose weights are loaded."""
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


def _load_file(
    path: str | Path, name: str, expected: Mapping[str, Tensor], place: str | None = None
) -> Weights:
    """Reads and checks the weights of a model; ``place`` names the file in messages."""
    return check_weights(read_weights(path, place).select(expected, name), expected, name)
