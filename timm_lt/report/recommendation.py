"""Which head to take, in a sentence: the best on validation, and what it does to rare classes."""

from collections.abc import Mapping
from typing import Any

from timm_lt.metrics import ShotReport
from timm_lt.report.tables import describe_selection, percent

JOINT = "linear"


def recommend(reports: Mapping[str, ShotReport], record: Mapping[str, Any]) -> str:
    """Returns a sentence or two on which head to take.

    The head is that which validation chose. The figures are those of the test split, which had no
    say in it. Heads whose interval of how far they lie behind it on validation reaches 0 are named
    as equals.

    Args:
        reports: Test figures by head.
        record: The selection of head ``auto``, see :func:`timm_lt.fit_head`.

    >>> from timm_lt.metrics import shot_accuracy
    >>> right = shot_accuracy([0, 0, 1, 1], [0, 0, 1, 1], [500, 5])
    >>> wrong = shot_accuracy([0, 0, 0, 1], [0, 0, 1, 1], [500, 5])
    >>> behind = {"linear": [0.01, 0.2], "crt": [0.0, 0.0]}
    >>> record = {"head": "crt", "objective": "all", "behind": behind}
    >>> print(recommend({"linear": wrong, "crt": right}, record))
    Take crt, the best on validation: of the test images 100.0 % are right, of few-shot classes \
    100.0 %, where linear has 75.0 % and 50.0 %.

    Where the test split has a tail too, so that not all that counts is the share of its images:

    >>> before = shot_accuracy([0, 0, 0, 0], [0, 0, 0, 1], [500, 5])
    >>> after = shot_accuracy([0, 0, 1, 1], [0, 0, 0, 1], [500, 5])
    >>> print(recommend({"linear": before, "crt": after}, record | {"objective": "class_mean"}))
    Take crt, the best on validation by class_mean: of the test images 75.0 % are right, as a mean \
over the classes 83.3 %, of few-shot classes 100.0 %, where linear has 75.0 %, 50.0 % and 0.0 %.
    """
    best = record["head"]
    equals = [name for name, (low, _) in record["behind"].items() if low <= 0 and name != best]
    tied = ""
    if equals:
        verb = "is" if len(equals) == 1 else "are"
        tied = f" {_listed(equals)} {verb} as good there, as far as its images can tell."
    if best == JOINT:
        return (
            f"Keep {JOINT}, the classifier as it is: on validation no other head is better.{tied}"
        )
    options = describe_selection(record.get("options", {}))
    shown = f"{best} ({options})" if options else best
    report, joint = reports[best], reports.get(JOINT)
    told = _told(report)
    figures = ", ".join(
        text.format(percent(getattr(report, field))) for field, text in told.items()
    )
    if joint is not None:
        before = [f"{percent(getattr(joint, field))} %" for field in told]
        figures += f", where {JOINT} has {_listed(before)}"
    by = "" if record["objective"] == "all" else f" by {record['objective']}"
    return f"Take {shown}, the best on validation{by}: {figures}.{tied}"


def _told(report: ShotReport) -> dict[str, str]:
    """Returns the fields that are worth a word, each in words."""
    texts = {"all": "of the test images {} % are right"}
    if abs(report.all - report.class_mean) > 1e-9:
        # The test split is no balanced one: few of its images are of rare classes.
        texts["class_mean"] = "as a mean over the classes {} %"
    if report.few_shot is not None:
        texts["few_shot"] = "of few-shot classes {} %"
    return texts


def _listed(names: list[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
