"""Few-shot heads, their losses and fits, against the papers' formulas in plain loops of floats."""

import math
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import usable_head
from gaussian_features import COUNTS, JOINT, TRAIN, VAL, C, draw_rows, few_shot, fit
from naive_sgd import naive_sgd
from torch import nn
from torch.autograd import gradcheck

import timm_lt
from timm_lt.features import Features
from timm_lt.fitting import FitData, create_fit
from timm_lt.fitting import few_shot as fits
from timm_lt.fitting.few_shot import WeightGenerator
from timm_lt.heads import set_head
from timm_lt.losses import DiscriminativeCentroids
from timm_lt.training import check_model
from timm_lt.utils.checks import UsageError

K, D = 5, 4


def length(x):
    return math.sqrt(sum(v * v for v in x))


def unit(x):
    return [v / length(x) for v in x]


def dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


@pytest.fixture
def generator():
    random = torch.Generator().manual_seed(0)
    generator = WeightGenerator(D, K, gamma=3.0, random=random).double()
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random))
    return generator


@pytest.mark.parametrize("base", [[0, 1, 2, 3, 4], [3, 0], [2]])
@pytest.mark.parametrize("exemplars", [1, 3])
def test_the_generator_is_the_naive_loop(generator, base, exemplars):
    weight, features = draw(K, D), 7 * draw(2, exemplars, D, seed=2)
    found = generator(nn.functional.normalize(features, dim=-1), weight[base], torch.tensor(base))
    for row, of_class in zip(found.tolist(), features, strict=True):
        assert row == pytest.approx(generated_by_hand(generator, of_class, weight, base), rel=1e-9)


def test_the_start_of_the_generator():
    """phi_avg and phi_att are 1 and phi_q nearly I: mean feature plus attended weights."""
    generator = WeightGenerator(300, 200, gamma=30, random=torch.Generator().manual_seed(0))
    assert generator.phi_avg.eq(1).all()
    assert generator.phi_att.eq(1).all()
    assert (generator.phi_q - torch.eye(300)).std().item() == pytest.approx(1e-3, rel=0.05)
    assert generator.keys.std().item() == pytest.approx(math.sqrt(2 / 300), rel=0.05)
    # With one base class all attention is on it: mean feature plus its direction.
    generator = WeightGenerator(3, 1, gamma=30, random=torch.Generator().manual_seed(0))
    weight = generator(torch.eye(3)[None, :2], torch.tensor([[0.0, 0, 5]]), torch.tensor([0]))
    assert weight.tolist() == [pytest.approx([0.5, 0.5, 1.0])]


def test_gradients_of_the_generator(generator):
    weight = draw(K, D).requires_grad_()
    features = nn.functional.normalize(draw(2, 3, D, seed=2), dim=-1)
    names = [name for name, _ in generator.named_parameters()]

    def call(weight, *parameters):
        given, base = dict(zip(names, parameters, strict=True)), torch.tensor([4, 1, 2])
        return torch.func.functional_call(generator, given, (features, weight[base], base))

    assert gradcheck(call, (weight, *generator.parameters()))
    generator(torch.zeros(1, 2, D).double(), weight, torch.arange(K)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in (weight, *generator.parameters()))


@pytest.fixture
def seen(monkeypatch):
    """Arguments of the generator and the loss, in order."""
    calls = {"generator": [], "loss": []}
    forward, backward = WeightGenerator.forward, fits._Training.backward

    def recorded_forward(self, features, weight, base):
        calls["generator"].append((self, features, weight.detach().clone(), base))
        return forward(self, features, weight, base)

    def recorded_backward(self, rows, weight, labels):
        calls["loss"].append((rows, weight.detach().clone(), labels))
        backward(self, rows, weight, labels)

    monkeypatch.setattr(WeightGenerator, "forward", recorded_forward)
    monkeypatch.setattr(fits._Training, "backward", recorded_backward)
    return calls


def test_the_first_stage_is_nesterov_sgd_on_the_base_classes(seen):
    fit("fslwf", base=15, steps=20, episodes=1, lr=0.1, weight_decay=0.01, scale=8.0, seed=3)
    base = TRAIN.targets <= 2
    x = nn.functional.normalize(TRAIN.values[base].double(), dim=1)
    y, rows = TRAIN.targets[base], base.nonzero().flatten()
    weight = JOINT.weight[:3].detach().double().requires_grad_()
    scale = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)

    def loss(call):
        drawn, _, labels = call
        assert TRAIN.targets[drawn].equal(labels)
        batch = torch.searchsorted(rows, drawn)
        cosines = x[batch] @ (weight / weight.norm(dim=1, keepdim=True)).T
        return nn.functional.cross_entropy(scale * cosines, y[batch])

    naive_sgd([weight, scale], loss, seen["loss"][:20], 0.1, 0.01, nesterov=True)
    (_, _, start, shown), *_ = seen["generator"]
    torch.testing.assert_close(start.double(), weight[shown], rtol=1e-4, atol=1e-5)
    # As the rows are distributed: 175 of them, of which 120 are of class 0.
    labels = torch.cat([labels for _, _, labels in seen["loss"][:20]])
    assert labels.eq(0).double().mean().item() == pytest.approx(120 / 175, abs=0.01)


