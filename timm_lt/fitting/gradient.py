"""Fits by gradient on cached features: linear, crt, lws and cosine; SMOTE."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from timm_lt.features import Features
from timm_lt.fitting.base import (
    MAXIMUM,
    Fit,
    FitData,
    register_fit,
    select,
    selection_record,
    validation_score,
)
from timm_lt.fitting.solvers import (
    MAX_ITERATIONS,
    row_blocks,
    scale_gradient,
    solve_linear,
    take_rows,
    train_head,
)
from timm_lt.heads import CosineHead, CRTHead, Head, LinearHead, LWSHead, limit_norms, seeded_linear
from timm_lt.heads.linear import BATCH_SIZE, CRT_LENGTH, LWS_LENGTH, TrainingLength
from timm_lt.losses import create_loss
from timm_lt.samplers import check_sampler
from timm_lt.utils.checks import UsageError, check_integer, check_mapping, user_errors
from timm_lt.utils.longtail import ShotRule, class_counts

H = TypeVar("H", bound=Head)
Solver = Literal["lbfgs", "sgd"]
Keep = Literal["last", "best"]
SmoteTarget: TypeAlias = int | Literal["largest"]
# Options of crt for both solvers; max_iterations is for lbfgs, and the others for sgd.
COMMON_OPTIONS = ("solver", "loss", "weight_decay", "smote")
LBFGS_LOSSES = ("cross_entropy", "balanced_softmax")
SGD_WEIGHT_DECAY = 5e-4
# Rows x features x classes above which lbfgs, with its weight decays, takes minutes.
LARGE = 5_000_000_000
# From strong to weak: each solution is the start of the next.
WEIGHT_DECAYS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
# Validations during training, with keep='best'.
VALIDATIONS = 10
# Neighbours of SMOTE.
NEIGHBORS = 5


@dataclass(frozen=True, kw_only=True)
class TrainedFit(Fit):
    """A fit by SGD.

    Args:
        steps: Number of updates; None goes by ``epochs``.
        epochs: Passes over the rows; None is the length of the reference code, but at least a
            number of updates.
        lr: Initial learning rate.
    """

    length: ClassVar[TrainingLength]
    batch_size: ClassVar[int] = BATCH_SIZE

    steps: int | None = None
    epochs: int | None = None
    lr: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.updates(1)

    def updates(self, images: int) -> int:
        """Returns the number of updates for so many images."""
        return self.length.updates(images, self.batch_size, self.epochs, self.steps)

    def train(
        self,
        head: H,
        data: FitData,
        features: Features,
        *,
        keep: Keep = "last",
        after: Callable[[int], None] | None = None,
        **options: Any,
    ) -> H:
        """Trains a head by SGD; returns its last state, or the first best of ten on validation."""
        steps = self.updates(features.num_images)
        options |= {"seed": data.seed, "steps": steps, "lr": self.lr, "batch_size": self.batch_size}
        if keep == "last":
            train_head(head, features, after=after, **options)
            return head
        val = data.need_val(self.name, "the best update", "keep='last'")
        due = {max(steps * number // VALIDATIONS, 1) for number in range(1, VALIDATIONS + 1)}
        compared: list[list[float]] = []
        best: tuple[tuple[float, float], int] = (-1.0, -1.0), 0
        state: dict[str, Tensor] = {}

        def validate(step: int) -> None:
            nonlocal best, state
            if after is not None:
                after(step)
            if step in due:
                score = validation_score(head.eval(), data, val)
                head.train()
                compared.append([step, score[0]])
                if score > best[0]:
                    best, state = (score, step), copy.deepcopy(head.state_dict())

        train_head(head, features, after=validate, **options)
        head.load_state_dict(state)
        head.selection = selection_record("steps", best[1], best[0][0], data, compared=compared)
        return head


def usual_solver(rows: int, linear: nn.Linear) -> Solver:
    """Returns ``"sgd"`` where lbfgs would take minutes on a few CPU cores, else ``"lbfgs"``."""
    return "lbfgs" if rows * linear.weight.numel() <= LARGE else "sgd"


@register_fit("linear")
@dataclass(frozen=True, kw_only=True)
class LinearFit(Fit):
    """Takes the joint classifier as it is, or without one fits a linear probe.

    The probe minimises the cross-entropy over the rows as they are distributed.

    Args:
        solver: As of ``crt``, like ``weight_decay``.
    """

    solver: Solver | None = None
    weight_decay: float | None = None

    def _fit(self, data: FitData) -> LinearHead:
        if data.classifier is not None:
            if self.solver is not None or self.weight_decay is not None:
                raise UsageError("head 'linear' takes no solver or weight_decay with a classifier")
            return LinearHead.from_classifier(data.classifier)
        features = data.features
        linear = seeded_linear(features.num_features, data.num_classes, seed=data.seed)
        if (self.solver or usual_solver(len(features), linear)) == "lbfgs":
            shares = torch.full((data.num_classes,), 1.0 / len(features))
            return _solve(LinearHead, data, features, linear, self.weight_decay, shares=shares)
        head = LinearHead.from_classifier(linear)
        train_head(
            head,
            features,
            seed=data.seed,
            steps=CRT_LENGTH.updates(features.num_images, BATCH_SIZE),
            lr=0.2,
            weight_decay=SGD_WEIGHT_DECAY if self.weight_decay is None else self.weight_decay,
            sampler="instance_balanced",
        )
        return head


@register_fit("crt")
@dataclass(frozen=True, kw_only=True)
class CRTFit(TrainedFit):
    """Re-trains the classifier from scratch on class-balanced data.

    Args:
        solver: ``"lbfgs"`` solves the expected problem, ``"sgd"`` follows Kang et al.; None is the
            one whose options are given, else lbfgs, or sgd where lbfgs would take minutes.
        loss: ``"cross_entropy"``, balanced by sampling (sgd) or weights (lbfgs), or
            ``"balanced_softmax"`` on the features as they are distributed. With sgd any of
            :func:`timm_lt.list_losses`, with the class counts of the features. An initial bias of
            the loss (sigmoids) is set, without weight decay.
        sampler: One of :func:`timm_lt.list_samplers` (sgd); None is ``"class_balanced"``, or
            ``"instance_balanced"`` for balanced softmax.
        weight_decay: None selects it on validation (lbfgs) or is 5e-4 (sgd).
        max_iterations: Iterations of lbfgs per weight decay.
        steps: Updates of sgd, 512 rows each.
        epochs: Epochs of sgd; None is the paper's 10, but at least 1,000 updates.
        max_norm: Largest norm of a class's weights after each update of sgd, > 0; None is no limit.
            With weight decay, the second stage of Alshammari et al., Long-Tailed Recognition via
            Weight Balancing, CVPR 2022.
        keep: State of the ``"last"`` update, or the ``"best"`` of ten on validation (sgd).
        smote: Add synthetic rows up to so many per class, or up to the ``"largest"`` class.
    """

    length = CRT_LENGTH

    solver: Solver | None = None
    loss: str = "cross_entropy"
    loss_options: Mapping[str, Any] | None = None
    sampler: str | None = None
    sampler_options: Mapping[str, Any] | None = None
    weight_decay: float | None = None
    max_iterations: int = MAX_ITERATIONS
    max_norm: float | None = None
    keep: Keep = "last"
    smote: SmoteTarget | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smote is not None:
            smote_counts(torch.ones(1, dtype=torch.int64), self.smote)
            with user_errors("smote", ImportError, cure="pip install 'timm_lt[smote]'"):
                import_module("imblearn.over_sampling")
        with user_errors("loss of head 'crt', a linear classifier", UsageError):
            loss = self._create_loss(torch.tensor([2, 1]))
            if (check_classifier := getattr(loss, "check_classifier", None)) is not None:
                check_classifier(nn.Linear(1, 2, device="meta"))
            if getattr(loss, "takes_pairs", False):
                raise UsageError(f"{self.loss!r} takes pairs of images; choose another")
        check_sampler("of head 'crt'", self._sampler, self.sampler_options)
        given = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        of_lbfgs = [*given & {"max_iterations"}]
        of_sgd = sorted(given - {*COMMON_OPTIONS, *of_lbfgs})
        of_sgd += [f"loss {self.loss!r}"] if self.loss not in LBFGS_LOSSES else []
        solver = self.solver or ("lbfgs" if of_lbfgs else "sgd" if of_sgd else None)
        useless = {"lbfgs": of_sgd, "sgd": of_lbfgs, None: []}[solver]
        if useless:
            raise UsageError(
                f"{useless[0]} of head 'crt' has no effect with the solver {solver}; remove it"
            )
        object.__setattr__(self, "solver", solver)

    @property
    def _sampler(self) -> str:
        usual = "instance_balanced" if self.loss == "balanced_softmax" else "class_balanced"
        return self.sampler or usual

    def _create_loss(self, counts: Tensor) -> nn.Module:
        options = check_mapping("loss_options", self.loss_options)
        for key in {"class_counts", "reduction"} & options.keys():
            raise UsageError(f"{key} in loss_options is set by the fit; remove it")
        return create_loss(self.loss, class_counts=counts, **options)

    def check_classes(self, class_counts: Tensor, *, rule: ShotRule = "fb", views: int = 1) -> None:
        """Checks that the schedule of a loss fits into the epochs of sgd."""
        if self.solver != "sgd":
            return
        rows, images = int(class_counts.sum()) * views, int(class_counts.sum())
        if self.smote is not None:
            rows = images = int(smote_counts(class_counts * views, self.smote).sum())
        epochs = math.ceil(self.updates(images) * self.batch_size / rows)
        loss = self._create_loss(class_counts)
        with user_errors(f"loss of head 'crt' (an epoch is {rows} rows)", UsageError):
            getattr(loss, "set_epoch", lambda *_: None)(0, epochs)

    def _fit(self, data: FitData) -> CRTHead:
        # Without a bias only if the joint classifier has none.
        with_bias = data.classifier is None or data.classifier.bias is not None
        features, num_classes = data.features, data.num_classes
        linear = seeded_linear(features.num_features, num_classes, bias=with_bias, seed=data.seed)
        if self.smote is not None:
            features = add_smote_rows(features, num_classes, self.smote, seed=data.seed)
        counts = class_counts(features.targets, num_classes)
        if (self.solver or usual_solver(len(features), linear)) == "sgd":
            return self._train(data, features, CRTHead.from_classifier(linear), counts)
        # The expectation of balanced sampling.
        shares, offset = (1.0 / (num_classes * counts.double())).float(), None
        if self.loss == "balanced_softmax":
            shares, offset = torch.full((num_classes,), 1.0 / len(features)), counts.float().log()
        problem = {"shares": shares, "offset": offset, "max_iterations": self.max_iterations}
        return _solve(CRTHead, data, features, linear, self.weight_decay, **problem)

    def _train(self, data: FitData, features: Features, head: CRTHead, counts: Tensor) -> CRTHead:
        """Trains the head by SGD."""
        loss, limit = self._create_loss(counts), self.max_norm
        start = getattr(loss, "initial_bias", lambda _: None)(head.out_features)
        undecayed = []
        if start is not None and head.bias is not None:
            nn.init.constant_(head.bias, start)
            undecayed = [head.bias]
        return self.train(
            head,
            data,
            features,
            keep=self.keep,
            weight_decay=SGD_WEIGHT_DECAY if self.weight_decay is None else self.weight_decay,
            sampler=self._sampler,
            sampler_options=self.sampler_options,
            loss=loss,
            undecayed=undecayed,
            after=None if limit is None else lambda _: limit_norms(head, limit),
        )


def _solve(
    kind: type[H],
    data: FitData,
    features: Features,
    linear: nn.Linear,
    weight_decay: float | None,
    **problem: Any,
) -> H:
    """Solves by L-BFGS from zero, selecting the weight decay on validation if it is None."""
    decays = WEIGHT_DECAYS if weight_decay is None else (weight_decay,)
    val = data.need_val(kind.kind, "weight_decay") if weight_decay is None else None
    weight = torch.zeros_like(linear.weight)
    bias: Tensor | None = None if linear.bias is None else torch.zeros_like(linear.bias)
    candidates = []
    for decay in decays:
        weight, bias = solve_linear(weight, bias, features, weight_decay=decay, **problem)
        with torch.no_grad():
            linear.weight.copy_(weight)
            if bias is not None:
                linear.bias.copy_(bias)
        candidates.append((decay, kind.from_classifier(linear)))
    return candidates[0][1] if val is None else select(candidates, data, val, "weight_decay")


@register_fit("lws")
@dataclass(frozen=True, kw_only=True)
class LWSFit(TrainedFit):
    """Learns one factor per class, starting at 1, by class-balanced SGD.

    Args:
        scale_bias: Option of the head.
        steps: Updates, 512 rows each.
        epochs: None is the 5 of the authors' code, but at least 500 updates.
        weight_decay: On the factors, as in the authors' code.
        keep: State of the ``"last"`` update, or the ``"best"`` of ten on validation.
    """

    length = LWS_LENGTH

    scale_bias: bool = True
    weight_decay: float = SGD_WEIGHT_DECAY
    keep: Keep = "last"

    def _fit(self, data: FitData) -> LWSHead:
        classifier = data.need_classifier(self.name)
        head = LWSHead.from_classifier(classifier, scale_bias=self.scale_bias)
        with torch.no_grad():
            head.scale.fill_(1.0)
        decay, backward = self.weight_decay, scale_gradient(head, data.features)
        return self.train(
            head, data, data.features, keep=self.keep, weight_decay=decay, backward=backward
        )


@register_fit("cosine")
@dataclass(frozen=True, kw_only=True)
class CosineFit(TrainedFit):
    """Trains a cosine classifier by class-balanced SGD, from the joint classifier's directions."""

    length = CRT_LENGTH

    scale: float = 16.0
    learn_scale: bool = False

    def _fit(self, data: FitData) -> CosineHead:
        linear = data.new_linear()
        if data.classifier is None:
            nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(data.seed))
        head = CosineHead.from_classifier(linear, scale=self.scale, learn_scale=self.learn_scale)
        return self.train(head, data, data.features)


