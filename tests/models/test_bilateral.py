"""Bilateral networks: the authors' two forward passes, timm's interface, and training."""

import copy

import learning
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn import functional as F

import timm_lt
from timm_lt.data.images import ImageTensors
from timm_lt.models.networks import CifarResNet, attach_attention
from timm_lt.training import TrainingOptions, train_head_on_images, train_representation
from timm_lt.training.parts import takes_pairs
from timm_lt.utils.accelerator import create_accelerator
from timm_lt.utils.checks import UsageError

# Basic blocks, one in the last stage; the CIFAR network; bottlenecks of a ResNeXt with attention.
BASES = {
    "test_resnet": {},
    "lt_resnet32": {"layers": (2, 2, 2)},
    "seresnext26t_32x4d": {"layers": [1, 1, 1, 2], "channels": (32, 32, 32, 32)},
}
every_base = pytest.mark.parametrize("base", BASES)


def create(base="test_resnet", classes=5, **options):
    torch.manual_seed(0)
    return timm.create_model(
        "lt_bbn_resnet", base=base, num_classes=classes, **{**BASES.get(base, {}), **options}
    )


def images(n=8, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 32, 32, generator=generator, dtype=dtype)


def last_stage(model):
    return model.layer3 if isinstance(model, CifarResNet) else model.layer4


class TwoPasses:
    """BBN as the authors' code has it: a pass for each stream, and a classifier of (f_c, f_r)."""

    def __init__(self, model):
        parts = copy.deepcopy(model)
        stage = last_stage(parts)
        branches = stage[-1]
        del stage[-1]
        stem = [parts.conv1, parts.bn1, parts.act1, parts.maxpool]
        stages = [parts.layer1, parts.layer2, parts.layer3, parts.layer4]
        self.parts, self.trunk = parts, nn.Sequential(*stem, *stages)
        self.branches = {"c": branches.conventional, "r": branches.rebalancing}
        self.weight, self.bias = parts.fc.weight, parts.fc.bias

    def features(self, images, branch):
        return self.branches[branch](self.trunk(images)).mean((2, 3))

    def loss(self, x_c, y_c, x_r, y_r, alpha):
        f_c, f_r = self.features(x_c, "c"), self.features(x_r, "r")
        mixed = 2 * torch.cat([alpha * f_c, (1 - alpha) * f_r], dim=1)
        z = mixed @ self.weight.T + self.bias
        return alpha * F.cross_entropy(z, y_c) + (1 - alpha) * F.cross_entropy(z, y_r)

    def state(self):
        """Parameters and buffers by the names that the network has for them."""
        stage = last_stage(self.parts)
        place = f"{'layer4' if stage is self.parts.layer4 else 'layer3'}.{len(stage)}"
        state = dict(self.parts.state_dict(keep_vars=True))
        for key, name in (("c", "conventional"), ("r", "rebalancing")):
            state |= self.branches[key].state_dict(keep_vars=True, prefix=f"{place}.{name}.")
        return state


@every_base
def test_two_updates_are_those_of_two_passes(base):
    model = create(base, branch_scale=2.0).double().train()
    reference = TwoPasses(model)
    state = reference.state()
    optimizers = [
        torch.optim.SGD(of, lr=0.1, momentum=0.9, weight_decay=1e-3)
        for of in (model.parameters(), [v for v in state.values() if v.requires_grad])
    ]
    loss = timm_lt.create_loss("bilateral", adaptor="linear_decay")
    x, y = images(), torch.tensor([0, 4, 1, 3, 0, 2, 2, 4])
    for epoch in (3, 0):
        loss.set_epoch(epoch, 10)
        values = [
            loss(model(x), y),
            reference.loss(x[0::2], y[0::2], x[1::2], y[1::2], alpha=1 - epoch / 10),
        ]
        torch.testing.assert_close(*values)
        for value, optimizer in zip(values, optimizers, strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        assert all(parameter.grad is not None for parameter in model.parameters())
    # The batch-norm statistics too, which have moved twice for each batch.
    assert model.state_dict().keys() == state.keys()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key].detach(), msg=key)
    assert model.bn1.num_batches_tracked == 4


@every_base
def test_evaluation_is_training_at_one_half(base):
    model = create(base, branch_scale=2.0).double().eval()
    x = images(4)
    reference = TwoPasses(model)
    with torch.no_grad():
        f_c, f_r = reference.features(x, "c"), reference.features(x, "r")
        features = torch.cat([f_c, f_r], dim=1)
        torch.testing.assert_close(model(x), features @ model.fc.weight.T + model.fc.bias)
        torch.testing.assert_close(model.forward_features(x).mean((2, 3)), features)
        # In pairs, batch norm being frozen, as a training of some modules has it.
        model.training = last_stage(model)[-1].training = True
        rows, zeros = model(x), torch.zeros_like(f_c)
        for first, parts in enumerate(((f_c, zeros), (zeros, f_r))):
            logits = 2 * torch.cat(parts, 1) @ model.fc.weight.T + model.fc.bias
            torch.testing.assert_close(rows[first::2], logits[first::2])