def apart(rows, others):
    """How far each row is from the nearest of the others."""
    return (rows[:, None] - others).abs().amax(dim=2).amin(dim=1)


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
        # The queries' rows tell which class is generated.
        asked = TRAIN.targets[rows]
        generated = [asked[labels == len(base) + i][0].item() for i in range(len(novel))]
        classes = [*base.tolist(), *generated]
        assert sorted(classes) == [0, 1, 2]
        assert torch.tensor(classes)[labels].equal(asked)
        assert (labels >= len(base)).sum() == of_novel
        for label, of_class in enumerate(features, start=len(base)):
            known = nn.functional.normalize(TRAIN.values[TRAIN.targets == classes[label]], dim=1)
            assert apart(of_class, known).max() < 1e-6
            # No exemplar is a query, as far as the class has enough rows.
            other = nn.functional.normalize(TRAIN.values[rows[labels == label]], dim=1)
            if of_novel // len(novel) + 4 <= COUNTS[classes[label]]:
                assert apart(of_class, other).min() > 1e-3
    assert set(taken) == {0, 1, 2}


def test_novel_weights_come_from_all_training_rows(seen, monkeypatch):
    monkeypatch.setattr(fits, "ENTRIES", 1)
    monkeypatch.setattr(fits, "ROWS", 2)
    head = fit("fslwf")
    generator = seen["generator"][-1][0]
    for label in (2, 3):
        rows = TRAIN.values[TRAIN.targets == label].double()
        expected = generated_by_hand(generator, rows, head.weight.double(), [0, 1])
        assert head.weight[label].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    # The joint classifier of the novel classes plays no part, and there is no dropout.
    other = nn.Linear(6, 4)
    other.weight.data.copy_(JOINT.weight)[2:] = 100.0
    assert fit("fslwf", classifier=other).weight.equal(head.weight)
    assert all(features.ne(0).all() for _, features, *_ in seen["generator"])


def test_dropout_is_applied_in_training_only(seen):
    head = fit("fslwf", dropout=0.5, episodes=40)
    zeros = torch.cat([features.flatten() for _, features, *_ in seen["generator"]]).eq(0)
    assert zeros.double().mean().item() == pytest.approx(0.5, abs=0.03)
    assert head.weight.ne(0).all()


TAIL, FLAT = [400, 101, 100, 20, 19, 5], [100, 20, 8, 5, 5, 5]


@pytest.mark.parametrize(
    ("counts", "base", "rule", "expected"),
    [
        (TAIL, "many_shot", "fb", 2),
        (TAIL, "many_shot", "oltr", 3),
        (TAIL, "many_and_medium", "fb", 4),
        (TAIL, 19, "fb", 5),
        (TAIL, 102, "fb", "two base classes and a novel one: 1 of 6"),
        (FLAT, "many_shot", "fb", "0 of 6 classes have > 100 training images"),
        (FLAT, 5, "fb", "6 of 6 .* choose another base"),
    ],
)
def test_which_classes_are_base(counts, base, rule, expected, seen):
    """By training images, whatever features there are; with one row of each class here."""
    features = Features(draw(6, D).float(), torch.arange(6))
    given = {"class_counts": torch.tensor(counts), "rule": rule}
    options = {"base": base, "steps": 2, "episodes": 2, "queries": 2}
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            create_fit("fslwf", **options).check_classes(**given)
        return
    head = timm_lt.fit_head("fslwf", features, **given, **options)
    assert head.weight.isfinite().all()
    assert len(seen["loss"][0][1]) == expected


VARIANTS = [(1.0, "squared"), (10.0, "linear"), (1.0, "linear"), (10.0, "squared")]


def naive_logits(head, x):
    """Memory, selector, reachability, squashing and cosines of one feature, number by number."""
    centroids, weight = head.centroids.tolist(), head.weight.tolist()
    classes = zip(head.memory_weight.tolist(), head.memory_bias.tolist(), strict=True)
    scores = [math.exp(dot(w, x) + b) for w, b in classes]
    memory = [
        sum(s * c[k] for s, c in zip(scores, centroids, strict=True)) / sum(scores)
        for k in range(len(x))
    ]
    selector = zip(head.selector_weight.tolist(), head.selector_bias.tolist(), strict=True)
    e = [math.tanh(dot(w, x) + b) for w, b in selector]
    gamma = min(length([a - b for a, b in zip(x, c, strict=True)]) for c in centroids)
    v = [head.reach / gamma * (a + s * m) for a, s, m in zip(x, e, memory, strict=True)]
    power = length(v) ** 2 if head.squash == "squared" else length(v)
    v = [power / (1 + power) * a for a in unit(v)]
    return [head.scale * dot(unit(w), v) for w in weight]


