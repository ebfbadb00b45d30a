"""Rendering the card from what a checkpoint says of itself.

Markdown that text of unknown origin cannot get out of.

A card that is there already: what is generated in it changes, what a person wrote stays.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from timm_lt.checkpoint import (
    CARD,
    GIVEN_DATA,
    GIVEN_MODEL,
    PLOTS,
    RECIPE,
    CheckpointInfo,
    HeadEntry,
    read_checkpoint,
)
from timm_lt.data import list_datasets
from timm_lt.fitting import AUTO
from timm_lt.report.plots import PLOT_FILES
from timm_lt.report.tables import (
    GROUPS,
    OBJECTIVE_WORDS,
    TEST_SELECTION,
    brief,
    describe_selection,
    group_word,
    known_fraction,
    percent,
    selected_option,
)
from timm_lt.utils.checks import WHITE, UsageError
from timm_lt.utils.console import one_line
from timm_lt.utils.files import YAML_ERRORS, read_text, write_atomic
from timm_lt.utils.longtail import describe_shots, shot_groups, shot_rule_texts

# An underscore at the edge of a word could be emphasis.
SIMPLE = re.compile(r"(?:(?!\b_|_\b)[\w .,+=%/-])*")
# A generated part of a card, with the comments around it; parts do not nest.
PART = re.compile(
    r"^<!-- timm_lt:(\w+) -->[ \t]*\n(?:(?!<!-- /?timm_lt:).*\n)*?<!-- /timm_lt:\1 -->[ \t]*$",
    re.MULTILINE,
)


def plain(value: str) -> str:
    """Returns text that is nothing but text, also in a cell of a table and in HTML.

    >>> plain("tau 1.05"), plain("a|b")
    ('tau 1.05', 'a&#124;b')
    """
    line = one_line(value)
    if SIMPLE.fullmatch(line):
        return line
    return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in line)


def code(value: str) -> str:
    """Returns text as code within a line.

    >>> code("tau_norm"), code("a`b")
    ('`tau_norm`', '<code>a&#96;b</code>')
    """
    line = one_line(value)
    return f"`{line}`" if line and SIMPLE.fullmatch(line) else f"<code>{plain(line)}</code>"


def fenced(text: str, language: str) -> str:
    """Returns a block of code that its text cannot end, and in which no part of a card ends."""
    text = re.sub(r"\r\n?", "\n", text).strip("\n")
    text = re.sub(r"^(<!-- /?)timm_lt:", r"\1timm_lt :", text, flags=re.MULTILINE)
    fence = "`" * max([2, *map(len, re.findall("`+", text))]) + "`"
    return f"{fence}{language}\n{text}\n{fence}"


def table(columns: Mapping[str, list[str]], right: Sequence[str]) -> str:
    """Returns a table.

    Args:
        columns: Cells by heading, in Markdown without line breaks and bars.
        right: Headings of the columns that are aligned on the right.
    """
    rules = ["---:" if heading in right else "---" for heading in columns]
    rows = [list(columns), rules, *map(list, zip(*columns.values(), strict=True))]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def part(name: str, content: str) -> str:
    """Returns a generated part of a card."""
    return f"<!-- timm_lt:{name} -->\n{content}\n<!-- /timm_lt:{name} -->"


TEMPLATE = Path(__file__).with_name("card_template.md")
TASK = "image-classification"
TAGS = ["timm", "timm_lt", "long-tailed-recognition", TASK]
# A longer list of classes would make the page slow; config.json has them all.
LISTED_CLASSES = 1000
# Heads whose tau is the exact maximiser, unless values were compared.
EXACT = ("tau_norm", "logit_adjusted")
HEADINGS = {group: group_word(group) for group in GROUPS} | {
    "all": "all",
    "class_mean": "class mean",
    "macro_f1": "macro F1",
    "ece": "ECE",
}
OBJECTIVES = {"all": "overall accuracy"} | {g: f"{group_word(g)}-shot accuracy" for g in GROUPS}


def render_card(
    info: CheckpointInfo,
    *,
    name: str,
    repo_id: str | None = None,
    plots: Sequence[str] = (),
    recipe: str | None = None,
    license: str | None = None,
) -> str:
    """Renders the model card of a checkpoint; what is not known is left out.

    Args:
        info: What the checkpoint says of itself.
        name: Title of the card.
        repo_id: ``namespace/name`` of the Hub, for the examples; None is the folder itself.
        plots: Names of files in the checkpoint's ``plots/``; those that are not a run's are left
            out.
        recipe: The recipe as it was run, YAML.
        license: Licence of the weights, by its identifier on the Hub.
    """
    place = json.dumps(f"hf-hub:{one_line(repo_id, 300)}" if repo_id else "local-dir:.")
    example = _example_head(info)
    card = ModelCard.from_template(
        _metadata(info, name, license),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=plain(name),
        architecture=code(info.architecture),
        own=info.architecture.startswith("lt_"),
        dataset=_code_of_name(info.dataset) if info.dataset else None,
        kept=_kept_backbone(recipe),
        num_classes=info.num_classes,
        named=info.label_names is not None,
        heads=[(code(entry.name), entry.kind) for entry in info.heads.values()],
        local=repo_id is None,
        place=place,
        create=f'timm_lt.create_model({place}, head="{example}")',
        load_image=_load_image(info),
        create_plain=f"timm.create_model({place}, pretrained=True)",
        other_head=_other_head(info, example),
        results=_results(info),
        seed=info.seed,
        note=TEST_SELECTION if info.protocol == "paper" else None,
        shots=_shots(info),
        plots=[plot for plot in PLOT_FILES if plot in plots],
        data=_data(info),
        class_list=_class_list(info),
        selections=_selections(info),
        recipe=fenced(recipe, "yaml") if recipe else None,
        licence=licence_text(license),
    )
    return f"{card}\n"


def _load_image(info: CheckpointInfo) -> str:
    background = "" if info.background == WHITE else f', background="{info.background}"'
    return f': timm_lt.load_image("photo.jpg"{background})'


def _kept_backbone(recipe: str | None) -> str | None:
    """Returns whose backbone a run of heads alone left as it was, None for one that trained it."""
    try:
        values = yaml.safe_load(recipe or "")
        if values["epochs"] != 0:
            return None
        model = values["model"]
        return _code_of_name(str(model["checkpoint"] or model["name"]))
    except (yaml.YAMLError, TypeError, KeyError, ValueError, RecursionError):
        # What is in a folder may be anything.
        return None


def _code_of_name(name: str) -> str:
    """Returns a name as code; what was given as an object has none."""
    return name if name in (GIVEN_MODEL, GIVEN_DATA) else code(name)


def _metadata(info: CheckpointInfo, name: str, license_id: str | None) -> ModelCardData:
    dataset = one_line(info.dataset) if info.dataset else None
    # A folder's name is no data set that others could look up.
    known = dataset if dataset and ("/" in dataset or dataset in list_datasets()) else None
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=known or "unknown",
            dataset_name=dataset or "unknown",
            dataset_split="test",
            metric_type="f1" if key == "macro_f1" else "accuracy",
            metric_name=f"{words}, head {entry.name}",
            metric_value=value,
        )
        for entry in info.heads.values()
        for key, words in {**OBJECTIVES, "macro_f1": "macro F1"}.items()
        if (value := known_fraction(entry.metrics.get(key))) is not None
    ]
    return ModelCardData(
        library_name="timm",
        pipeline_tag=TASK,
        tags=TAGS,
        license=one_line(license_id) if license_id else None,
        datasets=[known] if known else None,
        model_name=one_line(name) if results else None,
        eval_results=results or None,
    )


def _example_head(info: CheckpointInfo) -> str:
    """Returns the head that validation chose; else the most accurate but the joint classifier."""
    if AUTO in info.heads:
        return AUTO
    fitted = [entry for entry in info.heads.values() if entry.kind != "linear"]
    best = max(fitted, key=lambda e: known_fraction(e.metrics.get("all")) or 0.0, default=None)
    return best.name if best else "linear"


def _other_head(info: CheckpointInfo, example: str) -> str:
    """Returns arguments that choose another head, one without a file if there is one."""
    # Every checkpoint has it, since it needs the joint classifier only.
    if example != "tau_norm":
        return '"tau_norm", tau=0.5'
    others = sorted(set(info.heads) - {example, "linear"})
    return json.dumps(others[0] if others else "linear")


def _results(info: CheckpointInfo) -> str | None:
    """Builds the table of the heads' figures; None if there are none."""
    figures = _figures(info)
    if not figures:
        return None
    columns = {
        f"{HEADINGS[name]}{_group_note(info, name)}": _ranked(values, min if name == "ece" else max)
        for name, values in figures.items()
    }
    words = {
        "options": [_options(entry) for entry in info.heads.values()],
        "selected": [plain(describe_selection(entry.selection)) for entry in info.heads.values()],
    }
    words = {key: texts for key, texts in words.items() if any(texts)}
    names = {"head": list(map(code, info.heads))}
    return table({**names, **columns, **words}, right=list(columns))


