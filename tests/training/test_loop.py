"""The representation stage against a hand-written loop, and across restarts."""

import math
import re

import pytest
import timm.optim
import torch
from naive_sgd import naive_sgd
from stopping import new_state
from torch import nn
from training_runs import (
    SIDE,
    C,
    N,
    images,
    interrupted,
    linear_model,
    network,
    new_accelerator,
    own_accelerator,  # noqa: F401
    train,
    weights,
)

import timm_lt
from timm_lt.data.images import ImageTensors
from timm_lt.training import TrainingState, parts


def accuracy(model, data, rows=slice(None)):
    with torch.inference_mode():
        right = model((data.images[rows].float() / 255 - 0.5) / 0.25).argmax(1)
    return (right == data.labels[rows]).double().mean().item()


class Notes(nn.Module):
    """Cross-entropy that calls a function with what it gets."""

    takes_soft_targets = True

    def __init__(self, note):
        super().__init__()
        self.note = note

    def forward(self, logits, targets):
        return nn.functional.cross_entropy(logits, targets) * (self.note(targets) or 1.0)


def test_follows_a_hand_written_nesterov_loop():
    model = linear_model()
    weight, bias = (p.detach().double().clone() for p in model[1].parameters())
    data = images()
    history = train(model, scheduler={"sched": "constant"})

    x = ((data.images.double() / 255 - 0.5) / 0.25).flatten(1)
    sampler, batches, losses = timm_lt.create_sampler("instance_balanced", data.labels), [], []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches += torch.tensor(list(sampler)).split(8)

    def loss(rows):
        p = torch.softmax(x[rows] @ weight.T + bias, dim=1)
        value = -p[range(8), data.labels[rows]].log().mean()
        losses.append(value.item())
        return value

    # Weight decay is on the weight and not on the bias.
    both = [weight.requires_grad_(), bias.requires_grad_()]
    naive_sgd(both, loss, batches, 0.01, [0.1, 0.0], rate=lambda *_: 1, nesterov=True)
    expected = torch.tensor(losses).view(3, 5).mean(1).tolist()
    assert [record.loss for record in history] == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(model[1].weight.double(), weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model[1].bias.double(), bias, atol=1e-5, rtol=1e-4)


def test_resumes_to_the_same_bits(tmp_path):
    whole, model = linear_model(), linear_model()
    history = train(whole, epochs=4)
    nn.init.constant_(model[1].weight, 7.0)
    # A write that was cut off leaves another name, which is not taken for a state.
    (tmp_path / ".partial_0003").mkdir()
    (tmp_path / ".partial_0003" / "model.safetensors").write_bytes(b"cut off")
    after = interrupted(tmp_path, (linear_model(), model), 2, epochs=4)
    assert weights(model).equal(weights(whole))
    assert [record.loss for record in after] == [record.loss for record in history]
    # The one before is kept, in case the last is damaged.
    state = new_state(tmp_path)
    assert state.saved_epochs() == [3, 4]
    train(linear_model(), accelerator=state.accelerator)
    with pytest.raises(timm_lt.UsageError, match="make a new one"):
        train(linear_model(), state=state)


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "manifest"])
def test_a_damaged_state_is_not_loaded(tmp_path, caplog, damage):
    whole, model = linear_model(), linear_model()
    train(whole, state=new_state(tmp_path))
    file = tmp_path / "epoch_0003" / "optimizer.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        file.unlink()
    elif damage == "manifest":
        (file.parent / "manifest.json").write_text("{")
    else:
        file.write_bytes(content[:-9] if damage == "cut" else content)
    # Continues from the state before it, to the same weights.
    state = new_state(tmp_path)
    with caplog.at_level("WARNING", "timm_lt"):
        train(model, state=state)
    assert "epoch_0003 is damaged" in caplog.text
    assert weights(model).equal(weights(whole))
    for path in tmp_path.glob("epoch_*/model.safetensors"):
        path.write_bytes(b"no tensors")
    state = new_state(tmp_path)
    with pytest.raises(timm_lt.UsageError, match=r"every training state .*damaged.*--overwrite"):
        train(linear_model(), state=state)


def test_averages_and_the_best_epoch_survive_a_restart(tmp_path):
    """Learning rates that grow, so that an early epoch is the best on validation."""
    options = {"val": images(seed=1), "ema": {"decay": 0.5}, "epochs": 6}
    options["optimizer"] = {"opt": "adamw", "lr": 3.0}
    options["scheduler"] = {"sched": "constant", "warmup_epochs": 6, "warmup_lr": 1e-4}
    whole, model = linear_model(), linear_model()
    history = train(whole, **options)
    best = max(history, key=lambda record: record.val["all"])
    assert best.epoch < 6
    assert history[-1].val["all"] < best.val["all"]
    again = interrupted(tmp_path, (linear_model(), model), 5, **options)
    assert [record.val for record in again] == [record.val for record in history]
    assert weights(model).equal(weights(whole))
    assert accuracy(model, options["val"]) == pytest.approx(best.val["all"])


