"""``timm-lt inspect``: a look at a data set before training.

What ``timm-lt inspect`` prints.
"""

import argparse
import csv
import io
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from timm_lt.cli.arguments import check_is_list
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
from timm_lt.data.decode import Damage
from timm_lt.data.folder import folder, list_folder
from timm_lt.data.inspection import Inspection, Twin, inspect_splits
from timm_lt.data.list_files import read_image_list
from timm_lt.data.lists import located
from timm_lt.data.sources import DATASETS, dataset_from_files, find_root, find_splits
from timm_lt.report.plots import save_count_plot
from timm_lt.report.tables import group_word
from timm_lt.utils.checks import (
    UsageError,
    check_background,
    check_integer,
    check_number,
    check_options,
    unknown_name,
)
from timm_lt.utils.console import advance, error_text, one_line, progress, result_console
from timm_lt.utils.files import write_atomic
from timm_lt.utils.longtail import ShotRule, shot_groups

if TYPE_CHECKING:
    from datasets import Dataset

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


TABLE, PLOT = "classes.csv", "classes.png"
FOLDER, LIST = "folder", "list"


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
        help="behind transparent pixels, e.g. black or '#808080'; white unless given",
    )
    inspect.add_argument(
        "--output", type=Path, help="folder for table and plot; inspect_NAME unless given"
    )
    inspect.add_argument(
        "--quick", action="store_true", help="decode no image and look for no duplicates"
    )
    inspect.add_argument(
        "--shot-rule", choices=get_args(ShotRule), default="fb", help="of the shot groups"
    )
    add_output_options(inspect, quiet="what was found")
    inspect.set_defaults(command=inspect_data)


def inspect_data(arguments: argparse.Namespace) -> None:
    """Inspects a data set, prints what it finds, and writes table, plot and JSON."""
    options = parse_options(arguments.option, "min_images=5")
    _check_place(arguments.output)
    name, datasets, problems = find_data(arguments.data, arguments.root, options, arguments.output)
    background = check_background(arguments.background)
    datasets = {key: as_rgb(data, background=background) for key, data in datasets.items()}
    output = arguments.output or default_output(name)
    _check_place(output)
    total = None if arguments.quick else sum(map(len, datasets.values()))
    with progress(f"looking at {name}", total, unit="images") as bar:
        found = inspect_splits(
            datasets,
            name=name,
            quick=arguments.quick,
            shot_rule=arguments.shot_rule,
            problems=problems,
            on_image=lambda: advance(bar),
        )
    written = write_files(output, found)
    if arguments.json != STDOUT:
        print_report(result_console(), found, written)
    show_result(arguments, found.to_dict(), None)


def _check_place(output: Path | None) -> None:
    """Checks, before anything is looked at, that what is found can be written."""
    if output is not None:
        check_folder("--output", output)


def find_data(
    data: str, root: str | None, options: dict[str, Any], output: Path | None
) -> "tuple[str, Mapping[str, Dataset], list[str]]":
    """Finds what a user means by a folder, a list or a name.

    Returns:
        A name, the splits, and what of them would keep a run from training.

    Raises:
        UsageError: If there is no such thing, it has no images that could be looked at, or table
            and plot would be written into a folder of images.
    """
    path = Path(data).expanduser()
    if data == FOLDER and root is not None:
        path, root = Path(root).expanduser(), None
    elif data in DATASETS and not (data == FOLDER and path.is_dir()):
        if data == LIST and root is not None and isinstance(options.get("train"), str):
            train = located(options.pop("train"), find_root(root))
            return data, *_list(train, root, options)
        return data, find_splits(data, root=root, **options), []
    if path.is_dir() or data == FOLDER:
        if root is not None:
            raise UsageError("--root is for lists and data sets: a folder is its own root")
        name = path.resolve().name
        check_output(output or default_output(name), path)
        return name, *_folder(path, options)
    if path.is_file():
        check_is_list(path)
        return path.stem, *_list(path, root, options)
    raise unknown_name("data set (and no such folder or list):", data, list(DATASETS))


def default_output(name: str) -> Path:
    """Returns the folder for table and plot unless another is given."""
    return Path(f"inspect_{name}")


def check_output(output: Path, root: Path) -> None:
    """Checks that nothing is written into a folder of images.

    Raises:
        UsageError: If the output is in it.
    """
    if output.resolve().is_relative_to(root.resolve()):
        beside = root.resolve().parent / default_output(root.resolve().name)
        raise UsageError(
            f"{output} would lie in the folder {root} and be taken for a class: give a folder "
            f"elsewhere, e.g. --output {shlex.quote(str(beside))}"
        )


def _check_part(options: dict[str, Any]) -> None:
    """Checks the options of what is held out: data that are looked at anyway do not need them."""
    check_number("test_fraction", options.get("test_fraction", 0.2), "(0, 1)")
    check_integer("seed", options.get("seed", 0), minimum=0)


def _folder(path: Path, options: dict[str, Any]) -> "tuple[Mapping[str, Dataset], list[str]]":
    """Returns the splits of a folder; of one that is no good for a run, whatever there is."""
    check_options(f"data set {FOLDER!r}", folder, {"root": path, **options})
    _check_part(options)
    try:
        return find_splits(FOLDER, root=path, **options), []
    except UsageError:
        listed = {key: options[key] for key in ("min_images", "other_files") if key in options}
        images = list_folder(path, **listed)
        # Else it is another option that is wrong, or there is nothing to look at.
        if not (images.problems.found and images.files["train"]):
            raise
        datasets: dict[str, Dataset] = {
            split: dataset_from_files(paths, images.labels[split], images.names)
            for split, paths in images.files.items()
        }
        return datasets, images.problems.found


def _list(
    path: Path, root: str | None, options: dict[str, Any]
) -> "tuple[Mapping[str, Dataset], list[str]]":
    """Returns the splits of a list of training images; of a bad one, whatever there is."""
    start = Path(root).expanduser() if root is not None else path.parent
    check_options(f"data set {LIST!r}", DATASETS[LIST], {"root": start, "train": path} | options)
    _check_part(options)
    try:
        return find_splits(LIST, root=start, train=path.resolve(), **options), []
    except UsageError as error:
        found = read_image_list(path)
        parts = found.by_split() or {"train": found}
        return {
            split: dataset_from_files(
                [str(start.absolute() / file) for file in part.paths], part.labels, part.names
            )
            for split, part in parts.items()
        }, error.problems


def write_files(output: Path, found: Inspection) -> list[Path]:
    """Writes the table of all classes and the plot of their training images."""
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    splits = list(found.class_counts)
    train = torch.tensor(found.class_counts.get("train", []), dtype=torch.int64)
    groups = [""] * found.num_classes
    if train.any():
        for group, mask in shot_groups(train, found.shot_rule).items():
            for label in mask.nonzero().flatten().tolist():
                groups[label] = group_word(group)
    rows.writerow(["label", "name", *splits, "shot"])
    for label in range(found.num_classes):
        counts = [found.class_counts[split][label] for split in splits]
        name = found.label_names[label] if found.label_names else ""
        rows.writerow([label, name, *counts, groups[label]])
    write_atomic(output / TABLE, table.getvalue())
    if not train.any():
        return [output / TABLE]
    save_count_plot(output / PLOT, train, found.shot_rule)
    return [output / TABLE, output / PLOT]
