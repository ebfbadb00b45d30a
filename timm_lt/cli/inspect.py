"""``timm-lt inspect``: figures of a data set before training."""

import argparse
import csv
import io
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from timm_lt.cli.arguments import FOLDER, LIST, find_data
from timm_lt.cli.common import (
    STDOUT,
    Commands,
    add_command,
    add_output_options,
    check_folder,
    parse_options,
    show_result,
)
from timm_lt.data.columns import as_rgb
from timm_lt.data.folder import list_folder
from timm_lt.data.inspection import SHOWN, Duplicates, Inspection, Sizes, inspect_splits
from timm_lt.data.list_files import read_image_list
from timm_lt.data.lists import located
from timm_lt.data.sources import checked_source, dataset_from_files, find_root, find_splits
from timm_lt.report.plots import save_count_plot
from timm_lt.report.tables import group_word
from timm_lt.utils.checks import UsageError, check_background, check_integer, check_number
from timm_lt.utils.console import advance, error_text, one_line, progress, result_console
from timm_lt.utils.files import write_atomic
from timm_lt.utils.longtail import ShotRule, shot_groups

if TYPE_CHECKING:
    from datasets import Dataset

TABLE, PLOT = "classes.csv", "classes.png"


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    inspect = add_command(
        commands,
        "inspect",
        description=(
            "Prints classes, class counts, imbalance, shot groups, duplicates, unreadable files, "
            "image sizes and whatever would keep a run from training, and writes a table and a "
            "plot of the classes."
        ),
        examples=[
            "timm-lt inspect photos",
            "timm-lt inspect train.txt --root photos",
            "timm-lt inspect glyph_lt --quick",
        ],
    )
    inspect.add_argument("data", help="folder of images, list of images, or a data set's name")
    inspect.add_argument("--root", help="folder with the files of a list or a data set")
    inspect.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of the data set; may be repeated",
    )
    inspect.add_argument(
        "--background",
        default="white",
        metavar="COLOR",
        help="behind transparent pixels, e.g. black or '#808080'; default: white",
    )
    inspect.add_argument(
        "--output", type=Path, help="folder for table and plot; default: inspect_NAME"
    )
    inspect.add_argument(
        "--quick", action="store_true", help="decode no image and look for no duplicates"
    )
    inspect.add_argument(
        "--shot-rule", choices=get_args(ShotRule), default="fb", help="of the shot groups"
    )
    add_output_options(inspect, quiet="the figures")
    inspect.set_defaults(command=inspect_data)


def inspect_data(arguments: argparse.Namespace) -> None:
    """Inspects a data set, prints the figures, and writes table, plot and JSON."""
    options = parse_options(arguments.option, "min_images=5")
    data = find_data(arguments.data, arguments.root, options)
    source, root, options = data.name, data.root, dict(data.options)
    name = _data_name(source, root, options)
    output = arguments.output or Path(f"inspect_{name}")
    check_folder("--output", output)
    if source == FOLDER and root and output.resolve().is_relative_to(Path(root).resolve()):
        beside = Path(root).resolve().parent / f"inspect_{name}"
        raise UsageError(
            f"{output} would lie in the folder {root} and be taken for a class; choose a folder "
            f"elsewhere, e.g. --output {shlex.quote(str(beside))}"
        )
    background = check_background(arguments.background)
    splits, problems = _load(source, root, options)
    splits = {key: as_rgb(data, background=background) for key, data in splits.items()}
    total = None if arguments.quick else sum(map(len, splits.values()))
    with progress(f"inspecting {name}", total, unit="images") as bar:
        found = inspect_splits(
            splits,
            name=name,
            quick=arguments.quick,
            shot_rule=arguments.shot_rule,
            problems=problems,
            on_image=lambda: advance(bar),
        )
    written = _write_files(output, found)
    if arguments.json != STDOUT:
        _print_report(result_console(), found, written)
    show_result(arguments, found.to_dict(), None)


def _data_name(source: str, root: str | None, options: dict[str, Any]) -> str:
    """Returns the name of a data set: that of its folder or list, if it is one."""
    if source == FOLDER and root is not None:
        return Path(root).resolve().name
    return Path(options["train"]).stem if source == LIST and "train" in options else source


