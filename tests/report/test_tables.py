"""Tables of heads, and values from untrusted files in words."""

import dataclasses
import io

import pytest
import torch
from report_runs import COUNTS, balanced_reports
from rich.console import Console

from timm_lt.checkpoint import read_checkpoint
from timm_lt.metrics import shot_accuracy
from timm_lt.models.pretrained import CHECKPOINTS
from timm_lt.report.tables import describe_selection, head_table, recommend, shot_table
from timm_lt.utils.console import one_line

SELECTIONS = {
    "tau_norm": {"tau": 0.8125, "objective": "all", "split": "val", "val_accuracy": 0.5},
    "crt": {"weight_decay": 3e-4, "objective": "all", "split": "val", "val_accuracy": 0.5},
    "linear": {},
}


def printed(table, width=140):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def table_of(reports, **options):
    given = {"seconds": {"linear": 61.25, "crt": 1.5}, "selections": SELECTIONS, "title": "a title"}
    return printed(shot_table(reports, COUNTS, **given | options))


def cells(text):
    """Rows of the printed table by head."""
    rows = [line.split() for line in text.splitlines() if line.strip()]
    return {row[0]: row[1:] for row in rows}


def test_the_table_has_every_head_with_its_numbers():
    reports = balanced_reports()
    text = table_of(reports)
    rows = cells(text)
    header = rows["head"]
    assert header[:4] == ["many", "medium", "few", "all"]
    # many = mean(8/8, 7/8), medium = mean(3/8, 0), all = 18/32.
    assert rows["linear"][:4] == ["93.8", "18.8", "-", "56.2"]
    assert rows["crt"][:4] == ["87.5", "50.0", "-", "68.8"]
    assert rows["tau_norm"][:4] == ["75.0", "68.8", "-", "71.9"]
    assert rows["linear"][header.index("ECE")] == f"{100 * reports['linear'].ece:.1f}"
    assert rows["linear"][header.index("seconds")] == "61.2"
    assert rows["crt"][-3:] == ["1.5", "weight_decay", "0.0003"]
    # No time is known of tau_norm: that is not zero seconds.
    assert rows["tau_norm"][-3:] == ["-", "tau", "0.812"]
    assert "a title" in text
    legend = "shots: many > 100 (2 classes), medium 20 to 100 (2), few < 20 (0)"
    assert legend in " ".join(text.split())
    # No column without a value: a row with more cells would have made columns without a name.
    table = shot_table(reports, COUNTS, seconds={}, selections={}, title="x")
    assert [column.header for column in table.columns] == ["head", *header[:4], "ECE"]


def test_the_mean_over_classes_is_shown_if_the_split_is_not_balanced():
    targets = torch.tensor([0, 0, 0, 1, 2, 3])
    preds = torch.tensor([0, 0, 0, 0, 2, 0])
    text = table_of({"linear": shot_accuracy(preds, targets, COUNTS)})
    assert "class mean" in text
    # all = 4/6, mean over classes = (1 + 0 + 1 + 0) / 4; without logits there is no ECE.
    assert cells(text)["linear"][:5] == ["50.0", "50.0", "-", "66.7", "50.0"]
    assert "class mean" not in table_of(balanced_reports())


@pytest.mark.parametrize(
    "value",
    ["text\x1b[31m\n[/red]", None, [1, [2]], {"a": 1}, 10**400, 1e308, float("inf"), "x" * 999],
)
def test_a_selection_that_holds_anything_is_a_short_line(value):
    text = describe_selection({"tau": value})
    assert text.startswith("tau ")
    assert text.isprintable()
    assert len(text) < 40
    shown = table_of(balanced_reports(), selections={"crt": {"[/red]tau": value}})
    assert "[/red]tau" in shown
    assert describe_selection({"split": "val", "val_accuracy": 0.5}) == ""


def test_text_from_untrusted_files_is_one_printable_line():
    assert one_line("a\r\nb\u2028c\ud800\x00\u202e d") == "a b c d"
    assert one_line("é 猫 🙂") == "é 猫 🙂"
    assert one_line("x" * 100) == "x" * 79 + "…"


def test_the_recommendation_has_the_figures_that_change():
    before = shot_accuracy([0, 0, 0, 0], [0, 0, 0, 1], [500, 5])
    after = shot_accuracy([0, 0, 1, 1], [0, 0, 0, 1], [500, 5])
    reports = {"linear": before, "crt": after}
    record = {"head": "crt", "objective": "class_mean", "behind": {"linear": [0.1, 0.2]}}
    assert recommend(reports, record | {"options": {"tau": 0.5}}) == (
        "Recommended: crt (tau 0.5), the best on validation by class_mean. On the test images, "
        "overall accuracy stays at 75.0 %, the mean over classes rises from 50.0 % to 83.3 % and "
        "few-shot accuracy rises from 0.0 % to 100.0 %."
    )
    assert recommend({"crt": before}, record).endswith("and few-shot accuracy is 0.0 %.")
    tied = {"head": "linear", "objective": "all", "behind": {"crt": [0, 0.1], "ncm": [-0.1, 0]}}
    assert recommend(reports, tied) == (
        "Recommended: linear; no other head is better on validation. crt and ncm are "
        "statistically tied."
    )


def test_the_table_of_a_checkpoint_accepts_any_metrics():
    info = read_checkpoint(CHECKPOINTS / "lt_test_resnet.glyph_lt")
    figures = {"all": 10**400, "many_shot": 0.5, "medium_shot": None, "few_shot": -1.0}
    crt = dataclasses.replace(info.heads["crt"], name="mine", metrics=figures)
    odd = dataclasses.replace(info, heads={"mine": crt}, architecture="a[red]\x1b[2Jb")
    rows = cells(printed(head_table(odd)))
    assert rows["mine"] == ["50.0", "-", "-", "-", "a", "crt", "head"]
    assert "\x1b" not in printed(head_table(odd))
    assert "a[red]" in printed(head_table(odd))
    assert "shots: many > 100 (35 classes)" in printed(head_table(odd))
    unknown = dataclasses.replace(info, class_counts=None, shot_rule=None)
    assert "shots" not in printed(head_table(unknown))
