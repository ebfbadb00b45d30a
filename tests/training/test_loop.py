"""The training loop against a hand-written one, over processes, and across a restart."""

import math
import re
import resource

import pytest
import timm
import timm.optim
import torch
from accelerate.state import AcceleratorState
from stopping import StopError, StopsAfterTwo, new_state
from torch import nn

import timm_lt
from timm_lt.data.images import ImageTensors
from timm_lt.heads import get_head
from timm_lt.training import (
    TrainingState,
    check_batch_size,
    check_optimization,
    train_representation,
    update,
)
from timm_lt.utils.accelerator import create_accelerator, native_precision, set_cpu_threads

NUM_IMAGES, NUM_CLASSES, SIDE = 40, 4, 6


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield create_accelerator(mixed_precision="no")
    AcceleratorState._reset_state(reset_partial_state=True)


def images(seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (NUM_IMAGES, 3, SIDE, SIDE), generator=generator)
    labels = torch.arange(NUM_IMAGES) % NUM_CLASSES
    pixels[:, 0] = pixels[:, 0] // 2 + 32 * labels[:, None, None]
    return ImageTensors(pixels.to(torch.uint8), labels)


def linear_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, NUM_CLASSES))


def train(accelerator, model, epochs=3, batch_size=8, **options):
    """Returns the history; the model is trained in place."""
    data = options.pop("data", None) or images()
    settings = {
        "optimizer": {"opt": "sgd", "lr": 0.01, "weight_decay": 0.1, "momentum": 0.9},
        "scheduler": {"sched": "cosine"},
    }
    return train_representation(
        model,
        data,
        timm_lt.create_sampler("instance_balanced", data.labels, seed=0),
        options.pop("loss", None) or timm_lt.create_loss("cross_entropy"),
        accelerator=accelerator,
        epochs=epochs,
        batch_size=batch_size,
        **settings | options,
    ).history


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_follows_a_hand_written_nesterov_loop(accelerator):
    model = linear_model()
    weight, bias = (p.detach().double().clone() for p in model[1].parameters())
    data = images()
    history = train(accelerator, model, epochs=3, batch_size=8, scheduler={"sched": "constant"})

    x = ((data.images.double() / 255 - 0.5) / 0.25).flatten(1)
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    sampler = timm_lt.create_sampler("instance_balanced", data.labels, seed=0)
    losses = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        epoch_losses = []
        for start in range(0, NUM_IMAGES, 8):
            rows = order[start : start + 8]
            p = torch.softmax(x[rows] @ weight.T + bias, dim=1)
            targets = data.labels[rows]
            epoch_losses.append(-p[range(8), targets].log().mean())
            p[range(8), targets] -= 1
            # Weight decay is on the weight and not on the bias.
            gradients = [p.T @ x[rows] / 8 + 0.1 * weight, p.mean(0)]
            for k in range(2):
                velocity[k] = 0.9 * velocity[k] + gradients[k]
            weight -= 0.01 * (gradients[0] + 0.9 * velocity[0])
            bias -= 0.01 * (gradients[1] + 0.9 * velocity[1])
        losses.append(torch.stack(epoch_losses).mean().item())
    assert [record.loss for record in history] == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(model[1].weight.double(), weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model[1].bias.double(), bias, atol=1e-5, rtol=1e-4)


def test_cosine_goes_to_zero_per_update(accelerator):
    history = train(accelerator, linear_model(), epochs=4)
    rates = torch.tensor([record.lr for record in history])
    # The last update of epoch e (1-based, 5 updates each) has the rate of update 5 e - 1.
    expected = 0.005 * (1 + torch.cos(torch.pi * (5 * torch.arange(1, 5) - 1) / 20))
    torch.testing.assert_close(rates, expected)


