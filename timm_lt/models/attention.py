"""Modulated attention of OLTR: a block behind the last stage of a ResNet."""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet
from torch import Tensor, nn

from timm_lt.utils.checks import UsageError, check_choice, check_integer

SpatialAttention = Literal["convolution", "linear"]
# Name of the block in the last stage, e.g. layer4.attention.
ATTENTION = "attention"
# Height and width of a ResNet's last map for images of 224 pixels.
PUBLISHED_SIZE = 7


class ModulatedAttention(nn.Module):
    """Adds to a feature map what it sees of itself, where it matters: ``y = x + m ⊙ SA(x)``.

    ``SA`` is self-attention over the P = H W positions with embedded Gaussians,
    ``SA(x)_p = W_o Σ_q softmax_q(θ(x_p)·φ(x_q)) g(x_q)``, where θ, φ and g are 1×1 convolutions to
    ``channels // reduction`` channels. ``m`` is a weight for each position, the same for all
    channels:

    - ``spatial="convolution"``: ``m = P / 49 · softmax_p(a·x_p)``, at any map size. The factor is 1
      on the 7×7 map of the paper; with it the mean weight is 1/49 on every map, so that a model
      means the same at another image size.
    - ``spatial="linear"``: ``m = softmax_p(A vec(x) + b)_p`` with A (49, 49 channels), as
      published. It takes 7×7 maps only, those of a ResNet on images of 224 pixels.

    ``W_o`` starts at zero: the block is the identity until it is trained. φ and a have no bias,
    since softmax cancels it.

    Args:
        channels: Channels of the map, >= 2.
        reduction: What they are divided by inside the self-attention, from 1 to ``channels``; 2 in
            the paper.
        spatial: How positions are weighted.
        device: Where the parameters are created.
        dtype: The type of the parameters.

    Shape:
        (N, channels, H, W) to the same.

    Raises:
        UsageError: If a number is out of range; by the forward pass, if ``spatial="linear"`` gets
            a map that is not 7×7.

    References:
        Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019,
        https://arxiv.org/abs/1904.05160; self-attention: Wang et al., Non-local Neural Networks,
        CVPR 2018, https://arxiv.org/abs/1711.07971

    >>> x = torch.randn(2, 8, 5, 4)
    >>> torch.equal(ModulatedAttention(8)(x), x)
    True
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 2,
        spatial: SpatialAttention = "convolution",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("channels", channels, minimum=2)
        check_integer("reduction", reduction, 1, channels)
        check_choice("spatial", spatial, get_args(SpatialAttention))
        self.linear = spatial == "linear"
        width, positions = channels // reduction, PUBLISHED_SIZE**2
        self.query = nn.Conv2d(channels, width, 1, device=device, dtype=dtype)
        self.key = nn.Conv2d(channels, width, 1, bias=False, device=device, dtype=dtype)
        self.value = nn.Conv2d(channels, width, 1, device=device, dtype=dtype)
        self.output = nn.Conv2d(width, channels, 1, device=device, dtype=dtype)
        self.spatial: nn.Module
        if self.linear:
            self.spatial = nn.Linear(positions * channels, positions, device=device, dtype=dtype)
        else:
            self.spatial = nn.Conv2d(channels, 1, 1, bias=False, device=device, dtype=dtype)
        nn.init.zeros_(self.output.weight)
        if self.output.bias is not None:
            nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the attended map, (N, channels, H, W)."""
        return x + self.spatial_weights(x) * self.self_attention(x)

    def self_attention(self, x: Tensor) -> Tensor:
        """Returns SA(x), (N, channels, H, W)."""
        # (N, 1, P, width): one head. It keeps the scores in float32, which half precision needs:
        # those of embedded Gaussians are not divided by the root of the width.
        query = self.query(x).flatten(2).transpose(1, 2).unsqueeze(1)
        key = self.key(x).flatten(2).transpose(1, 2).unsqueeze(1)
        value = self.value(x).flatten(2).transpose(1, 2).unsqueeze(1)
        seen = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        seen = seen.squeeze(1).transpose(1, 2).reshape(x.shape[0], -1, x.shape[2], x.shape[3])
        attended: Tensor = self.output(seen)
        return attended

    def spatial_weights(self, x: Tensor) -> Tensor:
        """Returns m, (N, 1, H, W)."""
        height, width = x.shape[2], x.shape[3]
        if self.linear:
            if height != 7 or width != 7:
                raise UsageError(
                    f"spatial='linear' takes 7×7 maps, those of images of 224 pixels, and got "
                    f"{height}×{width}; spatial='convolution' takes any"
                )
            logits = self.spatial(x.flatten(1))
        else:
            logits = self.spatial(x).flatten(1)
        weights: Tensor = logits.softmax(1).to(x.dtype)
        if not self.linear:
            weights = weights * (height * width / 49)
        return weights.view(-1, 1, height, width)

    def extra_repr(self) -> str:
        """Names how positions are weighted when the module is printed."""
        return f"spatial={'linear' if self.linear else 'convolution'!r}"


def attach_attention(
    model: nn.Module, *, reduction: int = 2, spatial: SpatialAttention = "convolution"
) -> nn.Module:
    """Puts modulated attention behind the last stage of a ResNet or ResNeXt, in place.

    It is the stage's last module, such as ``layer4.attention``: the features of the model and of
    timm's ``features_only`` have passed it. Until it is trained, predictions stay as they were. The
    name is what ``model.trained`` of a recipe takes, to train it and the classifier alone.

    Args:
        model: A ``ResNet`` of timm, of any depth and kind of block.
        reduction: As of :class:`ModulatedAttention`.
        spatial: As there.

    Returns:
        The same model.

    Raises:
        UsageError: If the model is another, is bilateral, or has the attention already.

    >>> import timm
    >>> model = attach_attention(timm.create_model("test_resnet", num_classes=3))
    >>> model(torch.zeros(1, 3, 40, 56)).shape
    torch.Size([1, 3])
    """
    if not isinstance(model, ResNet):
        raise UsageError(
            f"modulated attention goes behind the last stage of timm's ResNets and ResNeXts, and "
            f"this is a {type(model).__name__}"
        )
    # The CIFAR ResNet has no fourth stage.
    last: dict[str, Any] = model.feature_info[-1]
    stage = model.get_submodule(last["module"])
    if hasattr(stage, ATTENTION):
        raise UsageError(f"the model has {last['module']}.{ATTENTION} already")
    # By its name, since bilateral networks are built on top of this.
    if any(hasattr(block, "rebalancing") for block in stage.children()):
        raise UsageError(
            "modulated attention does not go behind the branches of a bilateral network"
        )
    weight = next(stage.parameters())
    attention = ModulatedAttention(
        last["num_chs"],
        reduction=reduction,
        spatial=spatial,
        device=weight.device,
        dtype=weight.dtype,
    )
    stage.add_module(ATTENTION, attention.train(model.training))
    return model
