"""The OLTR head, the loss of its centroids and its fit, against loops in float64."""

import math
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import HEAD_OPTIONS, usable_head
from gaussian_features import COUNTS, JOINT, TRAIN, VAL, C, draw_rows, few_shot, fit
from torch.autograd import gradcheck

import timm_lt
from timm_lt.data import create_splits
from timm_lt.data.images import ImageTensors
from timm_lt.fitting import FitData, create_fit
from timm_lt.heads import set_head
from timm_lt.losses import DiscriminativeCentroids
from timm_lt.metrics import open_set_report
from timm_lt.training import check_model
from timm_lt.utils.accelerator import create_accelerator
from timm_lt.utils.checks import UsageError

VARIANTS = [(1.0, "squared"), (10.0, "linear"), (1.0, "linear"), (10.0, "squared")]


def rows(n=20, d=6, seed=1):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The head ----------------------------------------------------------------------------------------


def norm(v):
    return math.sqrt(sum(a * a for a in v))


def dot(a, b):
    return sum(p * q for p, q in zip(a, b, strict=True))


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
    gamma = min(norm([a - b for a, b in zip(x, c, strict=True)]) for c in centroids)
    v = [head.reach / gamma * (a + s * m) for a, s, m in zip(x, e, memory, strict=True)]
    length = norm(v)
    if head.squash == "squared":
        v = [length**2 / (1 + length**2) * a / length for a in v]
    else:
        v = [length / (1 + length) * a / length for a in v]
    return [head.scale * dot(w, v) / norm(w) for w in weight]