def test_resumes_to_the_same_bits(accelerator, tmp_path):
    whole = linear_model()
    history = train(accelerator, whole, epochs=4)

    interrupted = new_state(tmp_path, StopsAfterTwo)
    with pytest.raises(StopError):
        train(interrupted.accelerator, linear_model(), epochs=4, state=interrupted)
    # A write that was cut off leaves another name, which is not taken for a state.
    (tmp_path / ".partial_0003").mkdir()
    (tmp_path / ".partial_0003" / "model.safetensors").write_bytes(b"cut off")
    resumed, model = new_state(tmp_path), linear_model()
    with torch.no_grad():
        model[1].weight.fill_(7.0)
    after = train(resumed.accelerator, model, epochs=4, state=resumed)
    assert torch.equal(model[1].weight, whole[1].weight)
    assert torch.equal(model[1].bias, whole[1].bias)
    assert [record.loss for record in after] == [record.loss for record in history]
    # The one before is kept, in case the last is damaged.
    assert resumed.saved_epochs() == [3, 4]


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "manifest"])
def test_a_damaged_state_is_not_believed(accelerator, tmp_path, caplog, damage):
    whole = linear_model()
    state = TrainingState(tmp_path, accelerator)
    history = train(accelerator, whole, epochs=4, state=state)
    file = tmp_path / "epoch_0004" / "optimizer.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "cut":
        file.write_bytes(content[:-9])
    elif damage == "flipped":
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    else:
        (tmp_path / "epoch_0004" / "manifest.json").write_text("{")
    # Goes on from the state before it, to the same weights.
    state, model = new_state(tmp_path), linear_model()
    with caplog.at_level("WARNING", "timm_lt"):
        again = train(state.accelerator, model, epochs=4, state=state)
    assert "epoch_0004 is damaged" in caplog.text
    assert weights(model).equal(weights(whole))
    assert [record.loss for record in again] == [record.loss for record in history]


def test_with_nothing_but_damaged_states_the_run_stops(accelerator, tmp_path):
    state = TrainingState(tmp_path, accelerator)
    train(accelerator, linear_model(), epochs=2, state=state)
    for path in tmp_path.glob("epoch_*/model.safetensors"):
        path.write_bytes(b"no tensors")
    state = new_state(tmp_path)
    with pytest.raises(timm_lt.UsageError, match=r"every training state .*damaged.*--overwrite"):
        train(state.accelerator, linear_model(), epochs=2, state=state)