def test_a_compiled_model_trains_and_resumes_to_the_same_weights(tmp_path, monkeypatch):
    """As ``accelerate config`` may ask for it; this backend only traces, so it is fast."""
    whole, model = linear_model(), linear_model()
    options = {"ema": {"decay": 0.5}, "val": images()}
    train(whole, **options)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    assert new_accelerator().state.dynamo_plugin.backend == "EAGER"
    interrupted(tmp_path, (linear_model(), model), 1, **options)
    torch.testing.assert_close(weights(model), weights(whole))
    assert [name for name, _ in model.named_parameters()] == ["1.weight", "1.bias"]


def test_validation_is_counted_and_changes_nothing():
    with_val, without, data = linear_model(), linear_model(), images()
    counts = torch.tensor([200, 200, 50, 5])
    options = {"epochs": 5, "validate_every": 2, "keep": "last"}
    history = train(with_val, val=data, class_counts=counts, **options)
    train(without, **options)
    assert weights(with_val).equal(weights(without))
    assert history[-1].val["all"] == pytest.approx(accuracy(with_val, data))
    few = data.labels == 3
    assert history[-1].val["few_shot"] == pytest.approx(accuracy(with_val, data, few))
    assert [bool(record.val) for record in history] == [False, True, False, True, True]


def test_images_that_cannot_be_read_give_their_place_to_others():
    data, model, seen = images(), linear_model(), []
    missing = ImageTensors(data.images, data.labels, missing=[3, 4])
    options = {"data": missing, "val": missing, "keep": "last"}
    history = train(model, loss=Notes(seen.append), **options)
    # Others of the same batch stand in.
    assert [len(targets) for targets in seen] == [8] * 15
    readable = torch.tensor([row for row in range(N) if row not in (3, 4)])
    assert history[-1].val["all"] == pytest.approx(accuracy(model, data, readable))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    model, batches = linear_model(), []
    nn.init.constant_(model[1].weight, float("inf"))
    with pytest.raises(timm_lt.UsageError, match=r"became nan in update 1 of epoch 1:.*lr"):
        train(model)
    # Two batches an update, five updates an epoch: the ninth is of update 5 of epoch 2.
    numbers = iter([1.0] * (10 + 8) + [math.inf] * 9)
    accelerator = new_accelerator(accumulation_steps=2)
    state = TrainingState(tmp_path, accelerator)
    with pytest.raises(timm_lt.UsageError, match=r"inf in update 5 of epoch 2:.*is kept"):
        train(linear_model(), state=state, loss=Notes(lambda _: next(numbers)))
    assert state.saved_epochs() == [1]
    # A long epoch is stopped soon.
    monkeypatch.setattr(parts, "CHECK_EVERY", 2)
    loss = Notes(lambda batch: batches.append(batch) or math.nan)
    with pytest.raises(timm_lt.UsageError, match=r"update 1 of epoch 1"):
        train(linear_model(), loss=loss)
    assert len(batches) == 2


def test_accumulated_gradients_are_those_of_the_whole_batch():
    whole, parts = linear_model(), linear_model()
    train(whole)
    train(parts, accelerator=new_accelerator(accumulation_steps=4))
    torch.testing.assert_close(weights(parts), weights(whole), atol=1e-6, rtol=1e-5)


def test_an_update_that_was_cut_short_is_forgotten():
    accelerator = new_accelerator(accumulation_steps=4)
    fresh, again = linear_model(), linear_model()
    train(fresh, accelerator=accelerator)

    def interrupt(_):
        if accelerator.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(again, accelerator=accelerator, loss=Notes(interrupt))
    # Two of the four parts were begun; no update was made, so the weights are those of the start.
    assert weights(again).equal(weights(linear_model()))
    assert again[1].weight.grad is not None
    train(again, accelerator=accelerator)
    assert weights(again).equal(weights(fresh))


class OfFeatures(nn.Module):
    """Cross-entropy of its own product of features and weights; notes the epochs."""

    needs_features = True

    def __init__(self, classifier):
        super().__init__()
        self.classifier, self.epochs = [classifier], []

    def set_epoch(self, *epoch):
        self.epochs.append(epoch)

    def forward(self, logits, targets, features):
        again = self.classifier[0](features)
        torch.testing.assert_close(again, logits)
        return nn.functional.cross_entropy(again, targets)


