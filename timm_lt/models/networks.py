"""Networks of the long-tail papers that timm lacks, as timm ResNets.

Modulated attention (OLTR), the CIFAR ResNet, and bilateral-branch networks (BBN).
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from timm_lt.checkpoint import TimmBase
from timm_lt.heads import Head
from timm_lt.utils.checks import UsageError, check_choice, check_integer, check_number

SpatialAttention = Literal["convolution", "linear"]
# Height and width of a ResNet's last feature map for images of 224 pixels.
PUBLISHED_SIZE = 7


class ModulatedAttention(nn.Module):
    """Spatially weighted self-attention, ``y = x + m ⊙ SA(x)`` of :func:`attach_attention`."""

    def __init__(
        self, channels: int, *, reduction: int = 2, spatial: SpatialAttention = "convolution"
    ) -> None:
        super().__init__()
        check_integer("channels", channels, minimum=2)
        check_integer("reduction", reduction, 1, channels)
        check_choice("spatial", spatial, get_args(SpatialAttention))
        self.linear = spatial == "linear"
        width, positions = channels // reduction, PUBLISHED_SIZE**2
        self.query = nn.Conv2d(channels, width, 1)
        self.key = nn.Conv2d(channels, width, 1, bias=False)
        self.value = nn.Conv2d(channels, width, 1)
        self.output = nn.Conv2d(width, channels, 1)
        self.spatial: nn.Module = (
            nn.Linear(positions * channels, positions)
            if self.linear
            else nn.Conv2d(channels, 1, 1, bias=False)
        )
        for parameter in self.output.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the attended map, (N, channels, H, W)."""
        return x + self.spatial_weights(x) * self.self_attention(x)

    def self_attention(self, x: Tensor) -> Tensor:
        """Returns SA(x), (N, channels, H, W)."""
        # (N, 1, P, width): one head, for which torch keeps the scores in float32. Half precision
        # needs that, since embedded Gaussians are not divided by the root of the width.
        query, key, value = (
            projection(x).flatten(2).transpose(1, 2).unsqueeze(1)
            for projection in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        mixed = mixed.squeeze(1).transpose(1, 2).reshape(x.shape[0], -1, x.shape[2], x.shape[3])
        attended: Tensor = self.output(mixed)
        return attended

    def spatial_weights(self, x: Tensor) -> Tensor:
        """Returns m, (N, 1, H, W)."""
        height, width = x.shape[2:]
        if self.linear and (height, width) != (7, 7):
            raise UsageError(
                f"spatial='linear' only takes 7×7 maps (images of 224 pixels), got "
                f"{height}×{width}; use spatial='convolution'"
            )
        scores: Tensor = self.spatial(x.flatten(1) if self.linear else x).flatten(1)
        # The factor is 1 for 7×7 maps.
        weights = height * width / 49 * scores.softmax(1).to(x.dtype)
        return weights.view(-1, 1, height, width)


def attach_attention(
    model: nn.Module, *, reduction: int = 2, spatial: SpatialAttention = "convolution"
) -> nn.Module:
    """Puts modulated attention behind the last stage of a ResNet or ResNeXt, in place.

    The feature map becomes ``y = x + m ⊙ SA(x)`` with self-attention
    ``SA(x)_p = W_o Σ_q softmax_q(θ(x_p)·φ(x_q)) g(x_q)`` over the P = H W positions. θ, φ and g are
    1×1 convolutions to ``channels // reduction`` channels. ``m`` has one weight per position:

    - ``spatial="convolution"``: ``m = P / 49 · softmax_p(a·x_p)``, for any map size. The factor is
      1 for the 7×7 map of the paper and keeps the mean weight at 1/49 for other image sizes.
    - ``spatial="linear"``: ``m = softmax_p(A vec(x) + b)_p`` with A (49, 49 channels), as
      published, for 7×7 maps only.

    ``W_o`` starts at zero, so predictions do not change until the attention is trained. φ and a
    have no bias, since softmax cancels it. The attention becomes the last module of the stage, such
    as ``layer4.attention``, the name for ``model.trained`` in a recipe. It also applies to the
    features of timm's ``features_only``.

    Args:
        model: A ``ResNet`` of timm, of any depth and kind of block.
        reduction: Divisor of the channels inside the self-attention, from 1 to their number.
        spatial: Form of the spatial weights.

    Returns:
        The same model.

    Raises:
        UsageError: If the model is not a ``ResNet``, is bilateral, or already has the attention.

    References:
        Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019,
        https://arxiv.org/abs/1904.05160; self-attention: Wang et al., Non-local Neural Networks,
        CVPR 2018, https://arxiv.org/abs/1711.07971

    >>> import timm
    >>> model = attach_attention(timm.create_model("test_resnet", num_classes=3))
    >>> model(torch.zeros(1, 3, 40, 56)).shape
    torch.Size([1, 3])
    """
    if not isinstance(model, ResNet) or isinstance(model, _Bilateral):
        raise UsageError(
            "modulated attention is for timm's ResNets and ResNeXts, not for a "
            f"{type(model).__name__}"
        )
    # The CIFAR ResNet has no fourth stage.
    last: dict[str, Any] = model.feature_info[-1]
    stage = model.get_submodule(last["module"])
    if hasattr(stage, "attention"):
        raise UsageError(f"the model already has {last['module']}.attention")
    attention = ModulatedAttention(last["num_chs"], reduction=reduction, spatial=spatial)
    stage.add_module("attention", attention.to(next(stage.parameters())).train(model.training))
    return model


class ZeroPadShortcut(nn.Module):
    """Shortcut "option A" without parameters, to (N, C + 2 padding, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """Returns every second pixel, padded with channels of zeros."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class CifarResNet(ResNet):
    """CIFAR ResNet of He et al., section 4.2, for small images.

    A 3x3 convolution with 16 channels and no max pooling, three stages of n basic blocks with 16,
    32 and 64 channels and strides 1, 2 and 2, pooling, and the linear classifier ``fc``: depth
    6n + 2, with n = 5 the ResNet-32 of LDAM and BBN. The weights of the convolutions are drawn from
    N(0, 2 / fan_in). The four features (stem and stages) have strides 1, 1, 2 and 4.

    References:
        He, Zhang, Ren, Sun. Deep residual learning for image recognition. CVPR 2016.
        https://arxiv.org/abs/1512.03385
        He, Zhang, Ren, Sun. Delving deep into rectifiers. ICCV 2015.
        https://arxiv.org/abs/1502.01852

    >>> CifarResNet(layers=(1, 1, 1))(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        layers: Sequence[int] = (5, 5, 5),
        num_classes: int = 10,
        in_chans: int = 3,
        **options: Any,
    ) -> None:
        if len(layers) != 3:
            raise UsageError(f"layers must be three numbers, one per stage, got {tuple(layers)}")
        super().__init__(
            BasicBlock,  # type: ignore[arg-type]  # timm's annotation misses type[]
            tuple(layers),
            num_classes=num_classes,
            in_chans=in_chans,
            # timm's plain stem always has 64 channels, the deep one 2 * stem_width. The deep one
            # gives bn1 and the stages the right width; its convolutions are replaced below.
            stem_type="deep",
            stem_width=8,
            channels=(16, 32, 64),
            **{"zero_init_last": False, **options},
        )
        weight: Any = self.bn1.weight
        self.set_submodule("conv1", nn.Conv2d(in_chans, 16, 3, padding=1, bias=False).to(weight))
        self.set_submodule("maxpool", nn.Identity())
        self.set_submodule("layer2.0.downsample", ZeroPadShortcut(8))
        self.set_submodule("layer3.0.downsample", ZeroPadShortcut(16))
        # timm's forward runs four stages; it leaves an empty one like this when it prunes.
        self.set_submodule("layer4", nn.Sequential())
        for feature, reduction in zip(self.feature_info, (1, 1, 2, 4), strict=True):
            feature["reduction"] = reduction
        self.init_weights(options.get("zero_init_last", False))

    def init_weights(self, zero_init_last: bool = False) -> None:
        """Draws the weights of the convolutions; the last batch norms of blocks can start at 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            elif zero_init_last and isinstance(module, BasicBlock):
                module.zero_init_last()

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, *args: Any, **kwargs: Any
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Returns the intermediates as timm's ResNet, but of four features instead of five."""
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        return super().forward_intermediates(x, taken, *args, **kwargs)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Prunes as timm's ResNet, with the indices of ``forward_intermediates``."""
        taken, last = feature_take_indices(len(self.feature_info), indices)
        if last == 3 and not prune_head:
            return taken  # timm would also drop the head, as if it pruned a fourth stage
        return super().prune_intermediate_layers(taken, prune_norm, prune_head)


# As in equation 1 of the BBN paper; the authors' code has 2.
BRANCH_SCALE = 1.0
# The registered bilateral architecture of any ResNet.
ANY_BASE = "lt_bbn_resnet"


class BilateralBlock(nn.Module):
    """One residual block per branch; widens the features from d to 2 d channels.

    In evaluation mode, or if ``paired`` is False, every image passes both branches and gives
    ``s / 2 (f_c, f_r)`` with ``scale`` s. In training mode the rows of a batch are pairs: even rows
    pass the conventional branch and give ``s (f_c, 0)``, odd rows pass the re-balancing branch and
    give ``s (0, f_r)``. Shape: (N, C, H, W) to (N, 2 d, H', W').
    """

    def __init__(self, conventional: nn.Module, rebalancing: nn.Module, scale: float) -> None:
        super().__init__()
        self.conventional, self.rebalancing = conventional, rebalancing
        self.scale = scale
        self.paired = True

    def forward(self, x: Tensor) -> Tensor:
        """Returns the features of both branches, or those of pairs."""
        if self.training and self.paired:
            return self.in_pairs(x[0::2], x[1::2])
        both = torch.cat([self.conventional(x), self.rebalancing(x)], dim=1)
        return both if self.scale == 2 else self.scale / 2 * both

    def in_pairs(self, uniform: Tensor, reversed_: Tensor) -> Tensor:
        """Returns the rows (2 B, 2 d, ...) of pairs, from the inputs (B, C, ...) of each stream."""
        if len(uniform) != len(reversed_):
            raise UsageError(
                f"a bilateral network trains on pairs of images, but this batch has "
                f"{len(uniform) + len(reversed_)}; use sampler bilateral and an even batch size"
            )
        f_c = self.scale * self.conventional(uniform)
        f_r = self.scale * self.rebalancing(reversed_)
        zeros = torch.zeros_like(f_c)
        rows = torch.stack([torch.cat([f_c, zeros], 1), torch.cat([zeros, f_r], 1)], dim=1)
        return rows.flatten(0, 1)


class _Bilateral(ResNet):
    """ResNet with two branches, whose two streams of images pass the trunk one after the other."""

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the feature map (N, 2 d, H, W)."""
        blocks = _blocks(self)
        # A model without its last stage, as pruned by timm, has no branches.
        last = blocks.pop() if blocks else None
        if not (self.training and isinstance(last, BilateralBlock) and last.paired):
            return super().forward_features(x)
        return last.in_pairs(self._through(blocks, x[0::2]), self._through(blocks, x[1::2]))

    def _through(self, blocks: list[nn.Module], x: Tensor) -> Tensor:
        """Returns the input of a branch, for the images of its stream."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        if self.grad_checkpointing:
            return checkpoint_seq(blocks, x)  # type: ignore[no-any-return]
        return nn.Sequential(*blocks)(x)  # type: ignore[no-any-return]


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the residual blocks of a ResNet."""
    return [b for n in (1, 2, 3, 4) for b in model.get_submodule(f"layer{n}").children()]


class BilateralResNet(_Bilateral):
    """timm's ResNet with two branches; made by :func:`create_bilateral`."""


class BilateralCifarResNet(_Bilateral, CifarResNet):
    """The CIFAR ResNet with two branches; made by :func:`create_bilateral`."""


KINDS: dict[type[nn.Module], type[_Bilateral]] = {
    ResNet: BilateralResNet,
    CifarResNet: BilateralCifarResNet,
}


def create_bilateral(
    model: nn.Module, *, branch_scale: float = BRANCH_SCALE, fresh: bool = False
) -> nn.Module:
    """Makes a bilateral-branch network (BBN) from a ResNet or ResNeXt, in place.

    The branches share everything but the last residual block and the classifier, whose weight
    (C, 2 d) is ``(W_c, W_r)``. In evaluation mode it is a usual timm model with ``num_features``
    = 2 d and logits ``s / 2 (W_c f_c + W_r f_r) + b``, where f_c and f_r (d,) are the features of
    the branches and s is ``branch_scale``.

    In training mode, rows 2 i and 2 i + 1 of a batch are a pair, as drawn by sampler ``bilateral``.
    Their logits are ``z_c = s W_c f_c + b`` and ``z_r = s W_r f_r + b``, which the loss
    ``bilateral`` mixes to ``α z_c + (1 - α) z_r``. As in the authors' code, the two streams pass
    the shared trunk one after the other: batch norm normalises each by its own statistics, and
    updates its running ones twice; but not in ``forward_intermediates``.

    Args:
        model: A ``ResNet`` of timm, with any of its blocks, or an ``lt_resnet32``.
        branch_scale: s, > 0; 1 as in equation 1 of the paper. With 2, as in the authors' code,
            features keep their size in evaluation, and the classifier learns four times as fast.
        fresh: Draw the re-balancing block and the classifier anew, for training from scratch.
            Otherwise both branches start as the model's last block, and the network computes the
            same logits as the model, in both modes.

    Returns:
        The model.

    Raises:
        UsageError: If the model is not a ResNet, is already bilateral, has a module behind its last
            residual block, or carries a head.

    References:
        Zhou, Cui, Wei, Chen. BBN: Bilateral-branch network with cumulative learning for long-tailed
        visual recognition. CVPR 2020. https://arxiv.org/abs/1912.02413

    >>> import timm
    >>> model = create_bilateral(timm.create_model("test_resnet", num_classes=3))
    >>> model.num_features, model.train()(torch.zeros(4, 3, 32, 32)).shape
    (192, torch.Size([4, 3]))
    """
    scale = check_number("branch_scale", branch_scale, "(0, inf)")
    joint = getattr(model, "fc", None)
    last: Any = _blocks(model)[-1] if type(model) in KINDS else None
    problem = None
    if last is None:
        problem = f"not from a {type(model).__name__}"
    elif isinstance(joint, Head):
        problem = f"without a {joint.kind!r} head: fold it first (timm_lt.fold_head)"
    elif not hasattr(last, "conv1"):
        problem = f"whose last module is a residual block, not a {type(last).__name__}"
    if problem is not None:
        raise UsageError(f"a bilateral network is made from a ResNet of timm or CIFAR, {problem}")
    copied = copy.deepcopy(last)
    if fresh:
        # As the model does, but for last batch norms that start at 0, which are copied.
        KINDS[type(model)].init_weights(copied, zero_init_last=False)
    path = next(path for path, module in model.named_modules() if module is last)
    model.set_submodule(path, BilateralBlock(last, copied, scale).train(last.training))
    _record_base(model, scale)
    model.__class__ = KINDS[type(model)]
    bilateral: Any = model
    bilateral.num_features *= 2
    bilateral.feature_info[-1]["num_chs"] *= 2
    bilateral.reset_classifier(bilateral.num_classes)
    if isinstance(joint, nn.Linear) and not fresh:
        _share(joint, bilateral.fc, bilateral.global_pool.feat_mult(), scale)
    return model


def _record_base(model: nn.Module, scale: float) -> None:
    """Records the registered architecture and the base with which a checkpoint is built again."""
    base: TimmBase | None = model.__dict__.get("timm_base")
    config: Any = getattr(model, "pretrained_cfg", None)
    if base is None and config:
        base = TimmBase(config["architecture"], {})
    if base is not None:
        options = {"base": base.architecture, **base.model_args, "branch_scale": scale}
        model.__dict__["timm_base"] = TimmBase(ANY_BASE, options)


@torch.no_grad()
def _share(joint: nn.Linear, both: nn.Linear, parts: int, scale: float) -> None:
    """Copies the joint classifier to both branches, so that the logits do not change.

    Some poolings concatenate several parts of features, each of which is now twice as wide.
    """
    for part, weight in zip(both.weight.chunk(parts, 1), joint.weight.chunk(parts, 1), strict=True):
        part.copy_(weight.repeat(1, 2) / scale)
    if joint.bias is not None:
        both.bias.copy_(joint.bias)


def unpair(model: nn.Module) -> None:
    """Makes a model take single images in training mode, too."""
    for module in model.modules():
        if isinstance(module, BilateralBlock):
            module.paired = False
