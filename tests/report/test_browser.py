"""The report in a real Chromium: wide and on a phone, light and dark, by mouse and by keyboard."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from report_runs import whole_report

from timm_lt.report import write_report

CHROMIUM = shutil.which("chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
SIZES = {"wide": {"width": 1280, "height": 900}, "phone": {"width": 360, "height": 740}}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="there is no chromium here: apt-get install chromium"
    ),
]

# Texts whose contrast with what lies behind them is below 4.5, as WCAG 2 has it for small texts.
LOW_CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const shown = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
  };
  const luminance = (rgb) => {
    const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const [r, g, b] = rgb.map((v) => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const element = text.parentElement;
    if (!text.data.trim() || !element.checkVisibility()) continue;
    if (element.closest("script, noscript, :disabled")) continue;
    const behind = [];
    for (let up = element; up; up = up.parentElement) {
      behind.unshift(getComputedStyle(up).backgroundColor);
    }
    const back = luminance(shown(behind));
    const style = getComputedStyle(element), svg = element.closest("svg");
    const front = luminance(shown([...behind, svg ? style.fill : style.color]));
    const ratio = (Math.max(back, front) + .05) / (Math.min(back, front) + .05);
    if (ratio < 4.5) low.push(`${text.data.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return low;
}"""
WITHOUT_NAME = """() => [...document.querySelectorAll("button, a, input, select, [tabindex]")]
  .filter((e) => !(e.textContent.trim() || e.getAttribute("aria-label") || e.labels?.length))
  .map((e) => e.outerHTML)"""
# Height of the text in the charts that are displayed, in pixels.
LABEL_SIZES = """() => [...document.querySelectorAll(".chart text")]
  .filter((text) => text.checkVisibility())
  .map((text) => text.ownerSVGElement.getScreenCTM().a * parseFloat(text.style.fontSize))"""
CHOSEN = """() => [...document.querySelectorAll("[data-head]:not([hidden])")]
  .map((panel) => panel.dataset.head)"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="there is no playwright here: pip install playwright"
    )
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, whole_report(250, images=2))
    return path


@pytest.fixture
def opened(browser, report):
    """Opens the report; fails if anything is written to the console or asked of elsewhere."""
    contexts, problems, own = [], [], ("data:", report.parent.as_uri())

    def open_page(size="wide", scheme="light", path=report):
        look = {"viewport": SIZES[size], "color_scheme": scheme, "has_touch": size == "phone"}
        contexts.append(browser.new_context(**look))
        page = contexts[-1].new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message) or dialog.dismiss())
        page.on("request", lambda r: r.url.startswith(own) or problems.append(r.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def names(page):
    return page.locator("#class-table tbody th").all_text_contents()


def column(page, number):
    return page.locator(f"#class-table tbody tr td:nth-child({number})").all_text_contents()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_looks_right(opened, size, scheme, tmp_path):
    page, width = opened(size, scheme), SIZES[size]["width"]
    for head in ("crt", "tau_norm"):
        page.select_option("#picker-confusion", head)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(LOW_CONTRAST) == []
    assert page.evaluate(WITHOUT_NAME) == []
    # Every picture is one.
    assert page.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")
    # Text in charts is legible on a phone, too.
    titles = page.locator(".chart.wide title").all_text_contents()
    assert {"crt", "many", "training loss"} <= set(titles)
    sizes = page.evaluate(LABEL_SIZES)
    assert len(sizes) > 50
    assert 10 < min(sizes) <= max(sizes) < 16
    shot = page.screenshot(path=tmp_path / "screen.png", full_page=True)
    grey = np.asarray(Image.open(io.BytesIO(shot)).convert("L"), float)
    assert grey.shape[1] == width
    assert (grey.mean() > 200) if scheme == "light" else (grey.mean() < 60)
    assert grey.std() > 15


def test_the_table_sorts_filters_and_turns_pages(opened):
    page = opened()
    before = page.inner_html("#class-table tbody")
    assert len(names(page)) == 100
    assert page.text_content("#status") == "1 to 100 of 250 classes"
    # From the least frequent on at the second click.
    button = page.get_by_role("button", name="training images")
    heading = page.locator("#class-table th", has=button)
    for order, first in (("descending", "500"), ("ascending", "5")):
        button.click()
        assert heading.get_attribute("aria-sort") == order
        assert column(page, 2)[0] == first
    counts = [int(text.replace(",", "")) for text in column(page, 2)]
    assert counts == sorted(counts)
    page.click("#next")
    page.click("#next")
    assert page.text_content("#status") == "201 to 250 of 250 classes"
    assert page.is_disabled("#next")
    assert column(page, 2)[-1] == "500"
    page.select_option("#shots", "few_shot")
    assert set(column(page, 3)) == {"few"}
    page.select_option("#shots", "")
    for text, found in (
        ("BIRD_11", [*(f"bird_{k}" for k in range(119, 109, -1)), "bird_11"]),
        ("<script>", ["<script>alert(1)</script>"]),
        ("שלום", ["שלום עולם"]),
        ("no such bird", []),
    ):
        page.fill("#filter", text)
        assert names(page) == found
    assert page.text_content("#status") == "No class matches"
    # The script draws the same table as the template.
    page.fill("#filter", "")
    button.click()
    assert squeezed(page.inner_html("#class-table tbody")) == squeezed(before)


def squeezed(html):
    return "".join(html.split()).replace(";", "").replace('class=""', "").replace(".0%", "%")


def test_the_keyboard_sorts_and_chooses_heads(opened):
    page = opened()
    page.get_by_role("button", name="class", exact=True).focus()
    page.keyboard.press("Enter")
    assert names(page)[:3] == sorted(names(page)[:3], key=str.lower)
    assert page.locator("#class-table [aria-sort]").get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert column(page, 2)[0] == "500"
    page.focus("#picker-changes")
    page.keyboard.press("c")
    assert page.evaluate(CHOSEN) == ["crt", "crt"]
    assert page.input_value("#picker-confusion") == "crt"
    # Wide tables can be scrolled.
    assert page.locator(".scroll:not([tabindex='0'])").count() == 0


def test_missing_values_come_last(opened, report):
    marker, text = 'id="class-data">', report.read_text(encoding="utf-8")
    start, (table, end) = text.partition(marker)[0], text.partition(marker)[2].split("</script>", 1)
    data = json.loads(table)
    for k, row in enumerate(data["rows"]):
        row[4] = None if k % 5 else k / 1000
    path = report.parent / "missing.html"
    table = json.dumps(data).replace("<", "\\u003c")
    path.write_text(f"{start}{marker}{table}</script>{end}", "utf-8")
    page = opened(path=path)
    for expected in (["24.5", "24.0"], ["0.0", "0.5"]):
        page.get_by_role("button", name="linear").click()
        shown = column(page, 5)
        assert (shown[:2], shown[50:]) == (expected, ["-"] * 50)
