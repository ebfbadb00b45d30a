"""Small trainings on random images, and in two sessions."""

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from stopping import StopError, new_state
from torch import nn

import timm_lt
from timm_lt.data.images import ImageTensors
from timm_lt.training import TrainingOptions, TrainingState, train_representation
from timm_lt.utils.accelerator import create_accelerator

N, C, SIDE = 40, 4, 6
SGD = {"opt": "sgd", "lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}


def new_accelerator(**options):
    AcceleratorState._reset_state(reset_partial_state=True)
    return create_accelerator(**{"mixed_precision": "no"} | options)


@pytest.fixture(autouse=True)
def own_accelerator():
    """In the tests of a file that imports it, leaves accelerate without a state."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def images(seed=0, side=SIDE):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (N, 3, side, side), generator=generator)
    labels = torch.arange(N) % C
    pixels[:, 0] = pixels[:, 0] // 2 + 32 * labels[:, None, None]
    return ImageTensors(pixels.to(torch.uint8), labels)


def linear_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, C))


def network(name="test_resnet", **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=C, **options)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(model, loss=None, data=None, accelerator=None, state=None, **own):
    """Trains a model in place; returns the history."""
    data = data or images()
    given = {key: own.pop(key) for key in ("val", "class_counts") if key in own} | {"state": state}
    accelerator = state.accelerator if state else accelerator or new_accelerator()
    sampler = timm_lt.create_sampler("instance_balanced", data.labels, seed=0)
    loss = loss or timm_lt.create_loss("cross_entropy")
    settings = {"epochs": 3, "batch_size": 8, "optimizer": SGD, "scheduler": {"sched": "cosine"}}
    options = TrainingOptions(**settings | own)
    return train_representation(
        model, data, sampler, loss, options, accelerator=accelerator, **given
    ).history


def interrupted(folder, models, stop, **options):
    """Trains the first model until a state is saved, and the second from there to the end."""

    class Stops(TrainingState):
        def save(self, history, **kwargs):
            super().save(history, **kwargs)
            if len(history) == stop:
                raise StopError

    with pytest.raises(StopError):
        train(models[0], state=new_state(folder, Stops), **options)
    return train(models[1], state=new_state(folder), **options)
