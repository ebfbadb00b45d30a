"""Tables of heads for the terminal, and figures and the recommended head in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from timm_lt.checkpoint import CheckpointInfo
from timm_lt.metrics import ShotReport, confidence_intervals
from timm_lt.utils.console import one_line
from timm_lt.utils.longtail import describe_shots

JOINT = "linear"
GROUPS = ("many_shot", "medium_shot", "few_shot")
# Keys of a selection's record beside the selected option.
SELECTION_FIELDS = ("objective", "split", "val_accuracy", "compared")
# Objectives of a selection, in words.
OBJECTIVE_WORDS: Mapping[str, str] = {
    "all": "overall accuracy",
    "class_mean": "the mean accuracy of the classes",
    "few_shot": "few-shot accuracy",
    "harmonic_mean": "the harmonic mean of the shot groups",
    "worst_class": "the accuracy of the worst class",
}
# Note beside the figures of a run under the protocol "paper".
TEST_SELECTION = (
    "protocol paper: hyper-parameters and the epoch were selected on the test split, as in the "
    "paper; the figures are optimistic"
)


def percent(fraction: float | None) -> str:
    """Returns a fraction in percent with one decimal; None, a group without classes, as a dash."""
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def known_fraction(value: object) -> float | None:
    """Returns a value from an untrusted file if it is a fraction in [0, 1], else None.

    >>> known_fraction(0.5), known_fraction(70.1), known_fraction("0.5")
    (0.5, None, None)
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    # A mean of ones may come out a rounding error above 1.
    return float(value) if 0 <= value <= 1 + 1e-9 else None


def brief(value: object, digits: int = 3) -> str:
    """Returns a JSON value from an untrusted file as a short text.

    >>> brief(0.8125), brief(500), brief("cosine"), brief([1, 2])
    ('0.812', '500', 'cosine', 'a list')
    """
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return one_line(str(value), 30)


def selected_option(selection: Mapping[str, Any]) -> str | None:
    """Returns the name of the selected option in a selection's record, if any."""
    return next((key for key in selection if key not in SELECTION_FIELDS), None)


def describe_selection(selection: Mapping[str, Any]) -> str:
    """Returns the option that was selected for a head, with its value, such as ``tau 0.812``."""
    option = selected_option(selection)
    return "" if option is None else f"{one_line(option, 30)} {brief(selection[option])}"


def group_word(group: str) -> str:
    """Returns the word for a shot group in a table, such as ``many``."""
    return group.removesuffix("_shot")


def shot_table(
    reports: Mapping[str, ShotReport],
    class_counts: Tensor,
    *,
    seconds: Mapping[str, float],
    selections: Mapping[str, Mapping[str, Any]],
    title: str,
    note: str | None = None,
    intervals: bool = False,
) -> Table:
    """Builds the table of heads by shot group, in percent, with 95 % intervals if asked.

    Seconds and selections are by head; if empty, the table has no such column.
    """
    legend = shot_legend(describe_shots(class_counts, next(iter(reports.values())).rule))
    if intervals:
        legend += (
            "\nbelow each accuracy: its 95 % interval, over other test images of these classes"
        )
    balanced = all(abs(r.all - r.class_mean) < 1e-9 for r in reports.values())
    fields = [*GROUPS, "all", *([] if balanced else ["class_mean"])]
    headings = [group_word(field).replace("_", " ") for field in fields]
    table = new_table(title, legend if note is None else f"{legend}\n{note}", [*headings, "ECE"])
    if seconds:
        table.add_column("seconds", justify="right")
    if selections:
        table.add_column("selected")
    for name, report in reports.items():
        ends = confidence_intervals(report, class_counts) if intervals else {}
        below = {f: f"\n[dim]{100 * a:.0f}-{100 * b:.0f}[/dim]" for f, (a, b) in ends.items()}
        cells = [percent(getattr(report, field)) + below.get(field, "") for field in fields]
        cells.append(percent(report.ece))
        if seconds:
            cells.append(f"{seconds[name]:.1f}" if name in seconds else "-")
        if selections:
            cells.append(escape(describe_selection(selections.get(name, {}))))
        table.add_row(name, *cells)
    return table


