"""How the images of a batch are mixed with each other: timm's mixup and cutmix, and remix."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from timm.data import Mixup
from torch import Tensor

from timm_lt.utils.checks import UsageError, check_choice, check_number, unknown_name
from timm_lt.utils.longtail import ClassCounts, check_class_counts

KAPPA, TAU = "remix_kappa", "remix_tau"


class Remix:
    """Mixup whose labels go to the rarer class where the counts of the two differ much.

    An image ``λ x_i + (1 − λ) x_j`` of classes with n_i and n_j images has the label ``λ_y y_i + (1
    − λ_y) y_j``, where::

        λ_y = 0  if n_i / n_j >= κ and λ < τ
              1  if n_i / n_j <= 1 / κ and 1 − λ < τ
              λ  otherwise

    so an image of which the frequent class has a part below τ belongs to the rare one alone.

    Args:
        mixup: timm's, of mixup, cutmix or both, without label smoothing.
        class_counts: Training images per class, (C,), each >= 1.
        kappa: κ, >= 1; 3 in the paper.
        tau: τ, in [0, 1]; 0.5 in the paper, and 0 is mixup.

    References:
        Chou, Chang, Pan, Wei, Juan. Remix: Rebalanced mixup. ECCV 2020 Workshops,
        https://arxiv.org/abs/2007.03943
    """

    def __init__(
        self, mixup: Mixup, class_counts: ClassCounts, *, kappa: float = 3.0, tau: float = 0.5
    ) -> None:
        self.mixup = mixup
        self.class_counts = check_class_counts(class_counts)
        self.kappa = check_number(f"mixup.{KAPPA}", kappa, "[1, inf)")
        self.tau = check_number(f"mixup.{TAU}", tau, "[0, 1]")

    @property
    def mixup_enabled(self) -> bool:
        """Whether images are mixed."""
        return self.mixup.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        self.mixup.mixup_enabled = enabled

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes images (B, 3, H, W), in place, and labels (B,) to targets (B, C)."""
        images, soft = self.mixup(images, targets)
        # timm mixes an image with that at the same place from the end.
        own, other = targets[:, None], targets.flip(0)[:, None]
        share = soft.gather(1, own)
        counts = self.class_counts.to(targets.device, share.dtype)
        ratio = counts[own] / counts[other]
        share = torch.where((ratio >= self.kappa) & (share < self.tau), 0.0, share)
        share = torch.where((ratio <= 1 / self.kappa) & (1 - share < self.tau), 1.0, share)
        mixed = torch.zeros_like(soft).scatter_(1, own, share)
        return images, mixed.scatter_add_(1, other, 1 - share)


Mixing = Mixup | Remix


def create_mixup(
    options: Mapping[str, Any] | None, class_counts: Tensor, batch: int
) -> Mixing | None:
    """Creates timm's mixup and cutmix, or remix; None if neither has an alpha.

    Args:
        options: Arguments of ``timm.data.Mixup``, of which label smoothing is the loss's; and
            ``remix_kappa`` and ``remix_tau``, κ and τ of :class:`Remix`, which a κ chooses.
        class_counts: Training images per class, (C,); targets become (B, C).
        batch: Images that are mixed with each other.

    Raises:
        UsageError: If an option is unknown, out of range or without effect, or the batch is odd.
    """
    given = dict(options or {})
    kappa, tau = given.pop(KAPPA, None), given.pop(TAU, None)
    check_names("mixup", Mixup, given)
    for name in ("label_smoothing", "num_classes"):
        if name in given:
            raise UsageError(f"mixup.{name} is not set here: smoothing is an option of the loss")
    for name, interval in {
        "mixup_alpha": "[0, inf)",
        "cutmix_alpha": "[0, inf)",
        "prob": "[0, 1]",
        "switch_prob": "[0, 1]",
    }.items():
        check_number(f"mixup.{name}", given.get(name, 0.0), interval)
    check_choice("mixup.mode", given.get("mode", "batch"), ("batch", "pair", "elem"))
    mixup_alpha = given.setdefault("mixup_alpha", 0.0)
    mixes = bool(mixup_alpha or given.get("cutmix_alpha") or given.get("cutmix_minmax"))
    for name, value, needs in (
        (KAPPA, kappa, None if mixes else "mixup_alpha or cutmix_alpha"),
        (TAU, tau, KAPPA if kappa is None else None),
    ):
        if value is not None and needs is not None:
            raise UsageError(f"mixup.{name} has no effect without mixup.{needs}")
    if not mixes:
        return None
    if batch % 2:
        raise UsageError(f"mixup needs an even number of images in a process's batch, not {batch}")
    mixup = Mixup(label_smoothing=0.0, num_classes=len(class_counts), **given)
    if kappa is None:
        return mixup
    return Remix(mixup, class_counts, kappa=kappa, **({} if tau is None else {"tau": tau}))


def check_names(owner: str, part: type, options: Mapping[str, Any]) -> None:
    """Checks that the constructor of a class of timm takes some options."""
    names = list(inspect.signature(part).parameters)
    for name in options:
        if name not in names:
            raise unknown_name(f"option of {owner}:", name, names)
