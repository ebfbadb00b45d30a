"""The report in one file: its figures, its escaping and its size."""

import base64
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
from report_runs import LONG, figures, long_tail, report_of, right_in_order, squares, whole_report

from timm_lt.fitting import AccuracyCurve
from timm_lt.metrics import paired_difference
from timm_lt.report import ExampleImages, Report, render_report
from timm_lt.report.html import MAX_CLASSES
from timm_lt.report.record import (
    MAX_BYTES,
    SIDE,
    compare,
    confused_groups,
    data_uri,
    frequent_mistakes,
    min_images,
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
def report():
    return whole_report()


@pytest.fixture(scope="module")
def page(report):
    return render_report(report)


def table_data(page):
    return json.loads(re.search(r'id="class-data">(.*?)</script>', page)[1])


# Figures ------------------------------------------------------------------------------------------


def test_confusions_gains_and_losses_are_counted():
    counts, targets, logits = long_tail(12, images=9)
    report = Report(**figures(counts, targets, logits))
    group = ["many_shot" if n > 100 else "few_shot" if n < 20 else "medium_shot" for n in counts]
    preds = {name: logits[name].argmax(1).tolist() for name in ("linear", "crt")}
    pairs = {name: list(zip(targets.tolist(), p, strict=True)) for name, p in preds.items()}
    total = Counter(group[target] for target in targets.tolist())
    cells = Counter((group[t], "right" if t == p else group[p]) for t, p in pairs["crt"])
    for name, shares in confused_groups(report, "crt").items():
        assert shares == pytest.approx({o: cells[name, o] / total[name] for o in shares})
        assert sum(shares.values()) == pytest.approx(1)
    wrong = Counter(pair for pair in pairs["crt"] if pair[0] != pair[1])
    mistakes = frequent_mistakes(report, "crt")
    assert [m["images"] for m in mistakes] == sorted(wrong.values(), reverse=True)[:6]
    for mistake in mistakes:
        assert mistake["images"] == wrong[mistake["label"], mistake["pred"]]
        assert mistake["share"] == pytest.approx(mistake["images"] / 9)
    right = {name: Counter(t for t, p in pairs[name] if t == p) for name in pairs}
    change = [right["crt"][c] - right["linear"][c] for c in range(12)]
    found = compare(report, "crt")
    assert found["better"] == sum(moved > 0 for moved in change) > 3
    assert found["worse"] == sum(moved < 0 for moved in change) > 0
    gained = sorted((moved for moved in change if moved > 0), reverse=True)
    lost = sorted(moved for moved in change if moved < 0)
    for changes, expected in ((found["gained"], gained), (found["lost"], lost)):
        assert [c["after"] - c["before"] for c in changes] == expected[:5]
        assert all(
            c["after"] - c["before"] == change[c["label"]] and c["images"] == 9 for c in changes
        )


def rare_classes(*right):
    """A report on classes of 9, 9, 4, 4 and 1 test images, with those right by two heads."""
    targets = torch.arange(5).repeat_interleave(torch.tensor([9, 9, 4, 4, 1]))
    preds = {n: right_in_order(r, targets) for n, r in zip(("linear", "crt"), right, strict=True)}
    names = ["gull", "kite", "owl", "crow", "ibis"]
    return report_of(preds, targets, [300, 50, 18, 18, 5], label_names=names)


def test_rare_classes_are_among_those_that_gained():
    report = rare_classes([9, 5, 0, 1, 0], [8, 6, 4, 3, 1])
    # One image says nothing about a class; four are the most of a few-shot class.
    assert min_images(report) == {"many_shot": 5, "medium_shot": 5, "few_shot": 4}
    found = compare(report, "crt")
    changes = [*found["gained"], *found["lost"]]
    moved = [(report.names[c["label"]], c["before"], c["after"]) for c in changes]
    assert moved == [("owl", 0, 4), ("crow", 1, 3), ("kite", 5, 6), ("gull", 9, 8)]
    # All changes are counted.
    assert (found["better"], found["worse"]) == (4, 1)
    text = " ".join("".join(Page(render_report(report)).texts).split())
    assert "of those with at least 5 (many), 5 (medium), 4 (few) test images." in text
    assert "25.0 → 75.0 % (1 → 3 of 4 images)" in text


def test_the_mean_over_classes_is_shown_where_the_test_split_has_a_tail_too(page):
    preds = {"linear": [0, 0, 0, 0], "crt": [0, 0, 1, 1]}
    report = report_of(preds, [0, 0, 0, 1], [500, 5], recommended="crt")
    texts = [text.strip() for text in Page(render_report(report)).texts]
    place = texts.index("mean over classes")
    tile = [text for text in texts[place + 1 : place + 12] if text]
    assert tile[:4] == ["83.3", "%", "▲ +33.3", "from 50.0"]
    assert "mean over classes" not in page


def test_the_page_has_the_figures_of_the_heads_and_classes(report, page):
    counts, targets, logits = long_tail()
    preds = {name: values.argmax(1) for name, values in logits.items()}
    gain = paired_difference(preds["crt"], preds["linear"], targets, counts)
    text = " ".join(page.split())
    assert f"+{100 * gain[0]:.1f}</span><small>+{100 * gain[1]:.1f} to +{100 * gain[2]:.1f}" in text
    data = table_data(page)
    assert data["columns"][4:] == ["linear", "crt", "tau_norm"]
    assert [row[1] for row in data["rows"]] == counts.tolist()
    for c, row in enumerate(data["rows"]):
        of_class = [preds[name][targets == c] for name in data["columns"][4:]]
        found = [float((values == c).double().mean()) for values in of_class]
        assert row[4:] == pytest.approx([*found, found[2] - found[0]], abs=1e-4)


# Pictures -----------------------------------------------------------------------------------------


def test_pictures_are_small_and_of_the_right_image(report):
    change = compare(report, "crt")["gained"][0]
    assert change["pictures"]
    for picture in change["pictures"]:
        assert picture["uri"].startswith("data:image/jpeg;base64,")
        assert report.names[change["label"]] in picture["text"]
        assert "% sure" in picture["text"]
    colours = np.random.default_rng(0).integers(0, 256, (30, 3), np.uint8)
    for mistake in frequent_mistakes(report, "linear"):
        for picture, label in zip(
            mistake["pictures"], (mistake["label"], mistake["pred"]), strict=True
        ):
            encoded = base64.b64decode(picture["uri"].partition(",")[2])
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


def test_an_image_that_is_damaged_or_unknown_has_no_picture():
    labels = torch.arange(3)
    good = squares(labels, labels)
    rows = {"image": [{"bytes": b"nothing", "path": None}] * 3, "label": [0, 1, 2]}
    broken = datasets.Dataset.from_dict(rows, features=good.features)
    found = ExampleImages(good, labels, broken, labels)
    assert found.of_test(1) is None
    assert found.of_class(1) is not None
    assert found.of_class(5) is None
    assert ExampleImages(good, labels, good).of_test(1) is None


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
    # A long name is cut everywhere.
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
    # Also those within the charts.
    links = parsed.all("a") + parsed.all("use")
    assert {(link.get("href") or link["xlink:href"])[1:] for link in links} <= set(ids)
    assert set(re.findall(r"url\(#(.*?)\)", page)) <= set(ids)
    # Every colour of a chart is defined, for light and for dark.
    for name in set(re.findall(r"var\((--\w+)\)", page)) - {"--v", "--lo", "--hi", "--width"}:
        assert len(re.findall(rf"[{{;\s]{name}:", page)) == 2, name


def test_sections_of_unknown_figures_are_missing():
    counts, targets, logits = long_tail(3, heads=("ncm",))
    parsed = Page(render_report(Report(**figures(counts, targets, logits))))
    ids = {attributes["id"] for _, attributes in parsed.elements if "id" in attributes}
    assert {"heads", "frequency", "confusion", "calibration", "classes"} <= ids
    assert not {"tau", "changes", "training", "recipe"} & ids


@pytest.mark.parametrize("counts", [[500, 50, 5], [9, 8, 7]])
def test_a_class_without_test_images_and_heads_without_logits(counts):
    page = render_report(report_of({"linear": [0, 1, 1], "crt": [0, 1, 1]}, [0, 0, 1], counts))
    assert table_data(page)["rows"][2][4:] == [None, None, None]
    assert "nan" not in re.sub(r"<script>.*", "", page, flags=re.DOTALL).lower()
    assert 'id="calibration"' not in page


@pytest.mark.parametrize("size", [1, MAX_CLASSES + 2])
def test_of_very_many_classes_the_rarest_are_shown(size):
    targets = torch.tensor([0, size - 1])
    page = render_report(report_of({"crt": targets}, targets, torch.arange(size, 0, -1)))
    rows = [row[1] for row in table_data(page)["rows"]]
    assert (rows[0], rows[-1]) == (min(size, MAX_CLASSES), 1)
    assert ("; 2 more frequent ones are in per_class.csv" in page) == (size > 1)
    Page(page)


@pytest.mark.exhaustive
def test_the_largest_report_stays_below_five_megabytes():
    counts, targets = torch.arange(MAX_CLASSES, 0, -1), torch.arange(MAX_CLASSES).repeat(5)
    noise = np.random.default_rng(0).integers(0, 256, (len(targets), 24, 24, 3), np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [Image.fromarray(image) for image in noise], "label": targets.tolist()}
    images = datasets.Dataset.from_dict(rows, features=features)
    generator = torch.Generator().manual_seed(0)
    names = ["linear", *(f"head_{k}" for k in range(8))]
    right = torch.rand(len(names), len(targets), generator=generator) < 0.5
    wrong = [targets.roll(1 + k) for k in range(len(names))]
    preds = {n: torch.where(r, targets, w) for n, r, w in zip(names, right, wrong, strict=True)}
    low = torch.rand(50_000, generator=generator).double()
    report = report_of(
        preds,
        targets,
        counts,
        label_names=["\N{DOG FACE}" * 40] * MAX_CLASSES,
        curves={"head_1": (AccuracyCurve(low, low + 1), 0.9)},
        images=ExampleImages(images, targets, images, torch.arange(len(targets))),
    )
    assert 2e6 < len(render_report(report).encode()) < 5e6


# Mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recommended": "lws"}, r"recommended head 'lws'.* choose one of: linear, crt"),
        ({"predictions": {}}, r"of the shape .*\(12,\); got .'linear': None"),
        ({"targets": torch.zeros(11)}, r"\(11,\); got .'linear': \(12,\)"),
        ({"reports": {}}, "at least one head"),
    ],
)
def test_figures_that_do_not_fit_together_are_named(change, message):
    with pytest.raises(UsageError, match=message):
        Report(**figures(*long_tail(3)) | change)


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)[1], {})
    assert "crow" in (tmp_path / "report.html").read_text(encoding="utf-8")
