"""``timm-lt inspect``: figures of a data set before training."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from jinja2 import Environment, StrictUndefined
from PIL import Image
from rich import box
from rich.markup import escape
from rich.table import Table

from timm_lt.cli import inputs
from timm_lt.cli.common import (
    Commands,
    add_command,
    add_output_options,
    check_folder,
    parse_options,
    show_result,
)
from timm_lt.data.folder import list_folder
from timm_lt.data.inspection import SHOWN, Inspection, inspect_splits
from timm_lt.data.items import as_rgb
from timm_lt.data.list_files import read_image_list
from timm_lt.data.lists import located
from timm_lt.data.sources import dataset_from_files, find_root, find_splits
from timm_lt.metrics import write_per_class
from timm_lt.report.plots import save_count_plot
from timm_lt.report.tables import group_word
from timm_lt.run.recipe import DataRecipe
from timm_lt.utils.checks import UsageError, check_background
from timm_lt.utils.console import advance, error_text, one_line, progress, result_console
from timm_lt.utils.longtail import ShotRule, shot_groups

if TYPE_CHECKING:
    from datasets import Dataset

TABLE, PLOT = "classes.csv", "classes.png"


def add_inspect(commands: Commands) -> None:
    """Adds the command to the parser."""
    inspect = add_command(commands, "inspect", inspect_data)
    add = inspect.add_argument
    add("data", help=inputs.DATA_HELP)
    inputs.add_data_options(inspect)
    add("--background", default="white", metavar="COLOR", help=f"{inputs.BACKGROUND_HELP} white")
    add("--output", type=Path, help="folder for table and plot; inspect_NAME by default")
    add("--quick", action="store_true", help="decode no image and look for no duplicates")
    add("--shot-rule", choices=get_args(ShotRule), default="fb", help="rule of the shot groups")
    add_output_options(inspect, quiet="the figures")


def inspect_data(arguments: argparse.Namespace) -> None:
    """Prints the figures of a data set, and whatever would keep a run from training.

    These are classes, class counts, imbalance, shot groups, duplicates, unreadable files and image
    sizes. Writes a table and a plot of the classes.

    Examples:
        timm-lt inspect photos
        timm-lt inspect train.txt --root photos
        timm-lt inspect glyph_lt --quick
    """
    options = parse_options(arguments.option, "min_images=5")
    data = inputs.find_data(arguments.data, arguments.root, options)
    is_list = data.name == "list" and "train" in data.options
    name = Path(data.options["train"]).stem if is_list else Path(data.title).name
    output = arguments.output or Path(f"inspect_{name}")
    check_folder("--output", output)
    root = None if data.root is None else Path(data.root).expanduser().resolve()
    if data.name == "folder" and root and output.resolve().is_relative_to(root):
        raise UsageError(
            f"{output} would lie in the folder {data.root} and be taken for a class; choose an "
            "--output elsewhere"
        )
    background = check_background(arguments.background)
    splits, problems = _load(data)
    splits = {split: as_rgb(rows, background=background) for split, rows in splits.items()}
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
    show_result(arguments, found.to_dict(), _report(found, written))


def _load(data: DataRecipe) -> "tuple[dict[str, Dataset], list[str]]":
    """Returns the splits of a data set, and the problems that would keep a run from training.

    A folder or list that a run would refuse is inspected all the same.
    """
    source, root, options = data.name, data.root, dict(data.options)
    try:
        return {**find_splits(source, root=root, **options)}, []
    except UsageError as error:
        if root is None or (source != "folder" and "train" not in options):
            raise
        refusal, problems = error, error.problems
    path = Path(root).expanduser().absolute()
    if source == "folder":
        listed = {key: options[key] for key in ("min_images", "other_files") if key in options}
        images = list_folder(path, **listed)
        problems = images.problems.found
        # Otherwise an option is wrong, or there is nothing to inspect.
        if not (problems and images.files["train"]):
            raise refusal
        found: dict[str, Any] = {
            split: (images.files[split], images.labels[split], images.names)
            for split in images.files
        }
    else:
        files = read_image_list(located(options["train"], find_root(root)))
        parts = files.by_split() or {"train": files}
        found = {
            split: ([str(path / file) for file in part.paths], part.labels, part.names)
            for split, part in parts.items()
        }
    return {split: dataset_from_files(*rows) for split, rows in found.items()}, problems


def _write_files(output: Path, found: Inspection) -> list[Path]:
    """Writes the table of all classes and the plot of their training images."""
    train = torch.tensor(found.class_counts.get("train", []), dtype=torch.int64)
    groups = [""] * found.num_classes
    for group, mask in shot_groups(train, found.shot_rule).items() if train.any() else ():
        for label in mask.nonzero().flatten().tolist():
            groups[label] = group_word(group)
    names = found.label_names or [""] * found.num_classes
    columns = ("label", "name", *found.class_counts, "shot")
    rows = zip(range(found.num_classes), names, *found.class_counts.values(), groups, strict=True)
    write_per_class(output / TABLE, [dict(zip(columns, row, strict=True)) for row in rows])
    if not train.any():
        return [output / TABLE]
    save_count_plot(output / PLOT, train, found.shot_rule)
    return [output / TABLE, output / PLOT]


def _report(found: Inspection, written: list[Path]) -> str:
    """Returns the figures, and last the problems that would keep a run from training."""
    environment = Environment(undefined=StrictUndefined)
    environment.filters |= {"one_line": one_line, "error_text": error_text, "number": "{:,}".format}
    template = Path(__file__).with_name("inspect.txt").read_text(encoding="utf-8")
    text: str = environment.from_string(template).render(
        found=found,
        written=written,
        total=sum(map(sum, found.class_counts.values())),
        table=_table,
        split_rows=_split_rows(found),
        shot_rows=[
            (group_word(group), shot["rule"], shot["classes"], shot["images"])
            for group, shot in found.shots.items()
        ],
        class_rows=_class_rows(found),
        limit=SHOWN,
        pixels=(Image.MAX_IMAGE_PIXELS or 0) / 1e6,
    )
    return text


def _table(columns: Sequence[str], rows: Iterable[Sequence[str | int]]) -> str:
    """Returns a table as text for standard output."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(escape(cell) if isinstance(cell, str) else f"{cell:,}" for cell in row))
    console = result_console()
    with console.capture() as text:
        console.print(table)
    return text.get()


def _split_rows(found: Inspection) -> Iterator[tuple[str | int, ...]]:
    notes = {"val": " (held out of train by a run)"} if found.val_source == "train" else {}
    if list(found.class_counts) == ["train"]:
        notes = {"train": " (nothing is held out yet)"}
    for split, counts in found.class_counts.items():
        present = [count for count in counts if count] or [0]
        words = split + notes.get(split, "")
        yield words, sum(counts), sum(map(bool, counts)), max(present), min(present)


def _class_rows(found: Inspection) -> Iterator[tuple[str | int, ...]]:
    """Yields the largest and the smallest classes of train."""
    train = torch.tensor(found.class_counts.get("train", []))
    order = train.argsort(descending=True, stable=True).tolist()
    for rank, label in enumerate(order):
        if not SHOWN <= rank < len(order) - SHOWN:
            name = one_line(found.label_names[label], 40) if found.label_names else "-"
            yield name, str(label), *(counts[label] for counts in found.class_counts.values())
        elif rank == SHOWN:
            yield ("...",)
