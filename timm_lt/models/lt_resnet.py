"""ResNets and ResNeXts of the long-tail papers, registered with timm under ``lt_*`` names.

Each is one of timm's ResNets, so its weights load into plain timm, or one of
:mod:`timm_lt.models.networks`, which timm lacks. ``timm.create_model`` takes ``head=`` and its
options, too. timm shows the name of this module in ``list_modules``: it must not be one of timm's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    model_entrypoint,
    register_model,
)
from torch import Tensor, nn

from timm_lt.checkpoint import WEIGHTS, TimmBase
from timm_lt.heads import check_head_options, set_head
from timm_lt.models.create import find_entrypoint, split_options
from timm_lt.models.networks import (
    ANY_BASE,
    BRANCH_SCALE,
    CifarResNet,
    SpatialAttention,
    attach_attention,
    create_bilateral,
    unpair,
)
from timm_lt.models.pretrained import PUBLISHED, PretrainedSource, Published


@dataclass(frozen=True)
class Architecture:
    """A registered architecture: the ``base`` of timm, or what ``make`` makes of its arguments.

    ``reduction`` is the image size divided by that of the last feature map.
    """

    doc: str
    base: TimmBase | None = None
    make: Callable[..., nn.Module] | None = None
    first_conv: str = "conv1"
    reduction: int = 32
    feature_cfg: dict[str, Any] = field(default_factory=dict)

    def build(self, **options: Any) -> nn.Module:
        """Builds the model with timm's usual arguments, without weights."""
        if self.make is not None:
            return self.make(**options)
        assert self.base is not None
        entrypoint = model_entrypoint(self.base.architecture)
        model: nn.Module = entrypoint(pretrained=False, **{**self.base.model_args, **options})
        return model


def _oltr_resnet10(*, spatial: SpatialAttention = "convolution", **options: Any) -> nn.Module:
    return attach_attention(ARCHITECTURES["lt_resnet10"].build(**options), spatial=spatial)


def _bilateral(
    *, base: str = "resnet18", branch_scale: float = BRANCH_SCALE, **options: Any
) -> nn.Module:
    plain = find_entrypoint(base.partition(".")[0])(**options)
    model = create_bilateral(plain, branch_scale=branch_scale, fresh=True)
    # A checkpoint records the registered name instead.
    model.__dict__.pop("timm_base", None)
    return model


def _plain(doc: str, architecture: str, *layers: int, **more: Any) -> Architecture:
    """Describes a ResNet of timm, with other numbers of blocks per stage if there are any."""
    return Architecture(
        doc, TimmBase(architecture, {"layers": [*layers]} if layers else {}), **more
    )


CIFAR: dict[str, Any] = {"reduction": 4, "feature_cfg": {"out_indices": (0, 1, 2, 3)}}
# Fields of a pretrained configuration about the images.
IMAGE_KEYS = (
    *("input_size", "pool_size", "first_conv", "interpolation", "crop_pct", "crop_mode"),
    *("mean", "std"),
)
ARCHITECTURES = {
    "lt_test_resnet": _plain(
        "timm's ``test_resnet`` (0.4 M parameters): the model of the embedded data set.",
        "test_resnet",
        first_conv="conv1.0",
    ),
    "lt_resnet10": _plain(
        "ResNet-10 as in OLTR and Kang et al.: a ResNet-18 with one block per stage.",
        *("resnet18", 1, 1, 1, 1),
    ),
    "lt_oltr_resnet10": Architecture(
        "ResNet-10 with the modulated attention of OLTR behind its last stage. "
        '``spatial="linear"`` has the published form, for images of 224 pixels only.',
        make=_oltr_resnet10,
    ),
    "lt_resnet32": Architecture(
        "ResNet-32 for CIFAR as in LDAM and BBN; timm has no such architecture.",
        make=CifarResNet,
        **CIFAR,
    ),
    "lt_resnet50": _plain("ResNet-50 as in Kang et al.", "resnet50"),
    "lt_resnet101": _plain("ResNet-101 as in Kang et al.", "resnet101"),
    "lt_resnet152": _plain("ResNet-152 as in Kang et al.", "resnet152"),
    "lt_resnext50": _plain("ResNeXt-50 32x4d as in Kang et al.", "resnext50_32x4d"),
    "lt_resnext101": _plain("ResNeXt-101 32x4d as in Kang et al.", "resnext101_32x4d"),
    "lt_resnext152": _plain(
        "ResNeXt-152 32x4d as in Kang et al.: blocks 3, 8, 36 and 3.",
        *("resnext50_32x4d", 3, 8, 36, 3),
    ),
    "lt_bbn_resnet32": Architecture(
        "Bilateral ResNet-32 for CIFAR as in BBN; trained with sampler and loss ``bilateral``.",
        make=partial(_bilateral, base="lt_resnet32"),
        **CIFAR,
    ),
    "lt_bbn_resnet50": Architecture(
        "Bilateral ResNet-50 as in BBN; trained with sampler and loss ``bilateral``.",
        make=partial(_bilateral, base="resnet50"),
    ),
    ANY_BASE: Architecture(
        "Bilateral network of a model of timm's class ResNet, ``base=`` its name (a ResNet-18).",
        make=_bilateral,
    ),
}


