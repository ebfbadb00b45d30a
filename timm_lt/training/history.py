"""Record of a training run, epoch by epoch."""

from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import Accelerator

from timm_lt.utils.console import log

SHOT_GROUPS = ("many_shot", "medium_shot", "few_shot")


@dataclass(frozen=True)
class EpochRecord:
    """Figures of one epoch of training.

    Attributes:
        epoch: 1-based.
        loss: Mean training loss over the epoch's batches.
        lr: Learning rate at its end.
        images_per_second: Training images per second, over all processes.
        seconds: Wall time of the epoch with its validation.
        val: Accuracy on validation, ``all`` and per shot group, as fractions; empty if the epoch
            was not validated.
    """

    epoch: int
    loss: float
    lr: float
    images_per_second: float
    seconds: float
    val: dict[str, float | None]

    @property
    def score(self) -> float:
        """Overall accuracy on validation; -1 if the epoch was not validated."""
        return -1.0 if self.val.get("all") is None else float(self.val["all"] or 0)


def best_record(history: Sequence[EpochRecord]) -> EpochRecord | None:
    """Returns the epoch with the best overall accuracy on validation, the first of equals."""
    validated = [record for record in history if record.val]
    return max(validated, key=lambda record: record.score, default=None)


def representation_seconds(history: Sequence[EpochRecord]) -> float:
    """Returns the wall time of training, over all its sessions."""
    return sum(record.seconds for record in history)


def log_epoch(history: Sequence[EpochRecord], epochs: int, accelerator: Accelerator) -> None:
    """Logs the last epoch of a history, also to the trackers."""
    record = history[-1]
    line = f"epoch {record.epoch:3d}/{epochs}  loss {record.loss:.3f}  lr {record.lr:.3g}"
    if record.val:
        line += f"  val {format_accuracies(record)}" + ("*" if _is_best(history) else "")
    left = (epochs - record.epoch) * representation_seconds(history) / len(history)
    line += f"  {record.images_per_second:,.0f} images/s  {record.seconds:.1f} s"
    log.info("%s", line + (f"  {format_seconds(left)} left" if left else ""))
    values = {
        "loss": record.loss,
        "lr": record.lr,
        "images_per_second": record.images_per_second,
        "seconds": record.seconds,
    }
    values |= {f"val/{name}": value for name, value in record.val.items() if value is not None}
    accelerator.log(values, step=record.epoch)


def describe_history(history: Sequence[EpochRecord], kept: int) -> str:
    """Returns a summary of a run in one line.

    Args:
        history: Its epochs.
        kept: The epoch whose weights are kept, 1-based.
    """
    seconds = representation_seconds(history)
    # Every epoch has the same number of images.
    rate = len(history) / sum(1 / record.images_per_second for record in history)
    line = f"trained {len(history)} epochs in {format_seconds(seconds)}, {rate:,.0f} images/s"
    best = best_record(history)
    if best is not None:
        line += f"; best on validation: epoch {best.epoch} with {format_accuracies(best)}"
    return f"{line}; the weights of epoch {kept} are kept"


def format_accuracies(record: EpochRecord) -> str:
    """Returns an epoch's accuracies on validation in percent."""
    groups = [record.val[name] for name in SHOT_GROUPS]
    shown = " / ".join("-" if a is None else f"{100 * a:.1f}" for a in groups)
    return f"{100 * record.score:.1f} % ({shown})"


def format_seconds(seconds: float) -> str:
    """Returns a duration for people.

    >>> format_seconds(59.4), format_seconds(3725)
    ('59 s', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"


def _is_best(history: Sequence[EpochRecord]) -> bool:
    return best_record(history) is history[-1]
