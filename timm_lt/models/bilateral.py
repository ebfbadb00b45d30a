"""Bilateral-branch networks: a ResNet whose last block there is twice, in two branches."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from timm.models._manipulate import checkpoint_seq
from timm.models.resnet import ResNet
from torch import Tensor, nn

from timm_lt.checkpoint import TimmBase
from timm_lt.heads import Head
from timm_lt.models.cifar_resnet import CifarResNet
from timm_lt.utils.checks import UsageError, check_number

# As in equation 1 of the paper; the authors' code has 2.
BRANCH_SCALE = 1.0
# The registered architecture that takes any ResNet as its base.
ANY_BASE = "lt_bbn_resnet"
STAGES = ("layer4", "layer3", "layer2", "layer1")


class BilateralBlock(nn.Module):
    """A residual block once for each branch; it widens the features from d to 2 d channels.

    In evaluation mode, or if ``paired`` is False, every image goes through both branches and
    leaves ``s / 2 (f_c, f_r)``. In training mode the rows of a batch are pairs: an even one goes
    through the conventional branch and leaves ``s (f_c, 0)``, the odd one below it through the
    re-balancing branch and leaves ``s (0, f_r)``.

    Args:
        conventional: The block of the conventional branch.
        rebalancing: That of the re-balancing branch.
        scale: s, > 0.

    Attributes:
        paired: Whether rows are pairs in training mode. Where images come one by one in training
            mode, as in fine-tuning by another loop, set it to False.

    Shape:
        (N, C, H, W) to (N, 2 d, H', W'), N even where rows are pairs.
    """

    def __init__(self, conventional: nn.Module, rebalancing: nn.Module, scale: float) -> None:
        super().__init__()
        self.conventional, self.rebalancing = conventional, rebalancing
        self.scale = scale
        self.paired = True

    def forward(self, x: Tensor) -> Tensor:
        """Returns the features of both branches, or of the pairs of a batch."""
        if self.training and self.paired:
            return self.in_pairs(x[0::2], x[1::2])
        both = torch.cat([self.conventional(x), self.rebalancing(x)], dim=1)
        return both if self.scale == 2 else self.scale / 2 * both

    @torch.jit.unused
    def in_pairs(self, uniform: Tensor, reversed_: Tensor) -> Tensor:
        """Returns the rows (2 B, 2 d, ...) of pairs, from the inputs (B, C, ...) of each stream."""
        if len(uniform) != len(reversed_):
            raise UsageError(
                f"a bilateral network trains on pairs of images, and this batch has "
                f"{len(uniform) + len(reversed_)}: take sampler bilateral and an even batch size"
            )
        f_c = self.scale * self.conventional(uniform)
        f_r = self.scale * self.rebalancing(reversed_)
        zeros = torch.zeros_like(f_c)
        rows = torch.stack([torch.cat([f_c, zeros], 1), torch.cat([zeros, f_r], 1)], dim=1)
        return rows.flatten(0, 1)


class _Bilateral(ResNet):
    """What :func:`create_bilateral` adds to a ResNet: the streams pass the trunk one by one."""

    if TYPE_CHECKING:  # TorchScript takes no such annotation
        layer1: nn.Sequential
        layer2: nn.Sequential
        layer3: nn.Sequential
        layer4: nn.Sequential

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the feature map (N, 2 d, H, W)."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._features_or_pairs(x)
        # TorchScript lacks super().
        x = self.layer1(self.maxpool(self.act1(self.bn1(self.conv1(x)))))
        features: Tensor = self.layer4(self.layer3(self.layer2(x)))
        return features

    @torch.jit.unused
    def _features_or_pairs(self, x: Tensor) -> Tensor:
        blocks: list[nn.Module] = [*self.layer1, *self.layer2, *self.layer3, *self.layer4]
        # Pruned of its last stage, a model has no branches; it may have no block at all.
        last = blocks.pop() if blocks else None
        if not (self.training and isinstance(last, BilateralBlock) and last.paired):
            return super().forward_features(x)
        return last.in_pairs(self._through(blocks, x[0::2]), self._through(blocks, x[1::2]))

    def _through(self, blocks: list[nn.Module], x: Tensor) -> Tensor:
        """Returns what a branch takes of the images of a stream."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        if self.grad_checkpointing:
            checked: Tensor = checkpoint_seq(blocks, x)
            return checked
        for block in blocks:
            x = block(x)
        return x


class BilateralResNet(_Bilateral):
    """timm's ResNet with two branches; :func:`create_bilateral` makes it."""


class BilateralCifarResNet(_Bilateral, CifarResNet):
    """The CIFAR ResNet with two branches; :func:`create_bilateral` makes it."""


KINDS: dict[type[nn.Module], type[_Bilateral]] = {
    ResNet: BilateralResNet,
    CifarResNet: BilateralCifarResNet,
}