def test_a_full_disk_leaves_the_state_before(accelerator, tmp_path):
    """The operating system refuses to write on, in the middle of a file."""
    whole = linear_model()
    train(accelerator, whole, epochs=3)

    class DiskFills(TrainingState):
        def save(self, history, **kwargs):
            if len(history) == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            super().save(history, **kwargs)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = create_accelerator(mixed_precision="no")
    state = DiskFills(tmp_path, accelerator)
    message = r"after epoch 2 cannot be written.*after epoch 1 is whole.*--resume"
    try:
        with pytest.raises(timm_lt.UsageError, match=message):
            train(accelerator, linear_model(), epochs=3, state=state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_0001"]
    state, model = new_state(tmp_path), linear_model()
    train(state.accelerator, model, epochs=3, state=state)
    assert weights(model).equal(weights(whole))


def test_validation_is_counted_and_changes_nothing(accelerator):
    with_val, without = linear_model(), linear_model()
    counts = torch.tensor([200, 200, 50, 5])
    history = train(accelerator, with_val, val=images(), class_counts=counts)
    train(accelerator, without)
    assert torch.equal(with_val[1].weight, without[1].weight)
    data = images()
    with torch.inference_mode():
        x = (data.images.float() / 255 - 0.5) / 0.25
        right = (with_val(x).argmax(1) == data.labels).double()
    assert history[-1].val["all"] == pytest.approx(right.mean().item())
    few = right[data.labels == 3].mean().item()
    assert history[-1].val["few_shot"] == pytest.approx(few)


def test_a_loss_that_is_not_finite_stops_the_run(accelerator):
    model = linear_model()
    with torch.no_grad():
        model[1].weight.fill_(float("inf"))
    with pytest.raises(timm_lt.UsageError, match=r"loss became nan in epoch 1, update 1:.*lr"):
        train(accelerator, model)


def test_a_loss_that_is_not_finite_stops_a_long_epoch_soon(accelerator, monkeypatch):
    monkeypatch.setattr(update, "LOOK_EVERY", 2)
    batches = []

    class Broken(nn.Module):
        def forward(self, logits, targets):
            batches.append(targets)
            return logits.mean() * math.nan

    with pytest.raises(timm_lt.UsageError, match=r"epoch 1, update 1"):
        train(accelerator, linear_model(), loss=Broken())
    assert len(batches) == 2


def test_the_first_update_whose_loss_is_not_finite_is_named(accelerator, tmp_path):
    class Bursts(nn.Module):
        batches = 0

        def forward(self, logits, targets):
            self.batches += 1
            # Two batches an update, five updates an epoch: the ninth is of update 5 of epoch 2.
            return logits.mean() * (math.inf if self.batches == 10 + 9 else 1.0)

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = create_accelerator(mixed_precision="no", accumulation_steps=2)
    state = TrainingState(tmp_path, accelerator)
    with pytest.raises(timm_lt.UsageError, match=r"inf in epoch 2, update 5:.*is kept"):
        train(accelerator, linear_model(), state=state, loss=Bursts())
    assert state.saved_epochs() == [1]


def test_accumulated_gradients_are_those_of_the_whole_batch(accelerator):
    whole, parts = linear_model(), linear_model()
    train(accelerator, whole)
    AcceleratorState._reset_state(reset_partial_state=True)
    accumulating = create_accelerator(mixed_precision="no", accumulation_steps=4)
    history = train(accumulating, parts)
    torch.testing.assert_close(weights(parts), weights(whole), atol=1e-6, rtol=1e-5)
    assert len(history) == 3
    AcceleratorState._reset_state(reset_partial_state=True)
    three = create_accelerator(mixed_precision="no", accumulation_steps=3)
    with pytest.raises(timm_lt.UsageError, match=r"accumulation_steps 3 on 1 processes.*of 3"):
        train(three, linear_model())


def test_an_update_that_was_cut_short_is_forgotten(accelerator):
    class Breaks(nn.Module):
        batches = 0

        def forward(self, logits, targets):
            self.batches += 1
            if self.batches == 2:
                raise KeyboardInterrupt
            return logits.sum() + targets.sum()

    del accelerator
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = create_accelerator(mixed_precision="no", accumulation_steps=4)
    fresh, again = linear_model(), linear_model()
    train(accelerator, fresh)
    with pytest.raises(KeyboardInterrupt):
        train(accelerator, again, loss=Breaks())
    # Two of the four parts were begun; no update was made, so the weights are those of the start.
    assert accelerator.step == 2
    torch.testing.assert_close(weights(again), weights(linear_model()), rtol=0, atol=0)
    assert again[1].weight.grad is not None
    train(accelerator, again)
    torch.testing.assert_close(weights(again), weights(fresh), rtol=0, atol=0)


class _OfFeatures(nn.Module):
    """Cross-entropy of its own product of features and weights; notes when it is told of epochs."""

    needs_features = True

    def __init__(self, classifier):
        super().__init__()
        self.classifier, self.epochs = [classifier], []

    def set_epoch(self, epoch, epochs):
        self.epochs.append((epoch, epochs))

    def forward(self, logits, targets, features):
        again = features @ self.classifier[0].weight.T + self.classifier[0].bias
        torch.testing.assert_close(again, logits)
        return nn.functional.cross_entropy(again, targets)


def test_a_loss_of_features_has_their_gradients_and_hears_of_epochs(accelerator, tmp_path):
    def model():
        torch.manual_seed(0)
        return timm.create_model("test_resnet", num_classes=NUM_CLASSES)

    plain, other = model(), model()
    train(accelerator, plain, epochs=2)
    of_features = _OfFeatures(other.fc)
    train(accelerator, other, epochs=2, loss=of_features)
    torch.testing.assert_close(weights(other), weights(plain))
    assert of_features.epochs == [(0, 2), (1, 2)]
    # Nothing stays behind on the model.
    assert not other.fc._forward_pre_hooks


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_clipping_bounds_the_first_step(accelerator, mode):
    """Plain SGD at rate 1: the step is the clipped gradient."""
    model, free = small_network(), small_network()
    before = weights(model)
    options = {
        "optimizer": {"opt": "momentum", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0},
        "scheduler": {"sched": "constant"},
        "epochs": 1,
        "batch_size": NUM_IMAGES,
    }
    train(accelerator, free, **options)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = create_accelerator(mixed_precision="no")
    train(accelerator, model, clip_grad=0.01, clip_mode=mode, **options)
    step, unclipped = weights(model) - before, weights(free) - before
    if mode == "norm":
        expected = unclipped * (0.01 / unclipped.norm())
    elif mode == "value":
        expected = unclipped.clamp(-0.01, 0.01)
    else:
        rows = [p.detach() for p in small_network().parameters()]
        parts = unclipped.split([p.numel() for p in rows])
        expected = []
        for index, (flat, row) in enumerate(zip(parts, rows, strict=True)):
            part = flat.view_as(row)
            if index < 2:  # the classifier is left alone
                dims = tuple(range(1, row.ndim)) if row.ndim > 1 else None
                norm = part.norm() if dims is None else part.norm(dim=dims, keepdim=True)
                size = row.norm() if dims is None else row.norm(dim=dims, keepdim=True)
                limit = size.clamp(min=1e-3) * 0.01
                part *= torch.where(norm > limit, limit / norm.clamp(min=1e-6), 1.0)
            expected.append(part.flatten())
        expected = torch.cat(expected)
    torch.testing.assert_close(step, expected, atol=1e-6, rtol=1e-4)


def small_network():
    torch.manual_seed(0)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = nn.Linear(3 * SIDE * SIDE, 5)
            self.fc = nn.Linear(5, NUM_CLASSES)

        def get_classifier(self):
            return self.fc

        def forward(self, x):
            return self.fc(self.hidden(x.flatten(1)).relu())

    return Network()


def test_averaged_weights_go_on(accelerator, tmp_path):
    """The average by its formula, from the weights after every update."""
    seen = []

    class Notes(nn.Module):
        def forward(self, logits, targets):
            seen.append(weights(model))
            return nn.functional.cross_entropy(logits, targets)

    model = linear_model()
    train(accelerator, model, loss=Notes(), ema={"decay": 0.8}, keep="last")
    averaged = weights(model)
    # What the loss sees is before each update; the weights after the last are those of a plain run.
    AcceleratorState._reset_state(reset_partial_state=True)
    plain = linear_model()
    train(create_accelerator(mixed_precision="no"), plain)
    expected = seen[0]
    for step, after in enumerate([*seen[1:], weights(plain)]):
        # timm's average begins with the weights after the second update.
        decay = 0.8 if step > 1 else 0.0
        expected = decay * expected + (1 - decay) * after
    torch.testing.assert_close(averaged, expected, atol=1e-6, rtol=1e-5)


def test_averages_and_the_best_epoch_survive_a_restart(accelerator, tmp_path):
    """Learning rates that grow, so that an early epoch is the best on validation."""
    options = {
        "val": images(seed=1),
        "ema": {"decay": 0.5},
        "optimizer": {"opt": "adamw", "lr": 3.0},
        "scheduler": {"sched": "constant", "warmup_epochs": 6, "warmup_lr": 1e-4},
        "epochs": 6,
    }
    whole = linear_model()
    history = train(accelerator, whole, **options)
    best = max(history, key=lambda record: record.val["all"])
    assert best.epoch < 6
    assert history[-1].val["all"] < best.val["all"]

    class StopError(Exception):
        pass

    class Stops(TrainingState):
        def save(self, history, **kwargs):
            super().save(history, **kwargs)
            if len(history) == 5:
                raise StopError

    AcceleratorState._reset_state(reset_partial_state=True)
    state = Stops(tmp_path, create_accelerator(mixed_precision="no"))
    with pytest.raises(StopError):
        train(state.accelerator, linear_model(), state=state, **options)
    state, model = new_state(tmp_path), linear_model()
    again = train(state.accelerator, model, state=state, **options)
    assert [record.val for record in again] == [record.val for record in history]
    assert weights(model).equal(weights(whole))
    # What goes on is what was best.
    data = options["val"]
    with torch.inference_mode():
        x = (data.images.float() / 255 - 0.5) / 0.25
        accuracy = (model(x).argmax(1) == data.labels).double().mean().item()
    assert accuracy == pytest.approx(best.val["all"])


def test_validation_every_other_epoch_and_at_the_end(accelerator):
    history = train(accelerator, linear_model(), epochs=5, val=images(), validate_every=2)
    assert [bool(record.val) for record in history] == [False, True, False, True, True]


def plateau_rates_by_hand(scores, *, warmup, epochs, lr, decay, patience):
    """Rates at the ends of epochs: linear warm-up, then lower after too many bad epochs."""
    rates, best, bad, rate = [], -1.0, 0, lr
    for epoch in range(1, epochs + 1):
        if epoch <= warmup:
            # The last of five updates an epoch.
            rates.append(1e-5 + (lr - 1e-5) * (5 * epoch - 1) / (5 * warmup))
            continue
        rates.append(rate)
        score = scores[epoch - 1]
        if score is None:
            continue
        best, bad = (score, 0) if score > best * (1 + 1e-4) else (best, bad + 1)
        if bad > patience:
            rate, bad = rate * decay, 0
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 2])
@pytest.mark.parametrize("validate_every", [1, 2])
def test_plateau_follows_validation_and_survives_a_restart(
    accelerator, tmp_path, warmup, validate_every
):
    scheduler = {
        "sched": "plateau",
        "patience_epochs": 1,
        "decay_rate": 0.5,
        "warmup_epochs": warmup,
    }
    options = {
        "epochs": 9,
        "val": images(seed=1),
        "validate_every": validate_every,
        "scheduler": scheduler,
        # Nothing is learnt at this rate: every epoch after the first is one of patience.
        "optimizer": {"opt": "sgd", "lr": 1e-6},
    }
    history = train(accelerator, linear_model(), **options)
    rates = [record.lr for record in history]
    scores = [record.val.get("all") for record in history]
    by_hand = plateau_rates_by_hand(scores, warmup=warmup, epochs=9, lr=1e-6, decay=0.5, patience=1)
    assert rates == pytest.approx(by_hand, rel=1e-6)
    assert rates[-1] < 1e-6

    class StopError(Exception):
        pass

    class Stops(TrainingState):
        def save(self, history, **kwargs):
            super().save(history, **kwargs)
            if len(history) == 6:
                raise StopError

    AcceleratorState._reset_state(reset_partial_state=True)
    state = Stops(tmp_path, create_accelerator(mixed_precision="no"))
    with pytest.raises(StopError):
        train(state.accelerator, linear_model(), state=state, **options)
    state = new_state(tmp_path)
    again = train(state.accelerator, linear_model(), state=state, **options)
    assert [record.lr for record in again] == rates


