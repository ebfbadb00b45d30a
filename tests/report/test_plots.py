"""The charts show the measured figures, as PNG and as SVG."""

import re
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from report_runs import COUNTS, balanced_reports, figures, long_tail, right_in_order, whole_report

from timm_lt.features import Features
from timm_lt.fitting import AccuracyCurve, tau_curve
from timm_lt.metrics import evaluate_logits, shot_accuracy
from timm_lt.report import Predictions, Report
from timm_lt.report.plots import (
    LIGHT,
    PALETTE,
    PLOT_FILES,
    draw_calibration,
    draw_confusions,
    draw_curves,
    draw_frequency,
    draw_gains,
    draw_training,
    figure_svg,
    head_styles,
    save_plots,
)
from timm_lt.training.state import EpochRecord

VAL = {"all": 0.3, "many_shot": 0.5, "few_shot": None}
HISTORY = [
    EpochRecord(1, 2.0, 0.1, 9.0, 1.0, VAL),
    EpochRecord(2, 1.5, 0.1, 9.0, 1.0, {}),
    EpochRecord(3, 1.0, 0.0, 9.0, 1.0, VAL | {"all": 0.4}),
]


def report_of(reports, counts=COUNTS, **more):
    """Returns a report of some figures, with predictions that are all right."""
    targets = torch.arange(len(counts)).repeat_interleave(8)
    more |= {"predictions": dict.fromkeys(reports, Predictions(targets)), "targets": targets}
    return Report(title="x", reports=reports, class_counts=torch.as_tensor(counts), **more)


def shown(axes):
    """Points of the lines of a chart by the text that a page shows over them."""
    return {
        str(line.get_gid()).removeprefix("tip:"): line.get_xydata().tolist()
        for line in axes.get_lines()
        if line.get_gid()
    }


def test_plots_are_pngs_of_a_sane_size_and_old_ones_go(tmp_path):
    features = Features(torch.randn(80, 5), torch.arange(80) % 4)
    curve = tau_curve(torch.nn.Linear(5, 4), features, class_counts=COUNTS)
    curves = {"tau_norm": (curve, curve.best_tau), "logit_adjusted": (curve, 3.0)}
    more = {"recommended": "crt", "history": HISTORY, "kept_epoch": 3, "curves": curves}
    paths = save_plots(tmp_path / "p", report_of(balanced_reports(), **more))
    assert [path.name for path in paths] == list(PLOT_FILES)
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert 400 <= image.width <= 1600
            assert 250 <= image.height <= 1000
            # Curves in several colours, not an empty page.
            assert len(image.convert("RGB").getcolors(2**24)) > 50
        assert path.stat().st_size < 300_000
    fewer = save_plots(tmp_path / "p", report_of({"ncm": balanced_reports()["crt"]}))
    assert sorted(path.name for path in fewer) == ["accuracy_by_frequency.png", "calibration.png"]
    assert sorted((tmp_path / "p").iterdir()) == sorted(fewer)


def test_the_frequency_plot_orders_the_classes_by_their_counts():
    counts = [20, 300, 60]
    found = shot_accuracy([0, 1, 1, 1, 0, 1], [0, 0, 1, 1, 2, 2], counts)
    axes = draw_frequency(report_of({"linear": found}, counts), 7).axes[0]
    # Class 1 has two of two right, class 2 none, class 0 one.
    assert shown(axes) == {"linear": [[1, 100], [2, 0], [3, 50]]}
    # Between the groups of 300 and of 60 and 20 there is a mark.
    assert list(axes.get_lines()[-1].get_xdata()) == [1.5, 1.5]


def curves_of(curve, tau, selection):
    report = balanced_reports()
    given = {"curves": {"tau_norm": (curve, tau)}, "selections": {"tau_norm": selection}}
    return draw_curves(report_of(report, **given), 7)


