"""The model card: what it says is what the checkpoint holds, and nothing gets out of its place."""

import dataclasses
import json
import re
import shutil
from dataclasses import replace

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import timm_lt
from timm_lt.checkpoint import HeadEntry, read_checkpoint
from timm_lt.hub.card import folder_card, merge_cards, render_card, update_card, write_card
from timm_lt.models.published import CHECKPOINTS
from timm_lt.utils.checks import UsageError

PACKAGED = CHECKPOINTS / "lt_test_resnet.glyph_lt"
PLOTS = ["accuracy_by_frequency.png", "accuracy_by_tau.png", "calibration.png"]
HOSTILE = (
    "a`b``` | c --- \n---\n# Title\n<!-- timm_lt:use -->\n<!-- /timm_lt:data -->\n```\n"
    "{{ 7*7 }} {% raw %} <script>\\| </details> [x](y) *z* \ud800\u2028 | d"
)


@pytest.fixture
def info():
    return read_checkpoint(PACKAGED)


@pytest.fixture
def fresh(info):
    return render_card(info, name="glyphs", plots=PLOTS, recipe="epochs: 3\n", license="mit")


def headings(card):
    """Headings outside of blocks of code."""
    text = re.sub(r"^(`{3,}).*?^\1$", "", card, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#+ .*", text, flags=re.MULTILINE)


def part(card, name):
    return re.search(rf"<!-- timm_lt:{name} -->\n(.*?)\n<!-- /timm_lt:{name} -->", card, re.DOTALL)[
        1
    ]


def part_names(card):
    return re.findall(r"^<!-- timm_lt:(\w+) -->$", card, flags=re.MULTILINE)


def table(text):
    """Cells of the first table; every row must have as many as the first."""
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    assert len({len(row) for row in rows}) == 1
    return rows


def blocks(card):
    """What a Markdown reader makes of the text: kinds of blocks, and the HTML outside of code."""
    tokens = MarkdownIt("commonmark").enable("table").parse(card[card.index("\n---\n") + 5 :])
    kinds = [token.type for token in tokens]
    inline = [child for token in tokens for child in token.children or []]
    html = [t.content.strip() for t in (*tokens, *inline) if t.type.startswith("html")]
    return kinds, set(html), {t.type for t in inline}


def snippets(card):
    return re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)


# What it says ------------------------------------------------------------------------------------


def test_the_card_of_the_packaged_checkpoint(info):
    recipe = (PACKAGED / "recipe.yaml").read_text()
    card = folder_card(PACKAGED, name="lt_test_resnet.glyph_lt")
    assert headings(card) == [
        "# lt_test_resnet.glyph_lt",
        "## Use",
        "## Results",
        "## Plots",
        "## Training data",
        "## How options were selected",
        "## Recipe",
        "## Limits",
    ]
    assert f"```yaml\n{recipe.strip()}\n```" in card
    flowing = " ".join(card.split())
    assert "timm's `test_resnet`, trained on `glyph_lt`; it tells 100 classes apart" in flowing
    assert (
        "10,847 images of 100 classes: 500 of the most frequent class, 5 of the rarest" in flowing
    )
    assert "(imbalance factor 100)" in flowing
    assert "Licence of the weights: not stated." in card
    assert (
        "- `tau_norm`: tau = 1.021, the best of all values for overall accuracy on val (72.9 %)"
        in card
    )
    assert "- `crt`: weight_decay = 0.1, the best of 7 values for overall accuracy on val" in card
    assert "seed 0" in card
    assert "\n\n\n" not in card
    assert card.endswith("-->\n")
    kinds, html, _ = blocks(card)
    # Nine parts with their comments, and the list of classes that opens on a click.
    assert kinds.count("html_block") == 2 * 9 + 1
    assert {text for text in html if not text.startswith("<!-- ")} == {
        "<details>\n<summary>Training images of each class</summary>",
        "</details>\n<!-- /timm_lt:data -->",
    }
    assert [kinds.count(kind) for kind in ("table_open", "bullet_list_open", "fence")] == [2, 3, 4]


