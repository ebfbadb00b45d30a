"""The plots of a run: what is drawn is what was measured."""

import json

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from reports import COUNTS, balanced_reports

from timm_lt.features import Features
from timm_lt.fitting import AccuracyCurve, tau_curve
from timm_lt.metrics import ShotReport, evaluate_logits, shot_accuracy
from timm_lt.report.plots import (
    PLOT_FILES,
    draw_calibration,
    draw_confusions,
    draw_curves,
    draw_frequency,
    draw_gains,
    draw_training,
    head_styles,
    save_plots,
)
from timm_lt.report.tables import percent
from timm_lt.training.history import EpochRecord


def some_curves():
    g = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(5, 4)
    features = Features(torch.randn(80, 5, generator=g), torch.arange(80) % 4)
    norm = tau_curve(linear, features)
    prior = tau_curve(linear, features, adjust="prior", class_counts=COUNTS)
    return {"tau_norm": (norm, norm.best_tau), "logit_adjusted": (prior, 3.0)}


HISTORY = [
    EpochRecord(1, 2.0, 0.1, 9.0, 1.0, {"all": 0.3, "many_shot": 0.5, "few_shot": None}),
    EpochRecord(2, 1.5, 0.1, 9.0, 1.0, {}),
    EpochRecord(3, 1.0, 0.0, 9.0, 1.0, {"all": 0.4, "many_shot": 0.6, "few_shot": None}),
]
CONFUSIONS = {
    "linear": {"many_shot": {"right": 1.0}, "few_shot": {"many_shot": 0.75, "right": 0.25}},
    "crt": {"few_shot": {"many_shot": 0.5, "few_shot": 0.25, "right": 0.25}},
}


@pytest.mark.parametrize("whole", [True, False])
def test_plots_are_pngs_of_a_sane_size(tmp_path, whole):
    names = list(PLOT_FILES)
    more = {"compared": "crt", "confusions": CONFUSIONS, "history": HISTORY, "kept_epoch": 3}
    if whole:
        paths = save_plots(tmp_path / "p", balanced_reports(), COUNTS, some_curves(), **more)
    else:
        names = ["accuracy_by_frequency.png", "calibration.png"]
        paths = save_plots(tmp_path / "p", balanced_reports(), COUNTS, {})
    assert [path.name for path in paths] == names
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
    # Without logits there is no calibration.
    assert len(save_plots(tmp_path, {"linear": report}, counts, {})) == 1
    one = shot_accuracy(torch.tensor([0]), torch.tensor([0]), torch.tensor([7]))
    assert len(save_plots(tmp_path, {"linear": one}, torch.tensor([7]), {})) == 1


def test_curves_with_far_and_without_steps_are_drawn(tmp_path):
    far = AccuracyCurve(torch.tensor([0.0, 0.5]), torch.tensor([1e300, torch.inf]).double())
    flat = AccuracyCurve(torch.tensor([torch.inf]), torch.tensor([-torch.inf]))
    curves = {"tau_norm": (far, 0.5), "logit_adjusted": (flat, 0.5)}
    assert len(save_plots(tmp_path, balanced_reports(), COUNTS, curves)) == 3


def test_the_frequency_plot_orders_the_classes_by_their_counts():
    counts = torch.tensor([20, 300, 60])
    targets = torch.tensor([0, 0, 1, 1, 2, 2])
    report = shot_accuracy(torch.tensor([0, 1, 1, 1, 0, 1]), targets, counts)
    figure = Figure()
    draw_frequency(figure, {"linear": report}, counts)
    # Between the groups of 300 and of 60 and 20 there is a mark.
    line, mark = figure.axes[0].get_lines()
    assert list(mark.get_xdata()) == [1.5, 1.5]
    assert list(line.get_xdata()) == [1, 2, 3]
    # Class 1 has two of two right, class 2 none, class 0 one.
    assert list(line.get_ydata()) == [100, 0, 50]


def test_the_curve_plot_holds_the_last_accuracy_to_its_end():
    curve = AccuracyCurve(torch.tensor([0.0, 0.5]), torch.tensor([0.25, torch.inf]))
    figure = Figure()
    draw_curves(figure, {"tau_norm": (curve, 0.4)}, {"tau_norm": "all"})
    line, marker, point = figure.axes[0].get_lines()
    assert list(line.get_xdata()) == [0.0, 0.25, 0.5, 2.0]
    assert list(line.get_ydata()) == [50, 0, 50, 50]
    assert list(marker.get_xdata()) == [0.4, 0.4]
    # At .4 the first image is wrong again and the second not yet right.
    assert (list(point.get_xdata()), list(point.get_ydata())) == ([0.4], [0])
    assert "0.0 % at tau = 0.40\n(50.0 % at tau = 0)" in figure.axes[0].get_title()


def test_the_curve_plot_shows_what_was_maximised():
    # Class 0 has three images, right up to tau .5; class 1 one, right from .5 on.
    low, high = torch.tensor([0.0, 0.0, 0.0, 0.5]), torch.tensor([0.4, 0.4, 0.4, torch.inf])
    curve = AccuracyCurve(low, high, targets=torch.tensor([0, 0, 0, 1]))
    figure = Figure()
    draw_curves(
        figure,
        {"tau_norm": (curve, 0.2), "logit_adjusted": (curve, 1.0)},
        {"tau_norm": "all", "logit_adjusted": "class_mean"},
    )
    first, second = figure.axes
    assert len(first.get_lines()) == 3
    images, classes, _, point = second.get_lines()
    assert list(images.get_ydata()) == pytest.approx([75, 0, 25, 25])
    assert list(classes.get_ydata()) == pytest.approx([50, 0, 50, 50])
    assert list(point.get_ydata()) == [50]
    assert "50.0 % at tau = 1.00\n(50.0 % at tau = 0)" in second.get_title()
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["overall accuracy", "the mean accuracy of the classes"]
    colors = [line.get_color() for line in figure.legends[0].get_lines()]
    assert colors == [images.get_color(), classes.get_color()]
    assert first.get_lines()[0].get_color() == images.get_color() != classes.get_color()
    # A tau that was given maximises nothing.
    given = Figure()
    draw_curves(given, {"tau_norm": (curve, 0.2)}, {})
    assert given.axes[0].get_xlabel() == "tau (dashed: given)"


