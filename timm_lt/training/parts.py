"""Parts of the training on images: checks, frozen modules, mixup, optimiser, schedule, seeds."""

import copy
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.data import Mixup
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.optim import Optimizer

from timm_lt.checkpoint import is_statistic
from timm_lt.data.images import Images
from timm_lt.heads import Head, find_classifiers, get_head, get_heads
from timm_lt.models.networks import BilateralBlock, ModulatedAttention
from timm_lt.samplers import ClassSampler
from timm_lt.training.state import EpochRecord
from timm_lt.utils.checks import UsageError, check_choice, check_number, unknown_name, user_errors
from timm_lt.utils.longtail import ClassCounts, check_class_counts

BatchNorm = Literal["frozen", "shift"]
# Stands in a list of modules for the path that last_block finds.
LAST_BLOCK = "last_block"
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
ClipMode = Literal["norm", "value", "agc"]
PLATEAU = "plateau"
SCHEDULERS = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", PLATEAU)
# Values that timm takes without complaint, or refuses only in the middle of training.
RANGES = {
    "optimizer.lr": "(0, inf)",
    "optimizer.weight_decay": "[0, inf)",
    "optimizer.momentum": "[0, 1)",
    "optimizer.layer_decay": "(0, 1]",
    "mixup.mixup_alpha": "[0, inf)",
    "mixup.cutmix_alpha": "[0, inf)",
    "mixup.prob": "[0, 1]",
    "mixup.switch_prob": "[0, 1]",
    "ema.decay": "[0, 1)",
}
# Batches between two checks of the losses, each of which waits for the device.
CHECK_EVERY = 50
T = TypeVar("T")


def last_block(model: nn.Module) -> str:
    """Returns the path of the last block of a timm model's backbone, e.g. ``"layer4.1"``.

    timm's ``feature_info`` names the module of the last features: a stage, whose last block is
    returned, or a single layer, such as a norm, after the last block.
    """
    try:
        path = str(list(model.feature_info)[-1]["module"])  # type: ignore[arg-type]
        last = model.get_submodule(path)
    except (AttributeError, TypeError, LookupError) as error:
        raise _unknown(model, f"its feature_info names no module of it ({error})") from error
    if _is_block(last):
        return _innermost(model, path)
    place = path
    while place:
        parent, _, name = place.rpartition(".")
        names = [child for child, _ in model.get_submodule(parent).named_children()]
        for before in reversed(names[: names.index(name)]):
            candidate = f"{parent}.{before}".removeprefix(".")
            if _is_block(model.get_submodule(candidate)):
                return _innermost(model, candidate)
        place = parent
    raise _unknown(model, f"{path} and all before it are single layers")


def _unknown(model: nn.Module, reason: str) -> UsageError:
    return UsageError(
        f"the last block of {type(model).__name__} is unknown, since {reason}: name the modules in "
        f"trained, from {', '.join(name for name, _ in model.named_children())}"
    )


def _is_block(module: nn.Module) -> bool:
    """Returns whether a module has several layers with weight matrices, which norms lack."""
    return sum(any(p.ndim > 1 for p in m.parameters(recurse=False)) for m in module.modules()) > 1


def _innermost(model: nn.Module, path: str) -> str:
    """Goes down from a stage, or a list of stages, to the last block in it."""
    while True:
        module = model.get_submodule(path)
        if isinstance(module, BilateralBlock):
            # Its branches are one block, and neither is last.
            return path
        if path.rpartition(".")[0].endswith("blocks") and not isinstance(module, CONTAINERS):
            return path
        children = dict(module.named_children())
        if isinstance(children.get("blocks"), CONTAINERS):
            path = f"{path}.blocks"
            continue
        no_attention = {k: m for k, m in children.items() if not isinstance(m, ModulatedAttention)}
        blocks = [name for name, child in no_attention.items() if _is_block(child)]
        alike = len({type(child) for child in children.values()}) == 1
        if not blocks or not (isinstance(module, CONTAINERS) or alike):
            return path
        path = f"{path}.{blocks[-1]}"


