"""Few-shot learning without forgetting, against the paper's formula in plain loops of floats."""

import math

import pytest
import torch
from gaussian_features import COUNTS, JOINT, TRAIN, fit
from learning import COUNTS as GLYPH_COUNTS
from learning import features as glyph_features
from torch import nn

import timm_lt
from timm_lt.features import Features
from timm_lt.fitting import create_fit, fslwf
from timm_lt.fitting.fslwf import WeightGenerator
from timm_lt.fitting.solvers import train_head
from timm_lt.heads import create_head
from timm_lt.metrics import shot_accuracy
from timm_lt.utils.checks import UsageError

K, D = 5, 4


def length(x):
    return math.sqrt(sum(v * v for v in x))


def unit(x):
    return [v / length(x) for v in x]


def dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def generated_by_hand(generator, features, weight, base):
    """The weight of one class, from features of any length: equations 3 to 5 of the paper."""
    state = {name: value.tolist() for name, value in generator.state_dict().items()}
    z = [unit(x) for x in features.tolist()]
    w = [unit(weight[b].tolist()) for b in base]
    keys = [unit(state["keys"][b]) for b in base]
    made = [0.0] * len(z[0])
    for z_i in z:
        query = unit([dot(row, z_i) for row in state["phi_q"]])
        sharp = [math.exp(state["gamma"] * dot(query, key)) for key in keys]
        for d in range(len(made)):
            attended = sum(s / sum(sharp) * w_b[d] for s, w_b in zip(sharp, w, strict=True))
            made[d] += (state["phi_avg"][d] * z_i[d] + state["phi_att"][d] * attended) / len(z)
    return made


def some_generator(dtype=torch.float64):
    random = torch.Generator().manual_seed(0)
    generator = WeightGenerator(D, K, gamma=3.0, random=random).to(dtype)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random))
    return generator


def apart(rows, others):
    """How far each row is from the nearest of the others."""
    return (rows[:, None] - others).abs().amax(dim=2).amin(dim=1)


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The generator ------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [[0, 1, 2, 3, 4], [3, 0], [2]])
@pytest.mark.parametrize("exemplars", [1, 3])
def test_the_generator_is_the_naive_loop(base, exemplars):
    generator, weight = some_generator(), draw(K, D)
    features = 7 * draw(2, exemplars, D, seed=2)
    found = generator(
        nn.functional.normalize(features, dim=-1), weight[base], torch.tensor(base)
    ).tolist()
    for row, of_class in zip(found, features, strict=True):
        assert row == pytest.approx(generated_by_hand(generator, of_class, weight, base), rel=1e-9)


def test_the_start_of_the_generator():
    """phi_avg and phi_att are 1 and phi_q nearly I: mean feature plus attended weights."""
    generator = WeightGenerator(300, 200, gamma=30, random=torch.Generator().manual_seed(0))
    assert generator.phi_avg.eq(1).all()
    assert generator.phi_att.eq(1).all()
    assert (generator.phi_q - torch.eye(300)).std().item() == pytest.approx(1e-3, rel=0.05)
    assert generator.keys.std().item() == pytest.approx(math.sqrt(2 / 300), rel=0.05)
    assert generator.gamma.item() == 30


def test_a_weight_by_numbers():
    """With one base class all attention is on it: mean feature plus its direction."""
    generator = WeightGenerator(3, 1, gamma=30, random=torch.Generator().manual_seed(0))
    features = torch.eye(3)[None, :2]
    weight = generator(features, torch.tensor([[0.0, 0.0, 5.0]]), torch.tensor([0]))
    assert weight.tolist() == [pytest.approx([0.5, 0.5, 1.0])]


def test_gradients_of_the_generator():
    generator, weight = some_generator(), draw(K, D).requires_grad_()
    features = nn.functional.normalize(draw(2, 3, D, seed=2), dim=-1)
    names = [name for name, _ in generator.named_parameters()]

    def call(weight, *parameters):
        given = dict(zip(names, parameters, strict=True))
        base = torch.tensor([4, 1, 2])
        return torch.func.functional_call(generator, given, (features, weight[base], base))

    assert torch.autograd.gradcheck(call, (weight, *generator.parameters()))


def test_a_feature_of_zeros_has_finite_gradients():
    generator = some_generator()
    weight = generator(torch.zeros(1, 2, D).double(), draw(K, D), torch.arange(K))
    weight.square().sum().backward()
    assert weight.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in generator.parameters())


# The fit ------------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch):
    """What the generator and the loss were called with, in order."""
    calls = {"generator": [], "loss": []}
    forward, loss = WeightGenerator.forward, fslwf._Training.loss

    def recorded_forward(self, features, weight, base):
        calls["generator"].append((self, features, weight.detach().clone(), base))
        return forward(self, features, weight, base)

    def recorded_loss(self, rows, weight, labels):
        calls["loss"].append((rows, weight.detach().clone(), labels))
        return loss(self, rows, weight, labels)

    monkeypatch.setattr(WeightGenerator, "forward", recorded_forward)
    monkeypatch.setattr(fslwf._Training, "loss", recorded_loss)
    return calls


