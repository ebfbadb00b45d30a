"""The learning rate, update by update."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from timm.scheduler import create_scheduler_v2
from torch.optim import Optimizer

from timm_lt.training.history import EpochRecord
from timm_lt.utils.checks import UsageError

STEPPED_PER_UPDATE = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant")
PLATEAU = "plateau"
SCHEDULERS = (*STEPPED_PER_UPDATE, PLATEAU)


class Schedule:
    """timm's scheduler over a number of epochs; plateau has a warm-up by updates, as the others.

    Args:
        optimizer: Whose learning rate it sets.
        options: Arguments of ``timm.scheduler.create_scheduler_v2``.
        epochs: Length of the whole, with cooldown, warm-up and cycles.
        updates_per_epoch: At least 1.

    Raises:
        UsageError: If an option is unknown, or the schedule cannot have that length.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        options: Mapping[str, Any],
        *,
        epochs: int,
        updates_per_epoch: int,
    ) -> None:
        self.plateau = options.get("sched") == PLATEAU
        given = dict(options)
        if self.plateau:
            self._warmup = given.pop("warmup_epochs", 0)
            self._warmup_lr = given.pop("warmup_lr", 1e-5)
        given |= {"step_on_epochs": self.plateau, "updates_per_epoch": updates_per_epoch}
        self._updates = updates_per_epoch
        self._optimizer = optimizer
        try:
            self._scheduler = _create(optimizer, given, epochs)
        except UsageError:
            raise
        except (TypeError, ValueError, AssertionError, IndexError) as error:
            raise UsageError(f"scheduler: {error}") from error

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
        """Tells the scheduler called plateau how well an epoch did."""
        if self.plateau and record.val and record.epoch > self._warmup:
            self._scheduler.step(record.epoch, record.score)

    def replay(self, history: Sequence[EpochRecord]) -> None:
        """Brings a new schedule to where an interrupted one was, if it depends on more than t."""
        if not self.plateau:
            return
        for group, base in self._bases():
            group["lr"] = base
        for record in history:
            self.after_epoch(record)

    def _bases(self) -> list[tuple[dict[str, Any], float]]:
        groups = self._optimizer.param_groups
        return [(group, group["initial_lr"] * group.get("lr_scale", 1.0)) for group in groups]


def _create(optimizer: Optimizer, options: dict[str, Any], epochs: int) -> Any:  # noqa: ANN401
    """Creates the scheduler whose length, with all that timm adds to it, is ``epochs``."""
    with warnings.catch_warnings():
        # Of plateau, whose state timm does not save; here it is replayed.
        warnings.simplefilter("ignore", FutureWarning)
        for main in range(epochs, 0, -1):
            scheduler, total = create_scheduler_v2(optimizer, num_epochs=main, **options)
            if total == epochs:
                return scheduler
    raise UsageError(
        f"scheduler.options {options} make the schedule longer than {epochs} epochs: raise epochs, "
        "or shorten cooldown, warm-up or cycles"
    )