def _figures(info: CheckpointInfo) -> dict[str, list[float | None]]:
    """Returns the heads' figures by name, without those that no head has.

    The mean over classes is among them where it differs from the accuracy over images.
    """
    figures = {
        name: [known_fraction(entry.metrics.get(name)) for entry in info.heads.values()]
        for name in HEADINGS
    }
    pairs = zip(figures["all"], figures["class_mean"], strict=True)
    if all(a is None or b is None or abs(a - b) < 1e-9 for a, b in pairs):
        del figures["class_mean"]
    return {name: found for name, found in figures.items() if any(v is not None for v in found)}


def _group_note(info: CheckpointInfo, name: str) -> str:
    """Returns which classes a shot group has, as far as it is known."""
    if name not in GROUPS or info.shot_rule is None:
        return ""
    text = shot_rule_texts(info.shot_rule)[name]
    if info.class_counts is not None:
        number = int(describe_shots(info.class_counts, info.shot_rule)[name]["classes"])
        text += f", {_amount(number, 'class', 'classes')}"
    return f" ({text})"


def _ranked(values: list[float | None], best: Callable[[list[float]], float]) -> list[str]:
    """Returns figures in percent, the best of several in bold; what looks the same is the same."""
    texts = [percent(value) for value in values]
    known = [float(text) for text, value in zip(texts, values, strict=True) if value is not None]
    top = percent(best(known) / 100) if len(known) > 1 else None
    return [f"**{text}**" if text == top else text for text in texts]