def _cfg(entry: Published) -> dict[str, Any]:
    architecture = ARCHITECTURES[entry.architecture]
    _, height, width = entry.input_size
    images = ("input_size", "crop_pct", "interpolation", "mean", "std")
    return {
        **{key: getattr(entry, key) for key in ("num_classes", "hf_hub_id", *images)},
        "url": entry.urls.get("linear"),
        "origin_url": entry.origin,
        "file": str(entry.folder / WEIGHTS) if entry.folder else None,
        "first_conv": architecture.first_conv,
        "classifier": "fc",
        "pool_size": (height // architecture.reduction, width // architecture.reduction),
    }


default_cfgs = generate_default_cfgs(
    {
        **{name: _cfg(entry) for name, entry in PUBLISHED.items()},
        # Without training data: timm's default normalisation.
        ANY_BASE: {"input_size": (3, 224, 224), "first_conv": "conv1", "classifier": "fc"},
    }
)


def _create(
    variant: str, pretrained: bool = False, *, head: str | None = None, **kwargs: Any
) -> nn.Module:
    """Builds an architecture, loads its weights, and puts the head on it."""
    if variant == ANY_BASE and kwargs.get("pretrained_cfg") is None:
        # The images are those of the base.
        base = get_pretrained_cfg(kwargs.get("base", ANY_BASE))
        images = {} if base is None else {key: getattr(base, key) for key in IMAGE_KEYS}
        kwargs["pretrained_cfg_overlay"] = images | (kwargs.get("pretrained_cfg_overlay") or {})
    source = PretrainedSource(variant, head, kwargs) if pretrained else None
    kind = head if source is None else source.kind
    head_options, options = split_options(kind, kwargs)
    if source is not None:
        source.choose_url(head_options)
        if source.url or source.repo:
            # A wrong option raises before anything is downloaded.
            with torch.device("meta"):
                _build(variant, False, **options)
        weights = source.read(expected_state(variant, source.config.num_classes))
        if weights is not None:
            # Without its source: timm would read the weights again.
            overlay = options.get("pretrained_cfg_overlay") or {}
            overlay = {**overlay, "state_dict": weights.tensors, "source": None}
            options["pretrained_cfg_overlay"] = overlay
    model = _build(variant, pretrained, **options)
    if head is None or kind is None:
        return model
    if options.get("features_only"):
        # timm's scripts pass any arguments with it; there is no classifier to replace.
        check_head_options(kind, head_options)
        return model
    if source is None or model.num_classes != source.config.num_classes:
        return set_head(model, kind, **head_options)
    return source.put_head(model, head, head_options)


def _build(variant: str, pretrained: bool, **options: Any) -> nn.Module:
    architecture = ARCHITECTURES[variant]
    feature_cfg = dict(ARCHITECTURES.get(options.get("base", ""), architecture).feature_cfg)
    model: nn.Module = build_model_with_cfg(
        architecture.build, variant, pretrained, feature_cfg=feature_cfg, **options
    )
    for module in model.modules():
        # The loaded weights would stay in memory with the configuration.
        module.__dict__.get("pretrained_cfg", {}).pop("state_dict", None)
    if options.get("features_only"):
        unpair(model)
    if architecture.base is not None:
        model.__dict__["timm_base"] = architecture.base
    return model


def expected_state(name: str, num_classes: int) -> dict[str, Tensor]:
    """Returns the state dict of a registered architecture on the meta device: names and shapes."""
    with torch.device("meta"):
        model = ARCHITECTURES[name.partition(".")[0]].build(num_classes=num_classes)
    state: dict[str, Tensor] = model.state_dict()
    return state


def _register(name: str) -> Callable[..., nn.Module]:
    """Registers an architecture with timm, which takes name, module and docstring of a function."""

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = ARCHITECTURES[name].doc
    registered: Callable[..., nn.Module] = register_model(entrypoint)
    return registered


# Each is also a function of this module, as in timm's modules.
globals().update({name: _register(name) for name in ARCHITECTURES})
