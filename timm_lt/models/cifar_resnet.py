"""The small ResNet for 32-pixel images that the CIFAR-LT papers train, as a timm ResNet."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from timm_lt.utils.checks import UsageError


class ZeroPadShortcut(nn.Module):
    """Halves the resolution and adds channels of zeros: the shortcut "option A", no parameters.

    Args:
        padding: Channels of zeros on each side, before and after the old ones.

    Shape:
        (N, C, H, W) to (N, C + 2 padding, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """Returns every second pixel, between channels of zeros."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class CifarResNet(ResNet):
    """Classifies small images by the CIFAR ResNet of He et al., section 4.2.

    A 3x3 convolution with 16 channels and no max pooling, three stages of n basic blocks
    ``x <- relu(shortcut(x) + bn(conv(relu(bn(conv(x))))))`` with 16, 32 and 64 channels and strides
    1, 2 and 2, pooling, and the linear classifier ``fc``: depth 6n + 2. LDAM and BBN use
    ``layers=(5, 5, 5)``, their ResNet-32 (464,154 parameters with 10 classes).

    The weights of the convolutions are drawn from N(0, 2 / fan_in) (He et al., ICCV 2015), every
    batch normalisation starts as the identity, and ``fc`` as timm's. All of timm's model interface
    works; there are four features (stem and stages) at strides 1, 1, 2 and 4, so timm's
    ``features_only`` needs ``feature_cfg={"out_indices": (0, 1, 2, 3)}``.

    Args:
        layers: Basic blocks per stage, three numbers.
        num_classes: Outputs of ``fc``; 0 for none, the model then returns its features.
        in_chans: Channels of the images.
        global_pool: timm's name of the pooling, ``"avg"`` in the papers.
        drop_rate: Dropout before the classifier, in [0, 1).
        drop_path_rate: Stochastic depth of the last block, in [0, 1); grows linearly from 0.
        device: Where the parameters are created.
        dtype: The type of the parameters.

    Shape:
        images (N, in_chans, H, W); features (N, 64, ceil(H / 4), ceil(W / 4)); logits (N, C).

    Raises:
        UsageError: If there are not three stages.

    References:
        He, Zhang, Ren, Sun. Deep residual learning for image recognition. CVPR 2016.
        https://arxiv.org/abs/1512.03385
        He, Zhang, Ren, Sun. Delving deep into rectifiers. ICCV 2015.
        https://arxiv.org/abs/1502.01852
        Cao, Wei, Gaidon, Arechiga, Ma. Learning imbalanced datasets with label-distribution-aware
        margin loss. NeurIPS 2019. https://arxiv.org/abs/1906.07413
        Zhou, Cui, Wei, Chen. BBN: Bilateral-branch network with cumulative learning for long-tailed
        visual recognition. CVPR 2020. https://arxiv.org/abs/1912.02413

    >>> CifarResNet(layers=(1, 1, 1))(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        layers: Sequence[int] = (5, 5, 5),
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(layers) != 3:
            raise UsageError(f"layers must be three numbers, one per stage, got {tuple(layers)}")
        super().__init__(
            BasicBlock,  # type: ignore[arg-type]  # timm's annotation misses type[]
            tuple(layers),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            # timm's plain stem always has 64 channels, the deep one 2 * stem_width: it makes bn1
            # and the stages as wide as they should be, and its convolutions are replaced below.
            stem_type="deep",
            stem_width=8,
            channels=(16, 32, 64),
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            zero_init_last=False,
            device=device,
            dtype=dtype,
        )
        stem = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False, device=device, dtype=dtype)
        self.set_submodule("conv1", stem)
        self.set_submodule("maxpool", nn.Identity())
        self.set_submodule("layer2.0.downsample", ZeroPadShortcut(8))
        self.set_submodule("layer3.0.downsample", ZeroPadShortcut(16))
        # timm's forward runs four stages; where it prunes one, it leaves an empty one like this.
        self.set_submodule("layer4", nn.Sequential())
        for feature, reduction in zip(self.feature_info, (1, 1, 2, 4), strict=True):
            feature["reduction"] = reduction
        self.init_weights()

    def init_weights(self, zero_init_last: bool = False) -> None:
        """Draws the weights of the convolutions; the last batch normalisations can start at 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            elif zero_init_last and isinstance(module, BasicBlock):
                module.zero_init_last()

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, *args: Any, **kwargs: Any
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Returns what timm's ResNet does; None, n and -n count the four features, not five."""
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        return super().forward_intermediates(x, taken, *args, **kwargs)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what timm's ResNet does, with indices as in ``forward_intermediates``."""
        taken, last = feature_take_indices(len(self.feature_info), indices)
        if last == 3 and not prune_head:
            return taken  # timm would drop the head, as if a fourth stage had been cut off
        return super().prune_intermediate_layers(taken, prune_norm, prune_head)