@pytest.mark.parametrize(("reach", "squash"), VARIANTS)
@torch.no_grad()
def test_head_is_the_naive_loop(reach, squash):
    head = usable_head("oltr", scale=9.0, reach=reach, squash=squash).double()
    x = 2 * rows()
    expected = torch.tensor([naive_logits(head, row) for row in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(head(x), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(head(x[3:4]), expected[3:4], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("reach", "squash"), VARIANTS)
def test_head_gradients(reach, squash):
    head = usable_head("oltr", reach=reach, squash=squash).double()
    learned = [key for key, p in head.named_parameters() if p.requires_grad]
    assert learned == ["weight", "memory_weight", "memory_bias", "selector_weight", "selector_bias"]
    values = [getattr(head, key).detach().clone().requires_grad_() for key in learned]

    def logits(x, *values):
        return torch.func.functional_call(head, dict(zip(learned, values, strict=True)), (x,))

    assert gradcheck(logits, (rows(3).requires_grad_(), *values))


def test_a_feature_at_a_centroid_and_far_from_all_of_them():
    for squash in ("squared", "linear"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            head = usable_head("oltr", squash=squash).to(dtype)
            near = head.centroids[:1].clone().requires_grad_()
            z = head.transform(near)
            # The reachability is infinite: the embedding has unit length, and a gradient.
            assert torch.linalg.vector_norm(z.float()).item() == pytest.approx(1, abs=1e-2)
            z.sum().backward()
            assert near.grad.isfinite().all()
            far = head.transform(torch.full((1, 6), 4e3, dtype=dtype))
            assert far.isfinite().all()
    # With e = 0 there is only x, and γ / ‖x‖ decides: v has length 1 / γ · ‖x‖.
    head = usable_head("oltr")
    torch.nn.init.zeros_(head.selector_weight)
    torch.nn.init.zeros_(head.selector_bias)
    x = torch.zeros(1, 6)
    assert head(x).isfinite().all()
    assert torch.equal(head(x), torch.zeros(1, 4))


@torch.no_grad()
def test_of_two_features_in_one_direction_the_farther_has_the_flatter_softmax():
    head = usable_head("oltr", scale=9.0)
    # Without memory: the direction is that of x alone.
    head.selector_weight.zero_()
    head.selector_bias.zero_()
    head.centroids.copy_(torch.eye(4, 6))
    x = torch.tensor([[1.2, 0, 0, 0, 0, 0], [0.1, 0, 0, 0, 0, 0]])
    # γ / ‖x‖ is 0.2 / 1.2 and 0.9 / 0.1, so the squared lengths are 36 / 37 and 1 / 82.
    expected = torch.tensor([36 / 37, 1 / 82])
    torch.testing.assert_close(head.transform(x)[:, 0], expected)
    near, far = head(x).softmax(1).amax(1).tolist()
    assert near > far
    report = open_set_report(head(x), [int(head(x)[0].argmax()), -1], threshold=(near + far) / 2)
    assert (report.known, report.open, report.f_measure) == (1.0, 1.0, 1.0)


def test_it_is_not_folded_and_not_trained_as_a_joint_classifier():
    head = usable_head("oltr", 96, 3)
    with pytest.raises(UsageError, match=r"oltr head is not linear.*cannot be folded"):
        head.fold()
    model = set_head(timm.create_model("test_resnet", num_classes=3), head)
    with pytest.raises(UsageError, match=r"cannot be trained on .*not linear in the features"):
        check_model(model, SimpleNamespace(size=(32, 32)))


# The loss of the centroids -----------------------------------------------------------------------


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
def test_loss_is_the_naive_loop_and_its_derivative(hinge, margin):
    # Class 4 is not in the batch.
    centroids, x, y = rows(5, seed=2), 5 + rows(7), torch.arange(7) % 4
    loss = DiscriminativeCentroids(centroids + 5, repulsion=0.3, margin=margin, hinge=hinge)
    expected = naive_losses(x.tolist(), y.tolist(), (centroids + 5).tolist(), 0.3, margin, hinge)
    assert loss(x, y).tolist() == pytest.approx(expected, rel=1e-9)
    assert loss(x[:1], y[:1]).tolist() == pytest.approx(
        naive_losses(x[:1].tolist(), [0], (centroids + 5).tolist(), 0.3, margin, hinge)
    )

    def call(x, c):
        return torch.func.functional_call(loss, {"centroids": c}, (x, y))

    assert gradcheck(call, (x.requires_grad_(), (centroids + 5).requires_grad_()))


def test_without_a_hinge_the_class_means_are_the_minimum():
    means = torch.stack([TRAIN.values[TRAIN.targets == c].double().mean(0) for c in range(C)])
    loss = DiscriminativeCentroids(means, repulsion=0.0)
    losses = loss(TRAIN.values.double(), TRAIN.targets)
    # Balanced, as the sampler has it.
    sum(losses[TRAIN.targets == c].mean() for c in range(C)).backward()
    assert loss.centroids.grad.abs().max() < 1e-12


def test_loss_of_half_precision_features_is_float32():
    loss = DiscriminativeCentroids(rows(10_000, 8).float(), margin=40.0, repulsion=1.0)
    x, y = rows(3, 8, seed=4).half(), torch.tensor([0, 5, 9_999])
    assert loss(x, y).dtype is torch.float32
    # The mean over all other classes.
    squared = torch.cdist(x.double(), loss.centroids.double()).square()
    own = squared[torch.arange(3), y]
    expected = own / 2 + (40 - (squared.sum(1) - own) / 10_000).clamp_min(0)
    torch.testing.assert_close(loss(x, y).double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match=r"features must be \(N, 8\).*got \(3, 7\)"):
        loss(x[:, :7], y)


# The fit -----------------------------------------------------------------------------------------


def start(seed, **options):
    data = FitData.create(TRAIN, JOINT, COUNTS, VAL, seed=seed, objective="all", rule="fb")
    return create_fit("oltr", **options).start(data)


@pytest.mark.parametrize("centroids", ["learned", "means"])
@pytest.mark.parametrize(("reach", "squash"), VARIANTS[:2])
def test_fit_is_naive_sgd(centroids, reach, squash):
    options = {"reach": reach, "squash": squash, "scale": 8.0}
    more = {"loss_weight": 0.5, "hinge": "batch"} if centroids == "learned" else {}
    steps, lr, decay = 20, 0.05, 1e-2
    head = fit("oltr", steps=steps, lr=lr, weight_decay=decay, seed=3, centroids=centroids,
               **options, **more)  # fmt: skip
    first = start(3, **options)
    names = ("weight", "memory_weight", "memory_bias", "selector_weight", "selector_bias")
    w, hw, hb, sw, sb = (getattr(first, k).detach().double().requires_grad_() for k in names)
    c = first.centroids.double().requires_grad_()
    trained = [w, hw, hb, sw, sb] + [c] * (centroids == "learned")
    velocity = [torch.zeros_like(p) for p in trained]
    drawn = draw_rows(steps, 3, batch_size=128, samples_per_class=4)
    for step, batch in enumerate(drawn):
        x, y, m = TRAIN.values[batch].double(), TRAIN.targets[batch], c.detach()
        v = x + (x @ sw.T + sb).tanh() * ((x @ hw.T + hb).softmax(1) @ m)
        distances = torch.stack([(x - row).square().sum(1).sqrt() for row in m], 1)
        v = v * reach / distances.amin(1, keepdim=True)
        length = v.square().sum(1, keepdim=True).sqrt()
        power = 2 if squash == "squared" else 1
        v = v / length * length**power / (1 + length**power)
        z = 8.0 * v @ (w / w.square().sum(1, keepdim=True).sqrt()).T
        value = -z.log_softmax(1)[torch.arange(128), y].mean()
        if centroids == "learned":
            every = torch.stack([(x - row).square().sum(1) for row in c], 1)
            own = every[torch.arange(128), y]
            repelled = (10 - ((every.sum(1) - own) / C).mean()).clamp_min(0)
            value = value + 0.5 * (own.mean() / 2 + 0.01 * repelled)
        gradients = torch.autograd.grad(value, trained)
        now = lr * 0.1 ** (3 * step // steps)
        with torch.no_grad():
            for p, u, g in zip(trained, velocity, gradients, strict=True):
                u.mul_(0.9).add_(g + (0 if p is c else decay) * p)
                p.sub_(now * u)
    for key, value in zip(names, (w, hw, hb, sw, sb), strict=True):
        torch.testing.assert_close(getattr(head, key).double(), value, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(head.centroids.double(), c, rtol=1e-4, atol=1e-5)
    moved = (head.centroids - first.centroids).abs().max()
    assert (moved.item() > 1e-3) == (centroids == "learned")


def test_the_start_is_the_joint_classifier_and_the_class_means():
    head = start(0)
    assert head.memory_weight.equal(JOINT.weight)
    assert head.memory_bias.equal(JOINT.bias)
    for c in range(C):
        torch.testing.assert_close(head.centroids[c], TRAIN.values[TRAIN.targets == c].mean(0))
    assert not head.weight.equal(JOINT.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0}, r"scale of head 'oltr' must be a number in \(0, inf\), got 0"),
        ({"reach": -1}, r"reach must be a number in \(0, inf\), got -1"),
        ({"squash": "norm"}, "unknown squash of head 'oltr'.* 'norm'.*squared, linear"),
        ({"steps": 5, "epochs": 1}, "steps and epochs exclude each other"),
        ({"centroids": "fixed"}, "unknown centroids of head 'oltr'.*learned, means"),
        ({"hinge": "row"}, "unknown hinge of head 'oltr'.*example, batch"),
        ({"loss_weight": -1}, r"loss_weight of head 'oltr' must be a number in \[0, inf\)"),
        ({"centroids": "means", "hinge": "batch"}, "hinge of head 'oltr' have no effect"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        create_fit("oltr", **options)


def test_a_training_that_blows_up_is_an_error():
    with pytest.raises(UsageError, match=r"head 'oltr' became infinite or NaN.* below 1e\+30"):
        fit("oltr", lr=1e30)


def test_what_was_fitted_under_cannot_change_afterwards(tmp_path):
    torch.manual_seed(0)
    model = timm_lt.create_model("test_resnet", num_classes=4)
    head = usable_head("oltr", 96, 4, **HEAD_OPTIONS["oltr"])
    timm_lt.save_checkpoint(tmp_path, model, heads={"oltr": head}, class_counts=COUNTS)
    loaded = timm_lt.create_model(f"local-dir:{tmp_path}", head="oltr", scale=3.0)
    assert torch.equal(loaded.fc.centroids, head.centroids)
    assert (loaded.fc.scale, loaded.fc.reach) == (3.0, 10.0)
    with pytest.raises(UsageError, match=r"fitted with reach=10\.0, which cannot change"):
        timm_lt.create_model(f"local-dir:{tmp_path}", head="oltr", reach=1.0)


# Learning ----------------------------------------------------------------------------------------


def test_it_is_better_than_the_joint_classifier_on_few_shot_gaussians():
    assert few_shot(fit("oltr")) > few_shot(fit("linear")) + 0.05


@pytest.mark.slow
def test_it_is_better_than_the_joint_classifier_on_few_shot_glyphs():
    model = timm_lt.create_model("lt_test_resnet.glyph_lt", True)
    splits = create_splits("glyph_lt")
    config = model.pretrained_cfg
    accelerator = create_accelerator(mixed_precision="no")
    features = {}
    for split in ("train", "test"):
        stored = splits.images(split, size=(32, 32), mean=config["mean"], std=config["std"])
        if split == "test":
            stored = ImageTensors(stored.images[::4], stored.labels[::4])
        loader = stored.eval_loader(512, accelerator)
        features[split] = timm_lt.extract_features(model, loader, accelerator=accelerator)
    given = {"classifier": model.get_classifier(), "class_counts": splits.class_counts}
    reports = {}
    for name in ("linear", "oltr"):
        head = timm_lt.fit_head(name, features["train"], **given)
        with torch.no_grad():
            logits = head(features["test"].values)
        reports[name] = timm_lt.evaluate_logits(
            logits, features["test"].targets, splits.class_counts, "oltr"
        )
    joint, oltr = reports["linear"], reports["oltr"]
    assert oltr.few_shot > joint.few_shot + 0.1
    assert oltr.all > joint.all + 0.03
    assert oltr.many_shot < joint.many_shot
