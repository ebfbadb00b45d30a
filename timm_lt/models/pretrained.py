"""Published names, read from ``hub_configs/``, and pretrained weights from a repo, URL or file.

Each file ``<architecture>.<tag>.yaml`` with a ``published:`` block is one name in timm's registry.
For the weights, timm would cache a URL under its last part, which two published files share, would
read a local pickle whatever it holds, and would ask an unreachable Hub for a pickle as well.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlsplit

from filelock import FileLock
from timm.models._builder import resolve_pretrained_cfg
from timm.models._hub import download_cached_file, get_cache_dir
from torch import Tensor, nn

from timm_lt.checkpoint import find_entry, load_heads, read_checkpoint
from timm_lt.checkpoint.format import BLOCK, CONFIG, WEIGHTS, is_statistic, read_config
from timm_lt.heads import HEADS, Head, check_head_options, get_head, set_head
from timm_lt.models.repo import Repo
from timm_lt.models.weights_file import Weights, read_weights
from timm_lt.utils.checks import UsageError, unknown_name, user_errors
from timm_lt.utils.console import console, log
from timm_lt.utils.files import read_yaml, sha256

T = TypeVar("T")
PUBLISHED_BLOCK = "published"
PACKAGE = Path(__file__).parents[1]
CHECKPOINTS = PACKAGE / "checkpoints"


@dataclass(frozen=True)
class PublishedHead:
    """A head of a published backbone, with test accuracies (fractions by shot group and "all").

    ``url`` is a file with the whole model that has this head; None for a head without own file.
    """

    url: str | None = None
    quoted: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """A published name ``<architecture>.<tag>``; the fields of the images are timm's.

    ``packaged`` means that the weights are a decoupled checkpoint in this package. A repo of the
    Hub (``namespace/name``, with or without ``@revision``) has precedence over URLs.
    """

    name: str
    architecture: str
    data: str
    training: str
    num_classes: int
    input_size: tuple[int, int, int]
    crop_pct: float
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    heads: dict[str, PublishedHead] = field(default_factory=dict)
    packaged: bool = False
    hf_hub_id: str | None = None
    origin: str | None = None
    quoted_from: str | None = None
    measured_with: str | None = None

    @property
    def folder(self) -> Path | None:
        """The packaged checkpoint, if there is one."""
        return CHECKPOINTS / self.name if self.packaged else None

    @property
    def urls(self) -> dict[str, str]:
        """URLs by head; ``linear`` is the joint classifier."""
        return {name: head.url for name, head in self.heads.items() if head.url}


def hub_configs(inside: str = "") -> list[Path]:
    """Returns the YAML files of ``hub_configs/``, or of a folder inside of it."""
    packaged = PACKAGE / "hub_configs"
    folder = packaged if packaged.is_dir() else PACKAGE.parent / "hub_configs"
    return sorted((folder / inside).glob("*.yaml"), key=lambda path: path.stem)


def read_published(path: Path) -> Published | None:
    """Reads the ``published:`` block of a file of ``hub_configs/``; None if it has none."""
    block = read_yaml(path).get(PUBLISHED_BLOCK)
    if block is None:
        return None
    heads = {name: PublishedHead(**(part or {})) for name, part in block.pop("heads", {}).items()}
    block |= {key: tuple(block[key]) for key in ("input_size", "mean", "std")}
    return Published(name=path.stem, heads=heads, **block)


PUBLISHED = {
    entry.name: entry for path in hub_configs() if (entry := read_published(path)) is not None
}


def cached_name(url: str) -> str:
    """Returns the file name under which a URL is cached: a digest of it, and its readable end.

    >>> cached_name("https://example.org/weights/ImageNet_LT/models/resnet50.pth")
    '1b5702488603d1d6-resnet50.pth'
    """
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", urlsplit(url).path.rpartition("/")[2])
    return f"{sha256(url.encode())[:16]}-{readable[-100:]}"


def read_url(url: str, read: Callable[[Path], T], cache_dir: str | Path | None = None) -> T:
    """Reads the file behind a URL, which is downloaded unless it is in the cache.

    The cache is the folder ``timm_lt`` in timm's, or in ``cache_dir``. A file that ``read`` refuses
    with UsageError does not stay there.
    """
    if not re.match("https?://", url):
        raise UsageError(f"{url!r} is not an http:// or https:// URL")
    path = Path(cache_dir or get_cache_dir(), "timm_lt", cached_name(url))
    is_new = not path.is_file()
    kinds, cure = (OSError, HTTPException, ValueError), f"try again, or put the file at {path}"
    with user_errors(f"{url} cannot be downloaded", *kinds, cure=cure):
        try:
            if is_new:
                path.parent.mkdir(parents=True, exist_ok=True)
                shown = console.is_terminal and log.isEnabledFor(logging.INFO)
                # Processes that start together download the file once.
                with FileLock(f"{path}.lock"):
                    log.info("downloading %s to %s", url, path)
                    download_cached_file((url, path.name), False, shown, cache_dir=path.parent)
        except HTTPError as error:
            error.close()
            raise
    try:
        return read(path)
    except UsageError as error:
        if is_new:
            path.unlink(missing_ok=True)
            raise
        raise UsageError(f"{error}; delete {path} to download it again") from error


class PretrainedSource:
    """Source of the weights of a pretrained model: a URL, a file, a repo, or timm's own.

    ``folder`` is a decoupled checkpoint, once it is local; ``own_head`` says whether the file has
    the requested head instead of the joint classifier.
    """

    def __init__(self, variant: str, head: str | None, options: dict[str, Any]) -> None:
        config = self.config = resolve_pretrained_cfg(
            variant, options.get("pretrained_cfg"), options.get("pretrained_cfg_overlay")
        )
        self.name = f"{variant}.{config.tag}" if config.tag else variant
        self.head, self.cache_dir = head, options.get("cache_dir")
        self.url: str | None = None
        self.repo: Repo | None = None
        self.folder: Path | None = None
        self.weights: Weights | None = None
        self.own_head = False
        self.file = Path(config.file) if config.file and not config.source else None
        if self.file and self.file.name == WEIGHTS and (self.file.parent / CONFIG).is_file():
            self.folder = self.file.parent
        # timm prefers a state dict to a file, a file to a repo, and a repo to a URL.
        if config.state_dict or config.file or config.hf_hub_filename:
            return
        if config.hf_hub_id and config.source in (None, "", "hf-hub"):
            self.repo = Repo.parse(config.hf_hub_id, cache_dir=self.cache_dir)
        elif isinstance(config.url, str) and not config.source:
            self.url = config.url

    @property
    def kind(self) -> str | None:
        """Kind of the requested head, which a decoupled checkpoint may have under another name."""
        if self.head is None or self.head in HEADS:
            return self.head
        folder = self.folder if self.repo is None else self.repo.download(weights=False)
        if folder is None:
            raise unknown_name("head", self.head, list(HEADS))
        return find_entry(read_checkpoint(folder), self.head, str(self.repo or folder)).kind

    def choose_url(self, options: dict[str, Any]) -> None:
        """Chooses the published file for the requested head, which must have these options."""
        urls = PUBLISHED[self.name].urls if self.name in PUBLISHED else {}
        head = self.head
        if head is None or self.url is None or self.url != urls.get("linear"):
            return
        wanted, fitted = check_head_options(head, options), check_head_options(head, {})
        fixed = [key for key in HEADS[head].fixed_options if wanted[key] != fitted[key]]
        if head == "crt" and head not in urls:
            raise UsageError(
                f"{self.name} has no published crt head (published: {', '.join(urls)}); fit one "
                "with timm_lt.fit_head('crt', ...)"
            )
        if head in urls and fixed:
            raise UsageError(
                f"the published {head} head of {self.name} was fitted with "
                f"{fixed[0]}={fitted[fixed[0]]!r}, which cannot change afterwards"
            )
        self.own_head = head in urls and head != "linear"
        self.url = urls[head] if self.own_head else self.url

    def read(self, expected: Mapping[str, Tensor]) -> Weights | None:
        """Reads the weights, with the names and shapes of ``expected``; None if timm reads them."""

        def load(path: Path) -> Weights:
            file = read_weights(path, self.url)
            return file.select(expected, self.name).fit(expected, self.name)

        if self.repo is not None:
            folder = self.repo.download(head=self.head)
            self.folder = folder if BLOCK in read_config(folder) else None
            self.weights = load(folder / WEIGHTS)
        elif self.url is not None:
            self.weights = read_url(self.url, load, self.cache_dir)
        elif self.file is not None:
            self.weights = load(self.file)
        if self.weights is not None and self.weights.scale is not None and self.head != "lws":
            place = self.url or self.file
            raise UsageError(f"{place} has the learned scales of an lws head; pass head='lws'")
        return self.weights

    def put_head(self, model: nn.Module, head: str, options: dict[str, Any]) -> nn.Module:
        """Sets the head of a model whose weights are loaded."""
        if self.folder is not None:
            return set_head(model, load_heads(self.folder, head, model, **options))
        new = get_head(set_head(model, head, **options))
        if self.weights is not None and isinstance(new, Head):
            if self.weights.scale is not None:
                set_scale(new, self.weights.scale)
            if self.own_head:
                new.backbone_statistics = batch_norm_statistics(self.weights.tensors)
        return model


def set_scale(head: Head, scale: Tensor) -> Head:
    """Sets the learned scales (C,) of an lws head; returns the head."""
    head.load_state_dict({**head.state_dict(), "scale": scale})
    return head


def batch_norm_statistics(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the batch-norm statistics among the tensors of a model."""
    return {key: value for key, value in tensors.items() if is_statistic(key)}
