"""Weights of a pretrained model: from the Hub repo, URL or file that its configuration names.

timm would cache a URL by its last part, which two published files share, would read a local pickle
whatever it holds, and would ask an unreachable Hub for a pickle as well.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models._builder import resolve_pretrained_cfg
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
from timm_lt.models.download import download
from timm_lt.models.published import PUBLISHED
from timm_lt.models.repo import Repo
from timm_lt.models.third_party import Weights, check_weights, read_weights
from timm_lt.utils.checks import UsageError, unknown_name


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
