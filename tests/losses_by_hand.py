"""The papers' formulas, in plain Python, one image at a time: logits z, a label y, class counts.

Those of the losses of features are of a whole batch.
"""

import itertools
import math

import torch

COUNTS = [500, 120, 30, 8, 5]


def batch(n=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, len(COUNTS), generator=generator, dtype=torch.float64)
    return logits, torch.randint(len(COUNTS), (n,), generator=generator)


def slopes(function, x):
    """Returns the gradient of a function of a tensor, by differences."""
    x = torch.as_tensor(x, dtype=torch.float64).detach()
    found = torch.zeros_like(x)
    for index in itertools.product(*map(range, x.shape)):
        step = torch.zeros_like(x)
        step[index] = 1e-6
        found[index] = (function(x + step) - function(x - step)) / 2e-6
    return found


def softmax(z):
    total = sum(math.exp(zk) for zk in z)
    return [math.exp(zj) / total for zj in z]


def cross_entropy(z, y, smoothing=0.0):
    log_p = [math.log(p) for p in softmax(z)]
    soft = [(1 - smoothing) * (j == y) + smoothing / len(z) for j in range(len(z))]
    return -sum(t * lp for t, lp in zip(soft, log_p, strict=True))


def balanced_softmax(z, y):
    terms = [n * math.exp(zj) for n, zj in zip(COUNTS, z, strict=True)]
    return -math.log(terms[y] / sum(terms))


def logit_adjustment(z, y, tau=1.0):
    total = sum(COUNTS)
    pi = [n / total for n in COUNTS]
    # The paper's second form: log(1 + sum over the others of (pi_j / pi_y)^tau e^(z_j - z_y)).
    others = [(pi[j] / pi[y]) ** tau * math.exp(z[j] - z[y]) for j in range(len(z)) if j != y]
    return math.log(1 + sum(others))


def frequency_weight(y, exponent=1.0):
    raw = [n**-exponent for n in COUNTS]
    return raw[y] * len(raw) / sum(raw)


def effective_number_weight(y, beta=0.9999):
    raw = [(1 - beta) / (1 - beta**n) for n in COUNTS]
    return raw[y] * len(raw) / sum(raw)


def inverse_frequency(z, y, exponent=1.0):
    return frequency_weight(y, exponent) * cross_entropy(z, y)


def focal(z, y, gamma=2.0, form="softmax"):
    if form == "softmax":
        p = softmax(z)[y]
        return -((1 - p) ** gamma) * math.log(p)
    total = 0.0
    for j, zj in enumerate(z):
        p = 1 / (1 + math.exp(-zj))
        p_t = p if j == y else 1 - p
        total -= (1 - p_t) ** gamma * math.log(p_t)
    return total


def class_balanced(z, y, beta=0.9999, form="softmax", gamma=1.0):
    loss = {
        "softmax": lambda: cross_entropy(z, y),
        "sigmoid": lambda: focal(z, y, 0.0, "sigmoid"),
        "focal": lambda: focal(z, y, gamma, "sigmoid"),
    }[form]()
    return effective_number_weight(y, beta) * loss


def class_balanced_focal(z, y, beta=0.9999, gamma=1.0, form="sigmoid", probability="unweighted"):
    weight = effective_number_weight(y, beta)
    if probability == "weighted":
        p = math.exp(-weight * cross_entropy(z, y))
        return weight * (1 - p) ** gamma * cross_entropy(z, y)
    return weight * focal(z, y, gamma, form)


def ldam(z, y, max_margin=0.5, scale=30.0, logits="cosine"):
    raw = [n**-0.25 for n in COUNTS]
    margin = raw[y] * max_margin / max(raw)
    cosines = list(z) if logits == "cosine" else [zj / scale for zj in z]
    cosines[y] -= margin
    return cross_entropy([scale * c for c in cosines], y)


def label_aware_smoothing(z, y, head=0.3, tail=0.0, shape="concave", spread="others"):
    largest, smallest = max(COUNTS), min(COUNTS)
    angle = math.pi * (COUNTS[y] - smallest) / (2 * (largest - smallest))
    eps = {
        "concave": tail + (head - tail) * math.sin(angle),
        "linear": tail + (head - tail) * (COUNTS[y] - smallest) / (largest - smallest),
        "convex": head + (head - tail) * math.sin(1.5 * math.pi + angle),
    }[shape]
    if spread == "all":
        return cross_entropy(z, y, eps)
    log_p = [math.log(p) for p in softmax(z)]
    others = [log_p[j] for j in range(len(z)) if j != y]
    return -(1 - eps) * log_p[y] - eps / len(others) * sum(others)


