"""What a run shows: the table, the plots and the model card."""

import io
import re

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from rich.console import Console

import timm_lt
from timm_lt.features import Features
from timm_lt.fitting import AccuracyCurve, tau_curve
from timm_lt.metrics import evaluate_logits, shot_accuracy
from timm_lt.report import (
    describe_selection,
    percent,
    save_plots,
    shot_table,
    write_model_card,
)

# Two many-shot and two medium-shot classes; no few-shot class.
COUNTS = torch.tensor([300, 150, 60, 20])
SELECTIONS = {
    "tau_norm": {"tau": 0.8125, "objective": "all", "split": "val", "val_accuracy": 0.5},
    "crt": {"weight_decay": 3e-4, "objective": "all", "split": "val", "val_accuracy": 0.5},
    "linear": {},
}


def balanced_reports():
    """Three heads with figures that can be worked out by hand."""
    targets = torch.arange(4).repeat_interleave(8)
    reports = {}
    # How many of the eight images of each class are right.
    for name, right in {
        "linear": [8, 7, 3, 0],
        "crt": [7, 7, 5, 3],
        "tau_norm": [6, 6, 6, 5],
    }.items():
        preds = (targets + 1) % 4
        for c, k in enumerate(right):
            preds[8 * c : 8 * c + k] = c
        logits = torch.nn.functional.one_hot(preds, 4).float() * 3
        reports[name] = evaluate_logits(logits, targets, COUNTS)
    return reports


def printed(table, width=140):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def table_of(reports, **options):
    given = {"seconds": {"linear": 61.25, "crt": 1.5}, "selections": SELECTIONS, "title": "a title"}
    return printed(shot_table(reports, COUNTS, **{**given, **options}))


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


def test_the_mean_over_classes_is_shown_if_the_split_is_not_balanced():
    targets = torch.tensor([0, 0, 0, 1, 2, 3])
    preds = torch.tensor([0, 0, 0, 0, 2, 0])
    text = table_of({"linear": shot_accuracy(preds, targets, COUNTS)})
    assert "class mean" in text
    # all = 4/6, mean over classes = (1 + 0 + 1 + 0) / 4; without logits there is no ECE.
    assert cells(text)["linear"][:5] == ["50.0", "50.0", "-", "66.7", "50.0"]
    assert "class mean" not in table_of(balanced_reports())


def test_the_other_shot_rule_is_named():
    targets = torch.arange(4)
    report = shot_accuracy(targets, targets, COUNTS, "oltr")
    text = " ".join(table_of({"linear": report}).split())
    assert "many >= 100 (2 classes), medium 21 to 99 (1), few <= 20 (1)" in text


@pytest.mark.parametrize(
    ("fraction", "text"), [(0.0, "0.0"), (1.0, "100.0"), (0.12345, "12.3"), (None, "-")]
)
def test_percent(fraction, text):
    assert percent(fraction) == text


def test_a_selection_in_words():
    assert describe_selection({}) == ""
    assert describe_selection(SELECTIONS["crt"]) == "weight_decay 0.0003"


# Plots -------------------------------------------------------------------------------------------


def some_curves():
    g = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(5, 4)
    features = Features(torch.randn(80, 5, generator=g), torch.arange(80) % 4)
    norm = tau_curve(linear, features)
    prior = tau_curve(linear, features, adjust="prior", class_counts=COUNTS)
    return {"tau_norm": (norm, norm.best_tau), "logit_adjusted": (prior, 3.0)}


@pytest.mark.parametrize("with_curves", [True, False])
def test_plots_are_pngs_of_a_sane_size(tmp_path, with_curves):
    paths = save_plots(
        tmp_path / "plots", balanced_reports(), COUNTS, some_curves() if with_curves else {}
    )
    names = ["accuracy_by_frequency.png", "accuracy_by_tau.png"]
    assert [path.name for path in paths] == names[: 1 + with_curves]
    for path in paths:
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"
            assert 600 <= image.width <= 1600
            assert 300 <= image.height <= 1000
            # Curves in several colours, not an empty page.
            assert len(image.convert("RGB").getcolors(2**24)) > 50
        assert path.stat().st_size < 300_000


def test_plots_of_classes_without_test_images_and_of_one_class(tmp_path):
    counts = torch.tensor([300, 5])
    report = shot_accuracy(torch.tensor([0, 0]), torch.tensor([0, 0]), counts)
    assert len(save_plots(tmp_path, {"linear": report}, counts, {})) == 1
    one = shot_accuracy(torch.tensor([0]), torch.tensor([0]), torch.tensor([7]))
    assert len(save_plots(tmp_path, {"linear": one}, torch.tensor([7]), {})) == 1