def test_plateau_needs_validation(accelerator):
    with pytest.raises(timm_lt.UsageError, match="plateau needs a validation split"):
        train(accelerator, linear_model(), scheduler={"sched": "plateau"})


def test_a_schedule_ends_with_training(accelerator):
    """Cooldown and the epochs before it make up the epochs, all at the lowest rate in the end."""
    scheduler = {"sched": "cosine", "cooldown_epochs": 2, "min_lr": 1e-4}
    history = train(accelerator, linear_model(), epochs=5, scheduler=scheduler)
    rates = [record.lr for record in history]
    expected = [
        1e-4 + (0.01 - 1e-4) * (1 + math.cos(math.pi * (5 * epoch - 1) / 15)) / 2
        for epoch in (1, 2, 3)
    ]
    assert rates == pytest.approx([*expected, 1e-4, 1e-4])


def test_a_library_user_is_told(accelerator, tmp_path):
    with pytest.raises(timm_lt.UsageError, match="train is a list, not ImageTensors"):
        train_representation(
            linear_model(),
            [],
            timm_lt.create_sampler("instance_balanced", [0, 1]),
            nn.CrossEntropyLoss(),
            accelerator=accelerator,
            epochs=1,
        )
    train(accelerator, linear_model())
    with pytest.raises(timm_lt.UsageError, match="make a new one"):
        train(accelerator, linear_model(), state=TrainingState(tmp_path, accelerator))