def test_the_table_has_the_numbers_of_the_metrics():
    metrics = json.loads((PACKAGED / "metrics.json").read_text())
    rows = table(part(folder_card(PACKAGED, name="x"), "results"))
    assert rows[0] == [
        "head",
        "many (> 100, 35 classes)",
        "medium (20 to 100, 35 classes)",
        "few (< 20, 30 classes)",
        "all",
        "macro F1",
        "ECE",
        "options",
        "selected",
    ]
    keys = ("many_shot", "medium_shot", "few_shot", "all", "macro_f1", "ece")
    assert [row[0] for row in rows[2:]] == [f"`{name}`" for name in metrics["heads"]]
    for row, figures in zip(rows[2:], metrics["heads"].values(), strict=True):
        assert [cell.strip("*") for cell in row[1:7]] == [f"{100 * figures[k]:.1f}" for k in keys]
    for column, key in enumerate(keys, start=1):
        values = [figures[key] for figures in metrics["heads"].values()]
        best = min(values) if key == "ece" else max(values)
        bold = [row[column] for row in rows[2:] if row[column].startswith("**")]
        # All that are equal as they are shown.
        shown = [f"{100 * value:.1f}" for value in values]
        assert bold == [f"**{100 * best:.1f}**"] * shown.count(f"{100 * best:.1f}")
    by_head = {row[0]: row[7:] for row in rows}
    assert by_head["`tau_norm`"] == ["`keep_bias=False`", "tau 1.02"]
    assert by_head["`ncm`"] == ["`metric=cosine`, `features=raw`", ""]


def test_the_groups_and_classes_have_their_counts(info):
    card = folder_card(PACKAGED, name="x")
    rows = table(part(card, "data"))
    counts = info.class_counts
    groups = [
        [n for n in counts if n > 100],
        [n for n in counts if 20 <= n <= 100],
        [n for n in counts if n < 20],
    ]
    assert [row[2] for row in rows[2:]] == [str(len(group)) for group in groups]
    assert [row[3].replace(",", "") for row in rows[2:]] == [str(sum(group)) for group in groups]
    listed = re.findall(r"^`(\w+)` (\d+),?$", card, flags=re.MULTILINE)
    assert {name: int(n) for name, n in listed} == dict(zip(info.label_names, counts, strict=True))
    assert [int(n) for _, n in listed] == sorted(counts, reverse=True)


def test_the_metadata_reads_back(info):
    card = ModelCard(render_card(info, name="glyphs", license="apache-2.0"))
    assert card.data.library_name == "timm"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.license == "apache-2.0"
    assert card.data.datasets == ["glyph_lt"]
    assert {"timm", "timm_lt", "long-tailed-recognition", "image-classification"} == set(
        card.data.tags
    )
    assert card.data.model_name == "glyphs"
    found = {r.metric_name: (r.metric_type, r.metric_value) for r in card.data.eval_results}
    expected = {}
    for name, entry in info.heads.items():
        for key, words in {
            "all": "overall accuracy",
            "many_shot": "many-shot accuracy",
            "medium_shot": "medium-shot accuracy",
            "few_shot": "few-shot accuracy",
            "macro_f1": "macro F1",
        }.items():
            kind = "f1" if key == "macro_f1" else "accuracy"
            expected[f"{words}, head {name}"] = kind, entry.metrics[key]
    assert found == expected
    assert {(r.dataset_type, r.dataset_split) for r in card.data.eval_results} == {
        ("glyph_lt", "test")
    }


def test_the_plots_that_exist_are_shown_in_their_order(info):
    card = render_card(info, name="x", plots=["calibration.png", "x](y).png", PLOTS[0]])
    assert re.findall(r"\]\((.*?)\)", card) == [f"plots/{PLOTS[0]}", "plots/calibration.png"]


def test_the_examples_load_the_head_that_validation_chose(info):
    chosen = dataclasses.replace(info.heads["lws"], name="auto")
    card = render_card(dataclasses.replace(info, heads={**info.heads, "auto": chosen}), name="x")
    assert 'timm_lt.create_model("local-dir:.", head="auto")' in card