def seesaw(z, y, mitigation=0.8, compensation=2.0, min_probability=0.0, at=None):
    # The compensation is a constant: its logits are those of the point at which a slope is taken.
    p = softmax(z if at is None else at)
    total = math.exp(z[y])
    for j in range(len(z)):
        if j != y:
            m = 1.0 if COUNTS[y] <= COUNTS[j] else (COUNTS[j] / COUNTS[y]) ** mitigation
            ratio = p[j] / max(p[y], min_probability)
            k = 1.0 if ratio <= 1 else ratio**compensation
            total += m * k * math.exp(z[j])
    return -math.log(math.exp(z[y]) / total)


def deferred_reweighting(z, y, start=0.8, loss="cross_entropy", weights="", beta=0.9999, **_):
    if start == 0.8:
        weight = 1.0
    elif weights == "inverse_frequency":
        weight = frequency_weight(y)
    else:
        weight = effective_number_weight(y, beta)
    return weight * {"cross_entropy": cross_entropy, "ldam": ldam}[loss](z, y)


def range_by_hand(x, targets, *, k=2, margin=0.1, alpha=0.5, beta=0.5, power=2):
    groups = {}
    for row, y in zip(x.tolist(), targets.tolist(), strict=True):
        groups.setdefault(y, []).append(row)
    intra = 0.0
    for rows in groups.values():
        pairs = [math.dist(a, b) ** power for a, b in itertools.combinations(rows, 2)]
        largest = sorted(pairs, reverse=True)[:k]
        if largest:
            intra += len(largest) / sum(1 / d for d in largest)
    columns = [zip(*rows, strict=True) for rows in groups.values()]
    centers = [[sum(column) / len(column) for column in center] for center in columns]
    gaps = [math.dist(a, b) ** power for a, b in itertools.combinations(centers, 2)]
    inter = max(0.0, margin - min(gaps)) if gaps else 0.0
    return alpha * intra + beta * inter


def lifted_by_hand(x, targets, *, neg_margin=1.0, pos_margin=0.0, normalize=False):
    rows, labels = x.tolist(), targets.tolist()
    if normalize:
        rows = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in rows]
    hinges = []
    for i, j in itertools.combinations(range(len(rows)), 2):
        negatives = [n for n in range(len(rows)) if labels[n] != labels[i]]
        if labels[i] == labels[j] and negatives:
            pushed = sum(
                math.exp(neg_margin - math.dist(rows[i], rows[n]))
                + math.exp(neg_margin - math.dist(rows[j], rows[n]))
                for n in negatives
            )
            j_ij = math.log(pushed) + math.dist(rows[i], rows[j]) - pos_margin
            hinges.append(max(0.0, j_ij) ** 2)
    return sum(hinges) / (2 * len(hinges)) if hinges else 0.0


SOFTMAX = {"form": "softmax", "gamma": 0.5}
CONVEX = {"shape": "convex", "head": 0.6, "tail": 0.1, "spread": "all"}
WEIGHTED = {"start": 0, "normalization": "batch"}
BY_HAND = [
    ("cross_entropy", {}, cross_entropy),
    ("cross_entropy", {"smoothing": 0.1}, cross_entropy),
    ("balanced_softmax", {}, balanced_softmax),
    ("logit_adjustment", {}, logit_adjustment),
    ("logit_adjustment", {"tau": 0.0}, logit_adjustment),
    ("logit_adjustment", {"tau": 2.5}, logit_adjustment),
    ("inverse_frequency", {}, inverse_frequency),
    ("inverse_frequency", {"exponent": 0.5}, inverse_frequency),
    ("class_balanced", {}, class_balanced),
    ("class_balanced", {"beta": 0.9, "form": "sigmoid"}, class_balanced),
    ("class_balanced", {"form": "focal", "gamma": 2.0}, class_balanced),
    ("focal", {}, focal),
    ("focal", {"gamma": 0.5}, focal),
    ("focal", {"form": "sigmoid"}, focal),
    ("focal", {"form": "sigmoid", "gamma": 0.5}, focal),
    ("class_balanced_focal", {}, class_balanced_focal),
    ("class_balanced_focal", SOFTMAX, class_balanced_focal),
    ("class_balanced_focal", {**SOFTMAX, "probability": "weighted"}, class_balanced_focal),
    ("ldam", {}, ldam),
    ("ldam", {"max_margin": 0.3, "scale": 10.0, "logits": "scaled"}, ldam),
    ("label_aware_smoothing", {}, label_aware_smoothing),
    ("label_aware_smoothing", {"shape": "linear", "tail": 0.1}, label_aware_smoothing),
    ("label_aware_smoothing", CONVEX, label_aware_smoothing),
    ("seesaw", {}, seesaw),
    ("seesaw", {"mitigation": 1.5, "compensation": 0.5, "min_probability": 0.2}, seesaw),
    ("deferred_reweighting", {}, deferred_reweighting),
    ("deferred_reweighting", WEIGHTED, deferred_reweighting),
    (
        "deferred_reweighting",
        {**WEIGHTED, "weights": "inverse_frequency", "loss": "ldam"},
        deferred_reweighting,
    ),
]