def _options(entry: HeadEntry) -> str:
    """Returns the options of a head that were not selected."""
    chosen = selected_option(entry.selection)
    return ", ".join(
        code(f"{key}={brief(value)}") for key, value in entry.options.items() if key != chosen
    )


def _data(info: CheckpointInfo) -> str | None:
    counts = info.class_counts
    if counts is None:
        return None
    text = (
        f"{_amount(sum(counts), 'image', 'images')} of "
        f"{_amount(len(counts), 'class', 'classes')}: {max(counts):,} of the most frequent class, "
        f"{min(counts):,} of the rarest"
    )
    factor = f" (imbalance factor {max(counts) / min(counts):.4g})" if min(counts) else ""
    return f"{text}{factor}."


def _shots(info: CheckpointInfo) -> str | None:
    """Builds the table of shot groups; None if their rule or the counts are not known."""
    counts, rule = info.class_counts, info.shot_rule
    if counts is None or rule is None:
        return None
    members = {
        group: [n for n, inside in zip(counts, mask.tolist(), strict=True) if inside]
        for group, mask in shot_groups(counts, rule).items()
    }
    columns = {
        "classes": [f"{group_word(group)}-shot" for group in members],
        "training images of each": list(shot_rule_texts(rule).values()),
        "number": [f"{len(of_group):,}" for of_group in members.values()],
        "images in all": [f"{sum(of_group):,}" for of_group in members.values()],
    }
    return table(columns, right=["number", "images in all"])