@pytest.mark.parametrize("mixup", [{"mixup_alpha": 0.4}, {"cutmix_alpha": 1.0, "mode": "elem"}])
def test_mixed_images_have_mixed_targets(accelerator, mixup):
    """Whatever is mixed, each image is a combination of two with its target's proportions."""
    batches = []

    class Notes(nn.Module):
        takes_soft_targets = True

        def forward(self, logits, targets):
            batches.append(targets)
            return nn.functional.cross_entropy(logits, targets)

    train(accelerator, linear_model(), loss=Notes(), mixup=mixup, mixup_off_epoch=2)
    soft = torch.cat(batches[:10])
    assert soft.shape == (80, NUM_CLASSES)
    torch.testing.assert_close(soft.sum(1), torch.ones(80))
    assert ((soft > 0).sum(1) <= 2).all()
    assert ((soft > 0).sum(1) == 2).any()
    # After two epochs, images are as they are.
    assert (torch.cat(batches[10:]).max(1).values == 1).all()


def test_class_weights_are_no_longer_than_the_limit(accelerator):
    limited, free = (timm.create_model("test_resnet", num_classes=NUM_CLASSES) for _ in range(2))
    options = {"optimizer": {"opt": "sgd", "lr": 1.0}, "epochs": 2}
    train(accelerator, limited, max_norm=0.7, **options)
    train(accelerator, free, **options)
    longest = [
        max(math.hypot(*row) for row in get_head(m).weight.tolist()) for m in (limited, free)
    ]
    assert longest[0] == pytest.approx(0.7, abs=1e-5)
    assert longest[1] > 0.8
    with pytest.raises(timm_lt.UsageError, match=r"max_norm must be a number in \(0, inf\)"):
        train(accelerator, linear_model(), max_norm=0)