def head_table(info: CheckpointInfo) -> Table:
    """Builds the table of a checkpoint's heads: test figures in percent, and options."""
    counts, rule = info.class_counts, info.shot_rule
    legend = [shot_legend(describe_shots(counts, rule))] if counts and rule else []
    legend += [TEST_SELECTION] if info.protocol == "paper" else []
    fields = (*GROUPS, "all")
    title = f"{one_line(info.architecture)}, {info.num_classes} classes"
    table = new_table(title, "\n".join(legend) or None, [group_word(field) for field in fields])
    table.add_column("options")
    for name, entry in info.heads.items():
        figures = [percent(known_fraction(entry.metrics.get(field))) for field in fields]
        kind = [] if entry.kind == name else [f"a {entry.kind} head"]
        options = [f"{key}={brief(value)}" for key, value in entry.options.items()]
        table.add_row(name, *figures, escape(", ".join(kind + options)))
    return table


def new_table(title: str, caption: str | None, figures: Sequence[str] = ()) -> Table:
    """Creates an empty table; that of heads has columns for their names and for each figure."""
    look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "show_edge": False, "padding": (0, 0, 0, 1)}
    look |= {"title_style": "bold", "title_justify": "left", "caption_justify": "left"}
    table = Table(title=escape(title), caption=caption, **look)
    if figures:
        table.add_column("head", no_wrap=True)
    for name in figures:
        style = "bold" if name == "all" else ""
        table.add_column(name, justify="right", style=style, no_wrap=True)
    return table


def shot_legend(shots: Mapping[str, Mapping[str, object]]) -> str:
    """Returns a line about the shot groups, such as ``shots: many > 100 (3 classes)``."""
    parts = [
        f"{group_word(name)} {shot['rule']} ({shot['classes']})" for name, shot in shots.items()
    ]
    return f"shots: {', '.join(parts).replace(')', ' classes)', 1)}"


def recommend(reports: Mapping[str, ShotReport], record: Mapping[str, Any]) -> str:
    """Describes the head that validation chose, by the selection of ``auto``, with test figures.

    Heads are tied with it if the interval of its lead on validation reaches 0.
    """
    best, report, joint = record["head"], reports[record["head"]], reports.get(JOINT)
    equals = [name for name, (low, _) in record["behind"].items() if low <= 0 and name != best]
    verb = "is" if len(equals) == 1 else "are"
    tied = f" {_listed(equals)} {verb} statistically tied." if equals else ""
    if best == JOINT:
        return f"Recommended: {JOINT}; no other head is better on validation.{tied}"
    words = {"all": "overall accuracy"}
    if abs(report.all - report.class_mean) > 1e-9:
        # The test split has a long tail, too, and few images of rare classes.
        words["class_mean"] = "the mean over classes"
    if report.few_shot is not None:
        words["few_shot"] = "few-shot accuracy"
    changes = [
        f"{word} {_change(getattr(joint, field, None), getattr(report, field))}"
        for field, word in words.items()
    ]
    options = describe_selection(record.get("options", {}))
    name = f"{best} ({options})" if options else best
    by = "" if record["objective"] == "all" else f" by {record['objective']}"
    start = f"Recommended: {name}, the best on validation{by}."
    return f"{start} On the test images, {_listed(changes)}.{tied}"


def _change(before: float | None, after: float | None) -> str:
    """Describes the change of a figure, as a verb with its values."""
    old, new = percent(before), percent(after)
    if before is None or after is None:
        return f"is {new} %"
    if old == new:
        return f"stays at {new} %"
    return f"{'rises' if after > before else 'falls'} from {old} % to {new} %"


def _listed(texts: list[str]) -> str:
    *first, last = texts
    return f"{', '.join(first)} and {last}" if first else last
