"""Losses for the long tail do better on rare classes than cross-entropy does."""

import pytest
from learning import COUNTS, joint, learned, pretrained

from timm_lt.losses import create_loss


@pytest.mark.slow
def test_ldam_drw_learns_the_tail():
    # A gentler scale than the paper's, for so few updates at the rate of a linear classifier.
    options = {"loss": "ldam", "loss_options": {"scale": 10.0}, "normalization": "batch"}
    loss = create_loss("deferred_reweighting", COUNTS, start=0.5, **options)
    found = learned(loss, model=pretrained(head="cosine", scale=1.0))
    assert found["few_shot"] > joint()["few_shot"] + 0.1


@pytest.mark.slow
def test_class_balanced_learns_the_tail():
    found = learned(create_loss("class_balanced", COUNTS))
    assert found["few_shot"] > joint()["few_shot"] + 0.1
