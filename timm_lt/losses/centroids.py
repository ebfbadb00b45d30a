"""The loss of OLTR's centroids, which pulls features and centroids of a class together."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from timm_lt.utils.checks import UsageError, check_choice, check_number

Hinge = Literal["example", "batch"]


class DiscriminativeCentroids(nn.Module):
    """Attracts each feature to its class's centroid, and repels it from the others.

    ``l_i = ½ ‖x_i − c_y‖² + repulsion · max(0, margin − r_i)``, where
    ``r_i = (1/C) Σ_{j≠y} ‖x_i − c_j‖²`` is, for the hinge, that of the example, or with
    ``hinge="batch"``, as in the authors' code, the mean over the batch.

    It is no loss of :func:`timm_lt.create_loss`: the centroids are parameters of its own, which an
    optimizer has to be given, and which neither data parallelism nor a saved training state would
    know of. :func:`timm_lt.fit_head` trains them with the ``oltr`` head. Its gradient is the
    derivative of the loss. (The authors' code has one of its own for the centroids, which ignores
    the weight of the loss and divides by (1 + n_y) B; that is not here.)

    Args:
        centroids: Start of the centroids, usually the class means.
        repulsion: Weight of the hinge, >= 0.
        margin: >= 0.
        hinge: Whether each example has a hinge or the batch has one.

    Shape:
        centroids (C, D); features (N, D), targets (N,); returns the losses (N,), float32 at least.

    Raises:
        UsageError: If a number is out of range, or the shapes do not fit together.

    References:
        Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019,
        https://arxiv.org/abs/1904.05160

    >>> loss = DiscriminativeCentroids(torch.tensor([[0.0], [4.0]]), margin=3.0, repulsion=0.5)
    >>> loss(torch.tensor([[2.0]]), torch.tensor([1])).tolist()  # 4 / 2 + 0.5 (3 − 4 / 2)
    [2.5]
    """

    def __init__(
        self,
        centroids: Tensor,
        *,
        repulsion: float = 0.01,
        margin: float = 10.0,
        hinge: Hinge = "example",
    ) -> None:
        super().__init__()
        check_choice("hinge", hinge, get_args(Hinge))
        self.centroids = nn.Parameter(centroids.detach().clone())
        self.repulsion = check_number("repulsion", repulsion, "[0, inf)")
        self.margin = check_number("margin", margin, "[0, inf)")
        self.hinge = hinge

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """Returns the losses (N,) of features (N, D)."""
        num_classes, width = self.centroids.shape
        if features.ndim != 2 or features.shape[1] != width or targets.shape != features.shape[:1]:
            raise UsageError(
                f"features must be (N, {width}) and targets (N,), got {tuple(features.shape)} and "
                f"{tuple(targets.shape)}"
            )
        wide = torch.promote_types(features.dtype, torch.float32)
        # Seen from the middle of the centroids, where their sum is 0: all distances of an example
        # together then cost no more than one, and nothing cancels.
        middle = self.centroids.to(wide).mean(dim=0)
        x, c = features.to(wide) - middle, self.centroids.to(wide) - middle
        own = (x - c[targets]).square().sum(dim=1)
        every = num_classes * x.square().sum(dim=1) + c.square().sum()
        others = (every - own) / num_classes
        if self.hinge == "batch":
            others = others.mean().expand_as(others)
        return own / 2 + self.repulsion * (self.margin - others).clamp_min(0)