class FrozenParts:
    """Freezes a model except for some modules and its classifier.

    Frozen modules are in evaluation mode with ``bn="frozen"``. With ``bn="shift"`` they are in
    training mode, as in the code of Kang et al.: batch norm normalises by the batch, its running
    statistics move, and dropout is active. ``trained`` are the paths of the modules to train;
    ``"last_block"`` is the path from :func:`last_block`; None trains all.
    """

    def __init__(
        self, model: nn.Module, trained: Sequence[str] | None, bn: BatchNorm = "frozen"
    ) -> None:
        check_choice("bn", bn, get_args(BatchNorm))
        chosen = [model] if trained is None else _modules(model, trained)
        if bn == "shift" and (trained is None or not any(map(is_statistic, model.state_dict()))):
            reason = f"{type(model).__name__} has no batch-norm statistics"
            reason = "no modules are named in trained" if trained is None else reason
            raise UsageError(f"bn shift has no effect, since {reason}: remove it")
        parameters = {id(parameter) for module in chosen for parameter in module.parameters()}
        frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in parameters]
        for parameter in frozen:
            parameter.requires_grad_(False)
        self._parameters = frozen
        # Modules that stay in evaluation mode.
        self.evaluated = _beside(model, chosen) if bn == "frozen" else []

    def set_mode(self) -> None:
        """Gives the frozen modules their mode, after ``train()`` of the model."""
        for module in self.evaluated:
            module.training = False

    def thaw(self) -> None:
        """Lets the frozen parameters have gradients again."""
        for parameter in self._parameters:
            parameter.requires_grad_(True)

    def try_batch(self, model: nn.Module, size: tuple[int, int], batch: int) -> None:
        """Passes the smallest batch, which batch norm may refuse, through a copy of the model."""
        each = 2 if takes_pairs(model) else 1
        if batch > each:
            return
        # One call, so that the copied parts are those of the copied model.
        model, parts = copy.deepcopy((model, self))
        model.train()
        parts.set_mode()
        images = next(model.parameters()).new_zeros(each, 3, *size)
        fault = f"batch norm cannot normalise over {batch} images in a process's batch"
        fault += ", one for each branch" if each > 1 else ""
        cure = "take a larger batch_size, or fewer processes or accumulation_steps"
        refused = user_errors(fault, ValueError, cure=cure)
        with refused, torch.random.fork_rng(devices=[]), torch.no_grad():
            model(images)


def _modules(model: nn.Module, trained: Sequence[str]) -> list[nn.Module]:
    """Returns the modules at some paths, and the classifiers."""
    modules = dict(model.named_modules())
    chosen: list[nn.Module] = list(find_classifiers(model).values())
    for given in trained:
        name = last_block(model) if given == LAST_BLOCK and given not in modules else given
        if not name or name not in modules:
            raise unknown_name("module in trained:", name, _nearest(modules, name))
        chosen.append(modules[name])
    return chosen


