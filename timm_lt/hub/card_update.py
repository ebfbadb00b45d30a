"""A card that is there already: what is generated in it changes, what a person wrote stays."""

import re
from pathlib import Path
from typing import Any

import yaml

from timm_lt.checkpoint import CARD, PLOTS, RECIPE, read_checkpoint
from timm_lt.hub.card import licence_text, render_card
from timm_lt.hub.markdown import PART, part
from timm_lt.utils.checks import UsageError
from timm_lt.utils.files import YAML_ERRORS, read_text, write_atomic

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