def test_mixing_needs_an_even_batch_and_a_loss_for_it(accelerator):
    mixup = {"mixup_alpha": 0.2}
    with pytest.raises(timm_lt.UsageError, match=r"even number of images .* not 5"):
        train(accelerator, linear_model(), mixup=mixup, batch_size=5)
    with pytest.raises(timm_lt.UsageError, match="CrossEntropyLoss takes no soft targets"):
        train(accelerator, linear_model(), mixup=mixup, loss=nn.CrossEntropyLoss())
    with pytest.raises(timm_lt.UsageError, match="unknown option of mixup: 'alpha'"):
        train(accelerator, linear_model(), mixup={"alpha": 0.2})
    with pytest.raises(timm_lt.UsageError, match=r"ema.decay must be a number in \[0, 1\)"):
        train(accelerator, linear_model(), ema={"decay": 1.0})
    with pytest.raises(timm_lt.UsageError, match=r"ema option use_warmup has no effect"):
        train(accelerator, linear_model(), ema={"use_warmup": True})


def test_images_that_cannot_be_read_give_their_place_to_others(accelerator):
    data = images()
    missing = ImageTensors(data.images, data.labels, missing=[3, 4])
    seen = []

    class Notes(nn.Module):
        def forward(self, logits, targets):
            seen.append(targets)
            return nn.functional.cross_entropy(logits, targets)

    model = linear_model()
    history = train(accelerator, model, data=missing, val=missing, loss=Notes(), keep="last")
    counts = torch.bincount(torch.cat(seen), minlength=NUM_CLASSES)
    assert int(counts.sum()) == 3 * NUM_IMAGES
    # Others of the same batch stand in.
    assert all(len(targets) == 8 for targets in seen)
    readable = torch.tensor([row for row in range(NUM_IMAGES) if row not in (3, 4)])
    with torch.inference_mode():
        x = (data.images[readable].float() / 255 - 0.5) / 0.25
        right = (model(x).argmax(1) == data.labels[readable]).double().mean().item()
    assert history[-1].val["all"] == pytest.approx(right)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph", "ignore:It is highly")