def calibration_axes(reports):
    figure = Figure()
    draw_calibration(figure, reports)
    return figure, figure.axes[0]


def test_the_calibration_plot_has_the_bins_that_have_images():
    # Softmax of (log 3, 0) is (.75, .25), of (log 9, 0) it is (.9, .1).
    logits = torch.tensor([[3.0, 1.0]] * 5 + [[9.0, 1.0]]).log()
    report = evaluate_logits(logits, [0, 0, 1, 1, 1, 1], [50, 50])
    figure, axes = calibration_axes({"crt": report})
    diagonal, line, _ = axes.get_lines()
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 100]
    assert line.get_xdata() == pytest.approx([75, 90])
    assert line.get_ydata() == pytest.approx([40, 0])
    (points,) = axes.collections
    large, small = points.get_sizes()
    assert large > 2 * small
    # A bin of one image in a thousand is a point, but nothing that the line goes through.
    many = evaluate_logits(
        logits.repeat_interleave(torch.tensor([200] * 5 + [1]), 0), [0] * 1001, [5, 5]
    )
    _, crowded = calibration_axes({"crt": many})
    assert crowded.get_lines()[1].get_xdata() == pytest.approx([75])
    assert len(crowded.collections[0].get_offsets()) == 2
    # ECE: 5/6 · |2/5 − .75| + 1/6 · .9 = .4417
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["perfectly calibrated", "crt (ECE 44.2 %)"]


def test_each_head_has_a_look_of_its_own_in_all_plots():

    names = ["linear", *(f"head_{i}" for i in range(10))]
    styles = head_styles(dict.fromkeys(names))
    assert len({(style["color"], style["linestyle"]) for style in styles.values()}) == len(names)
    report = balanced_reports()["crt"]
    _, axes = calibration_axes(dict.fromkeys(names, report))
    drawn = {line.get_label(): line.get_color() for line in axes.get_lines()}
    assert [drawn[f"{n} (ECE {percent(report.ece)} %)"] for n in names] == [
        styles[n]["color"] for n in names
    ]


def test_metrics_of_before_the_calibration_plot_still_draw_the_others(tmp_path):
    fields = {name: report.to_dict() for name, report in balanced_reports().items()}
    for report in fields.values():
        del report["reliability"]
    old = json.loads(json.dumps(fields))
    reports = {name: ShotReport.from_dict(report) for name, report in old.items()}
    assert [p.name for p in save_plots(tmp_path, reports, COUNTS, {})] == [
        "accuracy_by_frequency.png"
    ]


def report_of(accuracies, counts):
    """Figures with ten test images a class, of which so many tenths are right."""
    targets = torch.arange(len(counts)).repeat_interleave(10)
    right = torch.cat([torch.arange(10) < 10 * a for a in accuracies])
    preds = torch.where(right, targets, (targets + 1) % len(counts))
    return shot_accuracy(preds, targets, counts)


def test_the_gains_of_classes_are_differences_in_the_order_of_their_counts():
    counts = torch.tensor([5, 200, 50])
    reports = {
        "linear": report_of([0.1, 0.9, 0.5], counts),
        "crt": report_of([0.6, 0.7, 0.5], counts),
    }
    figure = Figure()
    draw_gains(figure, reports, counts, joint="linear", head="crt")
    (axes,) = figure.axes
    gained, lost = (patch.get_data().values for patch in axes.patches)
    assert gained.tolist() == pytest.approx([0, 0, 50])
    assert lost.tolist() == pytest.approx([-20, 0, 0])
    assert figure.get_suptitle() == "1 class gains, 1 loses"
    assert "crt" in axes.get_ylabel()


def test_the_bars_of_a_shot_group_add_up_to_all_of_its_images():
    figure = Figure()
    draw_confusions(figure, CONFUSIONS)
    linear, crt = figure.axes
    assert [axes.get_title() for axes in (linear, crt)] == ["linear", "crt"]
    assert [label.get_text() for label in linear.get_yticklabels()] == ["many-shot", "few-shot"]
    ends = [(bar.get_y() + 0.4, bar.get_x() + bar.get_width()) for bar in linear.patches]
    assert ends[-2:] == [(0.0, 100.0), (1.0, 100.0)]
    widths = {(axes.get_title(), bar.get_width()) for axes in (linear, crt) for bar in axes.patches}
    assert {("linear", 75.0), ("crt", 50.0), ("crt", 25.0)} <= widths


def test_training_is_drawn_where_it_was_validated():
    figure = Figure()
    draw_training(figure, HISTORY, 3)
    val, loss = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in val.get_lines()}
    assert lines["all"] == [[1, 30], [3, 40]]
    assert "few" not in lines
    assert loss.get_lines()[0].get_ydata().tolist() == [2.0, 1.5, 1.0]
    assert val.get_lines()[-1].get_xdata() == [3, 3]