def test_figures_that_look_the_same_are_both_the_best(info):
    heads = dict(list(info.heads.items())[:3])
    for (name, entry), value in zip(heads.items(), (0.70412, 0.70408, None), strict=True):
        heads[name] = replace(entry, metrics={"all": value})
    rows = table(part(render_card(replace(info, heads=heads), name="x"), "results"))
    assert [row[:2] for row in rows] == [
        ["head", "all"],
        ["---", "---:"],
        ["`linear`", "**70.4**"],
        ["`crt`", "**70.4**"],
        ["`tau_norm`", "-"],
    ]


def test_the_mean_over_classes_is_shown_where_it_differs(info):
    metrics = {"all": 0.7, "class_mean": 0.6}
    heads = {"linear": replace(info.heads["linear"], metrics=metrics)}
    card = render_card(replace(info, heads=heads), name="x")
    # The best of one is nothing to point out.
    assert table(part(card, "results"))[0::2] == [
        ["head", "all", "class mean"],
        ["`linear`", "70.0", "60.0"],
    ]
    assert "bold" not in card


def test_long_lists_of_classes_are_cut(info):
    counts, names = [3] * 1500 + [7], [f"class_{i}" for i in range(1501)]
    card = render_card(
        replace(info, class_counts=counts, label_names=names, num_classes=1501), name="x"
    )
    assert "`class_1500` 7,\n`class_0` 3,\n" in card
    assert "and 501 more in `config.json`" in card
    assert "`class_999`" not in card


# What it lacks -----------------------------------------------------------------------------------


def test_converted_weights_have_a_card_without_empty_sections(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4)
    timm_lt.save_checkpoint(tmp_path, model, heads={}, class_counts=None)
    card = folder_card(tmp_path, name="converted")
    assert headings(card) == ["# converted", "## Use", "## Limits"]
    assert part_names(card) == ["intro", "use", "limits", "licence"]
    assert "trained on" not in card
    assert "None" not in card.replace("is None", "")
    data = ModelCard(card).data
    assert data.eval_results is None
    assert data.datasets is None
    assert data.license is None
    assert "\n\n\n" not in card


def test_groups_without_a_rule_or_counts_have_plain_headings(info):
    for change, heading in [
        ({"shot_rule": None}, "many"),
        ({"class_counts": None}, "many (> 100)"),
        ({"shot_rule": "oltr"}, "many (>= 100, 35 classes)"),
    ]:
        card = render_card(replace(info, **change), name="x")
        assert table(part(card, "results"))[0][1] == heading
    card = render_card(replace(info, shot_rule=None), name="x")
    assert "few-shot |" not in card
    assert "10,847 images" in card


def test_an_empty_class_has_no_imbalance_factor(info):
    card = render_card(replace(info, class_counts=[0, *info.class_counts[1:]]), name="x")
    assert "500 of the most frequent" not in card
    assert "477 of the most frequent class, 0 of the rarest." in " ".join(card.split())


# The examples ------------------------------------------------------------------------------------


def run_snippets(card, folder, monkeypatch, server):
    """Runs the first two here and the last without timm_lt; returns the logits of each."""
    monkeypatch.chdir(folder)
    first, second, plain = snippets(card)
    scope, swapped = {}, {}
    exec(first, scope)
    exec(second, swapped)
    run = server.python(
        f"import os\nos.chdir(r'{folder}')\n{plain}\n"
        "import sys\nassert not any(n.startswith('timm_lt') for n in sys.modules)\n"
        "torch.save(logits, 'logits.pt')\n"
    )
    assert run.status == 0, run.err
    plain_logits = torch.load(folder / "logits.pt", weights_only=True)  # noqa: TID251
    return scope, swapped["model"], plain_logits, run.out


