"""Fits of few-shot heads: learning without forgetting (FSLwF), and OLTR with its memory."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_lt.fitting.base import FitData, register_fit
from timm_lt.fitting.closed_form import class_means
from timm_lt.fitting.gradient import TrainedFit
from timm_lt.fitting.solvers import ENTRIES, ROWS, descend, take_rows
from timm_lt.heads import FSLwFHead, OLTRHead, seeded_linear
from timm_lt.heads.linear import BATCH_SIZE, LWS_LENGTH, OLTR_BATCH_SIZE, OLTR_LENGTH
from timm_lt.heads.metric import Squash
from timm_lt.losses import DiscriminativeCentroids
from timm_lt.losses.metric import Hinge
from timm_lt.samplers import create_sampler
from timm_lt.utils.checks import UsageError, check_choice, check_integer
from timm_lt.utils.longtail import ShotRule, class_counts, shot_groups, shot_rule_texts

Groups = Literal["many_shot", "many_and_medium"]
Base: TypeAlias = int | Groups
Centroids = Literal["learned", "means"]
# Settings of OLTR's code: rows of a class in succession, and divisions of the learning rate by ten,
# one at each third of the training.
SAMPLES_PER_CLASS, DROPS = 4, 3


class WeightGenerator(nn.Module):
    """Generates the weight of a class from some of its features and the base classes' weights.

    With unit features ``z_i`` of the class, unit weights ``w_b`` of the base classes and keys
    ``k_b``; the initial values are those of the authors' code:

        ``w' = phi_avg ⊙ mean_i z_i
        + phi_att ⊙ mean_i sum_b softmax_b(gamma cos(phi_q z_i, k_b)) w_b``.

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
        """Returns the attention (..., B) of unit features (..., D) to base classes (B,)."""
        queries = F.normalize(features @ self.phi_q.T, dim=-1)
        similarity = queries @ F.normalize(self.keys[base], dim=1).T
        return (self.gamma * similarity).softmax(dim=-1)

    def combine(self, mean: Tensor, attention: Tensor, weight: Tensor) -> Tensor:
        """Returns weights (M, D), from means over a class's features (M, D), (M, B) and (B, D)."""
        return self.phi_avg * mean + self.phi_att * (attention @ F.normalize(weight, dim=1))

    def forward(self, features: Tensor, weight: Tensor, base: Tensor) -> Tensor:
        """Returns the weights (M, D) of M classes with E unit features each, (M, E, D)."""
        attention = self.attend(features, base).mean(dim=1)
        return self.combine(features.mean(dim=1), attention, weight)