def _class_list(info: CheckpointInfo) -> str | None:
    if info.class_counts is None or info.label_names is None:
        return None
    pairs = sorted(zip(info.label_names, info.class_counts, strict=True), key=lambda pair: -pair[1])
    items = [f"{code(label)} {count:,}" for label, count in pairs[:LISTED_CLASSES]]
    if len(pairs) > LISTED_CLASSES:
        items.append(f"and {len(pairs) - LISTED_CLASSES:,} more in `config.json`")
    return ",\n".join(items)


def _selections(info: CheckpointInfo) -> list[str]:
    items = [_selection(e) for e in info.heads.values() if selected_option(e.selection)]
    rest = [code(e.name) for e in info.heads.values() if not selected_option(e.selection)]
    if items and rest:
        items.append(f"{', '.join(rest)}: nothing, the options are defaults or were given")
    return items


def _selection(entry: HeadEntry) -> str:
    """Says how an option was selected."""
    record, option = entry.selection, selected_option(entry.selection) or ""
    compared, objective = record.get("compared"), record.get("objective")
    exact = entry.kind in EXACT and option == "tau"
    how = "the best of all values" if exact else "selected"
    if isinstance(compared, list) and (len(compared) > 1 or option == "head"):
        how = f"the best of {len(compared):,} {'heads' if option == 'head' else 'values'}"
    text = f"{code(entry.name)}: {plain(option)} = {plain(brief(record[option], 4))}, {how}"
    if isinstance(objective, str):
        text += f" for {OBJECTIVE_WORDS.get(objective) or code(objective)}"
    if isinstance(record.get("split"), str):
        text += f" on {plain(record['split'])}"
    accuracy = known_fraction(record.get("val_accuracy"))
    return text if accuracy is None else f"{text} ({percent(accuracy)} %)"


def licence_text(license_id: object) -> str:
    """Returns the sentence about the licence; metadata that has no identifier states none."""
    if not (isinstance(license_id, str) and license_id):
        return "Licence of the weights: not stated."
    return f"Licence of the weights: {code(license_id)}."


