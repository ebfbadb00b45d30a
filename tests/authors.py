"""Checkpoints with random weights in the layout of Kang et al.'s published files."""

import io

import torch

from timm_lt.models.lt_resnet import ARCHITECTURES


def random_state(architecture, num_classes, seed=0):
    """A state dict as training leaves it: random weights and statistics."""
    torch.manual_seed(seed)
    state = ARCHITECTURES[architecture].build(num_classes=num_classes).state_dict()
    for key, value in state.items():
        if key.endswith(("running_mean", "bias")):
            value.normal_(std=0.1)
        elif key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif key.endswith("num_batches_tracked"):
            value.fill_(90)
    return state


def authors_file(state, scales=None, *, old=False, **changes):
    """A checkpoint as the authors' code saves it, in bytes."""
    classifier = {f"module.{key}": state[key] for key in ("fc.weight", "fc.bias")}
    if scales is not None:
        classifier["module.scales"] = scales
    backbone = {f"module.{k}": v for k, v in state.items() if not k.startswith("fc.")}
    content = {
        "epoch": 90,
        "best_epoch": 88,
        "state_dict_best": {"feat_model": backbone, "classifier": classifier},
        "best_acc": 0.444,
        "centroids": None,
        **changes,
    }
    buffer = io.BytesIO()
    # The files are from 2019: before torch saved zip archives.
    torch.save(content, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def moved(state, seed):
    """The same backbone after the classifier stage: other statistics, another classifier."""
    generator = torch.Generator().manual_seed(seed)
    other = {
        key: torch.rand(value.shape, generator=generator) + 0.2
        for key, value in state.items()
        if value.is_floating_point()
    }
    return {
        key: other[key] if "running" in key or key.startswith("fc.") else value
        for key, value in state.items()
    }