def test_the_examples_run_as_they_stand(plain_server, tmp_path, monkeypatch, info, capsys):
    folder = tmp_path / "checkpoint"
    shutil.copytree(PACKAGED, folder)
    write_card(folder, name="x")
    card = folder_card(folder, name="x")
    scope, swapped, plain, shown = run_snippets(card, folder, monkeypatch, plain_server)
    place = f"local-dir:{folder}"
    image = torch.zeros(1, 3, 32, 32).sub(0.5).div(0.25)
    # The most accurate head is the example.
    assert max(info.heads, key=lambda name: info.heads[name].metrics["all"]) == "logit_adjusted"
    expected = {
        head: timm_lt.create_model(place, head=head).eval()(image)
        for head in ("logit_adjusted", "linear")
    }
    torch.testing.assert_close(scope["logits"], expected["logit_adjusted"])
    torch.testing.assert_close(plain, expected["linear"])
    assert capsys.readouterr().out.strip() == info.label_names[scope["logits"].argmax()]
    assert shown.strip() == info.label_names[plain.argmax()]
    assert (swapped.get_classifier().kind, swapped.get_classifier().tau) == ("tau_norm", 0.5)


def test_the_examples_run_where_there_is_nothing_but_a_backbone(
    plain_server, tmp_path, monkeypatch, capsys
):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4)
    timm_lt.save_checkpoint(tmp_path, model, heads={}, class_counts=None)
    scope, swapped, plain, shown = run_snippets(
        folder_card(tmp_path, name="x"), tmp_path, monkeypatch, plain_server
    )
    torch.testing.assert_close(scope["logits"], plain)
    assert shown.strip() == capsys.readouterr().out.strip() == str(int(plain.argmax()))
    assert swapped.get_classifier().kind == "tau_norm"


def test_a_card_says_that_timm_lacks_the_architecture(tmp_path, monkeypatch):
    model = timm.create_model("lt_bbn_resnet", base="test_resnet", num_classes=4)
    timm_lt.save_checkpoint(tmp_path, model, heads={}, class_counts=None)
    card = folder_card(tmp_path, name="x")
    assert "The backbone is timm_lt's `lt_bbn_resnet`" in card
    assert "timm has no such architecture until timm_lt is imported" in card
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(snippets(card)[-1], scope)
    assert "timm_lt" in scope
    assert scope["logits"].shape == (1, 4)


def test_the_examples_of_a_repo_name_it(info):
    card = render_card(info, name="birds", repo_id="me/birds")
    first, second, plain = snippets(card)
    assert 'timm_lt.create_model("hf-hub:me/birds", head="logit_adjusted")' in first
    assert 'timm_lt.create_model("hf-hub:me/birds", head="tau_norm", tau=0.5)' in second
    assert 'timm.create_model("hf-hub:me/birds", pretrained=True)' in plain
    assert "local-dir" not in card


# Names from anywhere -----------------------------------------------------------------------------


def hostile(info):
    """The packaged checkpoint with everything that a folder may choose freely made hostile."""
    selection = {
        HOSTILE: [HOSTILE],
        "objective": HOSTILE,
        "split": HOSTILE,
        "val_accuracy": HOSTILE,
        "compared": {HOSTILE: 1},
    }
    heads = {
        name: replace(entry, selection=selection, metrics={**entry.metrics, HOSTILE: 1})
        for name, entry in info.heads.items()
    }
    return replace(
        info,
        architecture=HOSTILE,
        dataset=HOSTILE,
        label_names=[HOSTILE, *info.label_names[1:]],
        heads=heads,
    )