def test_curves_with_far_and_without_steps_are_drawn(tmp_path):
    far = AccuracyCurve(torch.tensor([0.0, 0.5]), torch.tensor([1e300, torch.inf]).double())
    flat = AccuracyCurve(torch.tensor([torch.inf]), torch.tensor([-torch.inf]))
    curves = {"tau_norm": (far, 0.5), "logit_adjusted": (flat, 0.5)}
    assert len(save_plots(tmp_path, balanced_reports(), COUNTS, curves)) == 2


def test_the_frequency_plot_orders_the_classes_by_their_counts():
    from matplotlib.figure import Figure

    from timm_lt.report import _draw_frequency

    counts = torch.tensor([20, 300, 60])
    targets = torch.tensor([0, 0, 1, 1, 2, 2])
    report = shot_accuracy(torch.tensor([0, 1, 1, 1, 0, 1]), targets, counts)
    figure = Figure()
    _draw_frequency(figure, {"linear": report}, counts)
    (line,) = figure.axes[0].get_lines()
    assert list(line.get_xdata()) == [1, 2, 3]
    # Class 1 has two of two right, class 2 none, class 0 one.
    assert list(line.get_ydata()) == [100, 0, 50]


def test_the_curve_plot_holds_the_last_accuracy_to_its_end():
    from matplotlib.figure import Figure

    from timm_lt.report import _draw_curves

    curve = AccuracyCurve(torch.tensor([0.0, 0.5]), torch.tensor([0.25, torch.inf]))
    figure = Figure()
    _draw_curves(figure, {"tau_norm": (curve, 0.4)})
    line, marker = figure.axes[0].get_lines()
    assert list(line.get_xdata()) == [0.0, 0.25, 0.5, 2.0]
    assert list(line.get_ydata()) == [50, 0, 50, 50]
    assert list(marker.get_xdata()) == [0.4, 0.4]


# Model card --------------------------------------------------------------------------------------


def write_card(folder, reports, **options):
    given = {
        "name": "my run: $5 & more",
        "architecture": "test_resnet",
        "data": "glyph_lt",
        "class_counts": COUNTS,
        "selections": SELECTIONS,
        "recipe": "epochs: 3\ndata:\n  name: glyph_lt\n",
        "seed": 7,
    }
    write_model_card(folder / "README.md", reports=reports, **{**given, **options})
    return (folder / "README.md").read_text()


def test_the_front_matter_is_valid_for_the_hub(tmp_path):
    write_card(tmp_path, balanced_reports())
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "timm"
    assert card.data.pipeline_tag == "image-classification"
    assert {"timm", "timm_lt"} <= set(card.data.tags)
    assert "$" not in card.text.replace("$5", "")


def test_the_card_has_the_numbers(tmp_path):
    plots = [tmp_path / "plots" / "accuracy_by_frequency.png"]
    text = write_card(tmp_path, balanced_reports(), plots=plots)
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    assert len({len(row) for row in table}) == 1
    rows = {row[0]: row for row in table}
    assert list(rows) == ["head", "---", "`linear`", "`crt`", "`tau_norm`"]
    assert rows["head"][1:5] == [
        "many (> 100, 2 classes)",
        "medium (20 to 100, 2 classes)",
        "few (< 20, 0 classes)",
        "all",
    ]
    assert rows["`crt`"][1:5] == ["87.5", "50.0", "-", "68.8"]
    assert rows["`tau_norm`"][-1] == "tau 0.812"
    assert "seed 7" in text
    flowing = " ".join(text.split())
    assert "4 classes, 530 images; the most frequent class has 300, the rarest 20" in flowing
    assert "(imbalance factor 15)" in flowing
    assert "![accuracy_by_frequency](plots/accuracy_by_frequency.png)" in text
    assert "```yaml\nepochs: 3\ndata:\n  name: glyph_lt\n```" in text


def test_the_snippets_run_on_a_checkpoint_folder(tmp_path):
    """The first needs timm_lt and gives the head, the second is plain timm."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4).eval()
    heads = {
        name: timm_lt.fit_head(
            name,
            Features(torch.randn(12, model.num_features), torch.arange(12) % 4),
            classifier=model.get_classifier(),
        )
        for name in ("linear", "ncm")
    }
    timm_lt.save_checkpoint(tmp_path, model, heads=heads, class_counts=COUNTS)
    reports = {name: balanced_reports()["linear"] for name in heads}
    text = write_card(tmp_path, reports)
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(snippets) == 2
    images = torch.randn(2, 3, 32, 32)
    expected = {"linear": model(images)}
    expected["ncm"] = timm_lt.set_head(model, heads["ncm"])(images)
    for snippet, name in zip(snippets, ("ncm", "linear"), strict=True):
        scope = {}
        exec(snippet.replace("local-dir:.", f"local-dir:{tmp_path}"), scope)
        assert not scope["model"].training
        torch.testing.assert_close(scope["model"](images), expected[name])


def test_a_card_of_the_joint_classifier_alone_shows_it(tmp_path):
    text = write_card(tmp_path, {"linear": balanced_reports()["linear"]})
    assert 'head="linear"' in text