def create_bilateral(
    model: nn.Module, *, branch_scale: float = BRANCH_SCALE, fresh: bool = False
) -> nn.Module:
    """Makes a bilateral-branch network (BBN) of a ResNet or ResNeXt, in place.

    All is shared by the branches but the last residual block, which each has for itself, and the
    classifier, whose weight (C, 2 d) is ``(W_c, W_r)``. In evaluation mode it is a timm model like
    any other, with ``num_features`` = 2 d: the logits of an image are ``s / 2 (W_c f_c + W_r f_r) +
    b``, where d are the features of a branch and s is ``branch_scale``.

    In training mode, rows 2 i and 2 i + 1 of a batch are a pair, as sampler ``bilateral`` draws
    them, and have the logits ``z_c = s W_c f_c + b`` and ``z_r = s W_r f_r + b``. The loss
    ``bilateral`` mixes them to ``α z_c + (1 - α) z_r``, which is that of the features
    ``s (α f_c, (1 - α) f_r)``. As in the authors' code, the two streams pass the shared trunk one
    after the other: batch norm normalises each by its own statistics, and its running ones move
    twice. (``forward_intermediates`` does not tell the streams apart before the last block.)

    Args:
        model: A ``ResNet`` of timm, with any of its blocks, or a :class:`CifarResNet`.
        branch_scale: s, > 0; 1 as in equation 1 of the paper. The authors' code has 2, with which
            every feature has its size in evaluation, and the classifier learns four times as fast.
        fresh: Draws the re-balancing block and the classifier anew, as for training from scratch.
            Otherwise both branches begin as the model's last block, and the network computes what
            the model did, in both modes.

    Returns:
        The model.

    Raises:
        UsageError: If the model is no ResNet, is bilateral already, has something behind its last
            residual block, or carries a head.

    References:
        Zhou, Cui, Wei, Chen. BBN: Bilateral-branch network with cumulative learning for long-tailed
        visual recognition. CVPR 2020. https://arxiv.org/abs/1912.02413

    >>> import timm
    >>> model = create_bilateral(timm.create_model("test_resnet", num_classes=3))
    >>> model.num_features, model.train()(torch.zeros(4, 3, 32, 32)).shape
    (192, torch.Size([4, 3]))
    """
    if type(model) not in KINDS:
        raise UsageError(
            f"a bilateral network is made of timm's ResNet or ResNeXt, or of a CifarResNet, not of "
            f"a {type(model).__name__}"
        )
    joint: Any = model.fc
    if isinstance(joint, Head):
        raise UsageError(
            f"the model carries a {joint.kind!r} head: fold it (timm_lt.fold_head), or put it "
            "on the bilateral network"
        )
    scale = check_number("branch_scale", branch_scale, "(0, inf)")
    stages: list[Any] = [model.get_submodule(name) for name in STAGES]
    stage = next(stage for stage in stages if len(stage))
    last = stage[-1]
    if not hasattr(last, "conv1"):
        raise UsageError(
            f"a bilateral network doubles the last residual block, and behind that of this model "
            f"is a {type(last).__name__}"
        )
    twin = copy.deepcopy(last)
    if fresh:
        # As the model's own: it initialises whatever modules are inside. The last batch norms that
        # start at 0 are copies already.
        KINDS[type(model)].init_weights(twin, zero_init_last=False)
    stage[-1] = BilateralBlock(last, twin, scale).train(last.training)
    model.__class__ = KINDS[type(model)]
    _rename(model, scale)
    bilateral: Any = model
    bilateral.num_features *= 2
    bilateral.feature_info[-1]["num_chs"] *= 2
    bilateral.reset_classifier(bilateral.num_classes)
    if isinstance(joint, nn.Linear) and not fresh:
        _share(joint, bilateral.fc, bilateral.global_pool.feat_mult(), scale)
    return model


def _rename(model: nn.Module, scale: float) -> None:
    """Notes how a checkpoint is to build the network again: a registered name, of this base."""
    plain: TimmBase | None = model.__dict__.get("timm_base")
    config: Any = getattr(model, "pretrained_cfg", None)
    if plain is None and config:
        plain = TimmBase(config["architecture"], {})
    if plain is not None:
        options = {"base": plain.architecture, **plain.model_args, "branch_scale": scale}
        model.__dict__["timm_base"] = TimmBase(ANY_BASE, options)


@torch.no_grad()
def _share(joint: nn.Linear, both: nn.Linear, parts: int, scale: float) -> None:
    """Gives each branch the joint classifier, so that the logits stay what they were.

    Some poolings give several parts of features, each of which has become twice as wide.
    """
    for part, weight in zip(both.weight.chunk(parts, 1), joint.weight.chunk(parts, 1), strict=True):
        part.copy_(weight.repeat(1, 2) / scale)
    if joint.bias is not None:
        both.bias.copy_(joint.bias)


def takes_pairs(model: nn.Module) -> bool:
    """Returns whether the rows of a batch are pairs for a model in training mode."""
    return any(isinstance(m, BilateralBlock) and m.paired for m in model.modules())


def unpair(model: nn.Module) -> None:
    """Lets a model take images one by one in training mode too."""
    for module in model.modules():
        if isinstance(module, BilateralBlock):
            module.paired = False