def test_the_curve_plot_holds_the_last_accuracy_to_its_end():
    curve = AccuracyCurve(torch.tensor([0.0, 0.5]), torch.tensor([0.25, torch.inf]))
    (axes,) = curves_of(curve, 0.4, {"tau": 0.4, "objective": "all"}).axes
    lines = shown(axes)
    assert lines["all"] == [[0, 50], [0.25, 0], [0.5, 50], [2, 50]]
    # At .4 the first image is wrong again and the second not yet right.
    assert lines["tau 0.4: 0.0 %"] == [[0.4, 0]]
    assert "0.0 % at the selected tau 0.4, 50.0 % at tau 0" in axes.get_title(loc="left")


@pytest.mark.parametrize(
    ("objective", "value", "at_zero", "words"),
    [
        ("all", 25, 75, "overall accuracy"),
        ("class_mean", 50, 50, "the mean accuracy of the classes"),
        ("few_shot", 100, 0, "few-shot accuracy"),
    ],
)
def test_the_curve_plot_shows_the_objective(objective, value, at_zero, words):
    # A many-shot class has three images, right up to tau .4; a few-shot one has one, from .5 on.
    low = torch.tensor([0.0, 0.0, 0.0, 0.5]).double()
    high = torch.tensor([0.4, 0.4, 0.4, torch.inf]).double()
    targets, masks = torch.tensor([0, 0, 0, 1]), torch.eye(2).bool()
    groups = {
        name: AccuracyCurve(low[k], high[k], targets=targets[k])
        for name, k in (("many_shot", slice(3)), ("few_shot", slice(3, 4)))
    }
    of_groups = {"many_shot": masks[0], "few_shot": masks[1]}
    curve = AccuracyCurve(low, high, groups, targets, of_groups)
    figure = curves_of(curve, 1.0, {"tau": 1.0, "objective": objective})
    (axes,) = figure.axes
    lines = shown(axes)
    assert lines["many"][0] == [0, 100]
    assert lines["many"][-1] == [2, 0]
    assert lines["all"][0] == [0, 75]
    extra = [words] if objective == "class_mean" else []
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["many", "few", "all", *extra]
    assert lines[f"tau 1: {value:.1f} %"] == [[1, value]]
    figures = f"{value:.1f} % at the selected tau 1, {at_zero:.1f} % at tau 0"
    assert axes.get_title(loc="left").split("\n")[1:] == [figures, f"({words})"]
    # A tau that was given maximises nothing.
    assert curves_of(curve, 1.0, {}).axes[0].get_xlabel() == "tau (dashed: given)"


def test_curves_with_far_and_with_many_steps_are_drawn_in_bounded_size():
    far = AccuracyCurve(torch.tensor([0.0, 0.5]), torch.tensor([1e300, torch.inf]).double())
    flat = AccuracyCurve(torch.tensor([torch.inf]), torch.tensor([-torch.inf]))
    low = torch.rand(100_000, generator=torch.Generator().manual_seed(0)).double() * 2
    many = AccuracyCurve(low, low + 1)
    for curve, limit in ((far, 3e4), (flat, 3e4), (many, 2e5)):
        assert len(figure_svg(curves_of(curve, 0.5, {}), "x")) < limit


def test_the_calibration_plot_has_the_bins_that_have_images():
    # Softmax of (log 3, 0) is (.75, .25), of (log 9, 0) it is (.9, .1).
    logits = torch.tensor([[3.0, 1.0]] * 5 + [[9.0, 1.0]]).log()
    found = evaluate_logits(logits, [0, 0, 1, 1, 1, 1], [50, 50])
    (axes,) = draw_calibration(report_of({"crt": found}), 7).axes
    diagonal, line, large, small = axes.get_lines()
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 100]
    assert line.get_xydata().tolist() == [pytest.approx([75, 40]), pytest.approx([90, 0])]
    assert large.get_markersize() > 1.4 * small.get_markersize()
    assert large.get_gid() == "tip:5 images of confidence 75 %: 40.0 % right"
    # ECE: 5/6 · |2/5 − .75| + 1/6 · .9 = .4417
    assert axes.get_title(loc="left") == "crt\nECE 44.2 %"


