"""History of a training run, and its state on disk."""

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial as bind
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from timm_lt.data.decode import is_worker_death
from timm_lt.utils.accelerator import is_lost_process
from timm_lt.utils.checks import UsageError, user_errors
from timm_lt.utils.console import log
from timm_lt.utils.files import file_sha256, flush_folder, read_json, write_json

SHOT_GROUPS = ("many_shot", "medium_shot", "few_shot")
HISTORY = "history.json"
MANIFEST = "manifest.json"
EMA = "ema.safetensors"
BEST = "best.safetensors"
# Errors of accelerate when it reads what another version wrote.
DAMAGE = (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError, EOFError)
# Number of saved states, so that one is left if the last is damaged.
KEPT = 2

Weights = Mapping[str, Tensor]
T = TypeVar("T")


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

    def accuracies(self) -> str:
        """Returns the accuracies on validation in percent."""
        groups = [self.val[name] for name in SHOT_GROUPS]
        shown = " / ".join("-" if a is None else f"{100 * a:.1f}" for a in groups)
        return f"{100 * self.score:.1f} % ({shown})"


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
        line += f"  val {record.accuracies()}" + ("*" if best_record(history) is record else "")
    left = (epochs - record.epoch) * representation_seconds(history) / len(history)
    line += f"  {record.images_per_second:,.0f} images/s  {record.seconds:.1f} s"
    log.info("%s", line + (f"  {timedelta(seconds=round(left))} left" if left else ""))
    values = {key: value for key, value in asdict(record).items() if key not in ("epoch", "val")}
    values |= {f"val/{name}": value for name, value in record.val.items() if value is not None}
    accelerator.log(values, step=record.epoch)


def describe_history(history: Sequence[EpochRecord], kept: int) -> str:
    """Returns a summary of a run in one line; ``kept`` is the epoch whose weights are kept."""
    # Every epoch has the same number of images.
    rate = len(history) / sum(1 / record.images_per_second for record in history)
    took = timedelta(seconds=round(representation_seconds(history)))
    line = f"trained {len(history)} epochs in {took}, {rate:,.0f} images/s"
    best = best_record(history)
    if best is not None:
        line += f"; best on validation: epoch {best.epoch} with {best.accuracies()}"
    return f"{line}; the weights of epoch {kept} are kept"


class TrainingState:
    """Folder of a run's states, with one sub-folder per saved epoch.

    A sub-folder is written under another name, with the digests of its files, and renamed when it
    is on the disk: a kill at any moment leaves the one before it, and later damage is noticed.
    Optimiser and random states are pickles of accelerate, which are read with
    ``weights_only=True``; everything else is safetensors and JSON.

    Args:
        folder: The folder, which several machines must share.
        accelerator: Saves and loads model, optimiser and scaler.
    """

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder, self.accelerator = folder, accelerator

    def saved_epochs(self) -> list[int]:
        """Returns the epochs after which a state was saved, ascending."""
        names = [path.name for path in self.folder.glob("epoch_*")]
        return sorted(int(name[6:]) for name in names if re.fullmatch(r"epoch_\d+", name))

    def save(
        self,
        history: Sequence[EpochRecord],
        *,
        ema: Weights | None = None,
        best: Weights | None = None,
    ) -> None:
        """Saves the state after the last epoch of the history; the one before it is kept too.

        With ``best`` None the best weights of the state before are kept.
        """
        epoch = history[-1].epoch
        partial = self.folder / f".partial_{epoch:04d}"
        try:
            self._clean()
            if self.accelerator.is_main_process:
                partial.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(partial))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                write_json(partial / HISTORY, {"epochs": [asdict(record) for record in history]})
                self._add_weights(partial, ema, best)
                _seal(partial)
                partial.rename(self._path(epoch))
                flush_folder(self.folder)
                self._drop(self.saved_epochs()[:-KEPT])
        except (OSError, RuntimeError, SafetensorError) as error:
            if is_lost_process(error) or is_worker_death(error):
                raise
            shutil.rmtree(partial, ignore_errors=True)
            raise UsageError(
                f"the training state after epoch {epoch} cannot be written to {self.folder} "
                f"({error}); complete states: {self.saved_epochs()}; make room and go on with "
                "--resume"
            ) from error
        self.accelerator.wait_for_everyone()

    def load(self) -> list[EpochRecord]:
        """Loads the last undamaged state and returns its history; [] if there are no states."""
        self._clean()
        epochs = self._shared(self.saved_epochs)
        for epoch in reversed(epochs):
            folder = self._path(epoch)
            problem = self._shared(bind(find_damage, folder))
            if problem is None:
                with user_errors(f"the training state {folder} cannot be loaded", *DAMAGE):
                    self.accelerator.load_state(str(folder))
                    stored = read_json(folder / HISTORY)["epochs"]
                self._drop([later for later in epochs if later > epoch])
                return [EpochRecord(**record) for record in stored]
            log.warning("the training state %s is damaged (%s)", folder, problem)
        if epochs:
            raise UsageError(
                f"every training state in {self.folder} is damaged; start again with --overwrite"
            )
        return []

    def load_weights(self, name: str, epoch: int) -> dict[str, Tensor]:
        """Loads the averaged or the best weights that were saved after an epoch."""
        return load_file(self._path(epoch) / name)

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch_{epoch:04d}"

    def _clean(self) -> None:
        """Removes the remains of killed processes."""
        if self.accelerator.is_main_process:
            for leftover in self.folder.glob(".partial_*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def _add_weights(self, partial: Path, ema: Weights | None, best: Weights | None) -> None:
        """Adds averaged and best weights."""
        if ema is not None:
            save_file(dict(ema), partial / EMA)
        if best is not None:
            save_file(dict(best), partial / BEST)
        elif self.saved_epochs():
            before = self._path(self.saved_epochs()[-1]) / BEST
            if before.is_file():
                shutil.copyfile(before, partial / BEST)

    def _drop(self, epochs: Sequence[int]) -> None:
        """Removes saved states."""
        for epoch in epochs if self.accelerator.is_main_process else ():
            # Renamed first, so that an interrupted removal does not leave a damaged state.
            doomed = self.folder / f".partial_{epoch:04d}"
            self._path(epoch).rename(doomed)
            shutil.rmtree(doomed)

    def _shared(self, look: Callable[[], T]) -> T:
        """Returns the result of the main process on every process."""
        seen = [look() if self.accelerator.is_main_process else None]
        shared: T = broadcast_object_list(seen)[0]
        return shared


def _seal(folder: Path) -> None:
    """Adds the digests of the files in a folder, and flushes all files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
    write_json(folder / MANIFEST, digests)
    for path in files:
        # Windows flushes only files that are open for writing.
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    flush_folder(folder)


def find_damage(folder: Path) -> str | None:
    """Returns the first problem of a saved state, whose files must have their digests."""
    try:
        digests = read_json(folder / MANIFEST)
        for name, digest in digests.items():
            if file_sha256(folder / name) != digest:
                return f"{name} is not what was written"
    except (UsageError, OSError) as error:
        return str(error)
    return None
