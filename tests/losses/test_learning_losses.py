"""Methods for the long tail are better on rare classes than joint training, on small glyphs."""

import copy

import pytest
import torch
from learning import COUNTS, features, joint, learned, pretrained, small_glyphs

import timm_lt
from timm_lt.losses import create_loss
from timm_lt.metrics import shot_accuracy

pytestmark = pytest.mark.slow
exhaustive = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def joint_few_shot():
    return joint()[1]["few_shot"]


def retrained(loss, *, seed=0, **options):
    """Few-shot accuracy of a classifier that is trained anew on the joint features."""
    train, test = features(joint()[0])
    settings = {"sampler": "instance_balanced", "steps": 50, "lr": 0.05}
    head = timm_lt.fit_head("crt", train, loss=loss, solver="sgd", seed=seed, **settings | options)
    with torch.no_grad():
        preds = head(test.values).argmax(1)
    return shot_accuracy(preds, test.targets, torch.tensor(COUNTS)).few_shot


def ldam_drw():
    # A gentler scale than the paper's, for so few updates at the rate of a linear classifier.
    options = {"loss": "ldam", "loss_options": {"scale": 10.0}, "normalization": "batch"}
    loss = create_loss("deferred_reweighting", COUNTS, start=0.5, **options)
    return learned(loss, model=pretrained(head="cosine", scale=1.0))


def deferred_sampling():
    labels = small_glyphs()[0].labels
    sampler = timm_lt.create_sampler("deferred", labels, start=0.5, epochs=4)
    return learned(create_loss("cross_entropy"), sampler=sampler)


def loss_of(name):
    return lambda: learned(create_loss(name, COUNTS))


def fine_tuning(trained):
    options = {"sampler": "class_balanced", "epochs": 2, "trained": trained}
    return lambda: learned(create_loss("cross_entropy"), model=copy.deepcopy(joint()[0]), **options)


@pytest.mark.parametrize(
    ("train", "gain"),
    [
        (ldam_drw, 0.1),
        (loss_of("balanced_softmax"), 0.1),
        pytest.param(loss_of("class_balanced"), 0.1, marks=exhaustive),
        # Measured: 0.56; joint training 0.47.
        pytest.param(deferred_sampling, 0.04, marks=exhaustive),
        # Measured: 0.60, 0.62 and 0.61; joint training 0.50.
        pytest.param(fine_tuning(None), 0.05, marks=exhaustive),
        (fine_tuning(["last_block"]), 0.05),
        pytest.param(fine_tuning([]), 0.05, marks=exhaustive),
    ],
)
def test_training_for_the_tail_learns_the_tail(train, gain, joint_few_shot):
    assert train()["few_shot"] > joint_few_shot + gain


# Losses, options of the fit, and the required gain over joint training. Measured, seeds 0 to 2: .03
# to .05 for seesaw, .07 to .10 for deferred weights and for balanced rows, .09 to .20 for others.
CLASSIFIERS = [
    ("balanced_softmax", {}, 0.08),
    ("inverse_frequency", {}, 0.08),
    ("deferred_reweighting", {"loss_options": {"start": 1}}, 0.04),
    ("seesaw", {}, 0.02),
    *(("cross_entropy", {"sampler": f"{kind}_sampled"}, 0.05) for kind in ("over", "under")),
    ("cross_entropy", {"smote": "largest"}, 0.05),
]
MORE_CLASSIFIERS = [
    ("logit_adjustment", {"loss_options": {"tau": 1.5}}, 0.08),
    ("class_balanced", {}, 0.08),
    ("class_balanced", {"loss_options": {"form": "focal", "normalization": "weights"}}, 0.08),
    ("class_balanced_focal", {}, 0.08),
    ("class_balanced_focal", {"loss_options": {"form": "softmax"}}, 0.08),
]


@pytest.mark.parametrize(
    ("name", "options", "gain"),
    [*CLASSIFIERS, *(pytest.param(*case, marks=exhaustive) for case in MORE_CLASSIFIERS)],
)
def test_classifiers_learn_the_tail(name, options, gain, joint_few_shot):
    assert retrained(name, **options) > joint_few_shot + gain


def test_label_aware_smoothing_learns_the_tail():
    """Compared with cross-entropy on balanced classes, as the second stage of MiSLAS has them."""
    sampled = {"sampler": "class_balanced"}
    # Measured: 0.69 and 0.58.
    smoothed = retrained("label_aware_smoothing", **sampled)
    assert smoothed > retrained("cross_entropy", **sampled) + 0.05


def test_losses_of_features_learn_the_tail(joint_few_shot):
    """With the sampler that the losses need, which is responsible for the gain here."""

    def by_fours(name):
        labels = small_glyphs()[0].labels
        sampler = timm_lt.create_sampler("class_balanced", labels, samples_per_class=4)
        return learned(create_loss(name, COUNTS), sampler=sampler)["few_shot"]

    plain = by_fours("cross_entropy")
    for name in ("range", "lifted_structure"):
        few_shot = by_fours(name)
        # Measured: 0.55 and 0.54; cross-entropy 0.47, by fours 0.58.
        assert few_shot > joint_few_shot + 0.03
        assert few_shot > plain - 0.1
        assert few_shot != plain
