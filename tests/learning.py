"""A small long tail of glyphs, on which methods learn within seconds."""

import functools

import torch

import timm_lt
from timm_lt.data import create_splits
from timm_lt.data.images import ImageTensors
from timm_lt.training import TrainingOptions, train_representation
from timm_lt.training.loop import EVAL_BATCH_SIZE, validate
from timm_lt.utils.accelerator import create_accelerator, fresh_accelerate

# From 160 to 4 images of 20 classes: 3 are many-shot, 8 medium-shot and 9 few-shot.
COUNTS = [int(160 * 40 ** (-c / 19)) for c in range(20)]
OPTIMIZER = {"opt": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


@functools.cache
def small_glyphs():
    """Returns the training and test images of the 20 classes."""
    splits = create_splits("glyph_lt")
    parts = []
    for split, counts in (("train", COUNTS), ("test", [50] * 20)):
        stored = splits.images(split, size=(32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)
        labels = splits.labels[split]
        rows = torch.cat([torch.nonzero(labels == c).flatten()[:n] for c, n in enumerate(counts)])
        parts.append(ImageTensors(stored.images[rows], labels[rows]))
    return parts


def pretrained(**options):
    """Returns the packaged backbone, trained on all of GlyphLT, with a fresh classifier."""
    return timm_lt.create_model("lt_test_resnet.glyph_lt", True, num_classes=20, **options)


def learned(loss, **options):
    """Trains a model by :func:`train` and returns its test accuracies, see :func:`accuracies`."""
    return accuracies(train(loss, **options))


@functools.cache
def joint():
    """Returns the model of joint training and its accuracies; copy it for further training."""
    model = train(timm_lt.create_loss("cross_entropy"))
    return model, accuracies(model)


def train(loss, *, sampler="instance_balanced", model=None, seed=0, **options):
    """Trains a model with 20 classes, :func:`pretrained` by default, and returns it."""
    images, _ = small_glyphs()
    torch.manual_seed(seed)
    if model is None:
        model = pretrained()
    if isinstance(sampler, str):
        sampler = timm_lt.create_sampler(sampler, images.labels, seed=seed)
    settings = {"epochs": 4, "batch_size": 32, "optimizer": OPTIMIZER, "seed": seed} | options
    schedule = {"sched": "cosine", "warmup_epochs": min(1, settings["epochs"] - 1)}
    plan = TrainingOptions(scheduler=schedule, **settings)
    with fresh_accelerate():
        accelerator = create_accelerator(mixed_precision="no")
        found = train_representation(model, images, sampler, loss, plan, accelerator=accelerator)
    return found.model


def accuracies(model):
    """Returns the test accuracies of a model, fractions: all and by shot group."""
    _, test = small_glyphs()
    with fresh_accelerate():
        accelerator = create_accelerator(mixed_precision="no")
        loader = test.eval_loader(EVAL_BATCH_SIZE, accelerator)
        return validate(model, loader, accelerator, torch.tensor(COUNTS))


@functools.cache
def features(model=None):
    """Returns the training and test features of a model, :func:`pretrained` by default."""
    model = (pretrained() if model is None else model).eval()
    parts = []
    for part in small_glyphs():
        starts = range(0, len(part), 250)
        batches = [part[list(range(at, min(at + 250, len(part))))] for at in starts]
        parts.append(timm_lt.extract_features(model, batches))
    return parts