@pytest.mark.parametrize(("reach", "squash"), VARIANTS)
def test_the_head_of_oltr_is_the_naive_loop(reach, squash):
    head = usable_head("oltr", scale=9.0, reach=reach, squash=squash).double()
    x = 2 * draw(20, 6)
    with torch.no_grad():
        expected = [naive_logits(head, row) for row in x.tolist()]
        for rows in (slice(20), slice(3, 4)):
            wanted = torch.tensor(expected[rows], dtype=torch.float64)
            torch.testing.assert_close(head(x[rows]), wanted, rtol=1e-9, atol=1e-12)
    learned = [key for key, p in head.named_parameters() if p.requires_grad]
    assert learned == ["weight", "memory_weight", "memory_bias", "selector_weight", "selector_bias"]
    values = [getattr(head, key).detach().clone().requires_grad_() for key in learned]

    def logits(x, *values):
        return torch.func.functional_call(head, dict(zip(learned, values, strict=True)), (x,))

    assert gradcheck(logits, (draw(3, 6).requires_grad_(), *values))


@pytest.mark.parametrize("squash", ["squared", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_feature_at_a_centroid_and_far_from_all_of_them(squash, dtype):
    head = usable_head("oltr", squash=squash).to(dtype)
    near = head.centroids[:1].clone().requires_grad_()
    z = head.transform(near)
    # The reachability is infinite: the embedding has unit length, and a gradient.
    assert torch.linalg.vector_norm(z.float()).item() == pytest.approx(1, abs=1e-2)
    z.sum().backward()
    assert near.grad.isfinite().all()
    assert head.transform(torch.full((1, 6), 4e3, dtype=dtype)).isfinite().all()
    assert head(torch.zeros(1, 6, dtype=dtype)).isfinite().all()


def test_oltr_is_not_folded_and_not_trained_as_a_joint_classifier():
    head = usable_head("oltr", 96, 3)
    with pytest.raises(UsageError, match=r"oltr head is not linear.*cannot be folded"):
        head.fold()
    model = set_head(timm.create_model("test_resnet", num_classes=3), head)
    with pytest.raises(UsageError, match=r"cannot be trained on .*not linear in the features"):
        check_model(model, SimpleNamespace(size=(32, 32)))


def naive_losses(x, y, centroids, repulsion, margin, hinge):
    def squares(a, b):
        return sum((p - q) ** 2 for p, q in zip(a, b, strict=True))

    others = [
        sum(squares(v, c) for j, c in enumerate(centroids) if j != t) / len(centroids)
        for v, t in zip(x, y, strict=True)
    ]
    if hinge == "batch":
        others = [sum(others) / len(others)] * len(others)
    return [
        squares(v, centroids[t]) / 2 + repulsion * max(0, margin - r)
        for v, t, r in zip(x, y, others, strict=True)
    ]


@pytest.mark.parametrize("hinge", ["example", "batch"])
@pytest.mark.parametrize("margin", [2.0, 11.0, 40.0])
def test_the_loss_of_the_centroids_is_the_naive_loop_and_its_derivative(hinge, margin):
    # Class 4 is not in the batch.
    centroids, x, y = 5 + draw(5, 6, seed=2), 5 + draw(7, 6), torch.arange(7) % 4
    loss = DiscriminativeCentroids(centroids, repulsion=0.3, margin=margin, hinge=hinge)
    for rows in (slice(7), slice(1)):
        given = (x[rows].tolist(), y[rows].tolist(), centroids.tolist())
        expected = naive_losses(*given, 0.3, margin, hinge)
        assert loss(x[rows], y[rows]).tolist() == pytest.approx(expected, rel=1e-9)

    def call(x, c):
        return torch.func.functional_call(loss, {"centroids": c}, (x, y))

    assert gradcheck(call, (x.requires_grad_(), centroids.requires_grad_()))


def test_without_a_hinge_the_class_means_are_the_minimum():
    means = torch.stack([TRAIN.values[TRAIN.targets == c].double().mean(0) for c in range(C)])
    loss = DiscriminativeCentroids(means, repulsion=0.0)
    losses = loss(TRAIN.values.double(), TRAIN.targets)
    # Balanced, as the sampler has it.
    sum(losses[TRAIN.targets == c].mean() for c in range(C)).backward()
    assert loss.centroids.grad.abs().max() < 1e-12


def test_the_loss_of_half_precision_features_is_float32():
    loss = DiscriminativeCentroids(draw(10, 8).float())
    x, y = draw(3, 8, seed=4).half(), torch.tensor([0, 5, 9])
    assert loss(x, y).equal(loss(x.float(), y))
    with pytest.raises(UsageError, match=r"features must be \(N, 8\).*got \(3, 7\)"):
        loss(x[:, :7], y)


def start(seed, **options):
    data = FitData(TRAIN, JOINT, COUNTS, VAL, seed=seed, objective="all", rule="fb")
    return create_fit("oltr", **options).start(data)


@pytest.mark.parametrize("centroids", ["learned", "means"])
@pytest.mark.parametrize(("reach", "squash"), VARIANTS[:2])
def test_the_fit_of_oltr_is_naive_sgd(centroids, reach, squash):
    options = {"reach": reach, "squash": squash, "scale": 8.0}
    more = {"loss_weight": 0.5, "hinge": "batch"} if centroids == "learned" else {}
    steps, lr, decay = 20, 0.05, 1e-2
    more |= {"steps": steps, "lr": lr, "weight_decay": decay, "seed": 3}
    head = fit("oltr", centroids=centroids, **options, **more)
    first = start(3, **options)
    means = [TRAIN.values[TRAIN.targets == label].mean(0) for label in range(C)]
    torch.testing.assert_close(first.centroids, torch.stack(means))
    assert first.memory_weight.equal(JOINT.weight)
    assert first.memory_bias.equal(JOINT.bias)
    names = ("weight", "memory_weight", "memory_bias", "selector_weight", "selector_bias")
    w, hw, hb, sw, sb = (getattr(first, k).detach().double().requires_grad_() for k in names)
    c = first.centroids.double().requires_grad_()
    trained = [w, hw, hb, sw, sb] + [c] * (centroids == "learned")

    def loss(batch):
        x, y, m = TRAIN.values[batch].double(), TRAIN.targets[batch], c.detach()
        v = x + (x @ sw.T + sb).tanh() * ((x @ hw.T + hb).softmax(1) @ m)
        distances = torch.stack([(x - row).square().sum(1).sqrt() for row in m], 1)
        v = v * reach / distances.amin(1, keepdim=True)
        size = v.square().sum(1, keepdim=True).sqrt()
        power = 2 if squash == "squared" else 1
        v = v / size * size**power / (1 + size**power)
        z = 8.0 * v @ (w / w.square().sum(1, keepdim=True).sqrt()).T
        value = -z.log_softmax(1)[torch.arange(128), y].mean()
        if centroids == "means":
            return value
        every = torch.stack([(x - row).square().sum(1) for row in c], 1)
        own = every[torch.arange(128), y]
        repelled = (10 - ((every.sum(1) - own) / C).mean()).clamp_min(0)
        return value + 0.5 * (own.mean() / 2 + 0.01 * repelled)

    drawn = draw_rows(steps, 3, batch_size=128, samples_per_class=4)
    decays = [decay] * 5 + [0.0] * (centroids == "learned")
    naive_sgd(trained, loss, drawn, lr, decays, rate=lambda step, steps: 0.1 ** (3 * step // steps))
    for key, value in zip(names, (w, hw, hb, sw, sb), strict=True):
        torch.testing.assert_close(getattr(head, key).double(), value, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(head.centroids.double(), c, rtol=1e-4, atol=1e-5)
    moved = (head.centroids - first.centroids).abs().max()
    assert (moved.item() > 1e-3) == (centroids == "learned")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fslwf", {"base": "medium"}, "base of head 'fslwf'.*many_shot, many_and_medium"),
        ("fslwf", {"base": 0}, "base of head 'fslwf', the fewest images of a base class, must be"),
        ("fslwf", {"exemplars": 0}, "exemplars of head 'fslwf' must be an integer from 1"),
        ("fslwf", {"queries": 1}, "queries of head 'fslwf' must be an integer from 2"),
        ("fslwf", {"novel_share": 1.0}, r"novel_share of head 'fslwf' must be a number in \(0, 1"),
        ("fslwf", {"fake_novel": 2}, "below the number of base classes, which is 2; got 2"),
        ("fslwf", {"lr": 1e30}, r"'fslwf' became infinite or NaN.* below 1e\+30"),
        ("oltr", {"reach": -1}, r"reach must be a number in \(0, inf\), got -1"),
        ("oltr", {"squash": "norm"}, "unknown squash of head 'oltr'.* 'norm'.*squared, linear"),
        ("oltr", {"centroids": "means", "hinge": "batch"}, "hinge of head 'oltr' have no effect"),
    ],
)
def test_wrong_options_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        fit(name, **options)


def test_oltr_is_better_than_the_joint_classifier_on_few_shot_gaussians():
    assert few_shot(fit("oltr")) > few_shot(fit("linear")) + 0.05
