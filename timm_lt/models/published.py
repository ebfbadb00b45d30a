"""Published names, as ``hub_configs/`` states them: data, normalisation, weights, heads, figures.

Each file ``<architecture>.<tag>.yaml`` with a ``published:`` block is one name that timm's registry
gets; the folder is the only place that states any of it, and ships inside of the wheel.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from timm_lt.utils.checks import UsageError, unknown_name
from timm_lt.utils.files import read_yaml

PUBLISHED_BLOCK = "published"
CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"


@dataclass(frozen=True)
class PublishedHead:
    """A head of a published backbone.

    Attributes:
        url: A file with the whole model that has this head; None for a head that needs no file of
            its own, that lies in the packaged checkpoint, or that has to be fitted.
        quoted: Test accuracy that ``quoted_from`` gives, fractions by shot group and "all".
        measured: Test accuracy that this project has measured, likewise.
    """

    url: str | None = None
    quoted: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """A published name.

    Attributes:
        name: ``<architecture>.<tag>``, the file's name.
        architecture: A registered ``lt_*`` architecture.
        data: The training data.
        training: How the representation was trained, in words.
        num_classes: Number of classes.
        input_size: Channels, height and width of the images.
        crop_pct: Share of the resized image that the centre crop keeps.
        interpolation: How images are resized.
        mean: Of each channel, to subtract.
        std: Of each channel, to divide by.
        heads: The heads that are published or quoted; ``linear`` is the joint classifier.
        packaged: The weights are a decoupled checkpoint inside of this package.
        hf_hub_id: The Hub repo with the decoupled checkpoint, ``namespace/name``, with
            ``@revision`` for a certain one. It has precedence over URLs.
        origin: Who published the weights.
        quoted_from: Where the quoted figures are from.
        measured_with: How the measured figures were measured.
        formerly: Former names, which warn and load this one.
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
    formerly: tuple[str, ...] = ()

    @property
    def folder(self) -> Path | None:
        """The packaged checkpoint, if there is one."""
        return CHECKPOINTS / self.name if self.packaged else None

    @property
    def urls(self) -> dict[str, str]:
        """Files by head."""
        return {name: head.url for name, head in self.heads.items() if head.url}

    def pretrained_cfg(self) -> dict[str, Any]:
        """Returns what timm's registry holds of the name, without the architecture's own facts."""
        return {
            "url": self.urls.get("linear"),
            "hf_hub_id": self.hf_hub_id,
            "num_classes": self.num_classes,
            "input_size": self.input_size,
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
            "mean": self.mean,
            "std": self.std,
            "origin_url": self.origin,
        }


def hub_configs(inside: str = "") -> list[Path]:
    """Returns the YAML files of ``hub_configs/``: in an installed package, or in the repository.

    Args:
        inside: A folder in it, e.g. ``"tables"``; none is ``hub_configs/`` itself.
    """
    package = Path(__file__).parents[1]
    packaged = package / "hub_configs"
    folder = packaged if packaged.is_dir() else package.parent / "hub_configs"
    return sorted((folder / inside).glob("*.yaml"), key=lambda path: path.stem)


def read_published(path: Path) -> Published | None:
    """Reads the ``published:`` block of a file of ``hub_configs/``; None if it has none.

    Raises:
        UsageError: If a key is unknown or missing, or the architecture is not the file's.
    """
    block = read_yaml(path).get(PUBLISHED_BLOCK)
    if block is None:
        return None
    where = f"{path}: {PUBLISHED_BLOCK}"
    heads = {
        name: PublishedHead(**_checked(PublishedHead, values or {}, f"{where}.heads.{name}"))
        for name, values in (block.get("heads") or {}).items()
    }
    fields = _checked(Published, {**block, "name": path.stem, "heads": heads}, where)
    for key, hint in get_type_hints(Published).items():
        if isinstance(fields.get(key), list) and str(hint).startswith("tuple"):
            fields[key] = tuple(fields[key])
    published = Published(**fields)
    if published.architecture != path.stem.partition(".")[0]:
        raise UsageError(f"{where}.architecture must be {path.stem.partition('.')[0]!r}")
    return published


def _checked(cls: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    """Checks that a mapping has the keys of a dataclass."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise unknown_name(f"key of {where}:", key, list(fields))
    for key, f in fields.items():
        optional = f.default is not dataclasses.MISSING or f.default_factory is not (
            dataclasses.MISSING
        )
        if key not in values and not optional:
            raise UsageError(f"{where}.{key} is missing")
    return dict(values)


def _read_all() -> dict[str, Published]:
    entries = (read_published(path) for path in hub_configs())
    return {entry.name: entry for entry in entries if entry is not None}


PUBLISHED = _read_all()