def test_hostile_names_change_no_structure(info):
    given = {"plots": PLOTS, "recipe": "a: 1\n"}
    selected = {
        name: replace(entry, selection={"tau": 0.5, "split": "val"})
        for name, entry in info.heads.items()
    }
    tame = render_card(replace(info, heads=selected), name="x", **given)
    card = render_card(hostile(info), name=HOSTILE, license=HOSTILE, **given)
    assert part_names(card) == part_names(tame)
    assert headings(card)[1:] == headings(tame)[1:]
    kinds, html, inline = blocks(card)
    tame_kinds, tame_html, tame_inline = blocks(tame)
    assert kinds == tame_kinds
    assert html - tame_html == {"<code>", "</code>"}
    # A character that is written as a number is text.
    assert inline - tame_inline == {"html_inline"}
    assert "49" not in headings(card)[0]
    assert len(snippets(card)) == 3
    for name in ("results", "data"):
        assert len(table(part(card, name))) == len(table(part(tame, name)))
    # Nothing of the hostile text is left that Markdown or HTML would read.
    body = card[card.index("\n---\n") :]
    for text in ("<script", "</details> [x]", "](y)", "{{", "{%", "*z*", "a`b", "\ud800", "\u2028"):
        assert text not in body
    assert card.count("<details>") == card.count("</details>") == 1
    assert card.encode()
    metadata = ModelCard(card).data
    assert "a`b``` | c --- --- # Title" in metadata.datasets[0]
    assert "a`b``` | c --- --- # Title" in metadata.model_name
    assert metadata.library_name == "timm"
    assert len(metadata.eval_results) == 5 * len(info.heads)
    assert update_card(card, card) == card
    # A tame card takes the place of the hostile one without a trace.
    updated = update_card(card, tame)
    for name in part_names(tame):
        if name != "licence":
            assert part(updated, name) == part(tame, name)


@pytest.mark.parametrize(
    "recipe",
    [
        "a: |\n  ```\n  x\n```\n# Title\n",
        "`````\n<!-- /timm_lt:recipe -->\n# Title\n<!-- timm_lt:use -->\n",
        "{{ 7*7 }}\r\n{% raw %}\r---\r\n",
    ],
)
def test_a_recipe_stays_in_its_block(info, recipe):
    card = render_card(info, name="x", recipe=recipe)
    assert headings(card) == headings(render_card(info, name="x", recipe="a: 1"))
    assert part_names(card) == part_names(render_card(info, name="x", recipe="a: 1"))
    assert blocks(card)[:2] == blocks(render_card(info, name="x", recipe="a: 1"))[:2]
    lines = re.split(r"\r\n?|\n", recipe.strip())
    block = re.search(r"^(`{3,})yaml\n(.*?)\n\1$", card, flags=re.MULTILINE | re.DOTALL)[2]
    shown = block.split("\n")
    assert [line.replace("timm_lt :", "timm_lt:") for line in shown] == lines
    # Verbatim but for our own comments.
    assert sum(a != b for a, b in zip(shown, lines, strict=True)) == recipe.count("timm_lt:")
    assert update_card(card, card) == card


@pytest.mark.parametrize(
    "value", [None, {}, {"many_shot": 1}, 10**400, 1e308, -1, float("inf"), float("nan"), 70.1]
)
def test_figures_that_are_no_fractions_are_left_out(info, value):
    keys = ("all", "many_shot", "medium_shot", "few_shot", "macro_f1", "class_mean", "ece")
    entry = HeadEntry("crt", "crt", {}, None, None, False, dict.fromkeys(keys, value), {})
    card = render_card(replace(info, heads={"crt": entry}), name="x")
    assert "results" not in part_names(card)
    assert ModelCard(card).data.eval_results is None


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ({"tau": 0.5}, "tau = 0.5, the best of all values"),
        ({"tau": None, "split": 3, "objective": []}, "tau = None, the best of all values"),
        (
            {"tau": 1, "objective": "few_shot"},
            "tau = 1, the best of all values for few-shot accuracy",
        ),
        (
            {"head": "crt", "compared": [["crt", 0.2], ["ncm", 0.1]], "objective": "worst_class"},
            "head = crt, the best of 2 heads for the accuracy of the worst class",
        ),
        ({"tau": 2.0, "compared": [[1.0, 0.1], [2.0, 0.2]]}, "tau = 2, the best of 2 values"),
        ({"tau": 10**400, "val_accuracy": 10**400}, "the best of all values"),
        ({"tau": {"a": [1]}}, "tau = an object, the best of all values"),
    ],
)
def test_selections_of_any_kind_have_a_line(info, selection, words):
    heads = {"tau_norm": replace(info.heads["tau_norm"], selection=selection)}
    lines = part(render_card(replace(info, heads=heads), name="x"), "selection").splitlines()
    assert lines[-1].startswith(("- `tau_norm`: tau = ", "- `tau_norm`: head = "))
    assert lines[-1].endswith(words)


