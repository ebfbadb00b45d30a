"""The fit of few-shot learning without forgetting, on cached features.

The generator of few-shot learning without forgetting: class weights out of features.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_lt.fitting.base import FIT_MAXIMUM, FitData, register_fit
from timm_lt.fitting.closed_form import class_means
from timm_lt.fitting.sgd import ENTRIES, ROWS, check_length, take_rows
from timm_lt.heads import FSLwFHead
from timm_lt.heads.linear import BATCH_SIZE, LWS_LENGTH
from timm_lt.samplers import create_sampler
from timm_lt.utils.checks import UsageError, check_choice, check_integer, check_number
from timm_lt.utils.longtail import ShotRule, class_counts, shot_groups, shot_rule_texts


class WeightGenerator(nn.Module):
    """Generates the weight of a class from some of its features and the base classes' weights.

    With unit features ``z_i`` of the class, unit weights ``w_b`` of the base classes and keys
    ``k_b``, all learned but the features:

        ``w' = phi_avg ⊙ mean_i z_i
        + phi_att ⊙ mean_i sum_b softmax_b(gamma cos(phi_q z_i, k_b)) w_b``.

    It starts with ``phi_avg = phi_att = 1``, ``phi_q = I`` with noise of 0.001, and keys of
    variance 2 / D, as the authors' code does.

    Args:
        num_features: D.
        num_base: Base classes, K.
        gamma: Sharpness of the attention at the start.
        random: Draws the keys and the noise.

    References:
        Gidaris and Komodakis, CVPR 2018, section 3.2, https://arxiv.org/abs/1804.09458
    """

    def __init__(
        self, num_features: int, num_base: int, *, gamma: float, random: torch.Generator
    ) -> None:
        super().__init__()
        noise = 1e-3 * torch.randn(num_features, num_features, generator=random)
        keys = torch.randn(num_base, num_features, generator=random) * math.sqrt(2 / num_features)
        self.phi_avg = nn.Parameter(torch.ones(num_features))
        self.phi_att = nn.Parameter(torch.ones(num_features))
        self.phi_q = nn.Parameter(torch.eye(num_features) + noise)
        self.keys = nn.Parameter(keys)
        self.gamma = nn.Parameter(torch.tensor(float(gamma)))

    def attend(self, features: Tensor, base: Tensor) -> Tensor:
        """Returns the attention (..., B) of unit features (..., D) to B of the base classes.

        Args:
            features: Unit features.
            base: Which base classes, (B,) integers below K.
        """
        queries = F.normalize(features @ self.phi_q.T, dim=-1)
        similarity = queries @ F.normalize(self.keys[base], dim=1).T
        return (self.gamma * similarity).softmax(dim=-1)

    def combine(self, mean: Tensor, attention: Tensor, weight: Tensor) -> Tensor:
        """Returns generated weights (M, D).

        Args:
            mean: Mean unit feature of each class, (M, D).
            attention: Mean attention of its features, (M, B).
            weight: Weights of the base classes, of any length, (B, D).
        """
        return self.phi_avg * mean + self.phi_att * (attention @ F.normalize(weight, dim=1))

    def forward(self, features: Tensor, weight: Tensor, base: Tensor) -> Tensor:
        """Returns the weights (M, D) of M classes with E unit features each, (M, E, D)."""
        attention = self.attend(features, base).mean(dim=1)
        return self.combine(features.mean(dim=1), attention, weight)


Groups = Literal["many_shot", "many_and_medium"]
Base: TypeAlias = int | Groups
COUNTS = {"episodes": 1, "fake_novel": 1, "exemplars": 1, "queries": 2}
NUMBERS = {
    "novel_share": "(0, 1)",
    "dropout": "[0, 1)",
    "gamma": "(0, inf)",
    "scale": "(0, inf)",
}


def _check_options(options: dict[str, Any]) -> None:
    """Checks what has no range in common with other fits."""
    check_length(options)
    owner = "of head 'fslwf'"
    base = options.get("base", "many_shot")
    if isinstance(base, str):
        check_choice(f"base {owner}:", base, get_args(Groups))
    else:
        check_integer(f"base {owner}, the fewest images of a base class,", base, minimum=1)
    for name, lowest in COUNTS.items():
        if options.get(name) is not None:
            check_integer(f"{name} {owner}", options[name], lowest, FIT_MAXIMUM)
    for name, interval in NUMBERS.items():
        if options.get(name) is not None:
            check_number(f"{name} {owner}", options[name], interval)


def _check_classes(
    options: dict[str, Any], class_counts: Tensor, *, rule: ShotRule, views: int
) -> None:
    """Checks that classes of so many images are divided into base and novel ones."""
    is_base = _base_classes(class_counts, rule, options.get("base", "many_shot"))
    _fake_novel(options.get("fake_novel"), int(is_base.sum()))


@dataclass(frozen=True)
class _Training:
    """What both stages share: the data, what is learned of the base classes, and the settings.

    Attributes:
        values: Features (N, D), read some rows at a time.
        rows: Rows of each base class, in the order of the classes.
        weight: Weights of the base classes, (K, D).
        scale: Factor of the cosines, a scalar.
        dropout: Share of each feature vector's entries that is left out.
        lr: Learning rate at the start.
        weight_decay: On all that is learned.
        random: Draws everything.
    """

    values: Tensor
    rows: Sequence[Tensor]
    weight: nn.Parameter
    scale: nn.Parameter
    dropout: float
    lr: float
    weight_decay: float
    random: torch.Generator

    def unit(self, rows: Tensor) -> Tensor:
        """Returns features (*rows.shape, D) at unit length, after dropout."""
        features = take_rows(self.values, rows.flatten()).view(*rows.shape, -1)
        if self.dropout:
            kept = torch.rand(features.shape, generator=self.random) >= self.dropout
            features = features * kept
        return F.normalize(features, dim=-1)

    def loss(self, rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean cross-entropy of a cosine classifier."""
        cosines = self.unit(rows) @ F.normalize(weight, dim=1).T
        return F.cross_entropy(self.scale * cosines, labels)

    def descend(self, steps: int, loss: Callable[[int], Tensor], *more: nn.Parameter) -> None:
        """Minimises by SGD with Nesterov momentum; the rate falls to zero along a cosine."""
        learned = [self.weight, self.scale, *more]
        optimizer = torch.optim.SGD(
            learned,
            self.lr,
            momentum=0.9,
            nesterov=True,
            weight_decay=self.weight_decay,
            fused=True,
        )
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = self.lr * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            loss(step).backward()
            optimizer.step()
        if not all(parameter.isfinite().all() for parameter in learned):
            raise UsageError(
                "head 'fslwf' did not stay finite while it was trained: take a lower lr than "
                f"{self.lr:g}"
            )