def _nearest(modules: Mapping[str, nn.Module], name: str) -> list[str]:
    """Returns the children of the deepest module on a wrong path that exists."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    start = f"{name}." if name else ""
    return [f"{start}{child}" for child, _ in modules[name].named_children()] or [name]


def _beside(model: nn.Module, chosen: Sequence[nn.Module]) -> list[nn.Module]:
    """Returns the modules that are not in a chosen one and do not contain one."""
    inside = {id(part) for module in chosen for part in module.modules()}
    return [m for m in model.modules() if not any(id(part) in inside for part in m.modules())]


def start_classifier(loss: nn.Module, model: nn.Module, num_classes: int) -> None:
    """Gives a fresh classifier the bias that the loss starts with, if it has one."""
    value = getattr(loss, "initial_bias", lambda _: None)(num_classes)
    if value is not None:
        for classifier in find_classifiers(model).values():
            if classifier.bias is not None:
                nn.init.constant_(classifier.bias, value)


def check_model(model: nn.Module, images: Images) -> None:
    """Checks that a model takes images of this size, and that its head, if any, can be folded."""
    classifier, size = get_head(model), (3, *images.size)
    refusals = (UsageError, RuntimeError, AssertionError)
    with user_errors(f"the model cannot be trained on images of size {size}", *refusals):
        if isinstance(classifier, Head):
            classifier.fold()
        with torch.inference_mode():
            model.eval()(next(model.parameters()).new_zeros(1, *size))


def takes_pairs(model: nn.Module) -> bool:
    """Returns whether the rows of a batch are pairs for a model in training mode."""
    return any(isinstance(m, BilateralBlock) and m.paired for m in model.modules())


def check_loss(loss: nn.Module, model: nn.Module, sampler: ClassSampler, epochs: int) -> None:
    """Checks that a loss fits the model, the sampler and the number of epochs."""
    if (set_epoch := getattr(loss, "set_epoch", None)) is not None:
        set_epoch(0, epochs)
    check_classifier = getattr(loss, "check_classifier", None)
    # Only timm's models tell which module is the classifier.
    if check_classifier is not None and hasattr(model, "get_classifier"):
        for classifier in get_heads(model).values():
            check_classifier(classifier)
    bilateral = {
        "model": takes_pairs(model),
        "sampler": getattr(sampler, "unit", 1) > 1,
        "loss": getattr(loss, "takes_pairs", False),
    }
    if not any(bilateral.values()):
        return
    # Mixed logits are those of mixed features for a linear classifier only.
    bilateral["linear classifier"] = getattr(get_head(model), "kind", "linear") == "linear"
    missing = ", ".join(name for name, is_one in bilateral.items() if not is_one)
    if missing:
        raise UsageError(
            f"not bilateral: {missing}; BBN is trained with all of: a model lt_bbn_* (or from "
            "create_bilateral) with a linear classifier, sampler bilateral and loss bilateral"
        )


def create_part(owner: str, create: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Calls a factory of timm with the options of a user; ``owner`` names the part in messages."""
    for name, value in options.items():
        interval = RANGES.get(f"{owner}.{name}")
        if interval is not None and value is not None:
            check_number(f"{owner}.{name}", value, interval)
    refusals = (TypeError, ValueError, AssertionError, ImportError, LookupError, RuntimeError)
    with user_errors(owner, UsageError, *refusals):
        return create(*arguments, **options)


