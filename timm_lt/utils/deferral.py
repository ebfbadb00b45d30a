"""When a schedule that begins late in training begins."""

from timm_lt.utils.checks import UsageError, check_integer, check_number


def epoch_not_set(loss: object) -> UsageError:
    """Returns the error for a loss with a schedule that is used before its epoch was set."""
    return UsageError(
        f"{type(loss).__name__} changes from epoch to epoch and was not told the epoch: call "
        "loss.set_epoch(epoch, epochs) before each epoch, also before the first"
    )


def check_start(start: float) -> None:
    """Checks a start: a 0-based epoch, or a fraction of the epochs.

    Raises:
        UsageError: If it is neither an integer from 0 on nor a number in (0, 1).
    """
    if isinstance(start, float) and not start.is_integer():
        check_number("start, a fraction of the epochs,", start, "(0, 1)")
    elif isinstance(start, float):
        raise UsageError(f"start must be an epoch (an integer) or in (0, 1), got {start!r}")
    else:
        check_integer("start", start, minimum=0)


def first_epoch(start: float, epochs: int | None) -> int:
    """Returns the 0-based epoch of a start, of which a fraction is rounded down.

    >>> first_epoch(160, 200), first_epoch(0.8, 200), first_epoch(0.8, 4)
    (160, 160, 3)

    Args:
        start: A 0-based epoch, or a fraction of the epochs.
        epochs: Epochs of the training; None is unknown.

    Raises:
        UsageError: If it is not within training, or a fraction of unknown epochs.
    """
    check_start(start)
    if epochs is None:
        if isinstance(start, float):
            raise UsageError(f"start {start} is a fraction of the epochs: give epochs, too")
        return int(start)
    # 0.29 of 100 is 28.999..., and means 29.
    epoch = int(start * epochs + 1e-9) if isinstance(start, float) else int(start)
    if epoch >= epochs:
        raise UsageError(
            f"start {start} is not within training, whose {epochs} epochs are 0 to {epochs - 1}: "
            "take an earlier epoch, or a fraction of the epochs such as 0.8"
        )
    return epoch
