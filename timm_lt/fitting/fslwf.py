"""The fit of few-shot learning without forgetting: class weights generated from features."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_lt.fitting.base import FitData, TrainedFit, register_fit
from timm_lt.fitting.closed_form import class_means
from timm_lt.fitting.solvers import ENTRIES, ROWS, descend, take_rows
from timm_lt.heads import FSLwFHead
from timm_lt.heads.linear import BATCH_SIZE, LWS_LENGTH
from timm_lt.samplers import create_sampler
from timm_lt.utils.checks import UsageError, check_choice, check_integer
from timm_lt.utils.longtail import ShotRule, class_counts, shot_groups, shot_rule_texts

Groups = Literal["many_shot", "many_and_medium"]
Base: TypeAlias = int | Groups


class WeightGenerator(nn.Module):
    """Generates the weight of a class from some of its features and the base classes' weights.

    With unit features ``z_i`` of the class, unit weights ``w_b`` of the base classes and keys
    ``k_b``, all learned but the features:

        ``w' = phi_avg ⊙ mean_i z_i
        + phi_att ⊙ mean_i sum_b softmax_b(gamma cos(phi_q z_i, k_b)) w_b``.

    It starts with ``phi_avg = phi_att = 1``, ``phi_q = I`` with noise of 0.001, and keys of
    variance 2 / D, as the authors' code does.

    Args:
        num_features: Width D of the features.
        num_base: Number of base classes K.
        gamma: Initial sharpness of the attention.
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
        """Returns the attention (..., B) of unit features (..., D) to base classes (B,)."""
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


