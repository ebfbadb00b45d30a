"""Reports: figures that can be worked out by hand, and a long tail of random predictions."""

import datasets
import numpy as np
import torch
from PIL import Image

from timm_lt.fitting import AccuracyCurve
from timm_lt.metrics import evaluate_logits, shot_accuracy
from timm_lt.report import ExampleImages, Predictions, Report
from timm_lt.training import EpochRecord

LONG = "a name that goes on and on and on until nobody reads it any more " * 3
ODD_NAMES = ["<script>alert(1)</script>", LONG, "שלום עולם", "a_b_c", "'\"&amp;", "=1+1"]
# Two many-shot and two medium-shot classes; no few-shot class.
COUNTS = torch.tensor([300, 150, 60, 20])
GROUPS = ("many_shot", "medium_shot", "few_shot")


def squares(labels, columns):
    """Returns a data set of plain squares, a colour for each class."""
    colours = np.random.default_rng(0).integers(0, 256, (int(max(labels)) + 1, 3), np.uint8)
    images = [Image.new("RGB", (40, 40), tuple(colours[c].tolist())) for c in labels]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": images, "label": columns}, features=features)


def long_tail(num_classes=30, *, heads=("linear", "crt", "tau_norm"), images=4, seed=0):
    """Returns class counts, targets, and by head logits that favour frequent classes."""
    generator = torch.Generator().manual_seed(seed)
    counts = (500 * 100 ** (-torch.arange(num_classes) / max(num_classes - 1, 1))).long()
    targets = torch.arange(num_classes).repeat_interleave(images)
    noise = torch.randn(len(heads), len(targets), num_classes, generator=generator)
    own = 2.5 * torch.nn.functional.one_hot(targets, num_classes)
    logits = {
        name: own + noise[k] + (counts.log() if name == "linear" else 0)
        for k, name in enumerate(heads)
    }
    return counts, targets, logits


def figures(counts, targets, logits):
    """Returns the required arguments of a report."""
    probabilities = {name: values.softmax(1).max(1) for name, values in logits.items()}
    return {
        "title": "birds",
        "reports": {name: evaluate_logits(z, targets, counts) for name, z in logits.items()},
        "class_counts": counts,
        "targets": targets,
        "predictions": {
            name: Predictions(top.indices.int(), top.values) for name, top in probabilities.items()
        },
    }


def report_of(preds, targets, counts, **more):
    """Returns a report on the predictions of some heads."""
    targets = torch.as_tensor(targets)
    preds = {name: torch.as_tensor(values) for name, values in preds.items()}
    return Report(
        title="x",
        reports={name: shot_accuracy(p, targets, counts) for name, p in preds.items()},
        class_counts=torch.as_tensor(counts),
        targets=targets,
        predictions={name: Predictions(p.int()) for name, p in preds.items()},
        **more,
    )


def right_in_order(counts, targets):
    """Returns predictions of which so many are right in each class, its first images."""
    place = torch.cat([torch.arange(n) for n in torch.bincount(targets).tolist()])
    return torch.where(place < torch.tensor(counts)[targets], targets, (targets + 1) % len(counts))


def whole_report(num_classes=30, **options):
    """Returns a report with every section."""
    counts, targets, logits = long_tail(num_classes, **options)
    train_labels = torch.arange(num_classes)
    generator = torch.Generator().manual_seed(1)
    low = torch.rand(400, generator=generator).double() * 2
    curve = AccuracyCurve(low, low + 1)
    curve = AccuracyCurve(low, low + 1, dict.fromkeys(GROUPS, curve))
    return Report(
        **figures(counts, targets, logits),
        label_names=(ODD_NAMES + [f"bird_{c}" for c in range(num_classes)])[:num_classes],
        curves={"tau_norm": (curve, 0.9)},
        selections={"tau_norm": {"tau": 0.9, "objective": "all"}},
        seconds={"linear": 60.0, "crt": 2.5},
        recommended="tau_norm",
        images=ExampleImages(
            train=squares(train_labels, train_labels),
            train_labels=train_labels,
            test=squares(targets, targets),
            test_rows=torch.arange(len(targets)),
        ),
        history=[
            EpochRecord(e, 3 / e, 0.1 / e, 100.0, 1.0, dict.fromkeys(("all", *GROUPS), 1 - 1 / e))
            for e in range(1, 13)
        ],
        kept_epoch=12,
        recipe="data:\n  name: </pre><script>alert(2)</script>\n",
        facts={"Data": "birds & <b>bees</b>"},
        warning="selected on test",
    )


def balanced_reports():
    """Three heads with figures that can be worked out by hand."""
    targets = torch.arange(4).repeat_interleave(8)
    reports = {}
    # How many of the eight images of each class are right.
    for name, right in {
        "linear": [8, 7, 3, 0],
        "crt": [7, 7, 5, 3],
        "tau_norm": [6, 6, 6, 5],
    }.items():
        logits = torch.nn.functional.one_hot(right_in_order(right, targets), 4).float() * 3
        reports[name] = evaluate_logits(logits, targets, COUNTS)
    return reports