class Remix(Mixup):
    """Mixup whose labels go to the rarer class where the class counts differ much.

    An image ``λ x_i + (1 − λ) x_j`` of classes with n_i and n_j images has the label ``λ_y y_i + (1
    − λ_y) y_j``, where::

        λ_y = 0  if n_i / n_j >= κ and λ < τ
              1  if n_i / n_j <= 1 / κ and 1 − λ < τ
              λ  otherwise

    so an image in which the frequent class has a share below τ belongs to the rare one alone.

    Args:
        counts: Training images per class, (C,), each >= 1.
        remix_kappa: κ, >= 1; 3 in the paper.
        remix_tau: τ, in [0, 1]; 0.5 in the paper, and 0 is mixup.
        **options: Arguments of ``timm.data.Mixup``: mixup, cutmix or both, without label smoothing.

    References:
        Chou, Chang, Pan, Wei, Juan. Remix: Rebalanced mixup. ECCV 2020 Workshops,
        https://arxiv.org/abs/2007.03943
    """

    def __init__(
        self,
        counts: ClassCounts,
        *,
        remix_kappa: float = 3.0,
        remix_tau: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self.class_counts = check_class_counts(counts)
        self.kappa = check_number("mixup.remix_kappa", remix_kappa, "[1, inf)")
        self.tau = check_number("mixup.remix_tau", remix_tau, "[0, 1]")

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes images (B, 3, H, W), in place, and labels (B,) to targets (B, C)."""
        images, soft = super().__call__(images, targets)  # type: ignore[no-untyped-call]
        # timm mixes image i from the beginning with image i from the end.
        own, other = targets[:, None], targets.flip(0)[:, None]
        share = soft.gather(1, own)
        counts = self.class_counts.to(targets.device, share.dtype)
        ratio = counts[own] / counts[other]
        share = torch.where((ratio >= self.kappa) & (share < self.tau), 0.0, share)
        share = torch.where((ratio <= 1 / self.kappa) & (1 - share < self.tau), 1.0, share)
        mixed = torch.zeros_like(soft).scatter_(1, own, share)
        return images, mixed.scatter_add_(1, other, 1 - share)


def create_mixup(
    options: Mapping[str, Any] | None, class_counts: Tensor, batch: int
) -> Mixup | None:
    """Creates mixup, cutmix or remix for batches of ``batch`` images; None without an alpha."""
    given = {name: value for name, value in (options or {}).items() if value is not None}
    check_choice("mixup.mode", given.get("mode", "batch"), ("batch", "pair", "elem"))
    sizes = {"label_smoothing": 0.0, "num_classes": len(class_counts)}
    is_remix = not given.keys().isdisjoint(("remix_kappa", "remix_tau"))
    create: Callable[..., Mixup] = partial(Remix, class_counts) if is_remix else Mixup
    # Created also if it does not mix, to find wrong options.
    mixup = create_part("mixup", create, **sizes, **{"mixup_alpha": 0.0} | given)
    if not any(given.get(name) for name in ("mixup_alpha", "cutmix_alpha", "cutmix_minmax")):
        if is_remix:
            raise UsageError("mixup.remix_* has no effect without mixup_alpha or cutmix_alpha")
        return None
    if batch % 2:
        raise UsageError(f"mixup needs an even number of images in a process's batch, not {batch}")
    return mixup


def create_optimizer(model: nn.Module, options: Mapping[str, Any]) -> Optimizer:
    """Creates an optimiser from arguments of ``timm.optim.create_optimizer_v2``."""
    names = tuple(map(str, list_optimizers()))
    check_choice("optimizer", str(options["opt"]).removeprefix("lookahead_"), names)
    return create_part("optimizer", create_optimizer_v2, model, **options)


@contextmanager
def means_over_processes(loss: nn.Module) -> Iterator[None]:
    """Lets the parts of a loss that have ``across_processes`` take means over all processes."""
    parts = [module for module in loss.modules() if hasattr(module, "across_processes")]
    try:
        for part in parts:
            part.across_processes = True  # type: ignore[assignment]
        yield
    finally:
        for part in parts:
            part.across_processes = False  # type: ignore[assignment]


class Losses:
    """Losses of an epoch, kept on the device between two checks that they are finite."""

    def __init__(self, accelerator: Accelerator, owner: str, advice: str) -> None:
        self._accelerator, self._message = accelerator, f"of {owner}: {advice}"
        self._values: list[Tensor] = []
        self._seen: list[Tensor] = []

    def add(self, value: Tensor) -> None:
        """Adds the loss of the next batch; UsageError if a loss is not finite."""
        self._values.append(value)
        if len(self._values) == CHECK_EVERY:
            self._flush()

    def finish(self, model: nn.Module) -> float:
        """Returns the mean over all batches and processes; checks the weights too."""
        self._flush()
        tensors = [*model.parameters(), *model.buffers()]
        # Under FSDP each process has a part of each tensor.
        parts = [t.to_local() if hasattr(t, "to_local") else t.detach() for t in tensors]
        broken = torch.stack([~part.isfinite().all() for part in parts]).any().float()
        if self._accelerator.reduce(broken, "sum") > 0:
            raise UsageError(f"weights are no longer finite after the last update {self._message}")
        return float(torch.cat(self._seen).mean())

    def _flush(self) -> None:
        if not self._values:
            return
        values = self._accelerator.reduce(torch.stack(self._values), "mean").double().cpu()
        wrong = torch.nonzero(~values.isfinite()).flatten().tolist()
        if wrong:
            batch = sum(map(len, self._seen)) + wrong[0]
            update = batch // self._accelerator.gradient_accumulation_steps + 1
            value = float(values[wrong[0]])
            raise UsageError(f"the loss became {value} in update {update} {self._message}")
        self._seen.append(values)
        self._values = []


class Schedule:
    """timm's scheduler over epochs with cooldown, warm-up (update by update) and cycles."""

    def __init__(
        self, optimizer: Optimizer, options: Mapping[str, Any], epochs: int, updates_per_epoch: int
    ) -> None:
        given = dict(options)
        check_choice("scheduler", given.get("sched", "cosine"), SCHEDULERS)
        self._warmup = given.get("warmup_epochs", 0)
        check_number("scheduler.warmup_epochs", self._warmup, f"[0, {epochs}]")
        self.plateau = given.get("sched") == PLATEAU
        if self.plateau:
            given.pop("warmup_epochs", None)
            self._warmup_lr = given.pop("warmup_lr", 1e-5)
        given |= {"step_on_epochs": self.plateau, "updates_per_epoch": updates_per_epoch}
        self._updates, self._optimizer = updates_per_epoch, optimizer
        self._scheduler = _scheduler_of_length(optimizer, given, epochs)

    def before_update(self, step: int) -> None:
        """Sets the learning rate of an update, counted from the beginning of training."""
        if not self.plateau:
            self._scheduler.step_update(step)
            return
        last = self._warmup * self._updates
        for group, base in self._bases():
            if step < last:
                group["lr"] = self._warmup_lr + (base - self._warmup_lr) * step / last
            elif step == last:
                group["lr"] = base

    def after_epoch(self, record: EpochRecord) -> None:
        """Passes the accuracy of an epoch to plateau."""
        if self.plateau and record.val and record.epoch > self._warmup:
            self._scheduler.step(record.epoch, record.score)

    def replay(self, history: Sequence[EpochRecord]) -> None:
        """Brings plateau, whose state depends on the accuracies, to the end of a history."""
        if self.plateau:
            for group, base in self._bases():
                group["lr"] = base
            for record in history:
                self.after_epoch(record)

    def _bases(self) -> list[tuple[dict[str, Any], float]]:
        groups = self._optimizer.param_groups
        return [(group, group["initial_lr"] * group.get("lr_scale", 1.0)) for group in groups]


def _scheduler_of_length(optimizer: Optimizer, options: dict[str, Any], epochs: int) -> Any:  # noqa: ANN401
    """Creates the scheduler whose length, with everything that timm adds to it, is ``epochs``."""
    with warnings.catch_warnings():
        # timm warns that it does not save the state of plateau, which is replayed here.
        warnings.simplefilter("ignore", FutureWarning)
        for main in range(epochs, 0, -1):
            scheduler, total = create_part(
                "scheduler", create_scheduler_v2, optimizer, num_epochs=main, **options
            )
            if total == epochs:
                return scheduler
    raise UsageError(
        f"scheduler.options {options} make the schedule longer than {epochs} epochs: raise epochs, "
        "or shorten cooldown, warm-up or cycles"
    )


def cpu_copy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a copy of weights on the CPU."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
    }


def share_buffers(buffers: Iterable[Tensor], accelerator: Accelerator) -> None:
    """Gives every process the main one's buffers, such as the statistics of batch norm."""
    if accelerator.num_processes > 1:
        with torch.no_grad():
            for buffer in buffers:
                buffer.copy_(broadcast(buffer))


def seed_epoch(seed: int, epoch: int, process: int) -> None:
    """Seeds Python, NumPy and torch from the run's seed, the epoch and the process."""
    words = np.random.SeedSequence([seed, epoch, process]).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0] >> np.uint64(1)))
    np.random.seed(int(words[0] & np.uint64(0xFFFFFFFF)))  # noqa: NPY002
    random.seed(int(words[0]))
