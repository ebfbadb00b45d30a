"""Forward time of every head that folds, as a ratio to ``nn.Linear``, in evaluation mode.

``python benchmarks/head_forward.py``: one thread, CPU time, the two interleaved, median of the
ratios. Heads keep their effective weights, so the ratio should be 1; ``recomputed`` is what it
would be if they did not.
"""

import argparse
import statistics
import time

import torch
from torch import nn

from timm_lt.heads import Head, create_head

HEADS = {
    "linear": {},
    "crt": {},
    "tau_norm": {"tau": 0.7},
    "tau_norm, bias": {"tau": 0.7, "keep_bias": True},
    "lws": {},
    "lws, bias unscaled": {"scale_bias": False},
    "logit_adjusted": {"tau": 1.0},
    "ncm, cosine": {"metric": "cosine"},
    "ncm, cosine, centered_l2": {"metric": "cosine", "features": "centered_l2"},
    "ncm, euclidean": {"metric": "euclidean"},
    "cosine": {},
}


def fitted(name: str, num_features: int, num_classes: int) -> Head:
    """Returns a head with random weights and a random fitted state."""
    head = create_head(name.split(",")[0], num_features, num_classes, **HEADS[name]).eval()
    with torch.no_grad():
        for state in head.fitted_state:
            getattr(head, state).uniform_(0.5, 1.5)
    return head.requires_grad_(False)


def seconds(call: nn.Module, features: torch.Tensor, repeats: int) -> float:
    """Returns the CPU time of some forward passes."""
    start = time.process_time()
    for _ in range(repeats):
        call(features)
    return time.process_time() - start


def ratio(head: nn.Module, linear: nn.Linear, features: torch.Tensor, rounds: int) -> float:
    """Returns the median over rounds of the head's time divided by the plain classifier's."""
    repeats = max(1, int(0.02 / max(seconds(linear, features, 3) / 3, 1e-6)))
    ratios = []
    for number in range(rounds):
        # Alternate the order.
        pair = [head, linear] if number % 2 else [linear, head]
        times = {id(call): seconds(call, features, repeats) for call in pair}
        ratios.append(times[id(head)] / times[id(linear)])
    return statistics.median(ratios)


class Recomputed(nn.Module):
    """A head that computes its effective weights at every call."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns the logits."""
        return nn.functional.linear(self.head.transform(features), *self.head.effective())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    features = torch.randn(arguments.batch_size, arguments.features)
    classes = (1000, 8142)
    print(f"batch {arguments.batch_size}, {arguments.features} features, float32, one thread")
    print(f"{'head':26}" + "".join(f"{f'{c} classes':>14}{'recomputed':>12}" for c in classes))
    for name in HEADS:
        row = f"{name:26}"
        for num_classes in classes:
            head = fitted(name, arguments.features, num_classes)
            linear = nn.Linear(arguments.features, num_classes).eval().requires_grad_(False)
            with torch.inference_mode():
                kept = ratio(head, linear, features, arguments.rounds)
                anew = ratio(Recomputed(head), linear, features, 5)
            row += f"{kept:14.3f}{anew:12.3f}"
        print(row)


if __name__ == "__main__":
    main()