def _amount(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


OURS = ("library_name", "pipeline_tag", "model-index", "datasets", "license")
# Characters; results of a hundred heads fit.
METADATA_LIMIT = 2**17
TITLE = re.compile(r"^# .*$", re.MULTILINE)
FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\n((?:.*\n)*?)---[ \t]*(?:\n|\Z)")


def folder_card(
    folder: str | Path,
    *,
    name: str,
    repo_id: str | None = None,
    license: str | None = None,
) -> str:
    """Renders the model card of a checkpoint folder, from its config, plots and recipe.

    Args:
        folder: The checkpoint's folder.
        name: Title of the card.
        repo_id: ``namespace/name`` of the Hub, for the examples; None is the folder itself.
        license: Licence of the weights, by its identifier on the Hub.

    Raises:
        UsageError: If the folder has no readable checkpoint.
    """
    folder = Path(folder)
    return render_card(
        read_checkpoint(folder),
        name=name,
        repo_id=repo_id,
        plots=[path.name for path in (folder / PLOTS).glob("*.png")],
        recipe=read_text(folder / RECIPE),
        license=license,
    )


def write_card(folder: str | Path, *, name: str, license: str | None = None) -> None:
    """Writes the model card of a checkpoint folder, or updates the one that it has.

    Args:
        folder: The checkpoint's folder.
        name: Title of the card.
        license: Licence of the weights, by its identifier on the Hub.

    Raises:
        UsageError: If the folder has no readable checkpoint, or its card is broken.
    """
    path = Path(folder) / CARD
    fresh, old = folder_card(folder, name=name, license=license), read_text(path)
    text = fresh if old is None else update_card(old, fresh)
    if text != old:
        write_atomic(path, text)


def update_card(text: str, fresh: str) -> str:
    """Puts the generated parts of a fresh card into an existing one and keeps all else.

    Metadata of ours is replaced, tags are united, other metadata is kept. Parts that the old card
    lacks come at its end. A card without any of our parts is somebody's own and returned as it is.

    Args:
        text: The existing card.
        fresh: The card as :func:`render_card` gives it now.

    Raises:
        UsageError: If the metadata of the existing card cannot be read.
    """
    card = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if not PART.search(card):
        return text
    front, body = _split(card)
    old, new = _read_metadata(front), _read_metadata(_split(fresh)[0])
    merged = _merge(old, new)
    if merged != old:
        front = _front(merged)
    parts = {match[1]: match[0] for match in PART.finditer(fresh)}
    if "license" not in new:
        # Of the metadata that is kept; the fresh card knows of none.
        parts["licence"] = part("licence", licence_text(merged.get("license")))
    body = PART.sub(lambda match: parts.get(match[1], match[0]), body)
    there = {match[1] for match in PART.finditer(body)}
    missing = [content for key, content in parts.items() if key not in there]
    if missing:
        body = "\n\n".join([body.rstrip("\n"), *missing]) + "\n"
    return front + body


def merge_cards(local: str | None, remote: str | None, fresh: str) -> str:
    """Chooses the card to push where there is one here and one on the Hub, and updates it.

    A local card in which nobody has written gives way to that of the Hub, in which somebody may
    have. Where somebody has written into both, it is the local one that is pushed.

    Args:
        local: The card beside the checkpoint.
        remote: The card of the repo.
        fresh: The card as :func:`render_card` gives it now, for the repo.

    Raises:
        UsageError: If the metadata of the chosen card cannot be read.
    """
    mine = fresh if local is None else update_card(local, fresh)
    if remote is None or (local is not None and _own_words(local) != _own_words(fresh)):
        return mine
    if _own_words(remote) or PART.search(remote):
        # Metadata of a card without anything to read, such as a licence, goes with what is here.
        return update_card(remote, mine)
    theirs = _read_metadata(_split(remote)[0])
    front, body = _split(mine)
    return _front({**theirs, **_read_metadata(front)}) + body


def stated_license(card: str) -> object:
    """Returns the licence in the metadata of a card, None if it states none."""
    return _read_metadata(_split(card)[0]).get("license")


def _own_words(card: str) -> str:
    """Returns what stands in a card outside of its metadata, its title and its generated parts."""
    _, body = _split(card.removeprefix("\ufeff").replace("\r\n", "\n"))
    return "".join(PART.sub("", TITLE.sub("", body, count=1)).split())


def _front(metadata: dict[str, Any]) -> str:
    try:
        text = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()
    except YAML_ERRORS as error:
        raise UsageError(f"the metadata of the model card ({CARD}) is no YAML: {error}") from error
    return f"---\n{text}\n---\n"


def _split(text: str) -> tuple[str, str]:
    """Splits a card into its metadata, with the lines around it, and the text."""
    match = FRONT_MATTER.match(text)
    end = match.end() if match else 0
    return text[:end], text[end:]


def _read_metadata(front: str) -> dict[str, Any]:
    match = FRONT_MATTER.match(front)
    text = match[1] if match else ""
    if len(text) > METADATA_LIMIT:
        raise UsageError(
            f"the metadata of the model card ({CARD}) is longer than {METADATA_LIMIT:,}"
        )
    try:
        # Aliases of aliases grow without bound when they are written out.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise UsageError(f"the metadata of the model card ({CARD}) must not have aliases")
        content = yaml.safe_load(text)
    except UsageError:
        raise
    except YAML_ERRORS as error:
        raise UsageError(f"the metadata of the model card ({CARD}) is no YAML: {error}") from error
    if not (content is None or isinstance(content, dict)):
        raise UsageError(f"the metadata of the model card ({CARD}) is no mapping of keys to values")
    return content or {}


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    if not old:
        return new
    tags = old.get("tags")
    tags = tags if isinstance(tags, list) else [] if tags is None else [tags]
    tags = [*tags, *(tag for tag in new["tags"] if tag not in tags)]
    return {**new, **old, **{key: new[key] for key in OURS if key in new}, "tags": tags}
