"""Mixup, cutmix and remix: against the papers' formulas, image by image."""

import pytest
import torch

from timm_lt import UsageError
from timm_lt.training.parts import create_mixup, seed_epoch

COUNTS = torch.tensor([500, 100, 34, 33, 5])


def mix(targets, seed=0, **options):
    """Returns images whose pixels are their own share λ, and the targets."""
    mixing = create_mixup({"mixup_alpha": 1.0, **options}, COUNTS, len(targets))
    seed_epoch(seed, 0, 0)
    # Row i is the i-th unit vector: what is mixed into a row can be read off.
    images = torch.eye(len(targets)).view(len(targets), 1, len(targets), 1).contiguous()
    mixed, soft = mixing(images, targets)
    return mixed.flatten(1).double(), soft.double()


def remixed(share, own, other, kappa, tau):
    """Returns λ_y of the paper."""
    if COUNTS[own] / COUNTS[other] >= kappa and share < tau:
        return 0.0
    if COUNTS[own] / COUNTS[other] <= 1 / kappa and 1 - share < tau:
        return 1.0
    return share


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize(
    ("kappa", "tau"), [(3.0, 0.5), (3.0, 0.9), (1.0, 0.5), (50.0, 1.0), (1, 0)]
)
def test_remix_labels_follow_the_paper(mode, kappa, tau):
    seen = set()
    for seed in range(12):
        targets = torch.randint(5, (8,), generator=torch.Generator().manual_seed(seed))
        mixed, soft = mix(targets, seed, mode=mode, remix_kappa=kappa, remix_tau=tau)
        expected = torch.zeros(8, 5, dtype=torch.float64)
        for row, (own, other) in enumerate(zip(targets, targets.flip(0), strict=True)):
            share = float(mixed[row, row])
            label = remixed(share, own, other, kappa, tau)
            expected[row, own] += label
            expected[row, other] += 1 - label
            seen.add(label in (0.0, 1.0) and bool(own != other))
        torch.testing.assert_close(soft, expected, atol=1e-6, rtol=0)
    # Some images get one label, unless τ is 0.
    assert seen == ({True, False} if tau else {False})


def test_without_a_threshold_remix_is_mixup():
    targets = torch.tensor([0, 4, 1, 1, 2, 3])
    plain = mix(targets)
    for options in ({"remix_kappa": 3.0, "remix_tau": 0.0}, {"remix_kappa": 1e9}):
        for found, expected in zip(mix(targets, **options), plain, strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup_alpha": 1.0, "remix_kappa": 0.5}, r"mixup.remix_kappa must be .* \[1, inf\)"),
        ({"cutmix_alpha": 1.0, "remix_kappa": 3, "remix_tau": 2}, r"remix_tau must be .* \[0, 1\]"),
        ({"mixup_alpha": -1.0}, r"mixup.mixup_alpha must be a number in \[0, inf\)"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(UsageError, match=message):
        create_mixup(options, COUNTS, 4)