def _load(
    source: str, root: str | None, options: dict[str, Any]
) -> "tuple[dict[str, Dataset], list[str]]":
    """Returns the splits of a data set, and the problems that would keep a run from training.

    Raises:
        UsageError: If an option is wrong, or there are no images to inspect.
    """
    if source in (FOLDER, LIST):
        # A folder or list that a run would refuse is inspected all the same, with right options.
        checked_source(source, root, dict(options))
        check_number("test_fraction", options.get("test_fraction", 0.2), "(0, 1)")
        check_integer("seed", options.get("seed", 0), minimum=0)
    try:
        return {**find_splits(source, root=root, **options)}, []
    except UsageError as error:
        if root is None or source not in (FOLDER, LIST):
            raise
        if source == LIST:
            train = located(options["train"], find_root(root))
            return _listed(train, Path(root).expanduser()), error.problems
        listed = {key: options[key] for key in ("min_images", "other_files") if key in options}
        images = list_folder(Path(root).expanduser(), **listed)
        # Otherwise another option is wrong, or there is nothing to inspect.
        if not (images.problems.found and images.files["train"]):
            raise
        splits: dict[str, Dataset] = {
            split: dataset_from_files(paths, images.labels[split], images.names)
            for split, paths in images.files.items()
        }
        return splits, images.problems.found


def _listed(train: Path, root: Path) -> "dict[str, Dataset]":
    """Returns the splits of a list, whether or not its files exist."""
    found = read_image_list(train)
    return {
        split: dataset_from_files(
            [str(root.absolute() / file) for file in part.paths], part.labels, part.names
        )
        for split, part in (found.by_split() or {"train": found}).items()
    }