def test_the_first_stage_is_nesterov_sgd_on_the_base_classes(seen):
    fit("fslwf", base=15, steps=20, episodes=1, lr=0.1, weight_decay=0.01, scale=8.0, seed=3)
    base = TRAIN.targets <= 2
    x = nn.functional.normalize(TRAIN.values[base].double(), dim=1)
    y, rows = TRAIN.targets[base], base.nonzero().flatten()
    weight = JOINT.weight[:3].detach().double().requires_grad_()
    scale = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
    velocity = [torch.zeros_like(weight), torch.zeros_like(scale)]
    for step, (drawn, _, labels) in enumerate(seen["loss"][:20]):
        assert TRAIN.targets[drawn].equal(labels)
        batch = torch.searchsorted(rows, drawn)
        cosines = x[batch] @ (weight / weight.norm(dim=1, keepdim=True)).T
        loss = nn.functional.cross_entropy(scale * cosines, y[batch])
        gradients = torch.autograd.grad(loss, (weight, scale))
        lr = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 20))
        with torch.no_grad():
            for p, v, g in zip((weight, scale), velocity, gradients, strict=True):
                decayed = g + 0.01 * p
                v.mul_(0.9).add_(decayed)
                p.sub_(lr * (decayed + 0.9 * v))
    (_, _, start, shown), *_ = seen["generator"]
    torch.testing.assert_close(start.double(), weight[shown], rtol=1e-4, atol=1e-5)
    # As the rows are distributed: 175 of them, of which 120 are of class 0.
    labels = torch.cat([labels for _, _, labels in seen["loss"][:20]])
    assert labels.eq(0).double().mean().item() == pytest.approx(120 / 175, abs=0.01)


@pytest.mark.parametrize(
    ("options", "of_novel"), [({}, 8), ({"novel_share": 0.5}, 12), ({"fake_novel": 2}, 16)]
)
def test_an_episode_takes_base_classes_for_novel(seen, options, of_novel):
    episodes = {"base": 15, "steps": 1, "episodes": 30, "exemplars": 4, "queries": 24}
    fit("fslwf", **episodes, **options)
    taken = []
    for call, (rows, weight, labels) in zip(seen["generator"], seen["loss"][1:], strict=True):
        _, features, base_weight, base = call
        novel = sorted({0, 1, 2} - set(base.tolist()))
        taken += novel
        assert features.shape == (len(novel), 4, 6)
        assert weight[: len(base)].equal(base_weight)
        # Which class is generated is told by the rows that it is asked for.
        asked = TRAIN.targets[rows]
        generated = [asked[labels == len(base) + i][0].item() for i in range(len(novel))]
        classes = [*base.tolist(), *generated]
        assert sorted(classes) == [0, 1, 2]
        assert torch.tensor(classes)[labels].equal(asked)
        assert (labels >= len(base)).sum() == of_novel
        for label, of_class in enumerate(features, start=len(base)):
            known = nn.functional.normalize(TRAIN.values[TRAIN.targets == classes[label]], dim=1)
            assert apart(of_class, known).max() < 1e-6
            # None of the exemplars is asked for, as far as the class has enough.
            other = nn.functional.normalize(TRAIN.values[rows[labels == label]], dim=1)
            if of_novel // len(novel) + 4 <= COUNTS[classes[label]]:
                assert apart(of_class, other).min() > 1e-3
    assert set(taken) == {0, 1, 2}


def test_novel_weights_come_from_all_training_rows(seen, monkeypatch):
    monkeypatch.setattr(fslwf, "ENTRIES", 1)
    monkeypatch.setattr(fslwf, "ROWS", 2)
    head = fit("fslwf")
    generator = seen["generator"][-1][0]
    for label in (2, 3):
        rows = TRAIN.values[TRAIN.targets == label].double()
        expected = generated_by_hand(generator, rows, head.weight.double(), [0, 1])
        assert head.weight[label].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert head.scale.item() > 0


def test_the_joint_classifier_of_the_novel_classes_plays_no_part():
    other = nn.Linear(6, 4)
    with torch.no_grad():
        other.weight.copy_(JOINT.weight)
        other.weight[2:] = 100.0
    assert fit("fslwf", classifier=other).weight.equal(fit("fslwf").weight)


def test_dropout_leaves_out_features_in_training_only(seen):
    head = fit("fslwf", dropout=0.5, episodes=40)
    zeros = torch.cat([features.flatten() for _, features, *_ in seen["generator"]]).eq(0)
    assert zeros.double().mean().item() == pytest.approx(0.5, abs=0.03)
    assert head.weight.ne(0).all()
    seen["generator"].clear()
    fit("fslwf")
    assert all(features.ne(0).all() for _, features, *_ in seen["generator"])


