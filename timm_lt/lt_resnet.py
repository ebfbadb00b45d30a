"""ResNets and ResNeXts of the long-tail papers, registered with timm under ``lt_*`` names.

Each is one of timm's own ResNets, so its weights load into plain timm. ``timm.create_model`` takes
``head=`` and that head's options beside its usual arguments. The file's name is the module name
that timm shows, and must differ from timm's own modules.
"""

from pathlib import Path
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    model_entrypoint,
    register_model,
)
from torch import nn

from timm_lt.checkpoint import CONFIG, WEIGHTS, TimmBase, load_model_head
from timm_lt.heads import set_absent_head, set_head
from timm_lt.model import split_options

CHECKPOINTS = Path(__file__).parent / "checkpoints"


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "lt_test_resnet.glyph_lt": _cfg(
            num_classes=100,
            input_size=(3, 32, 32),
            pool_size=(1, 1),
            crop_pct=1.0,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            first_conv="conv1.0",
            file=str(CHECKPOINTS / "lt_test_resnet.glyph_lt" / WEIGHTS),
        ),
        "lt_resnet10.imagenet_lt": _cfg(),
        "lt_resnet50.imagenet_lt": _cfg(),
        "lt_resnext50.imagenet_lt": _cfg(),
    }
)


def _create(
    variant: str,
    base: TimmBase,
    pretrained: bool = False,
    *,
    head: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Builds one of timm's ResNets under our name, loads its weights, and puts the head on it."""
    head_options, timm_options = split_options(head, kwargs)
    entrypoint = model_entrypoint(base.architecture)
    model: nn.Module = build_model_with_cfg(
        lambda **options: entrypoint(pretrained=False, **{**base.model_args, **options}),
        variant,
        pretrained,
        **timm_options,
    )
    if getattr(model, "num_classes", 0) == 0:
        # With features_only or num_classes=0 there is no classifier for a head to replace.
        return model if head is None else set_absent_head(model, head, **head_options)
    model.__dict__["timm_base"] = base
    if head is None:
        return model
    config: Any = model.pretrained_cfg
    same_classes = model.num_classes == config["num_classes"]
    source = config.get("file")
    if pretrained and same_classes and source and (Path(source).parent / CONFIG).is_file():
        return load_model_head(Path(source).parent, model, head, **head_options)
    return set_head(model, head, **head_options)


@register_model
def lt_test_resnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Timm's ``test_resnet`` (0.4 M parameters): the model of the embedded data set."""
    return _create("lt_test_resnet", TimmBase("test_resnet", {}), pretrained, **kwargs)


@register_model
def lt_resnet10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-10 as in OLTR and Kang et al.: a ResNet-18 with one block per stage."""
    base = TimmBase("resnet18", {"layers": [1, 1, 1, 1]})
    return _create("lt_resnet10", base, pretrained, **kwargs)


@register_model
def lt_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 as in Kang et al., ICLR 2020."""
    return _create("lt_resnet50", TimmBase("resnet50", {}), pretrained, **kwargs)


@register_model
def lt_resnext50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNeXt-50 32x4d as in Kang et al., ICLR 2020."""
    return _create("lt_resnext50", TimmBase("resnext50_32x4d", {}), pretrained, **kwargs)