@register_fit("fslwf", _check_options, check_classes=_check_classes)
def fit_fslwf(
    data: FitData,
    *,
    base: Base = "many_shot",
    steps: int | None = None,
    epochs: int | None = None,
    episodes: int = 500,
    fake_novel: int | None = None,
    exemplars: int = 5,
    queries: int = 256,
    novel_share: float | None = None,
    dropout: float = 0.5,
    gamma: float = 10.0,
    scale: float = 10.0,
    lr: float = 0.1,
    weight_decay: float = 5e-4,
) -> FSLwFHead:
    """Trains weights of the base classes, and generates those of the others from all their rows.

    First a cosine classifier of the base classes is trained on rows as they are distributed, from
    the joint classifier's directions or, without one, from the class means. Then come episodes:
    some base classes are taken for novel, their weights are generated from a few rows of theirs
    and the weights of the base classes that are left, and the cross-entropy over all of them moves
    the generator, the base weights and the scale. The paper says nothing of a long tail: which
    classes are base is our rule.

    Args:
        data: The fit's data.
        base: Which classes are base: the ``"many_shot"`` ones, ``"many_and_medium"``, or those
            with at least so many training images.
        steps: Updates of the first stage, of 512 rows; None goes by epochs.
        epochs: None takes 5 of the base classes' rows, but at least 500 updates.
        episodes: Updates of the second stage; the paper's code has 6 epochs of 4,000.
        fake_novel: Base classes of an episode that are taken for novel; None takes a quarter.
        exemplars: Rows of each from which its weight is generated.
        queries: Rows that are classified in an episode, at least 2; other ones than the exemplars,
            unless a class has too few.
        novel_share: Share of the queries that are of classes taken for novel. None has each class
            in the same share, as balanced test sets do; few-shot protocols take 0.5, which favours
            the novel classes.
        dropout: Share of the features' entries that is left out in training, as in the code.
        gamma: Sharpness of the attention at the start; the paper's code has 10, and 30 on
            ImageNet.
        scale: Factor of the cosines at the start.
        lr: Learning rate of both stages at the start.
        weight_decay: On all that is learned.

    Raises:
        UsageError: If no class is novel or fewer than two are base, or too many of them are to be
            taken for novel.
    """
    is_base = _base_classes(data.class_counts, data.rule, base)
    classes = is_base.nonzero().flatten()
    fake_novel = _fake_novel(fake_novel, len(classes))
    targets = data.features.targets.cpu()
    by_class = targets.sort(stable=True).indices.split(class_counts(targets).tolist())
    training = _Training(
        values=data.features.values,
        rows=[by_class[label] for label in classes.tolist()],
        weight=nn.Parameter(_start(data)[classes]),
        scale=nn.Parameter(torch.tensor(float(scale))),
        dropout=dropout,
        lr=lr,
        weight_decay=weight_decay,
        random=torch.Generator().manual_seed(data.seed),
    )
    images = sum(map(len, training.rows)) // data.features.views
    _train_base(training, LWS_LENGTH.updates(images, epochs=epochs, steps=steps), data.seed)
    width = data.features.num_features
    generator = WeightGenerator(width, len(classes), gamma=gamma, random=training.random)
    share = fake_novel / len(classes) if novel_share is None else novel_share
    of_novel = min(max(round(share * queries), 1), queries - 1)
    _train_generator(
        training,
        generator,
        episodes=episodes,
        fake_novel=fake_novel,
        exemplars=exemplars,
        queries=(queries - of_novel, of_novel),
    )
    head = FSLwFHead.from_classifier(data.new_linear())
    with torch.no_grad():
        head.scale.copy_(training.scale)
        head.weight[is_base] = training.weight
        rows = [by_class[label] for label in (~is_base).nonzero().flatten().tolist()]
        head.weight[~is_base] = _generated(training, generator, rows)
    return head