@pytest.mark.parametrize(
    ("counts", "base", "rule", "expected"),
    [
        ([400, 101, 100, 20, 19, 5], "many_shot", "fb", 2),
        ([400, 101, 100, 20, 19, 5], "many_shot", "oltr", 3),
        ([400, 101, 100, 20, 19, 5], "many_and_medium", "fb", 4),
        ([400, 101, 100, 20, 19, 5], 19, "fb", 5),
        ([400, 101, 100, 20, 19, 5], 102, "fb", "fewer than two base classes: 1 of 6"),
        ([100, 20, 8, 5, 5, 5], "many_shot", "fb", "two base classes: 0 of 6 .* > 100 training"),
        ([100, 20, 8, 5, 5, 5], 5, "fb", "no novel class: 6 of 6 .* choose another base"),
    ],
)
def test_which_classes_are_base(counts, base, rule, expected, seen):
    """By training images, whatever features there are; with a row or two of each class here."""
    features = Features(draw(12, D).float(), torch.arange(12) % 6)
    counts, options = torch.tensor(counts), {"base": base, "steps": 2, "episodes": 2}
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            create_fit("fslwf", **options).check_classes(counts, rule=rule)
        return
    create_fit("fslwf", **options).check_classes(counts, rule=rule)
    head = timm_lt.fit_head("fslwf", features, class_counts=counts, rule=rule, **options)
    assert head.weight.isfinite().all()
    assert len(seen["loss"][0][1]) == expected


def test_one_row_of_each_class_and_more_classes_than_queries():
    features = Features(draw(6, D).float(), torch.arange(6))
    options = {"class_counts": torch.tensor([9, 9, 9, 9, 9, 1]), "steps": 2, "episodes": 3}
    head = timm_lt.fit_head("fslwf", features, base=9, queries=2, fake_novel=3, **options)
    assert head.weight.isfinite().all()
    blank = Features(torch.zeros(6, D), torch.arange(6))
    assert timm_lt.fit_head("fslwf", blank, base=9, **options).weight.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "medium"}, "base of head 'fslwf'.*many_shot, many_and_medium"),
        ({"base": 0}, "base of head 'fslwf', the fewest images of a base class, must be .*>= 1"),
        ({"base": 2.5}, "must be an integer >= 1, got 2.5"),
        ({"base": None}, "base of head 'fslwf' cannot be null"),
        ({"episodes": 0}, "episodes of head 'fslwf' must be an integer from 1"),
        ({"exemplars": 0}, "exemplars of head 'fslwf' must be"),
        ({"fake_novel": 0}, "fake_novel of head 'fslwf' must be"),
        ({"queries": 1}, "queries of head 'fslwf' must be an integer from 2"),
        ({"novel_share": 1.0}, r"novel_share of head 'fslwf' must be a number in \(0, 1\)"),
        ({"dropout": 1}, r"dropout of head 'fslwf' must be a number in \[0, 1\)"),
        ({"gamma": 0}, "gamma of head 'fslwf'"),
        ({"scale": -1}, "scale of head 'fslwf'"),
        ({"lr": 0}, "lr of head 'fslwf'"),
        ({"steps": 5, "epochs": 1}, "give one of them"),
        ({"tau": 1}, "has no option 'tau'"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_fitted(options, message):
    with pytest.raises(UsageError, match=message):
        create_fit("fslwf", **options)


def test_what_only_the_fit_can_see_is_refused():
    with pytest.raises(UsageError, match="below the number of base classes, which is 2; got 2"):
        fit("fslwf", fake_novel=2)
    with pytest.raises(UsageError, match=r"'fslwf' became infinite or NaN.* below 1e\+30"):
        fit("fslwf", lr=1e30)


# What it is good for ------------------------------------------------------------------------------


@pytest.mark.slow
def test_few_shot_glyphs_are_better_than_with_the_joint_classifier():
    # Of the packaged backbone, for which these twenty classes were many-shot.
    train, test = glyph_features()
    counts = torch.tensor(GLYPH_COUNTS)
    torch.manual_seed(0)
    joint = create_head("linear", train.num_features, len(counts))
    train_head(joint, train, seed=0, steps=200, lr=0.05, batch_size=64, sampler="instance_balanced")
    head = timm_lt.fit_head("fslwf", train, classifier=joint, base="many_and_medium")
    with torch.no_grad():
        before, after = (
            shot_accuracy(h(test.values).argmax(1), test.targets, counts) for h in (joint, head)
        )
    # Measured: 0.82 and 0.94.
    assert after.few_shot > before.few_shot + 0.05
    assert after.all > before.all
