"""The report in one file: what it says is what was measured, whatever the names; its size."""

import base64
import dataclasses
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from report_runs import LONG, figures, long_tail, squares, whole_content

from timm_lt.fitting import AccuracyCurve
from timm_lt.metrics import paired_difference, shot_accuracy
from timm_lt.report.html import (
    MAX_BYTES,
    MAX_CLASSES,
    MAX_COMPARED,
    SIDE,
    Change,
    ClassNote,
    ClassTable,
    Comparison,
    ExampleImages,
    Picture,
    Predictions,
    Thumbnails,
    data_uri,
    drawn_steps,
    gather_report,
    render_report,
    tau_chart,
    write_report,
)
from timm_lt.utils.checks import UsageError

# Elements without an end.
VOID = {"meta", "img", "input", "br", "wbr"}


class Page(HTMLParser):
    """The elements and texts of a page; fails where elements do not nest."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self.open = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID and tag != "path":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def content():
    return whole_content()


@pytest.fixture(scope="module")
def page(content):
    return render_report(content)


def table_data(page):
    return json.loads(re.search(r'id="class-data">(.*?)</script>', page)[1])


# What it says -------------------------------------------------------------------------------------


def test_the_confusion_of_shot_groups_and_classes_is_counted():
    counts, targets, logits = long_tail(12, images=9)
    content = gather_report(**figures(counts, targets, logits))
    group = ["many_shot" if n > 100 else "few_shot" if n < 20 else "medium_shot" for n in counts]
    preds = logits["crt"].argmax(1).tolist()
    cells, pairs, total = Counter(), Counter(), Counter()
    for target, pred in zip(targets.tolist(), preds, strict=True):
        total[group[target]] += 1
        cells[group[target], "right" if target == pred else group[pred]] += 1
        pairs[target, pred] += target != pred
    found = content.confusions["crt"]
    for name, shares in found.groups.items():
        assert sum(shares.values()) == pytest.approx(1)
        for other, share in shares.items():
            assert share == pytest.approx(cells[name, other] / total[name])
    assert [m.images for m in found.mistakes] == sorted(pairs.values(), reverse=True)[:6]
    for mistake in found.mistakes:
        pair = tuple(int(note.name.split()[1]) for note in (mistake.of, mistake.taken_for))
        assert mistake.images == pairs[pair]
        assert mistake.share == pytest.approx(mistake.images / 9)
        assert mistake.of.group == group[pair[0]]
        assert mistake.of.training_images == counts[pair[0]]


def test_the_mean_over_classes_is_told_where_the_test_split_has_a_tail_too():
    targets = torch.tensor([0, 0, 0, 1])
    preds = {"linear": [0, 0, 0, 0], "crt": [0, 0, 1, 1]}
    page = Page(
        render_report(
            gather_report(
                title="birds",
                reports={n: shot_accuracy(p, targets, [500, 5]) for n, p in preds.items()},
                class_counts=torch.tensor([500, 5]),
                targets=targets,
                predictions={
                    n: Predictions(torch.tensor(p).int(), torch.full((4,), 0.5))
                    for n, p in preds.items()
                },
                recommended="crt",
            )
        )
    )
    texts = [text.strip() for text in page.texts]
    place = texts.index("mean over classes")
    tile = [text for text in texts[place + 1 : place + 12] if text]
    assert tile[:4] == ["83.3", "%", "▲ +33.3", "from 50.0"]
    assert "mean over classes" not in render_report(whole_content())


def test_the_classes_that_gained_and_lost_most_are_those():
    counts, targets, logits = long_tail(12, images=9)
    content = gather_report(**figures(counts, targets, logits))
    right = {
        name: Counter(
            t for t, z in zip(targets.tolist(), logits[name], strict=True) if z.argmax() == t
        )
        for name in ("linear", "crt")
    }
    change = {f"class {c}": (right["crt"][c] - right["linear"][c]) / 9 for c in range(12)}
    found = content.comparisons["crt"]
    assert found.better == sum(moved > 0 for moved in change.values()) > 3
    assert found.worse == sum(moved < 0 for moved in change.values()) > 0
    order = sorted(change.values(), reverse=True)
    for changes, expected in (
        (found.gained, [moved for moved in order if moved > 0]),
        (found.lost, [moved for moved in order[::-1] if moved < 0]),
    ):
        assert [c.after - c.before for c in changes] == pytest.approx(expected[:5])
        for one in changes:
            assert one.after - one.before == pytest.approx(change[one.of.name])


def rare_classes(right):
    """Returns what a report says of two classes of nine test images and rare ones of 4, 4 and 1.

    ``right`` has the test images of each class that the joint classifier and a head have right.
    """
    counts, images = torch.tensor([300, 50, 18, 18, 5]), torch.tensor([9, 9, 4, 4, 1])
    targets = torch.arange(5).repeat_interleave(images)
    place = torch.cat([torch.arange(n) for n in images.tolist()])
    preds = {
        name: torch.where(place < torch.tensor(numbers)[targets], targets, (targets + 1) % 5)
        for name, numbers in zip(("linear", "crt"), right, strict=True)
    }
    return gather_report(
        title="rare",
        reports={name: shot_accuracy(p, targets, counts) for name, p in preds.items()},
        class_counts=counts,
        targets=targets,
        predictions={name: Predictions(p) for name, p in preds.items()},
        label_names=["gull", "kite", "owl", "crow", "ibis"],
    )


def test_rare_classes_are_among_those_that_gained():
    content = rare_classes(([9, 5, 0, 1, 0], [8, 6, 4, 3, 1]))
    found = content.comparisons["crt"]
    # One image says nothing of a class; four are what the few-shot classes have at most.
    assert content.min_images == {"many_shot": 5, "medium_shot": 5, "few_shot": 4}
    assert [(c.of.name, c.before, c.after) for c in found.gained] == [
        ("owl", 0.0, 1.0),
        ("crow", 0.25, 0.75),
        ("kite", 5 / 9, 6 / 9),
    ]
    assert [(c.of.name, c.before, c.after) for c in found.lost] == [("gull", 1.0, 8 / 9)]
    # All changes are counted.
    assert (found.better, found.worse) == (4, 1)
    text = " ".join("".join(Page(render_report(content)).texts).split())
    assert "of those with at least 5 (many), 5 (medium) or 4 (few) test images." in text
    assert "25.0 → 75.0 % (1 → 3 of 4 images)" in text


def test_a_list_without_classes_does_not_deny_that_some_moved():
    text = render_report(rare_classes(([9, 5, 0, 1, 1], [9, 5, 0, 1, 0])))
    assert "0 classes are better than under the joint classifier, 1 worse." in text
    assert "No class gained." in text
    assert "No class with so many test images lost." in text


def test_the_heads_have_their_intervals_and_gains(content, page):
    crt = next(head for head in content.heads if head.name == "crt")
    counts, targets, logits = long_tail()
    preds = [logits[name].argmax(1) for name in ("crt", "linear")]
    assert crt.gain == pytest.approx(tuple(paired_difference(*preds, targets, counts)))
    few = crt.figures["few_shot"]
    assert few.low < few.value < few.high
    assert f"{100 * few.low:.1f} to {100 * few.high:.1f}" in page


def test_the_table_of_classes_has_every_figure(content, page):
    counts, targets, logits = long_tail()
    data = table_data(page)
    assert data["columns"][4:] == ["linear", "crt", "tau_norm"]
    assert [row[1] for row in data["rows"]] == counts.tolist()
    for c, row in enumerate(data["rows"]):
        rows = targets == c
        found = [
            float((logits[n][rows].argmax(1) == c).double().mean()) for n in data["columns"][4:]
        ]
        assert row[4:7] == pytest.approx(found, abs=1e-4)
        assert row[7] == pytest.approx(found[2] - found[0], abs=1e-4)


@pytest.mark.parametrize("steps", [0, 3, 5000])
def test_a_drawn_curve_has_the_extremes_of_every_column(steps):
    generator = np.random.default_rng(steps)
    edges = np.concatenate([[0.0], np.sort(generator.uniform(0, 3, steps))])
    values = generator.uniform(0, 1, steps + 1)
    points = drawn_steps(torch.from_numpy(edges), torch.from_numpy(values), 2.0)
    assert len(points) <= 4 * 400 + 1
    assert points == sorted(points, key=lambda point: point[0])
    assert points[0] == (0.0, values[0])
    assert points[-1] == (2.0, values[edges < 2][-1])
    for column in range(400):
        inside = (edges >= column / 200) & (edges < (column + 1) / 200)
        drawn = [v for tau, v in points[:-1] if column / 200 <= tau < (column + 1) / 200]
        if inside.any():
            assert (min(drawn), max(drawn)) == (values[inside].min(), values[inside].max())
            assert (drawn[0], drawn[-1]) == (values[inside][0], values[inside][-1])


def tau_content(selection):
    """Returns a report with a curve of three images of a frequent class and one of a rare class."""
    low = torch.tensor([0.0, 0.0, 0.0, 0.5]).double()
    high = torch.tensor([0.4, 0.4, 0.4, torch.inf]).double()
    groups = {"many_shot": slice(3), "few_shot": slice(3, 4)}
    targets = torch.tensor([0, 0, 0, 1])
    curve = AccuracyCurve(
        low,
        high,
        {name: AccuracyCurve(low[k], high[k], targets=targets[k]) for name, k in groups.items()},
        targets,
        {"many_shot": torch.tensor([True, False]), "few_shot": torch.tensor([False, True])},
    )
    given = figures(*long_tail(2, heads=("linear", "tau_norm")))
    return gather_report(
        **given, curves={"tau_norm": (curve, 1.0)}, selections={"tau_norm": selection}
    )


@pytest.mark.parametrize(
    ("objective", "value", "at_zero", "words"),
    [
        ("all", 0.25, 0.75, "overall accuracy"),
        ("class_mean", 0.5, 0.5, "the mean accuracy of the classes"),
        ("few_shot", 1.0, 0.0, "few-shot accuracy"),
        ("worst_class", 0.0, 0.0, "the accuracy of the worst class"),
    ],
)
def test_the_tau_chart_shows_what_was_maximised(objective, value, at_zero, words):
    content = tau_content({"tau": 1.0, "objective": objective})
    (curve,) = content.curves
    assert (curve.value, curve.at_zero) == (value, at_zero)
    assert curve.steps["all"][0] == (0.0, 0.75)
    assert curve.steps[objective][0] == (0.0, at_zero)
    assert curve.steps[objective][-1][1] == value
    text = "".join(Page(render_report(content)).texts)
    assert (
        f"Objective ({words}): {100 * value:.1f} % at the selected tau 1, {100 * at_zero:.1f} % at"
    ) in text
    extra = objective in {"class_mean", "worst_class"}
    chart = tau_chart(curve)
    assert [line.name for line in chart.lines] == [
        *("many", "few", "all"),
        *([f"{objective.replace('_', ' ')} (objective)"] if extra else []),
    ]
    (dot,) = chart.dots
    assert dot.y == chart.y.place(100 * value)
    assert dot.look in [line.look for line in chart.lines]


def test_a_tau_that_was_given_is_not_said_to_be_selected():
    text = "".join(Page(render_report(tau_content({}))).texts)
    assert "Overall accuracy: 25.0 % at the given tau 1, 75.0 % at tau 0." in text
    assert "selected tau" not in text


# Pictures -----------------------------------------------------------------------------------------


def test_pictures_are_small_and_of_the_right_image(content):
    change = content.comparisons["crt"].gained[0]
    assert change.pictures
    for picture in change.pictures:
        assert picture.uri.startswith("data:image/jpeg;base64,")
        assert change.of.name in picture.text
        assert "% sure" in picture.text
    colours = np.random.default_rng(0).integers(0, 256, (30, 3), np.uint8)
    mistake = next(m for m in content.confusions["linear"].mistakes if "bird_" in m.of.name)
    label = int(mistake.of.name.split("_")[1]) + 6
    encoded = base64.b64decode(mistake.pictures[0].uri.partition(",")[2])
    with Image.open(io.BytesIO(encoded)) as image:
        # JPEG moves colours a little.
        assert np.abs(np.asarray(image, int)[20, 20] - colours[label]).max() < 12


def test_pictures_of_noise_and_of_odd_shapes_are_bounded():
    noise = np.random.default_rng(0).integers(0, 256, (500, 900, 3), np.uint8)
    for image in (noise, noise[:3], noise[:, :1]):
        uri = data_uri(Image.fromarray(image))
        encoded = base64.b64decode(uri.partition(",")[2])
        assert len(encoded) <= MAX_BYTES
        assert max(Image.open(io.BytesIO(encoded)).size) <= SIDE


def test_an_image_that_is_damaged_or_not_known_has_no_picture():
    labels = torch.arange(3)
    good = squares(labels, labels)
    broken = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"nothing", "path": None}] * 3, "label": [0, 1, 2]},
        features=good.features,
    )
    found = Thumbnails(ExampleImages(good, labels, broken, labels))
    assert found.test(1) is None
    assert found.of_class(1) is not None
    assert found.of_class(5) is None
    assert Thumbnails(ExampleImages(good, labels, good)).test(1) is None
    assert Thumbnails(None).of_class(0) is None


# The page -----------------------------------------------------------------------------------------


def test_nothing_in_a_name_is_markup(page):
    parsed = Page(page)
    kinds = [attributes.get("type") for attributes in parsed.all("script")]
    assert kinds == ["application/json", None]
    assert parsed.all("b") == []
    assert "<script>alert(1)</script>" in "".join(parsed.texts)
    assert "alert(2)</script>" in "".join(parsed.texts)
    names = [row[0] for row in table_data(page)["rows"]]
    assert names[0] == "<script>alert(1)</script>"
    assert names[2] == "שלום עולם"
    # A long name is cut, wherever it stands.
    assert len(names[1]) == 40
    assert LONG[:60] not in page


def test_the_page_needs_nothing_beside_it(page):
    parsed = Page(page)
    (policy,) = (m["content"] for m in parsed.all("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'; img-src data:")
    assert parsed.all("link") == parsed.all("iframe") == []
    assert all(
        image["src"].startswith("data:image/") and image["alt"] for image in parsed.all("img")
    )
    assert all(link["href"].startswith("#") for link in parsed.all("a"))
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link in parsed.all("a")} <= set(ids)


def test_what_is_not_known_is_left_out(tmp_path):
    counts, targets, logits = long_tail(3, heads=("ncm",))
    bare = gather_report(**figures(counts, targets, logits))
    parsed = Page(render_report(bare))
    ids = {attributes["id"] for _, attributes in parsed.elements if "id" in attributes}
    assert {"heads", "frequency", "confusion", "calibration", "classes"} <= ids
    assert not {"tau", "changes", "training", "recipe"} & ids
    write_report(tmp_path / "report.html", bare)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_report(bare)


def test_one_class_a_class_without_test_images_and_a_head_without_logits():
    targets = torch.tensor([0, 0, 1])
    preds = torch.tensor([0, 1, 1])
    for counts in (torch.tensor([500, 50, 5]), torch.tensor([9, 8, 7])):
        report = shot_accuracy(preds, targets, counts)
        page = render_report(
            gather_report(
                title="",
                reports={"linear": report, "crt": report},
                class_counts=counts,
                targets=targets,
                predictions={"linear": Predictions(preds), "crt": Predictions(preds)},
            )
        )
        assert table_data(page)["rows"][2][4:] == [None, None, None]
        assert "nan" not in re.sub(r"<script>.*", "", page, flags=re.DOTALL).lower()
        assert 'id="calibration"' not in page
    one = shot_accuracy([0], [0], [7])
    alone = Predictions(torch.tensor([0]))
    Page(
        render_report(
            gather_report(
                title="one",
                reports={"linear": one},
                class_counts=torch.tensor([7]),
                targets=torch.tensor([0]),
                predictions={"linear": alone},
            )
        )
    )


def test_ten_thousand_classes_with_all_that_there_can_be_stay_below_five_megabytes(content):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (88, 88, 3), np.uint8))
    uri = f"data:image/jpeg;base64,{'A' * 4 * (MAX_BYTES // 3)}"
    assert len(data_uri(noise)) <= len(uri)
    names = [f"head_{k}" for k in range(MAX_COMPARED)]
    note = ClassNote("\N{DOG FACE}" * 40, "few_shot", 5)
    pictures = [Picture(uri, f"{note.name}, which this head takes for {note.name}", note.name)] * 4
    change = [Change(note, 0, 50, 50, pictures)] * 5
    mistakes = [
        dataclasses.replace(m, of=note, taken_for=note, pictures=pictures[:2])
        for m in content.confusions["crt"].mistakes
    ]
    confusions = dataclasses.replace(content.confusions["crt"], mistakes=mistakes)
    curve = [(k * 41.84, k / 239) for k in range(240)]
    row = [note.name, 12345, "medium_shot", 50, *[0.1234] * (MAX_COMPARED + 1)]
    heads = [dataclasses.replace(content.heads[1], name=name) for name in ("linear", *names)]
    full = dataclasses.replace(
        content,
        heads=heads,
        recommended=names[0],
        classes=ClassTable(["linear", *names], [row] * MAX_CLASSES, 11841),
        comparisons=dict.fromkeys(names, Comparison(change, change, 9000, 1000)),
        confusions=dict.fromkeys(("linear", *names), confusions),
        frequency=dataclasses.replace(
            content.frequency,
            accuracy=dict.fromkeys(("linear", *names), tuple(curve)),
        ),
    )
    page = render_report(full)
    assert len(page.encode()) < 5e6
    assert "11,841 more frequent ones are in per_class.csv" in page


def test_the_table_of_very_many_classes_has_the_rarest():
    counts = torch.arange(MAX_CLASSES + 2, 0, -1)
    targets = torch.tensor([0, MAX_CLASSES + 1])
    report = shot_accuracy(targets, targets, counts)
    content = gather_report(
        title="many",
        reports={"crt": report},
        class_counts=counts,
        targets=targets,
        predictions={"crt": Predictions(targets)},
    )
    assert content.classes.left_out == 2
    assert [row[1] for row in content.classes.rows[:: MAX_CLASSES - 1]] == [MAX_CLASSES, 1]
    # A few hundred points, whatever the number of classes.
    assert len(content.frequency.counts) == 240


# Mistakes -----------------------------------------------------------------------------------------


def test_what_does_not_fit_together_is_named():
    given = figures(*long_tail(3))
    with pytest.raises(UsageError, match=r"recommended head 'lws' is not one of: linear, crt"):
        gather_report(**given, recommended="lws")
    with pytest.raises(UsageError, match=r"head 'linear' has figures but no predictions"):
        gather_report(**given | {"predictions": {}})
    with pytest.raises(UsageError, match=r"predictions \(12,\), the targets are \(11,\)"):
        gather_report(**given | {"targets": given["targets"][1:]})
    with pytest.raises(UsageError, match=r"at least one head"):
        gather_report(**given | {"reports": {}})


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "report.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)[1], {})
    assert "crow" in (tmp_path / "report.html").read_text(encoding="utf-8")