@register_fit("fslwf")
@dataclass(frozen=True, kw_only=True)
class FSLwFFit(TrainedFit):
    """Trains weights of the base classes, and generates those of the others from all their rows.

    First a cosine classifier of the base classes is trained on rows as they are distributed, from
    the joint classifier's directions or, without one, from the class means. Then come episodes:
    some base classes are taken for novel, their weights are generated from a few of their rows and
    the other base classes' weights, and the cross-entropy over all of them moves the generator, the
    base weights and the scale. The paper does not cover long tails: which classes are base is our
    rule.

    Args:
        base: Base classes: the ``"many_shot"`` ones, ``"many_and_medium"``, or those with at least
            so many training images; at least two, and not all.
        steps: Updates of the first stage, 512 rows each.
        epochs: None is 5 of the base classes' rows, but at least 500 updates.
        episodes: Updates of the second stage; the paper's code has 6 epochs of 4,000.
        fake_novel: Base classes of an episode that are taken for novel; None is a quarter.
        exemplars: Rows of each from which its weight is generated.
        queries: Rows that are classified in an episode, at least 2; they are not exemplars, unless
            a class has too few rows.
        novel_share: Share of the queries from classes taken for novel. None draws every class
            equally often; few-shot protocols take 0.5, which favours the novel classes.
        dropout: Share of the features' entries that are dropped in training, as in the code.
        gamma: Initial sharpness of the attention; the paper's code has 10, and 30 on ImageNet.
        scale: Initial factor of the cosines.
    """

    length = LWS_LENGTH

    base: Base = "many_shot"
    episodes: int = 500
    fake_novel: int | None = None
    exemplars: int = 5
    queries: int = 256
    novel_share: float | None = None
    dropout: float = 0.5
    gamma: float = 10.0
    scale: float = 10.0
    lr: float = 0.1
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.base, str):
            check_choice("base of head 'fslwf':", self.base, get_args(Groups))
        else:
            check_integer("base of head 'fslwf', the fewest images of a base class,", self.base, 1)

    def check_classes(self, class_counts: Tensor, *, rule: ShotRule = "fb", views: int = 1) -> None:
        """Checks that classes of these sizes can be divided into base and novel ones."""
        self._divide(class_counts, rule)

    def _divide(self, counts: Tensor, rule: ShotRule) -> tuple[Tensor, int]:
        """Returns a mask (C,) of the base classes, and how many an episode takes for novel."""
        groups, texts = shot_groups(counts, rule), shot_rule_texts(rule)
        if self.base == "many_shot":
            mask, having = groups["many_shot"], texts["many_shot"]
        elif self.base == "many_and_medium":
            mask, having = ~groups["few_shot"], f"not {texts['few_shot']}"
        else:
            mask, having = counts >= self.base, f">= {self.base}"
        number = int(mask.sum())
        if number < 2 or number == len(mask):
            raise UsageError(
                f"head 'fslwf' needs two base classes and a novel one: {number} of {len(mask)} "
                f"classes have {having} training images (all: {int(counts.min())} to "
                f"{int(counts.max())}); choose another base"
            )
        fake_novel = max(number // 4, 1) if self.fake_novel is None else self.fake_novel
        if fake_novel >= number:
            raise UsageError(
                "fake_novel of head 'fslwf' must be below the number of base classes, which is "
                f"{number}; got {fake_novel}"
            )
        return mask, fake_novel

    def _fit(self, data: FitData) -> FSLwFHead:
        is_base, fake_novel = self._divide(data.class_counts, data.rule)
        training = _Training(self, data, is_base)
        training.train_base(data.seed)
        generator = training.train_generator(fake_novel)
        head = FSLwFHead.from_classifier(data.new_linear())
        with torch.no_grad():
            head.scale.copy_(training.scale)
            head.weight[is_base] = training.weight
            head.weight[~is_base] = training.generate(generator)
        return head


class _Training:
    """The two stages of the training; ``is_base`` is a mask (C,) of the base classes."""

    def __init__(self, options: FSLwFFit, data: FitData, is_base: Tensor) -> None:
        self.options, self.values, self.views = options, data.features.values, data.features.views
        targets = data.features.targets.cpu()
        by_class = targets.sort(stable=True).indices.split(class_counts(targets).tolist())
        self.rows = [rows for rows, base in zip(by_class, is_base, strict=True) if base]
        self.novel_rows = [rows for rows, base in zip(by_class, is_base, strict=True) if not base]
        if data.classifier is not None:
            start = data.classifier.weight.detach()
        else:
            start = class_means(self.values, targets, data.num_classes, ("l2",))["l2"]
        self.weight = nn.Parameter(start[is_base])
        self.scale = nn.Parameter(torch.tensor(float(options.scale)))
        self.random = torch.Generator().manual_seed(data.seed)

    def train_base(self, seed: int) -> None:
        """Trains the cosine classifier of the base classes."""
        rows = torch.cat(self.rows)
        steps = self.options.updates(len(rows) // self.views)
        sizes = torch.tensor([len(of_class) for of_class in self.rows])
        labels = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        draws = {"num_samples": steps * BATCH_SIZE, "seed": seed}
        batches = create_sampler("instance_balanced", labels, **draws).epoch_indices()
        batches = batches.view(steps, BATCH_SIZE)

        def backward(step: int) -> None:
            self.backward(rows[batches[step]], self.weight, labels[batches[step]])

        self._descend(steps, backward)

    def train_generator(self, fake_novel: int) -> WeightGenerator:
        """Trains a generator in episodes, and the base classes' weights with it."""
        options = self.options
        generator = WeightGenerator(
            self.values.shape[1], len(self.rows), gamma=options.gamma, random=self.random
        )
        # Queries of novel and of base classes.
        share = options.novel_share or fake_novel / len(self.rows)
        of_novel = min(max(round(share * options.queries), 1), options.queries - 1)
        of_base = options.queries - of_novel

        def backward(_: int) -> None:
            shuffled = torch.randperm(len(self.rows), generator=self.random)
            novel, base = shuffled[:fake_novel], shuffled[fake_novel:]
            # Exemplars, followed by queries.
            drawn = self._draw(novel, options.exemplars + math.ceil(of_novel / len(novel)))
            exemplars, queries = drawn.tensor_split([options.exemplars], dim=1)
            # With more classes than queries, some classes have none.
            asked = base[:of_base]
            base_queries = self._draw(asked, math.ceil(of_base / len(asked)))
            weight = self.weight[base]
            generated = generator(self.unit(exemplars), weight, base)
            # The classes alternate in the transposed rows, and so do the labels.
            rows = [base_queries.T.flatten()[:of_base], queries.T.flatten()[:of_novel]]
            labels = [torch.arange(of_base) % len(asked), torch.arange(of_novel) % len(novel)]
            labels[1] += len(base)
            self.backward(torch.cat(rows), torch.cat([weight, generated]), torch.cat(labels))

        self._descend(options.episodes, backward, *generator.parameters())
        return generator

    @torch.no_grad()
    def generate(self, generator: WeightGenerator) -> Tensor:
        """Returns the weights (M, D) of the novel classes from all of their rows."""
        (num_base, width), novel = self.weight.shape, len(self.novel_rows)
        base = torch.arange(num_base)
        means, attention = torch.zeros(novel, width), torch.zeros(novel, num_base)
        step = max(ENTRIES // max(width, num_base), ROWS)
        for label, of_class in enumerate(self.novel_rows):
            for part in of_class.split(step):
                unit = F.normalize(take_rows(self.values, part), dim=1)
                means[label] += unit.sum(dim=0) / len(of_class)
                attention[label] += generator.attend(unit, base).sum(dim=0) / len(of_class)
        return generator.combine(means, attention, self.weight)

    def unit(self, rows: Tensor) -> Tensor:
        """Returns features (*rows.shape, D) at unit length, after dropout."""
        features = take_rows(self.values, rows.flatten()).view(*rows.shape, -1)
        if self.options.dropout:
            kept = torch.rand(features.shape, generator=self.random) >= self.options.dropout
            features = features * kept
        return F.normalize(features, dim=-1)

    def backward(self, rows: Tensor, weight: Tensor, labels: Tensor) -> None:
        """Sets the gradients of the mean cross-entropy of a cosine classifier."""
        cosines = self.unit(rows) @ F.normalize(weight, dim=1).T
        F.cross_entropy(self.scale * cosines, labels).backward()

    def _descend(self, steps: int, backward: Callable[[int], None], *more: nn.Parameter) -> None:
        given: dict[str, Any] = {"lr": self.options.lr, "weight_decay": self.options.weight_decay}
        descend("fslwf", [self.weight, self.scale, *more], steps, backward, nesterov=True, **given)

    def _draw(self, classes: Tensor, number: int) -> Tensor:
        """Returns rows (len(classes), number), different ones unless a class has too few."""
        drawn = []
        for label in classes.tolist():
            rows = self.rows[label]
            order = torch.randperm(len(rows), generator=self.random)[:number]
            drawn.append(rows[order[torch.arange(number) % len(order)]])
        return torch.stack(drawn)


@register_fit("oltr")
@dataclass(frozen=True, kw_only=True)
class OLTRFit(TrainedFit):
    """Trains the head by class-balanced SGD on the cross-entropy and the loss of the centroids.

    The settings are those of the authors' second stage: batches of 128, 4 rows of a class in
    succession, momentum 0.9, a learning rate that drops to a tenth at each third. The memory's
    coefficients start from the joint classifier, if there is one. On frozen features the loss of
    the centroids moves nothing but them, from the class means, which are near its minimum.

    Args:
        centroids: ``"learned"`` by :class:`timm_lt.losses.DiscriminativeCentroids`, without weight
            decay; or fixed at the class ``"means"``.
        loss_weight: Weight of that loss beside the cross-entropy, >= 0; ``hinge`` is its option.
        epochs: None is 2, but at least 150 updates; the paper, whose backbone learns too, has 60
            on ImageNet-LT.
        weight_decay: On everything but the centroids.
    """

    length = OLTR_LENGTH
    batch_size = OLTR_BATCH_SIZE

    scale: float = 16.0
    reach: float = 1.0
    squash: Squash = "squared"
    centroids: Centroids = "learned"
    loss_weight: float = 0.01
    hinge: Hinge = "example"
    lr: float = 0.1
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.centroids == "means" and (self.loss_weight, self.hinge) != (0.01, "example"):
            raise UsageError(
                "loss_weight and hinge of head 'oltr' have no effect with centroids 'means'"
            )

    def _fit(self, data: FitData) -> OLTRHead:
        head, features = self.start(data), data.features
        loss = DiscriminativeCentroids(head.centroids, hinge=self.hinge)
        loss.requires_grad_(self.centroids == "learned")

        def backward(rows: Tensor) -> None:
            with torch.no_grad():
                head.centroids.copy_(loss.centroids)
            values, targets = take_rows(features.values, rows), features.targets[rows]
            # head(values) would take weights that are no longer finite for unfitted ones.
            logits = F.linear(head.transform(values), *head.effective())
            objective: Tensor = F.cross_entropy(logits, targets)
            if self.centroids == "learned":
                objective = objective + self.loss_weight * loss(values, targets).mean()
            objective.backward()

        self.train(
            head,
            data,
            features,
            weight_decay=self.weight_decay,
            sampler_options={"samples_per_class": SAMPLES_PER_CLASS},
            backward=backward,
            # The gradient of the centroids is so small that a decay would draw them to zero.
            undecayed=[p for p in loss.parameters() if p.requires_grad],
            decay=lambda step, steps: 0.1 ** (DROPS * step // steps),
            fused=False,
        )
        with torch.no_grad():
            head.centroids.copy_(loss.centroids)
        return head

    def start(self, data: FitData) -> OLTRHead:
        """Returns the head before its training."""
        features, num_classes = data.features, data.num_classes
        width, with_bias = features.num_features, data.new_linear().bias is not None
        generator = torch.Generator().manual_seed(data.seed)
        seeds = torch.randint(2**31, (3,), generator=generator).tolist()
        start = seeded_linear(width, num_classes, bias=with_bias, seed=seeds[0])
        memory: nn.Linear = data.classifier or seeded_linear(width, num_classes, seed=seeds[1])
        selector = seeded_linear(width, width, seed=seeds[2])
        head = OLTRHead.from_classifier(
            start, scale=self.scale, reach=self.reach, squash=self.squash
        )
        means = class_means(features.values, features.targets, num_classes)["raw"]
        with torch.no_grad():
            head.centroids.copy_(means)
            head.memory_weight.copy_(memory.weight)
            head.memory_bias.copy_(torch.zeros(()) if memory.bias is None else memory.bias)
            head.selector_weight.copy_(selector.weight)
            head.selector_bias.copy_(selector.bias)
        return head