def smote_counts(counts: Tensor, target: SmoteTarget) -> Tensor:
    """Returns the rows per class (C,) after :func:`add_smote_rows`; an empty class stays empty."""
    if target == "largest":
        wanted = int(counts.max())
    else:
        wanted = check_integer("smote, rows per class or 'largest',", target, 1, MAXIMUM)
    return torch.where(counts == 0, 0, counts.clamp_min(wanted))


def add_smote_rows(
    features: Features, num_classes: int, target: SmoteTarget, *, seed: int = 0
) -> Features:
    """Appends synthetic rows until each class has ``target`` rows, or those of the largest class.

    A synthetic row is ``x + u (x' − x)``, with ``x'`` one of the ``min(5, n − 1)`` nearest of the n
    rows of the class and ``u`` uniform in [0, 1]. A single row of a class is repeated.

    References:
        Chawla et al., SMOTE: Synthetic Minority Over-sampling Technique, JAIR 2002,
        https://arxiv.org/abs/1106.1813
    """
    counts = class_counts(features.targets, num_classes)
    missing = smote_counts(counts, target) - counts
    parts = list(row_blocks(features.values, 1))
    by_class = features.targets.sort(stable=True).indices.split(counts.tolist())
    for label in missing.nonzero().flatten().tolist():
        of_class = take_rows(features.values, by_class[label])
        parts.append(_synthetic(of_class, int(missing[label]), seed + label))
    labels = torch.repeat_interleave(torch.arange(num_classes), missing)
    return Features(torch.cat(parts), torch.cat([features.targets.cpu(), labels]))


def _synthetic(rows: Tensor, number: int, seed: int) -> Tensor:
    """Returns synthetic rows (number, D) between the rows (n, D) of a class."""
    if len(rows) == 1:
        return rows.expand(number, -1)
    smote = import_module("imblearn.over_sampling").SMOTE(
        sampling_strategy={1: len(rows) + number},
        k_neighbors=min(NEIGHBORS, len(rows) - 1),
        random_state=seed % 2**32,
    )
    # imbalanced-learn needs a second class.
    labels = [1] * len(rows) + [0]
    resampled, _ = smote.fit_resample(torch.cat([rows, rows[:1]]).numpy(), labels)
    return torch.from_numpy(resampled[len(labels) :])