def _base_classes(counts: Tensor, rule: ShotRule, base: Base) -> Tensor:
    """Returns a mask (C,) of the base classes; see :func:`fit_fslwf`."""
    groups, texts = shot_groups(counts, rule), shot_rule_texts(rule)
    if base == "many_shot":
        mask, having = groups["many_shot"], texts["many_shot"]
    elif base == "many_and_medium":
        mask, having = ~groups["few_shot"], f"not {texts['few_shot']}"
    else:
        mask, having = counts >= base, f">= {base}"
    number = int(mask.sum())
    if number < 2 or number == len(mask):
        missing = "no novel class" if number == len(mask) else "fewer than two base classes"
        low, high = int(counts.min()), int(counts.max())
        raise UsageError(
            f"head 'fslwf' has {missing}: {number} of {len(mask)} classes have {having} training "
            f"images, and classes have {low} to {high}; give it another base, 'many_shot', "
            "'many_and_medium' or the fewest images of a base class"
        )
    return mask


def _fake_novel(given: int | None, num_base: int) -> int:
    """Returns how many base classes an episode takes for novel; see :func:`fit_fslwf`."""
    number = max(num_base // 4, 1) if given is None else given
    if number >= num_base:
        raise UsageError(
            "fake_novel of head 'fslwf' must be below the number of base classes, which is "
            f"{num_base}; got {number}"
        )
    return number


def _start(data: FitData) -> Tensor:
    """Returns the joint classifier's weight (C, D), or the mean unit feature of each class."""
    if data.classifier is not None:
        return data.classifier.weight.detach()
    features = data.features
    return class_means(features.values, features.targets, data.num_classes, ("l2",))["l2"]


def _train_base(training: _Training, steps: int, seed: int) -> None:
    """Trains the cosine classifier of the base classes."""
    rows = torch.cat(list(training.rows))
    sizes = torch.tensor([len(of_class) for of_class in training.rows])
    labels = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    sampler = create_sampler("instance_balanced", labels, num_samples=steps * BATCH_SIZE, seed=seed)
    batches = sampler.epoch_indices().view(steps, BATCH_SIZE)

    def loss(step: int) -> Tensor:
        batch = batches[step]
        return training.loss(rows[batch], training.weight, labels[batch])

    training.descend(steps, loss)


def _train_generator(
    training: _Training,
    generator: WeightGenerator,
    *,
    episodes: int,
    fake_novel: int,
    exemplars: int,
    queries: tuple[int, int],
) -> None:
    """Trains the generator in episodes, and the base classes' weights with it.

    Args:
        training: What both stages share.
        generator: Trained in place.
        episodes: As in :func:`fit_fslwf`, like fake_novel and exemplars.
        fake_novel: As there.
        exemplars: As there.
        queries: How many are of classes that are base ones in the episode, and of novel ones.
    """

    def loss(_: int) -> Tensor:
        shuffled = torch.randperm(len(training.rows), generator=training.random)
        novel, base = shuffled[:fake_novel], shuffled[fake_novel:]
        # The last exemplars are followed by the queries.
        drawn = _draw(training, novel, exemplars + -(-queries[1] // len(novel)))
        # Of more classes than queries some are asked for, any.
        asked = base[: queries[0]]
        of_base = _draw(training, asked, -(-queries[0] // len(asked)))
        weight = training.weight[base]
        generated = generator(training.unit(drawn[:, :exemplars]), weight, base)
        # Row by row of the transposed the classes alternate, and so do the labels.
        rows = [of_base.T.flatten()[: queries[0]], drawn[:, exemplars:].T.flatten()[: queries[1]]]
        labels = [
            torch.arange(queries[0]) % len(asked),
            len(base) + torch.arange(queries[1]) % len(novel),
        ]
        return training.loss(torch.cat(rows), torch.cat([weight, generated]), torch.cat(labels))

    training.descend(episodes, loss, *generator.parameters())


def _draw(training: _Training, classes: Tensor, number: int) -> Tensor:
    """Returns rows (len(classes), number), different ones unless a class has too few."""
    drawn = []
    for label in classes.tolist():
        rows = training.rows[label]
        order = torch.randperm(len(rows), generator=training.random)[:number]
        drawn.append(rows[order[torch.arange(number) % len(order)]])
    return torch.stack(drawn)


@torch.no_grad()
def _generated(training: _Training, generator: WeightGenerator, rows: Sequence[Tensor]) -> Tensor:
    """Returns the weights (M, D) of the novel classes from all of their rows."""
    width, num_base = training.weight.shape[1], len(training.weight)
    base = torch.arange(num_base)
    means, attention = torch.zeros(len(rows), width), torch.zeros(len(rows), num_base)
    step = max(ENTRIES // max(width, num_base), ROWS)
    for label, of_class in enumerate(rows):
        for part in of_class.split(step):
            unit = F.normalize(take_rows(training.values, part), dim=1)
            means[label] += unit.sum(dim=0) / len(of_class)
            attention[label] += generator.attend(unit, base).sum(dim=0) / len(of_class)
    return generator.combine(means, attention, training.weight)