def test_each_head_has_a_look_of_its_own_in_all_charts():
    found = balanced_reports()["crt"]
    report = report_of(dict.fromkeys(["linear", *(f"head_{i}" for i in range(10))], found))
    styles = head_styles(report)
    assert len({(s["color"], str(s["linestyle"])) for s in styles.values()}) == 11
    assert len(set(LIGHT.values())) == len(PALETTE)
    for axes, name in zip(draw_calibration(report, 7).axes, report.reports, strict=True):
        assert axes.get_lines()[1].get_color() == styles[name]["color"]


def test_the_gains_of_classes_are_differences_in_the_order_of_their_counts():
    counts, targets = [5, 200, 50], torch.arange(3).repeat_interleave(10)
    reports = {
        name: shot_accuracy(right_in_order(right, targets), targets, counts)
        for name, right in (("linear", [1, 9, 5]), ("crt", [6, 7, 5]))
    }
    (axes,) = draw_gains(report_of(reports, counts, recommended="crt"), 7).axes
    gained, lost = (patch.get_data().values for patch in axes.patches)
    assert gained.tolist() == pytest.approx([0, 0, 50])
    assert lost.tolist() == pytest.approx([-20, 0, 0])
    assert "better: 1, worse: 1" in axes.get_xlabel()
    assert "crt" in axes.get_ylabel()
    assert draw_gains(report_of(reports, counts, recommended="linear"), 7) is None


def test_the_bars_of_a_shot_group_add_up_to_all_of_its_images():
    counts, targets, logits = long_tail(12, images=9)
    report = Report(**figures(counts, targets, logits), recommended="crt")
    linear, crt = draw_confusions(report, 7).axes
    assert [axes.get_title(loc="left") for axes in (linear, crt)] == ["linear", "crt"]
    for axes in (linear, crt):
        ends = [bar.get_x() + bar.get_width() for bar in axes.patches[-3:]]
        assert ends == pytest.approx([100] * 3)
    right = (logits["crt"].argmax(1) == targets).double().view(12, 9).mean(1)
    assert crt.patches[2].get_width() == pytest.approx(100 * float(right[counts < 20].mean()))


def test_training_is_drawn_where_it_was_validated():
    report = report_of(balanced_reports(), history=HISTORY, kept_epoch=3)
    loss, val, rate = draw_training(report, 9).axes
    lines = shown(val)
    assert lines["all"] == [[1, 30], [3, 40]]
    assert "few" not in lines
    assert shown(loss)["training loss"] == [[1, 2], [2, 1.5], [3, 1]]
    assert shown(rate)["learning rate"] == [[1, 0.1], [2, 0.1], [3, 0]]
    assert val.get_lines()[-1].get_xdata() == [3, 3]
    bare = [EpochRecord(1, 2.0, 0.1, 9.0, 1.0, {})]
    assert len(draw_training(report_of(balanced_reports(), history=bare), 9).axes) == 2


def test_a_chart_as_svg_is_reproducible_and_has_no_colours_of_its_own():
    hostile = "$x_{$ <b>\"&amp;' font-family: 猫"
    reports = {hostile: balanced_reports()["crt"], "_hidden": balanced_reports()["linear"]}
    for draw in (draw_frequency, draw_calibration):
        svg, same, other = (figure_svg(draw(report_of(reports), 7), salt) for salt in "aab")
        assert svg == same
        root = ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="xlink" ', 1))
        texts = " ".join(element.text for element in root.iter() if element.text)
        assert hostile in texts
        assert "_hidden" in texts
        assert not re.search(r"#[0-9a-f]{6}\b", svg)
        # The text takes the page's font and stays text.
        assert "DejaVu" not in svg
        assert not set(re.findall(r' id="(.*?)"', svg)) & set(re.findall(r' id="(.*?)"', other))
    assert "<title>crt</title>" in figure_svg(draw_frequency(whole_report(), 7), "x")