def _write_files(output: Path, found: Inspection) -> list[Path]:
    """Writes the table of all classes and the plot of their training images."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    train = torch.tensor(found.class_counts.get("train", []), dtype=torch.int64)
    groups = [""] * found.num_classes
    if train.any():
        for group, mask in shot_groups(train, found.shot_rule).items():
            for label in mask.nonzero().flatten().tolist():
                groups[label] = group_word(group)
    rows.writerow(["label", "name", *found.class_counts, "shot"])
    names = found.label_names or [""] * found.num_classes
    counts = zip(*found.class_counts.values(), strict=True)
    rows.writerows(
        [label, name, *count, group]
        for label, (name, count, group) in enumerate(zip(names, counts, groups, strict=True))
    )
    write_atomic(output / TABLE, text.getvalue())
    if not train.any():
        return [output / TABLE]
    save_count_plot(output / PLOT, train, found.shot_rule)
    return [output / TABLE, output / PLOT]


def _print_report(console: Console, found: Inspection, written: list[Path]) -> None:
    """Prints the figures, and last the problems that would keep a run from training."""

    def say(*lines: str) -> None:
        for line in lines:
            console.print(line, soft_wrap=True, highlight=False)

    total = sum(map(sum, found.class_counts.values()))
    say(f"[bold]{_plain(found.name)}[/]: {total:,} images of {found.num_classes} classes")
    console.print(_splits_table(found))
    if found.shots:
        say(
            f"imbalance factor {found.imbalance_factor:.4g} (largest / smallest class of train); "
            f"imbalance ratio {found.imbalance_ratio:.4g} (mean over the classes of largest / "
            "class: MeanIR of Charte et al., 2015)",
        )
        console.print(_shot_table(found), _class_table(found))
    say(*_duplicates(found.duplicates, found.label_names), *_unreadable(found))
    say(*_sizes(found.sizes) if found.sizes else ())
    say(f"written: {', '.join(_plain(str(path)) for path in written)}")
    number = len(found.problems)
    if not number:
        say("[bold]none of this keeps a run from training[/]")
        return
    say(f"[bold]{number} problem{'s' * (number > 1)} would keep a run from training:[/]")
    say(*(f"- {escape(error_text(problem))}" for problem in found.problems))


def _plain(text: str, limit: int = 60) -> str:
    """Returns a name that comes from a file, safe for a terminal."""
    return escape(one_line(text, limit)) or "''"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _splits_table(found: Inspection) -> Table:
    table = _table("split", "images", "classes", "largest", "smallest")
    for split, counts in found.class_counts.items():
        present = [count for count in counts if count] or [0]
        words = split
        if split == "val" and found.val_source == "train":
            words = "val (held out of train by a run)"
        elif split == "train" and len(found.class_counts) == 1:
            words = "train (nothing is held out yet)"
        numbers = sum(counts), sum(map(bool, counts)), max(present), min(present)
        table.add_row(words, *(f"{number:,}" for number in numbers))
    return table


def _shot_table(found: Inspection) -> Table:
    table = _table("shot group", "training images of a class", "classes", "images")
    for group, shot in found.shots.items():
        numbers = f"{shot['classes']:,}", f"{shot['images']:,}"
        table.add_row(group_word(group), str(shot["rule"]), *numbers)
    return table


def _class_table(found: Inspection) -> Table:
    """The largest and the smallest classes of train."""
    train = torch.tensor(found.class_counts["train"])
    order = train.argsort(descending=True, stable=True).tolist()
    table = _table("class", "label", *found.class_counts)
    for rank, label in enumerate(order):
        if SHOWN <= rank < len(order) - SHOWN:
            if rank == SHOWN:
                table.add_row("...")
            continue
        name = _plain(found.label_names[label], 40) if found.label_names else "-"
        counts = [f"{counts[label]:,}" for counts in found.class_counts.values()]
        table.add_row(name, str(label), *counts)
    return table


def _duplicates(found: Duplicates | None, names: list[str] | None) -> Iterator[str]:
    if found is None:
        yield "duplicates: not looked for"
        return
    numbers = {f"within {split}": (split, number) for split, number in found.within.items()}
    for key, number in found.across.items():
        first, second = key.split(", ")
        numbers[f"of {second} also in {first}"] = (key, number)
    numbers["under two labels"] = ("conflicts", found.conflicts)
    any_found = any(number for _, number in numbers.values())
    yield f"duplicates (images with the same bytes){'' if any_found else ': none'}"
    for words, (key, number) in numbers.items():
        if number:
            yield f"  {words}: {number:,}"
        for pair in found.pairs.get(key, []):
            labels = [names[image.label] if names else f"label {image.label}" for image in pair]
            yield "    " + " = ".join(
                f"{image.split} {_plain(image.name, 200)}, {_plain(label, 40)}"
                for image, label in zip(pair, labels, strict=True)
            )
        if number > SHOWN:
            yield "    ..."


def _unreadable(found: Inspection) -> Iterator[str]:
    how = "by header and end of the files" if found.duplicates is None else "all were decoded"
    number = sum(map(len, found.unreadable.values()))
    yield f"unreadable images ({how}): {number or 'none'}"
    for split, images in found.unreadable.items():
        for image in images[:SHOWN]:
            yield f"  {split} {_plain(image.name, 200)}: {_plain(image.reason, 100)}"
        if len(images) > SHOWN:
            yield f"  {split}: ... {len(images):,} in all"


def _sizes(sizes: Sizes) -> Iterator[str]:
    width, height = (" / ".join(f"{n:,}" for n in side) for side in (sizes.width, sizes.height))
    yield f"sizes (smallest / median / largest): width {width}, height {height}"
    frequent = (f"{width}x{height} ({number:,})" for width, height, number in sizes.most_frequent)
    yield f"  most frequent, width x height: {', '.join(frequent)}"
    modes, formats = (
        ", ".join(f"{_plain(name)} ({number:,})" for name, number in numbers.items())
        for numbers in (sizes.modes, sizes.formats)
    )
    yield f"  modes: {modes}; formats: {formats}"
    limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
    for words, number in {
        "with transparency (composited onto --background)": sizes.transparent,
        "with more than 8 bits per channel, of which 8 are kept": sizes.deep,
        "of a single colour when decoded": sizes.one_color,
        f"of more than {limit:.0f} million pixels, read all the same": sizes.huge,
    }.items():
        if number:
            yield f"  {words}: {number:,}"