def test_a_loss_of_features_has_their_gradients_and_gets_the_epochs():
    plain, other = network(), network()
    train(plain, epochs=2)
    of_features = OfFeatures(other.fc)
    train(other, epochs=2, loss=of_features)
    torch.testing.assert_close(weights(other), weights(plain))
    assert of_features.epochs == [(0, 2), (0, 2), (1, 2)]
    assert not other.fc._forward_pre_hooks


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 5), nn.ReLU(), nn.Linear(5, C))


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_clipping_bounds_the_first_step(mode):
    """Plain SGD at rate 1: the step is the clipped gradient."""
    model, free = small_network(), small_network()
    before = weights(model)
    options = {
        "optimizer": {"opt": "momentum", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0},
        "scheduler": {"sched": "constant"},
        "epochs": 1,
        "batch_size": N,
    }
    train(free, **options)
    train(model, clip_grad=0.01, clip_mode=mode, **options)
    step, unclipped = weights(model) - before, weights(free) - before
    if mode == "norm":
        expected = unclipped * (0.01 / unclipped.norm())
    elif mode == "value":
        expected = unclipped.clamp(-0.01, 0.01)
    else:
        expected, parameters = [], dict(small_network().named_parameters())
        parts = unclipped.split([p.numel() for p in parameters.values()])
        for (name, p), part in zip(parameters.items(), parts, strict=True):
            if name.startswith("1."):  # the classifier is left alone
                # A unit is a row of a weight, or a whole bias.
                shape = (len(p) if p.ndim > 1 else 1, -1)
                size, norm = (x.view(shape).norm(dim=1, keepdim=True) for x in (p.detach(), part))
                limit = size.clamp(min=1e-3) * 0.01
                part.view(shape).mul_((limit / norm.clamp(min=1e-6)).clamp(max=1))
            expected.append(part.flatten())
        expected = torch.cat(expected)
    torch.testing.assert_close(step, expected, atol=1e-6, rtol=1e-4)


def test_averaged_weights_are_kept():
    """The average by its formula, from the weights after every update."""
    seen, model, plain = [], linear_model(), linear_model()
    loss = Notes(lambda _: seen.append(weights(model)))
    train(model, loss=loss, ema={"decay": 0.8}, keep="last")
    # The loss sees the weights before each update; those after the last are of a plain run.
    train(plain)
    expected = seen[0]
    for step, after in enumerate([*seen[1:], weights(plain)]):
        # timm's average begins with the weights after the second update.
        decay = 0.8 if step > 1 else 0.0
        expected = decay * expected + (1 - decay) * after
    torch.testing.assert_close(weights(model), expected, atol=1e-6, rtol=1e-5)


def test_class_weights_are_no_longer_than_the_limit():
    options = {"optimizer": {"opt": "sgd", "lr": 1.0}, "epochs": 2}
    longest = []
    for limit in ({"max_norm": 0.7}, {}):
        model = network()
        train(model, **limit, **options)
        longest.append(max(math.hypot(*row) for row in model.fc.weight.tolist()))
    assert longest[0] == pytest.approx(0.7, abs=1e-5)
    assert longest[1] > 0.8


@pytest.mark.parametrize("mixup", [{"mixup_alpha": 0.4}, {"cutmix_alpha": 1.0, "mode": "elem"}])
def test_mixed_images_have_mixed_targets(mixup):
    """Each image is a combination of two with its target's proportions, until mixup ends."""
    batches = []
    options = {"loss": Notes(batches.append), "mixup": mixup, "mixup_off_epoch": 2}
    train(linear_model(), **options)
    soft = torch.cat(batches[:10])
    assert soft.shape == (80, C)
    torch.testing.assert_close(soft.sum(1), torch.ones(80))
    assert ((soft > 0).sum(1) <= 2).all()
    assert ((soft > 0).sum(1) == 2).any()
    assert (torch.cat(batches[10:]).max(1).values == 1).all()


@pytest.mark.parametrize("cooldown", [0, 2])
def test_a_cosine_ends_with_training(cooldown):
    """Per update; cooldown and the epochs before it make up the epochs, at the lowest rate."""
    scheduler = {"sched": "cosine", "cooldown_epochs": cooldown, "min_lr": 1e-4}
    history = train(linear_model(), epochs=5, scheduler=scheduler)
    length = 5 - cooldown
    # The last update of epoch e (1-based, 5 updates each) has the rate of update 5 e - 1.
    steps = [min(5 * e - 1, 5 * length) for e in range(1, length + 1)] + [5 * length] * cooldown
    expected = [1e-4 + 0.00495 * (1 + math.cos(math.pi * step / 5 / length)) for step in steps]
    assert [record.lr for record in history] == pytest.approx(expected)


