"""Published names, read from ``hub_configs/``: data, normalisation, weights, heads, figures.

Each file ``<architecture>.<tag>.yaml`` with a ``published:`` block is one name in timm's registry.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm_lt.utils.files import read_yaml

PUBLISHED_BLOCK = "published"
CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"


@dataclass(frozen=True)
class PublishedHead:
    """A head of a published backbone.

    Attributes:
        url: A file with the whole model that has this head; None for a head without a file of its
            own, in the packaged checkpoint, or to be fitted.
        quoted: Test accuracy from ``quoted_from``, fractions by shot group and "all".
        measured: Test accuracy measured by this project, likewise.
    """

    url: str | None = None
    quoted: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """A published name; the fields of the images are those of timm's ``PretrainedCfg``.

    Attributes:
        name: ``<architecture>.<tag>``, the file's name.
        architecture: A registered ``lt_*`` architecture.
        data: The training data.
        training: Training of the representation, in words.
        heads: The published or quoted heads; ``linear`` is the joint classifier.
        packaged: The weights are a decoupled checkpoint in this package.
        hf_hub_id: Hub repo of the decoupled checkpoint, ``namespace/name`` or
            ``namespace/name@revision``. It has precedence over URLs.
        origin: URL of the publisher.
        quoted_from: Source of the quoted figures.
        measured_with: Protocol of the measured figures.
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
        """URLs by head."""
        return {name: head.url for name, head in self.heads.items() if head.url}


def hub_configs(inside: str = "") -> list[Path]:
    """Returns the YAML files of ``hub_configs/``, or of a folder inside of it."""
    package = Path(__file__).parents[1]
    packaged = package / "hub_configs"
    folder = packaged if packaged.is_dir() else package.parent / "hub_configs"
    return sorted((folder / inside).glob("*.yaml"), key=lambda path: path.stem)


def read_published(path: Path) -> Published | None:
    """Reads the ``published:`` block of a file of ``hub_configs/``; None if it has none."""
    block = read_yaml(path).get(PUBLISHED_BLOCK)
    if block is None:
        return None
    heads = {name: PublishedHead(**(part or {})) for name, part in block.pop("heads", {}).items()}
    fields: dict[str, Any] = dict(block)
    for key in ("input_size", "mean", "std"):
        fields[key] = tuple(fields[key])
    return Published(name=path.stem, heads=heads, **fields)


PUBLISHED = {
    entry.name: entry for path in hub_configs() if (entry := read_published(path)) is not None
}