@register_fit("fslwf")
@dataclass(frozen=True, kw_only=True)
class FSLwFFit(TrainedFit):
    """Trains weights of the base classes, and generates those of the others from all their rows.

    First a cosine classifier of the base classes is trained on rows as they are distributed, from
    the joint classifier's directions or, without one, from the class means. Then come episodes:
    some base classes are taken for novel, their weights are generated from a few of their rows and
    the weights of the remaining base classes, and the cross-entropy over all of them moves the
    generator, the base weights and the scale. The paper does not cover long tails: which classes
    are base is our rule.

    Args:
        base: Base classes: the ``"many_shot"`` ones, ``"many_and_medium"``, or those with at least
            so many training images; at least two, and not all.
        steps: Updates of the first stage, of 512 rows; None goes by epochs.
        epochs: None is 5 of the base classes' rows, but at least 500 updates.
        episodes: Updates of the second stage; the paper's code has 6 epochs of 4,000.
        fake_novel: Base classes of an episode that are taken for novel; None is a quarter.
        exemplars: Rows of each from which its weight is generated.
        queries: Rows that are classified in an episode, at least 2; they are not exemplars, unless
            a class has too few rows.
        novel_share: Share of the queries from classes taken for novel. None draws every class
            equally often, as balanced test sets do; few-shot protocols take 0.5, which favours the
            novel classes.
        dropout: Share of the features' entries that are dropped in training, as in the code.
        gamma: Initial sharpness of the attention; the paper's code has 10, and 30 on ImageNet.
        scale: Initial factor of the cosines.
        lr: Initial learning rate of both stages.
        weight_decay: On everything that is learned.
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
        owner = "of head 'fslwf'"
        if isinstance(self.base, str):
            check_choice(f"base {owner}:", self.base, get_args(Groups))
        else:
            check_integer(f"base {owner}, the fewest images of a base class,", self.base, minimum=1)

    def check_classes(self, class_counts: Tensor, *, rule: ShotRule = "fb", views: int = 1) -> None:
        """Checks that classes of these sizes can be divided into base and novel ones."""
        self._number_of_novel(int(self._base_classes(class_counts, rule).sum()))

    def _base_classes(self, counts: Tensor, rule: ShotRule) -> Tensor:
        """Returns a mask (C,) of the base classes."""
        groups, texts = shot_groups(counts, rule), shot_rule_texts(rule)
        if self.base == "many_shot":
            mask, having = groups["many_shot"], texts["many_shot"]
        elif self.base == "many_and_medium":
            mask, having = ~groups["few_shot"], f"not {texts['few_shot']}"
        else:
            mask, having = counts >= self.base, f">= {self.base}"
        number = int(mask.sum())
        if number < 2 or number == len(mask):
            missing = "no novel class" if number == len(mask) else "fewer than two base classes"
            low, high = int(counts.min()), int(counts.max())
            raise UsageError(
                f"head 'fslwf' has {missing}: {number} of {len(mask)} classes have {having} "
                f"training images, and classes have {low} to {high}; choose another base: "
                "'many_shot', 'many_and_medium', or the fewest images of a base class"
            )
        return mask

    def _number_of_novel(self, num_base: int) -> int:
        """Returns how many base classes an episode takes for novel."""
        number = max(num_base // 4, 1) if self.fake_novel is None else self.fake_novel
        if number >= num_base:
            raise UsageError(
                "fake_novel of head 'fslwf' must be below the number of base classes, which is "
                f"{num_base}; got {number}"
            )
        return number

    def _fit(self, data: FitData) -> FSLwFHead:
        is_base = self._base_classes(data.class_counts, data.rule)
        training = _Training(self, data, is_base)
        training.train_base(data.seed)
        generator = training.train_generator(self._number_of_novel(int(is_base.sum())))
        head = FSLwFHead.from_classifier(data.new_linear())
        with torch.no_grad():
            head.scale.copy_(training.scale)
            head.weight[is_base] = training.weight
            head.weight[~is_base] = training.generate(generator)
        return head


class _Training:
    """The two stages of the training, on some rows of the features at a time.

    Args:
        options: Options of the fit.
        data: Input of the fit.
        is_base: Mask (C,) of the base classes.
    """

    def __init__(self, options: FSLwFFit, data: FitData, is_base: Tensor) -> None:
        self.options, self.values, self.views = options, data.features.values, data.features.views
        targets = data.features.targets.cpu()
        by_class = targets.sort(stable=True).indices.split(class_counts(targets).tolist())
        self.rows, self.novel_rows = (
            [by_class[label] for label in mask.nonzero().flatten().tolist()]
            for mask in (is_base, ~is_base)
        )
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
        sampler = create_sampler(
            "instance_balanced", labels, num_samples=steps * BATCH_SIZE, seed=seed
        )
        batches = sampler.epoch_indices().view(steps, BATCH_SIZE)
        self._descend(
            steps, lambda step: self.loss(rows[batches[step]], self.weight, labels[batches[step]])
        )

    def train_generator(self, fake_novel: int) -> WeightGenerator:
        """Trains a generator in episodes, and the base classes' weights with it."""
        options = self.options
        generator = WeightGenerator(
            self.values.shape[1], len(self.rows), gamma=options.gamma, random=self.random
        )
        share = options.novel_share or fake_novel / len(self.rows)
        # Queries of novel and of base classes.
        of_novel = min(max(round(share * options.queries), 1), options.queries - 1)
        of_base = options.queries - of_novel

        def loss(_: int) -> Tensor:
            shuffled = torch.randperm(len(self.rows), generator=self.random)
            novel, base = shuffled[:fake_novel], shuffled[fake_novel:]
            # Exemplars, followed by queries.
            drawn = self._draw(novel, options.exemplars + -(-of_novel // len(novel)))
            exemplars, queries = drawn.split_with_sizes(
                [options.exemplars, drawn.shape[1] - options.exemplars], dim=1
            )
            # With more classes than queries, some classes have none.
            asked = base[:of_base]
            base_queries = self._draw(asked, -(-of_base // len(asked)))
            weight = self.weight[base]
            generated = generator(self.unit(exemplars), weight, base)
            # The classes alternate in the transposed rows, and so do the labels.
            rows = [base_queries.T.flatten()[:of_base], queries.T.flatten()[:of_novel]]
            labels = [
                torch.arange(of_base) % len(asked),
                len(base) + torch.arange(of_novel) % len(novel),
            ]
            return self.loss(torch.cat(rows), torch.cat([weight, generated]), torch.cat(labels))

        self._descend(options.episodes, loss, *generator.parameters())
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

    def loss(self, rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean cross-entropy of a cosine classifier."""
        cosines = self.unit(rows) @ F.normalize(weight, dim=1).T
        return F.cross_entropy(self.scale * cosines, labels)

    def _descend(self, steps: int, loss: Callable[[int], Tensor], *more: nn.Parameter) -> None:
        """Minimises a loss by SGD with Nesterov momentum."""
        descend(
            "fslwf",
            [self.weight, self.scale, *more],
            steps,
            lambda step: loss(step).backward(),
            lr=self.options.lr,
            weight_decay=self.options.weight_decay,
            nesterov=True,
        )

    def _draw(self, classes: Tensor, number: int) -> Tensor:
        """Returns rows (len(classes), number), different ones unless a class has too few."""
        drawn = []
        for label in classes.tolist():
            rows = self.rows[label]
            order = torch.randperm(len(rows), generator=self.random)[:number]
            drawn.append(rows[order[torch.arange(number) % len(order)]])
        return torch.stack(drawn)