def test_the_papers_equation_has_no_factor_and_is_the_default():
    model = create().double()
    twice = create(branch_scale=2.0).double()
    twice.load_state_dict(model.state_dict())
    bias = model.fc.bias
    x = images()
    for mode in (True, False):
        logits, doubled = copy.deepcopy(model).train(mode)(x), copy.deepcopy(twice).train(mode)(x)
        torch.testing.assert_close(2 * (logits - bias), doubled - bias)


@pytest.mark.parametrize("name", ["test_resnet", "lt_resnet32"])
@pytest.mark.parametrize("pool", ["avg", "catavgmax"])
def test_a_trained_model_becomes_bilateral_without_a_change(name, pool):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, global_pool=pool).double()
    x = images()
    training, evaluation = copy.deepcopy(model).train(), model.eval()
    with torch.no_grad():
        # The streams are normalised one by one.
        expected = evaluation(x), torch.stack([training(x[0::2]), training(x[1::2])], 1)
        bilateral = timm_lt.create_bilateral(copy.deepcopy(model), branch_scale=3.0)
        assert not bilateral.training
        torch.testing.assert_close(bilateral(x), expected[0])
        torch.testing.assert_close(bilateral.train()(x), expected[1].flatten(0, 1))


def test_from_scratch_the_branches_differ():
    block = create("lt_resnet32").layer3[-1]
    first, second = block.conventional.conv1.weight, block.rebalancing.conv1.weight
    assert not torch.equal(first, second)
    assert second.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.05)
    # timm's ResNet starts the last batch norms at 0, unless told otherwise.
    for zero in (True, False):
        block = create(zero_init_last=zero).layer4[-1]
        for branch in (block.conventional, block.rebalancing):
            assert bool(branch.bn2.weight.any()) is not zero

    # timm's ResNet starts the last batch norms at 0, unless told otherwise.
    for zero in (True, False):
        block = create(zero_init_last=zero).layer4[-1]
        for branch in (block.conventional, block.rebalancing):
            assert bool(branch.bn2.weight.any()) is not zero


def test_registered_networks():
    small = timm.create_model("lt_bbn_resnet32.cifar100_lt", head="tau_norm", tau=0.5)
    assert (small.num_classes, small.num_features, len(small.layer3)) == (100, 128, 5)
    assert small.pretrained_cfg["input_size"] == (3, 32, 32)
    # One more block of 64 channels, and a classifier twice as wide, than ResNet-32.
    plain = sum(p.numel() for p in timm.create_model("lt_resnet32", num_classes=100).parameters())
    block = 2 * (9 * 64 * 64) + 2 * 2 * 64
    assert sum(p.numel() for p in small.parameters()) == plain + block + 64 * 100
    with torch.device("meta"):
        assert timm.create_model("lt_bbn_resnet50", num_classes=7).num_features == 4096


@pytest.mark.parametrize("base", ["lt_test_resnet", "lt_resnet32"])
def test_images_are_those_of_the_base(base):
    plain = timm.data.resolve_data_config(model=timm.create_model(base))
    for overlay in ({}, {"input_size": (3, 40, 40)}):
        model = timm.create_model("lt_bbn_resnet", base=base, pretrained_cfg_overlay=overlay)
        assert timm.data.resolve_data_config(model=model) == {**plain, **overlay}


@every_base
def test_features_only_takes_images_one_by_one(base):
    levels = timm.create_model("lt_bbn_resnet", base=base, features_only=True, **BASES[base])
    x, full = images(3, dtype=torch.float32), create(base).eval()
    out = levels.train()(x)
    assert [level.shape[1] for level in out] == levels.feature_info.channels()
    assert out[-1].shape[1] == full.num_features == full.feature_info[-1]["num_chs"]
    last, intermediates = full.forward_intermediates(x)
    torch.testing.assert_close(last, full.forward_features(x))
    assert [level.shape for level in intermediates] == [level.shape for level in out]


@torch.no_grad()
@pytest.mark.parametrize(("index", "width"), [(0, 32), (2, 48), (4, 192)])
def test_pruning(index, width):
    model = create().train()
    model.prune_intermediate_layers([index])
    assert model.num_features == width
    assert model.forward_features(images(4, dtype=torch.float32)).shape[:2] == (4, width)
    assert takes_pairs(model) is (index == 4)


