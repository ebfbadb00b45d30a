"""The plots of a run, as PNG for its folder and model card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from timm_lt.fitting import AccuracyCurve
from timm_lt.metrics import Objective, ShotReport
from timm_lt.report.plot_common import write_figure
from timm_lt.report.plot_differences import draw_confusions, draw_gains, draw_training
from timm_lt.report.plot_heads import draw_calibration, draw_curves, draw_frequency
from timm_lt.training.history import EpochRecord

FREQUENCY_PLOT = "accuracy_by_frequency.png"
GAINS_PLOT = "gains.png"
CONFUSION_PLOT = "confusions.png"
TAU_PLOT = "accuracy_by_tau.png"
CALIBRATION_PLOT = "calibration.png"
TRAINING_PLOT = "training.png"
# In the order in which they are shown.
PLOT_FILES = (
    FREQUENCY_PLOT,
    GAINS_PLOT,
    CONFUSION_PLOT,
    TAU_PLOT,
    CALIBRATION_PLOT,
    TRAINING_PLOT,
)


def save_plots(
    folder: Path,
    reports: Mapping[str, ShotReport],
    class_counts: Tensor,
    curves: Mapping[str, tuple[AccuracyCurve, float]],
    *,
    objectives: Mapping[str, Objective | None] | None = None,
    joint: str = "linear",
    compared: str | None = None,
    confusions: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
    history: Sequence[EpochRecord] = (),
    kept_epoch: int | None = None,
) -> list[Path]:
    """Draws what a run measured, as PNG; what it did not is left out.

    Args:
        folder: Where to write; made if missing.
        reports: Test figures by head; those without logits have no calibration.
        class_counts: Training images per class, (C,).
        curves: Validation accuracy against tau with the head's tau, by head; may be empty.
        objectives: What that tau maximises, by head; of the others it was given, not selected.
        joint: Name of the joint classifier.
        compared: Name of the head that is compared with it, class by class; None compares none.
        confusions: By head, what the images of each shot group are taken for, as of
            :class:`timm_lt.report.content.Confusions`; of them, the joint classifier's and the
            compared head's are drawn.
        history: The epochs of training; empty if nothing was trained.
        kept_epoch: The epoch whose weights went on.

    Returns:
        The files.
    """
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []

    def save(name: str, height: float, draw: Any, *args: Any, **options: Any) -> None:  # noqa: ANN401
        figure = Figure(figsize=(7.5, height), layout="constrained")
        draw(figure, *args, **options)
        write_figure(folder / name, figure)
        paths.append(folder / name)

    pair = [name for name in (joint, compared) if name is not None and name in reports]
    save(FREQUENCY_PLOT, 4.2, draw_frequency, reports, class_counts)
    if compared is not None and len(set(pair)) == 2:
        save(GAINS_PLOT, 3.8, draw_gains, reports, class_counts, joint=joint, head=compared)
    known = confusions or {}
    shown = {name: known[name] for name in pair if name in known}
    if shown:
        save(CONFUSION_PLOT, 2.6, draw_confusions, shown)
    if curves:
        save(TAU_PLOT, 3.4, draw_curves, curves, objectives or {})
    if any(report.reliability for report in reports.values()):
        save(CALIBRATION_PLOT, 4.8, draw_calibration, reports)
    if history:
        save(TRAINING_PLOT, 3.4, draw_training, history, kept_epoch)
    for name in PLOT_FILES:
        if folder / name not in paths:
            # Of an earlier try, with other heads.
            (folder / name).unlink(missing_ok=True)
    return paths
