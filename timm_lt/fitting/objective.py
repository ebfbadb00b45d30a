"""Interim: moves to timm_lt.metrics."""

from typing import Literal

from timm_lt.metrics import ShotReport
from timm_lt.registry import UsageError

Objective = Literal["all", "class_mean", "few_shot", "harmonic_mean", "worst_class"]


def objective_value(report: ShotReport, objective: Objective) -> float:
    """Returns the value."""
    if objective in ("all", "class_mean"):
        return float(getattr(report, objective))
    if objective == "few_shot":
        if report.few_shot is None:
            raise UsageError("no few_shot")
        return report.few_shot
    if objective == "worst_class":
        a = report.per_class
        return float(a[~a.isnan()].min())
    g = [x for x in (report.many_shot, report.medium_shot, report.few_shot) if x is not None]
    return len(g) / sum(1 / x for x in g) if all(g) else 0.0
