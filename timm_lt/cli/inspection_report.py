"""What ``timm-lt inspect`` prints."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from timm_lt.data.duplicates import Twin
from timm_lt.data.inspection import Inspection
from timm_lt.data.verification import Damage
from timm_lt.report.tables import group_word
from timm_lt.utils.console import error_text, one_line

# Classes, pairs and files that are listed.
SHOWN = 5


def print_report(console: Console, found: Inspection, written: list[Path]) -> None:
    """Prints what was found, and last what would keep a run from training."""
    total = sum(map(sum, found.class_counts.values()))
    _say(console, f"[bold]{_plain(found.name)}[/]: {total:,} images of {found.num_classes} classes")
    console.print(_splits_table(found))
    if found.shots:
        _say(
            console,
            f"imbalance factor {found.imbalance_factor:.4g} (largest / smallest class of train); "
            f"imbalance ratio {found.imbalance_ratio:.4g} (mean over the classes of largest / "
            "class: MeanIR of Charte et al., 2015)",
        )
        console.print(_shot_table(found))
        console.print(_class_table(found))
    for line in (*_duplicates(found), *_unreadable(found), *_sizes(found)):
        _say(console, line)
    _say(console, f"written: {', '.join(_plain(str(path)) for path in written)}")
    if not found.problems:
        _say(console, "[bold]nothing of this keeps a run from training[/]")
        return
    number = len(found.problems)
    _say(console, f"[bold]{number} problem{'s' * (number > 1)} would keep a run from training:[/]")
    for problem in found.problems:
        _say(console, f"- {escape(error_text(problem))}")


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False)


def _plain(text: str, limit: int = 60) -> str:
    """Returns a name out of a file as it may be printed."""
    return escape(one_line(text, limit)) or "''"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _splits_table(found: Inspection) -> Table:
    table = _table("split", "images", "classes", "largest", "smallest")
    for split, counts in found.class_counts.items():
        present = [count for count in counts if count]
        words = split
        if split == "val" and found.val_source == "train":
            words = "val (held out of train by a run)"
        elif split == "train" and len(found.class_counts) == 1:
            words = "train (nothing is held out yet)"
        table.add_row(
            words,
            f"{sum(counts):,}",
            f"{len(present):,}",
            f"{max(present, default=0):,}",
            f"{min(present, default=0):,}",
        )
    return table


def _shot_table(found: Inspection) -> Table:
    table = _table("shot group", "training images of a class", "classes", "images")
    for group, shot in found.shots.items():
        table.add_row(
            group_word(group), str(shot["rule"]), f"{shot['classes']:,}", f"{shot['images']:,}"
        )
    return table


def _class_table(found: Inspection) -> Table:
    """The largest and the smallest classes of train."""
    train = torch.tensor(found.class_counts["train"])
    order = train.argsort(descending=True, stable=True).tolist()
    splits = list(found.class_counts)
    table = _table("class", "label", *splits)
    for place, label in enumerate(order):
        if SHOWN <= place < len(order) - SHOWN:
            if place == SHOWN:
                table.add_row("...")
            continue
        name = _plain(found.label_names[label], 40) if found.label_names else "-"
        counts = [f"{found.class_counts[split][label]:,}" for split in splits]
        table.add_row(name, str(label), *counts)
    return table


def _duplicates(found: Inspection) -> Iterable[str]:
    twins = found.duplicates
    if twins is None:
        yield "duplicates: not looked for"
        return
    counted = {f"within {split}": (split, number) for split, number in twins.within.items()}
    for key, number in twins.across.items():
        first, second = key.split(", ")
        counted[f"of {second} also in {first}"] = (key, number)
    counted["under two labels"] = ("conflicts", twins.conflicts)
    if not any(number for _, number in counted.values()):
        yield "duplicates (images with the same bytes): none"
        return
    yield "duplicates (images with the same bytes)"
    for words, (key, number) in counted.items():
        if number:
            yield f"  {words}: {number:,}"
            for pair in twins.pairs[key]:
                yield "    " + " = ".join(_twin(twin, found) for twin in pair)
            if number > SHOWN:
                yield "    ..."


def _twin(twin: Twin, found: Inspection) -> str:
    label = found.label_names[twin.label] if found.label_names else f"label {twin.label}"
    return f"{twin.split} {_plain(twin.name, 200)}, {_plain(label, 40)}"


def _unreadable(found: Inspection) -> Iterable[str]:
    how = "by a look at both ends of the files" if found.is_quick else "all were decoded"
    number = sum(map(len, found.unreadable.values()))
    yield f"unreadable images ({how}): {number or 'none'}"
    for split, damaged in found.unreadable.items():
        yield from _damaged(split, damaged)


def _damaged(split: str, damaged: list[Damage]) -> Iterable[str]:
    for one in damaged[:SHOWN]:
        yield f"  {split} {_plain(one.name, 200)}: {_plain(one.reason, 100)}"
    if len(damaged) > SHOWN:
        yield f"  {split}: ... {len(damaged):,} in all"


def _sizes(found: Inspection) -> Iterable[str]:
    sizes = found.sizes
    if sizes is None:
        return
    yield (
        f"sizes (smallest / median / largest): width {_spread(sizes.width)}, height "
        f"{_spread(sizes.height)}"
    )
    frequent = (f"{width}x{height} ({number:,})" for width, height, number in sizes.most_frequent)
    yield f"  most frequent, width x height: {', '.join(frequent)}"
    yield f"  modes: {_counted(sizes.modes)}; formats: {_counted(sizes.formats)}"
    if sizes.transparent:
        yield f"  with transparency: {sizes.transparent:,} (composited onto --background)"
    if sizes.deep:
        yield f"  with more than 8 bits per channel, of which 8 are kept: {sizes.deep:,}"
    if sizes.one_color:
        yield f"  of one colour only when decoded: {sizes.one_color:,}"
    if sizes.huge:
        limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        yield f"  of more than {limit:.0f} million pixels, read all the same: {sizes.huge:,}"


def _spread(lengths: tuple[int, int, int]) -> str:
    return " / ".join(f"{length:,}" for length in lengths)


def _counted(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{_plain(name)} ({number:,})" for name, number in numbers.items())
