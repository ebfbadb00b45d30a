"""Training that stops after two epochs, and the states that it leaves."""

from accelerate.state import AcceleratorState

from timm_lt.training import TrainingState
from timm_lt.utils.accelerator import create_accelerator


class StopError(Exception):
    """Raised when two epochs are saved."""


class StopsAfterTwo(TrainingState):
    def save(self, history, **kwargs):
        super().save(history, **kwargs)
        if len(history) == 2:
            raise StopError


def new_state(folder, cls=TrainingState):
    """A state with an accelerator of its own, as a new process would have it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return cls(folder, create_accelerator(mixed_precision="no"))