# Cards that are there already --------------------------------------------------------------------


def test_updating_with_itself_changes_nothing(info, fresh):
    assert update_card(fresh, fresh) == fresh
    other = render_card(replace(info, heads={"linear": info.heads["linear"]}), name="y")
    once = update_card(fresh, other)
    assert once != fresh
    assert update_card(once, other) == once


def test_what_a_person_wrote_stays(fresh):
    own = "\n\n## How to cite\n\nSmith, *Rare birds* | 2025 \\1 \\g<0>\n\n"
    text = fresh.replace("<!-- timm_lt:results -->", f"{own}<!-- timm_lt:results -->")
    text = text.replace("# glyphs", "# My glyphs") + "\nThe end.\n"
    text = re.sub(r"many \(> 100", "many (outdated", text)
    updated = update_card(text, fresh)
    assert own in updated
    assert "# My glyphs" in updated
    assert updated.endswith("\nThe end.\n")
    assert "outdated" not in updated
    assert updated == text.replace("many (outdated", "many (> 100")


def test_a_part_that_is_missing_comes_at_the_end(info, fresh):
    old = render_card(info, name="glyphs", license="mit")
    updated = update_card(old, fresh)
    assert part_names(old) == [n for n in part_names(fresh) if n not in ("plots", "recipe")]
    assert part_names(updated) == [*part_names(old), "plots", "recipe"]
    assert part(updated, "recipe") == part(fresh, "recipe")
    assert update_card(updated, fresh) == updated


def test_a_card_without_our_parts_is_somebodys_own(fresh):
    for text in ("", "# Mine\r\n", "---\nnot: [yaml\n---\n# Mine <!-- timm_lt:intro -->\n"):
        assert update_card(text, fresh) == text


def test_metadata_of_others_is_kept_and_ours_replaced(fresh):
    old = (
        "---\n# a comment\nlanguage: en\nlibrary_name: other\nlicense: cc-by-4.0\n"
        "tags: [birds, timm]\nmodel-index: nonsense\ndate: 2025-01-02\n---\n"
        "<!-- timm_lt:intro -->\nold\n<!-- /timm_lt:intro -->\n"
    )
    metadata = yaml.safe_load(update_card(old, fresh).split("---\n")[1])
    ours = yaml.safe_load(fresh.split("---\n")[1])
    assert metadata.pop("language") == "en"
    assert str(metadata.pop("date")) == "2025-01-02"
    assert metadata.pop("tags") == ["birds", "timm", *ours["tags"][1:]]
    del ours["tags"]
    assert metadata == ours
    # Metadata that says the same already stays as it is written, comments too.
    commented = fresh.replace("---\n", "---\n# a comment\n", 1)
    assert update_card(commented, fresh) == commented


def test_a_licence_is_kept_where_the_fresh_card_knows_none(info, fresh):
    without = render_card(info, name="glyphs")
    updated = update_card(fresh, without)
    assert ModelCard(updated).data.license == "mit"
    assert part(updated, "licence") == "Licence of the weights: `mit`."
    assert part(update_card(without, fresh), "licence") == "Licence of the weights: `mit`."
    # One that a person has put into the metadata.
    by_hand = without.replace("---\n", "---\nlicense: cc0-1.0\n", 1)
    assert part(update_card(by_hand, without), "licence") == "Licence of the weights: `cc0-1.0`."


@pytest.mark.parametrize(
    "front",
    ["a: [b\n", "- a\n- b\n", "just words\n", "date: 2025-99-99\n", "a: " + "[" * 1000 + "\n"],
)
def test_broken_metadata_is_named(fresh, front):
    body = fresh.split("---\n", 2)[2]
    with pytest.raises(UsageError, match=r"README\.md"):
        update_card(f"---\n{front}---\n{body}", fresh)


def test_cards_with_other_line_ends_or_without_metadata_are_updated(fresh):
    assert update_card("\ufeff" + fresh.replace("\n", "\r\n"), fresh) == fresh
    body = fresh.split("---\n", 2)[2]
    assert update_card(body, fresh) == fresh


