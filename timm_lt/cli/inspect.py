"""``timm-lt inspect``: a look at a data set before training."""

import argparse
import csv
import io
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from timm_lt.cli.common import (
    STDOUT,
    Commands,
    add_command,
    add_output_options,
    check_folder,
    parse_options,
    show_result,
)
from timm_lt.cli.inspection_report import print_report
from timm_lt.cli.model_argument import check_is_list
from timm_lt.data.columns import as_rgb
from timm_lt.data.folder.source import folder, list_folder
from timm_lt.data.inspection import Inspection, inspect_splits
from timm_lt.data.lists import read_image_list
from timm_lt.data.lists.checks import absolute_root, located
from timm_lt.data.pixels import check_background
from timm_lt.data.sources import DATASETS, dataset_from_files, find_splits
from timm_lt.report.plot_counts import save_count_plot
from timm_lt.report.tables import group_word
from timm_lt.utils.checks import (
    UsageError,
    check_integer,
    check_number,
    check_options,
    unknown_name,
)
from timm_lt.utils.console import advance, progress, result_console
from timm_lt.utils.files import write_atomic
from timm_lt.utils.longtail import ShotRule, shot_groups

if TYPE_CHECKING:
    from datasets import Dataset

TABLE, PLOT = "classes.csv", "classes.png"
FOLDER, LIST = "folder", "list"


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    inspect = add_command(
        commands,
        "inspect",
        summary="look at a data set before training",
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
            train = located(options.pop("train"), absolute_root(root))
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
        if not (images.problems.found and any(images.images.get("train", {}).values())):
            raise
        datasets: dict[str, Dataset] = {}
        for split in images.images:
            paths, labels = images.files(split)
            datasets[split] = dataset_from_files(paths, labels, images.names)
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
