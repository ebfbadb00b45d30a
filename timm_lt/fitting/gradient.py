"""Fits by gradient on cached features: linear, crt, lws and cosine."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from timm_lt.features import Features
from timm_lt.fitting.base import FitData, register_fit, select, selection_record, validation_score
from timm_lt.fitting.sgd import (
    BestStep,
    Score,
    SmoteTarget,
    Softmax,
    add_smote_rows,
    check_length,
    check_smote,
    epochs_of,
    scale_gradient,
    smote_counts,
    solve_linear,
    train_head,
)
from timm_lt.heads import CosineHead, CRTHead, Head, LinearHead, LWSHead, seeded_linear
from timm_lt.heads.linear import BATCH_SIZE, CRT_LENGTH, LWS_LENGTH
from timm_lt.losses import create_loss
from timm_lt.samplers import check_sampler
from timm_lt.utils.checks import (
    UsageError,
    check_choice,
    check_integer,
    check_mapping,
    check_number,
)
from timm_lt.utils.longtail import ShotRule, class_counts

H = TypeVar("H", bound=Head)
Solver = Literal["lbfgs", "sgd"]
# Losses of the lbfgs solver; sgd takes any registered loss.
LBFGSLoss = Literal["cross_entropy", "balanced_softmax"]
Keep = Literal["last", "best"]
SGD_OPTIONS = (
    *("steps", "epochs", "lr", "max_norm", "keep", "loss_options", "sampler", "sampler_options"),
)
MAX_ITERATIONS = 100
# Rows x features x classes above which lbfgs, with its weight decays, takes minutes.
LARGE = 5_000_000_000
# From strong to weak: each solution is the start of the next.
WEIGHT_DECAYS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)


def usual_solver(rows: int, linear: nn.Linear) -> Solver:
    """Returns ``"sgd"`` where lbfgs would take minutes on a few CPU cores, else ``"lbfgs"``."""
    return "lbfgs" if rows * linear.weight.numel() <= LARGE else "sgd"


@register_fit("linear")
def fit_linear(
    data: FitData, *, solver: Solver | None = None, weight_decay: float | None = None
) -> LinearHead:
    """Returns the joint classifier as a head, or without one fits a linear probe.

    The probe minimises the cross-entropy over the rows as they are distributed.

    Args:
        data: Input of the fit.
        solver: As in :func:`fit_crt`.
        weight_decay: None selects it on validation (lbfgs) or is 5e-4 (sgd).
    """
    if data.classifier is not None:
        if solver is not None or weight_decay is not None:
            raise UsageError(
                "solver and weight_decay of head 'linear' have no effect with a joint classifier; "
                "remove them"
            )
        return LinearHead.from_classifier(data.classifier)
    features = data.features
    linear = seeded_linear(features.num_features, data.num_classes, seed=data.seed)
    solver = solver or usual_solver(features.num_images * features.views, linear)
    if solver == "lbfgs":
        counts = class_counts(features.targets, data.num_classes)
        given = Softmax.instance_balanced(counts)
        return _solve(LinearHead, data, features, linear, given, weight_decay=weight_decay)
    head = LinearHead.from_classifier(linear)
    train_head(
        head,
        features,
        seed=data.seed,
        steps=CRT_LENGTH.updates(features.num_images),
        lr=0.2,
        weight_decay=5e-4 if weight_decay is None else weight_decay,
        sampler="instance_balanced",
    )
    return head


def _check_crt_options(options: dict[str, Any]) -> None:
    """Checks the options by themselves; those of the other solver have no effect."""
    solver = options.get("solver") or "lbfgs"
    of_others = SGD_OPTIONS if solver == "lbfgs" else ("max_iterations",)
    for key in of_others:
        if options.get(key) is not None:
            raise UsageError(
                f"{key} of head 'crt' has no effect with solver {solver!r}; remove it, or pass "
                f"solver={'sgd' if solver == 'lbfgs' else 'lbfgs'!r}"
            )
    check_length(options)
    if options.get("max_norm") is not None:
        check_number("max_norm of head 'crt'", options["max_norm"], "(0, inf)")
    check_smote(options.get("smote"))
    loss = options.get("loss", "cross_entropy")
    given = check_mapping("loss_options of head 'crt'", options.get("loss_options"))
    for key in {"class_counts", "reduction"} & set(given):
        raise UsageError(f"{key} in loss_options of head 'crt' is set by the fit; remove it")
    try:
        made = create_loss(loss, class_counts=[2, 1], **given)
    except UsageError as error:
        raise UsageError(f"loss of head 'crt': {error}") from error
    if solver == "lbfgs" and loss not in get_args(LBFGSLoss):
        raise UsageError(
            f"loss {loss!r} of head 'crt' needs solver: sgd; lbfgs solves "
            f"{' and '.join(get_args(LBFGSLoss))}"
        )
    try:
        getattr(made, "check_classifier", lambda _: None)(nn.Linear(1, 2, device="meta"))
    except UsageError as error:
        raise UsageError(f"loss {loss!r} of head 'crt', which is linear: {error}") from error
    if getattr(made, "takes_pairs", False):
        raise UsageError(f"loss {loss!r} of head 'crt' takes pairs of images; choose another")
    sampler = options.get("sampler") or _usual_sampler(loss)
    check_sampler("of head 'crt'", sampler, options.get("sampler_options"))


def _usual_sampler(loss: str) -> str:
    """Returns the default sampler of a loss."""
    return "instance_balanced" if loss == "balanced_softmax" else "class_balanced"


def _check_crt_length(
    options: dict[str, Any], class_counts: Tensor, *, rule: ShotRule, views: int
) -> None:
    """Checks that the schedule of a loss fits into the epochs."""
    if options.get("solver") != "sgd":
        return
    rows, images = int(class_counts.sum()) * views, int(class_counts.sum())
    if options.get("smote") is not None:
        rows = images = int(smote_counts(class_counts * views, options["smote"]).sum())
    length = CRT_LENGTH.updates(images, epochs=options.get("epochs"), steps=options.get("steps"))
    given = check_mapping("loss_options of head 'crt'", options.get("loss_options"))
    loss = create_loss(options.get("loss", "cross_entropy"), class_counts=class_counts, **given)
    try:
        getattr(loss, "set_epoch", lambda *_: None)(0, epochs_of(length * BATCH_SIZE, rows))
    except UsageError as error:
        raise UsageError(f"loss of head 'crt' (an epoch is {rows} rows): {error}") from error


def _with_solver(data: FitData, options: dict[str, Any]) -> dict[str, Any]:
    """Adds the default solver, which depends on the size of the problem."""
    if options.get("solver") is not None:
        return options
    rows = len(data.features)
    if options.get("smote") is not None:
        check_smote(options["smote"])
        counts = class_counts(data.features.targets, data.num_classes)
        rows = int(smote_counts(counts, options["smote"]).sum())
    linear = nn.Linear(data.features.num_features, data.num_classes, device="meta")
    return {**options, "solver": usual_solver(rows, linear)}


@register_fit("crt", _check_crt_options, check_classes=_check_crt_length, complete=_with_solver)
def fit_crt(
    data: FitData,
    *,
    solver: Solver | None = None,
    loss: str = "cross_entropy",
    loss_options: Mapping[str, Any] | None = None,
    sampler: str | None = None,
    sampler_options: Mapping[str, Any] | None = None,
    weight_decay: float | None = None,
    max_iterations: int = MAX_ITERATIONS,
    steps: int | None = None,
    epochs: int | None = None,
    lr: float = 0.2,
    max_norm: float | None = None,
    keep: Keep = "last",
    smote: SmoteTarget | None = None,
) -> CRTHead:
    """Re-trains the classifier from scratch on class-balanced data.

    Args:
        data: Input of the fit.
        solver: ``"lbfgs"`` solves the expected problem, ``"sgd"`` follows Kang et al.; None is
            lbfgs, or sgd where lbfgs would take minutes.
        loss: ``"cross_entropy"``, balanced by sampling (sgd) or weights (lbfgs), or
            ``"balanced_softmax"`` on the features as they are distributed. With sgd any of
            :func:`timm_lt.list_losses`, e.g. a re-weighted one with ``sampler=
            "instance_balanced"``; its class counts are those of the features. An initial bias of
            the loss (sigmoids) is set, without weight decay.
        loss_options: Options of the loss (sgd).
        sampler: One of :func:`timm_lt.list_samplers` (sgd); None is ``"class_balanced"``, or
            ``"instance_balanced"`` for balanced softmax.
        sampler_options: Options of the sampler (sgd).
        weight_decay: None selects it on validation (lbfgs) or is 5e-4 (sgd).
        max_iterations: Iterations of lbfgs per weight decay.
        steps: Updates of sgd, 512 rows each; None goes by epochs.
        epochs: Epochs of sgd; None is the paper's 10, but at least 1,000 updates.
        lr: Initial learning rate of sgd.
        max_norm: Largest norm of a class's weights after each update of sgd, > 0; None is no limit.
            With weight decay, the second stage of Alshammari et al., Long-Tailed Recognition via
            Weight Balancing, CVPR 2022.
        keep: State of the ``"last"`` update, or the ``"best"`` of ten on validation (sgd).
        smote: Add synthetic rows up to so many per class, or up to the ``"largest"`` class.
    """
    # Without a bias only if the joint classifier has none.
    with_bias = data.classifier is None or data.classifier.bias is not None
    width, num_classes = data.features.num_features, data.num_classes
    linear = seeded_linear(width, num_classes, bias=with_bias, seed=data.seed)
    features = data.features
    if smote is not None:
        features = add_smote_rows(features, data.num_classes, smote, seed=data.seed)
    if solver == "lbfgs":
        counts = class_counts(features.targets, num_classes)
        balanced = loss == "balanced_softmax"
        make = Softmax.balanced_softmax if balanced else Softmax.class_balanced
        return _solve(
            CRTHead,
            data,
            features,
            linear,
            make(counts),
            weight_decay=weight_decay,
            max_iterations=max_iterations,
        )
    head = CRTHead.from_classifier(linear)
    counts = class_counts(features.targets, num_classes)
    made = create_loss(loss, class_counts=counts, **dict(loss_options or {}))
    start = getattr(made, "initial_bias", lambda _: None)(num_classes)
    if start is not None and head.bias is not None:
        nn.init.constant_(head.bias, start)
    best = train_head(
        head,
        features,
        seed=data.seed,
        steps=CRT_LENGTH.updates(features.num_images, epochs=epochs, steps=steps),
        lr=lr,
        weight_decay=5e-4 if weight_decay is None else weight_decay,
        sampler=sampler or _usual_sampler(loss),
        sampler_options=sampler_options,
        loss=made,
        decay_bias=start is None,
        max_norm=max_norm,
        score=_score(head, data, keep),
    )
    _record(head, best, data)
    return head


def _solve(
    kind: type[H],
    data: FitData,
    features: Features,
    linear: nn.Linear,
    loss: Softmax,
    *,
    weight_decay: float | None,
    max_iterations: int = MAX_ITERATIONS,
) -> H:
    """Solves by L-BFGS from zero, selecting the weight decay on validation if it is None."""
    check_integer("max_iterations", max_iterations, minimum=1)
    if weight_decay is not None:
        check_number("weight_decay", weight_decay, "[0, inf)")
    decays = WEIGHT_DECAYS if weight_decay is None else (weight_decay,)
    val = data.need_val(kind.kind, "weight_decay") if weight_decay is None else None
    weight = torch.zeros_like(linear.weight)
    bias: Tensor | None = None if linear.bias is None else torch.zeros_like(linear.bias)
    candidates = []
    for decay in decays:
        weight, bias = solve_linear(
            weight,
            bias,
            features,
            weight_decay=decay,
            max_iterations=max_iterations,
            loss=loss,
        )
        with torch.no_grad():
            linear.weight.copy_(weight)
            if bias is not None:
                linear.bias.copy_(bias)
        candidates.append((decay, kind.from_classifier(linear)))
    return candidates[0][1] if val is None else select(candidates, data, val, "weight_decay")


@register_fit("lws", check_length)
def fit_lws(
    data: FitData,
    *,
    scale_bias: bool = True,
    steps: int | None = None,
    epochs: int | None = None,
    lr: float = 0.2,
    weight_decay: float = 5e-4,
    keep: Keep = "last",
) -> LWSHead:
    """Learns one factor per class, starting at 1, by class-balanced SGD (:func:`train_head`).

    Args:
        data: Input of the fit.
        scale_bias: Option of the head.
        steps: Updates, 512 rows each; None goes by epochs.
        epochs: None is the 5 of the authors' code, but at least 500 updates.
        lr: Initial learning rate.
        weight_decay: On the factors, as in the authors' code.
        keep: State of the ``"last"`` update, or the ``"best"`` of ten on validation.
    """
    head = LWSHead.from_classifier(data.need_classifier("lws"), scale_bias=scale_bias)
    with torch.no_grad():
        head.scale.fill_(1.0)
    best = train_head(
        head,
        data.features,
        seed=data.seed,
        steps=LWS_LENGTH.updates(data.features.num_images, epochs=epochs, steps=steps),
        lr=lr,
        weight_decay=weight_decay,
        backward=scale_gradient(head, data.features),
        score=_score(head, data, keep),
    )
    _record(head, best, data)
    return head


@register_fit("cosine", check_length)
def fit_cosine(
    data: FitData,
    *,
    scale: float = 16.0,
    learn_scale: bool = False,
    steps: int | None = None,
    epochs: int | None = None,
    lr: float = 0.2,
) -> CosineHead:
    """Trains a cosine classifier by class-balanced SGD, from the joint classifier's directions."""
    linear = data.new_linear()
    if data.classifier is None:
        nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(data.seed))
    head = CosineHead.from_classifier(linear, scale=scale, learn_scale=learn_scale)
    length = CRT_LENGTH.updates(data.features.num_images, epochs=epochs, steps=steps)
    train_head(head, data.features, seed=data.seed, steps=length, lr=lr)
    return head


def _score(head: Head, data: FitData, keep: Keep) -> Callable[[], Score] | None:
    """Returns the validation score during training, None for ``keep="last"``."""
    check_choice(f"keep of head {head.kind!r}", keep, get_args(Keep))
    if keep == "last":
        return None
    val = data.need_val(head.kind, "the best update", "keep='last'")
    return lambda: validation_score(head, data, val)


def _record(head: Head, best: BestStep | None, data: FitData) -> None:
    """Records the best update, if there is one."""
    if best is not None:
        head.selection = selection_record("steps", best.step, best.score, data)
        head.selection["compared"] = [list(pair) for pair in best.compared]