def test_gradients_do_not_depend_on_checkpointing():
    gradients = []
    for enable in (False, True):
        model = create("lt_resnet32").double().train()
        model.set_grad_checkpointing(enable)
        model(images()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["registered", "any base", "converted"])
def test_decoupled_checkpoints(kind, tmp_path):
    if kind == "registered":
        model = timm.create_model("lt_bbn_resnet32", num_classes=5, branch_scale=2.0)
    elif kind == "any base":
        model = create("lt_resnet10")
    else:
        model = timm_lt.create_bilateral(timm.create_model("test_resnet", num_classes=5))
    model, x = model.eval(), images(4, dtype=torch.float32)
    head = timm_lt.create_head("tau_norm", model.num_features, 5, tau=0.5)
    head.load_state_dict(model.fc.state_dict())
    timm_lt.save_checkpoint(tmp_path, model, heads={"tau_norm": head}, class_counts=[9, 7, 5, 3, 1])
    loaded = timm_lt.create_model(f"local-dir:{tmp_path}").eval()
    torch.testing.assert_close(loaded(x), model(x))
    assert takes_pairs(loaded)
    tau_normed = timm_lt.create_model(f"local-dir:{tmp_path}", head="tau_norm").eval()
    torch.testing.assert_close(tau_normed(x), timm_lt.set_head(model, head).eval()(x))


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield create_accelerator(mixed_precision="no")
    AcceleratorState._reset_state(reset_partial_state=True)


LABELS = torch.tensor([0] * 9 + [1] * 5 + [2] * 3 + [3] * 2 + [4])


def data():
    return ImageTensors(torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8), LABELS)


def train(accelerator, model=None, sampler="bilateral", loss="bilateral", **options):
    return train_representation(
        create() if model is None else model,
        data(),
        timm_lt.create_sampler(sampler, LABELS),
        timm_lt.create_loss(loss, LABELS.bincount()),
        TrainingOptions(epochs=2, **{"batch_size": 8, **options}),
        accelerator=accelerator,
    )


def test_mistakes_are_named_before_training(accelerator):
    for options, message in (
        ({"sampler": "reversed", "loss": "cross_entropy"}, "not bilateral: sampler, loss; BBN"),
        ({"model": timm.create_model("test_resnet", num_classes=5)}, "not bilateral: model;"),
        ({"model": create(head="cosine")}, "not bilateral: linear classifier"),
        ({"batch_size": 7}, "batch_size 7 .* a multiple of 2 "),
        ({"mixup": {"mixup_alpha": 1.0}}, "BilateralLoss takes no soft targets, which mixup makes"),
    ):
        with pytest.raises(UsageError, match=message):
            train(accelerator, **options)


OTHERS = [
    (lambda: create().train()(images(3, dtype=torch.float32)), "but this batch has 3"),
    (lambda: timm_lt.create_bilateral(timm.create_model("test_vit")), "not from a VisionTr"),
    (lambda: timm_lt.create_bilateral(create()), "not from a BilateralResNet"),
    (lambda: timm_lt.create_bilateral(timm.create_model("lt_resnet32", head="ncm")), "fold it"),
    (lambda: create(branch_scale=0), r"branch_scale must be a number in \(0, inf\), got 0"),
    (lambda: create("resnet"), "unknown architecture 'resnet'; similar names: resnet"),
    (lambda: create("lt_oltr_resnet10"), "a residual block, not a ModulatedAttention"),
    (lambda: attach_attention(create()), "not for a BilateralResNet"),
]


def test_an_odd_batch_and_other_networks_are_refused():
    for call, message in OTHERS:
        with pytest.raises(UsageError, match=message):
            call()


def test_training_moves_every_parameter_and_heads_follow_on_images(accelerator):
    before = create()
    model = train(accelerator, copy.deepcopy(before)).model
    for (key, value), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(value, old), key
    # With batch norm in training mode images come one by one.
    options = {"accelerator": accelerator, "batch_size": 5, "steps": 2}
    head = train_head_on_images("crt", model, data(), bn="shift", **options)
    assert head.weight.shape == (5, 192)
    assert head.backbone_statistics["bn1.num_batches_tracked"] == model.bn1.num_batches_tracked + 2
    assert takes_pairs(model)


@pytest.mark.slow
def test_bbn_beats_joint_training_on_few_shot_classes():
    train, _ = learning.small_glyphs()
    _, joint = learning.joint()
    torch.manual_seed(0)
    model = timm_lt.create_bilateral(learning.pretrained())
    bbn = learning.learned(
        timm_lt.create_loss("bilateral", learning.COUNTS),
        sampler=timm_lt.create_sampler("bilateral", train.labels),
        model=model,
        batch_size=64,
    )
    assert bbn["few_shot"] > joint["few_shot"] + 0.1
    assert bbn["all"] > joint["all"] + 0.03