@pytest.mark.parametrize("name", sorted({*map(str, timm.optim.list_optimizers()), "lookahead_sgd"}))
def test_every_optimiser_of_timm_trains_or_says_what_it_needs(accelerator, name, monkeypatch):
    # One of them compiles what it computes, which takes half a minute.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    optimizer = {"opt": name, "lr": 1e-3, "weight_decay": 0.01, "momentum": 0.9}
    try:
        check_optimization(optimizer, {}, epochs=1)
    except timm_lt.UsageError as error:
        assert re.search("install|CUDA|apex", str(error)), error  # noqa: PT017
        return
    model = small_network()
    before = weights(model)
    train(accelerator, model, epochs=1, optimizer=optimizer)
    assert weights(model).isfinite().all()
    assert not weights(model).equal(before)


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "match"),
    [
        ({"opt": "sdg", "lr": 0.1}, {}, "did you mean 'sgd"),
        ({"opt": "sgd", "lr": 0.0}, {}, r"lr must be a number in \(0, inf\)"),
        ({"opt": "sgd", "lr": 0.1, "weight_decay": -1}, {}, "weight_decay"),
        ({"opt": "sgd", "lr": 0.1, "momentum": 1.0}, {}, "momentum"),
        ({"opt": "sgd", "lr": 0.1, "nesterof": True}, {}, "nesterof"),
        ({"opt": "sgd", "lr": 0.1}, {"sched": "cosin"}, "did you mean 'cosine'"),
        ({"opt": "sgd", "lr": 0.1}, {"warmup_epochs": 9}, r"\[0, 5\]"),
        ({"opt": "sgd", "lr": 0.1}, {"warmup": 1}, "warmup"),
    ],
)
def test_wrong_optimisation_is_named(optimizer, scheduler, match):
    with pytest.raises(timm_lt.UsageError, match=match):
        check_optimization(optimizer, scheduler, epochs=5)


def test_wrong_batch_sizes_are_named():
    check_batch_size(8, 8, 2)
    with pytest.raises(timm_lt.UsageError, match="exceeds the 7 images"):
        check_batch_size(8, 7, 1)
    with pytest.raises(timm_lt.UsageError, match="multiple of their number, 3"):
        check_batch_size(8, 80, 3)


def test_threads(monkeypatch):
    before = torch.get_num_threads()
    try:
        assert set_cpu_threads(2) == torch.get_num_threads() == 2
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        assert set_cpu_threads() == 2
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
        assert set_cpu_threads() == 1
        with pytest.raises(timm_lt.UsageError, match="threads"):
            set_cpu_threads(0)
    finally:
        torch.set_num_threads(before)


def test_auto_precision_is_one_that_this_machine_computes():
    assert native_precision() in ("no", "bf16")


def test_a_compiled_model_trains_and_resumes_to_the_same_weights(
    accelerator, tmp_path, monkeypatch
):
    """As ``accelerate config`` may ask for it; this backend only traces, so it is fast."""
    whole = linear_model()
    train(accelerator, whole, ema={"decay": 0.5}, val=images())
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")

    class StopError(Exception):
        pass

    class Stops(TrainingState):
        def save(self, history, **kwargs):
            super().save(history, **kwargs)
            raise StopError

    AcceleratorState._reset_state(reset_partial_state=True)
    state = Stops(tmp_path, create_accelerator(mixed_precision="no"))
    assert state.accelerator.state.dynamo_plugin.backend == "EAGER"
    options = {"ema": {"decay": 0.5}, "val": images(), "state": state}
    with pytest.raises(StopError):
        train(state.accelerator, linear_model(), **options)
    state, model = new_state(tmp_path), linear_model()
    train(state.accelerator, model, **options | {"state": state})
    torch.testing.assert_close(weights(model), weights(whole))
    assert [name for name, _ in model.named_parameters()] == ["1.weight", "1.bias"]
