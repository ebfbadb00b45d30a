"""Figures of heads that can be worked out by hand."""

import torch

from timm_lt.metrics import evaluate_logits

# Two many-shot and two medium-shot classes; no few-shot class.
COUNTS = torch.tensor([300, 150, 60, 20])


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
        preds = (targets + 1) % 4
        for c, k in enumerate(right):
            preds[8 * c : 8 * c + k] = c
        logits = torch.nn.functional.one_hot(preds, 4).float() * 3
        reports[name] = evaluate_logits(logits, targets, COUNTS)
    return reports