def plateau_rates_by_hand(scores, *, warmup, lr, decay, patience):
    """Rates at the ends of epochs: linear warm-up, then lower after too many bad epochs."""
    rates, best, bad, rate = [], -1.0, 0, lr
    for epoch, score in enumerate(scores, 1):
        if epoch <= warmup:
            # The last of five updates an epoch.
            rates.append(1e-5 + (lr - 1e-5) * (5 * epoch - 1) / (5 * warmup))
            continue
        rates.append(rate)
        if score is None:
            continue
        best, bad = (score, 0) if score > best * (1 + 1e-4) else (best, bad + 1)
        if bad > patience:
            rate, bad = rate * decay, 0
    return rates


@pytest.mark.parametrize(("warmup", "validate_every"), [(0, 1), (2, 1), (1, 2)])
def test_plateau_follows_validation_and_survives_a_restart(tmp_path, warmup, validate_every):
    plateau = {"sched": "plateau", "patience_epochs": 1, "decay_rate": 0.5}
    options = {
        "epochs": 9,
        "val": images(seed=1),
        "validate_every": validate_every,
        "scheduler": plateau | {"warmup_epochs": warmup},
        # Nothing is learnt at this rate: every epoch after the first is one of patience.
        "optimizer": {"opt": "sgd", "lr": 1e-6},
    }
    history = train(linear_model(), **options)
    rates = [record.lr for record in history]
    scores = [record.val.get("all") for record in history]
    by_hand = plateau_rates_by_hand(scores, warmup=warmup, lr=1e-6, decay=0.5, patience=1)
    assert rates == pytest.approx(by_hand, rel=1e-6)
    assert rates[-1] < 1e-6
    assert [
        record.lr
        for record in interrupted(tmp_path, (linear_model(), linear_model()), 6, **options)
    ] == rates


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph", "ignore:It is highly")
@pytest.mark.parametrize(
    "name",
    [
        *("sgd", "adamw", "adafactor", "lookahead_sgd", "sgdp", "muon", "adahessian"),
        *(pytest.param(str(n), marks=pytest.mark.exhaustive) for n in timm.optim.list_optimizers()),
    ],
)
def test_every_optimiser_of_timm_trains_or_says_what_it_needs(name, monkeypatch):
    # One of them compiles what it computes, which takes half a minute.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    optimizer = {"opt": name, "lr": 1e-3, "weight_decay": 0.01, "momentum": 0.9}
    model = small_network()
    before = weights(model)
    try:
        train(model, epochs=1, optimizer=optimizer)
    except timm_lt.UsageError as error:
        assert re.search("install|CUDA|apex", str(error)), error  # noqa: PT017
        return
    assert weights(model).isfinite().all()
    assert not weights(model).equal(before)


def sgd(**options):
    return {"optimizer": {"opt": "sgd", "lr": 0.1} | options}


def mixup(**options):
    return {"mixup": options}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (sgd(opt="sdg"), "did you mean 'sgd"),
        (sgd(lr=0.0), r"optimizer.lr must be a number in \(0, inf\)"),
        (sgd(momentum=1.0), "momentum"),
        (sgd(nesterof=True), "optimizer: .*'nesterof'"),
        ({"scheduler": {"sched": "cosin"}}, "did you mean 'cosine'"),
        ({"scheduler": {"sched": "plateau"}}, "plateau needs a validation split"),
        ({"scheduler": {"warmup_epochs": 9}}, r"\[0, 3\]"),
        ({"scheduler": {"warmup": 1}}, "scheduler: .*unexpected keyword argument 'warmup'"),
        ({"scheduler": {"cooldown_epochs": 3}}, "longer than 3 epochs"),
        ({"max_norm": 0}, r"max_norm must be a number in \(0, inf\)"),
        ({"clip_mode": "agc"}, "clip_mode agc has no effect without clip_grad"),
        (mixup(remix_kappa=3.0), r"remix_\* has no effect without mixup_alpha"),
        (mixup(mixup_alpha=0.2) | {"batch_size": 5}, r"even number of images .* not 5"),
        (mixup(mixup_alpha=0.2) | {"loss": nn.CrossEntropyLoss()}, "takes no soft targets"),
        (mixup(alpha=0.2), "mixup: .*unexpected keyword argument 'alpha'"),
        ({"ema": {"decay": 1.0}}, r"ema.decay must be a number in \[0, 1\)"),
        ({"ema": {"use_warmup": True}}, "use_warmup.* has no effect without ema.decay"),
        ({"batch_size": 41}, "a multiple of 1 and at most 40, the images of an epoch"),
        ({"keep": "first"}, "unknown keep 'first'"),
        ({"epochs": 0}, "epochs must be an integer >= 1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(timm_lt.UsageError, match=message):
        train(linear_model(), **options)