def test_a_part_that_was_not_closed_takes_nothing_with_it(fresh):
    text = fresh.replace("<!-- /timm_lt:intro -->\n", "")
    updated = update_card(text, fresh)
    assert updated.startswith(text.rstrip("\n"))
    assert part_names(updated) == [*part_names(text), "intro"]


def test_writing_a_card_twice_keeps_what_was_added(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(PACKAGED, folder)
    (folder / "README.md").unlink()
    write_card(folder, name="glyphs", license="mit")
    first = (folder / "README.md").read_text()
    assert first == folder_card(folder, name="glyphs", license="mit")
    (folder / "README.md").write_text(first.replace("## Use", "## Usage") + "\nMine.\n")
    write_card(folder, name="glyphs")
    assert (folder / "README.md").read_text() == first + "\nMine.\n"
    # A card without our parts is somebody's own.
    (folder / "README.md").write_bytes(b"# Mine\r\n")
    write_card(folder, name="glyphs")
    assert (folder / "README.md").read_bytes() == b"# Mine\r\n"


def test_files_that_are_no_text_are_named(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(PACKAGED, folder)
    (folder / "recipe.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"recipe\.yaml is no text in UTF-8"):
        folder_card(folder, name="x")


# A card here and one on the Hub -----------------------------------------------------------------


def test_where_nobody_wrote_the_fresh_card_is_pushed(info, fresh):
    local = render_card(info, name="the_run", plots=PLOTS)
    assert merge_cards(None, None, fresh) == fresh
    assert merge_cards(None, fresh, fresh) == fresh
    assert merge_cards(local, fresh, fresh) == fresh
    first = merge_cards(local, None, fresh)
    assert headings(first)[0] == "# the_run"
    assert sorted(headings(first)[1:]) == sorted(headings(fresh)[1:])
    assert ModelCard(first).data.license == "mit"
    # A licence that was stated before stays, though the push does not name it again.
    assert ModelCard(merge_cards(fresh, None, local)).data.license == "mit"


def test_words_on_the_hub_outlive_a_local_card_without_any(info, fresh):
    local = render_card(info, name="the_run", plots=PLOTS)
    remote = fresh.replace("<!-- timm_lt:use -->", "Taken in the wild.\n\n<!-- timm_lt:use -->")
    assert "Taken in the wild." in merge_cards(local, remote, fresh)
    assert "Taken in the wild." in merge_cards(None, remote, fresh)


def test_words_written_here_are_what_is_pushed(fresh):
    local = fresh + "\nOurs.\n"
    remote = fresh + "\nTheirs.\n"
    pushed = merge_cards(local, remote, fresh)
    assert "Ours." in pushed
    assert "Theirs." not in pushed
    own = "# Birds\n\nNothing generated here.\n"
    assert merge_cards(own, remote, fresh) == own
    # What somebody wrote on the Hub from nothing is theirs; a licence alone is metadata.
    assert merge_cards(None, own, fresh) == own
    assert merge_cards(fresh, own, fresh) == own
    merged = ModelCard(merge_cards(None, "---\nlicense: gpl\nlanguage: en\n---\n", fresh))
    assert (merged.data.license, merged.data.language) == ("mit", "en")
    assert headings(str(merged)) == headings(fresh)


@pytest.mark.parametrize(
    "metadata",
    ["a: &a [1]\nb: *a", "a: &a {x: 1}\nb: {<<: *a}", "x: !!bool foo", "x: !!int ''",
     "x: 2020-99-99", "x: " + "[" * 1000, "x: " + "y" * 2**18, "x: 0x" + "f" * 6000],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_metadata_that_mean_harm_are_refused(fresh, metadata):
    card = re.sub(r"\A---\n.*?\n---\n", lambda _: f"---\n{metadata}\n---\n", fresh, flags=re.DOTALL)
    with pytest.raises(UsageError, match=r"metadata of the model card \(README\.md\)"):
        update_card(card, fresh)
