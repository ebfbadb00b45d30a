"""``timm-lt predict``: the most probable classes of images."""

import argparse
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm.data
import torch
from rich.markup import escape
from rich.table import Column, Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from timm_lt.checkpoint import background_of
from timm_lt.cli import inputs
from timm_lt.cli.common import Commands, add_command, add_log_options, as_json, positive, say
from timm_lt.data.decode import ImageError, decode_image, shown_path
from timm_lt.data.folder import IMAGE_SUFFIXES, Found, counted_suffixes, find_images, suffix
from timm_lt.models.create import image_config, label_names
from timm_lt.models.repo import ModelSource
from timm_lt.run.network import class_orders
from timm_lt.run.recipe import ClassOrder, prefixed
from timm_lt.utils.accelerator import default_device, set_cpu_threads
from timm_lt.utils.checks import UsageError, check_background, shown_names
from timm_lt.utils.console import log, one_line, result_console
from timm_lt.utils.files import read_text, write_atomic

BATCH_SIZE = 32
# Number of files that are named in the log because they are not images.
SHOWN_OTHERS = 100
# Photos that Pillow does not decode, or of which it decodes a preview.
PHOTOS = frozenset(
    (
        *("heic", "heif", "avci", "jxl", "3fr", "arw", "cr2", "cr3", "dng", "nef", "orf", "pef"),
        *("raf", "raw", "rw2", "srw"),
    )
)
FORMATS = ("table", "csv", "json")


def add_predict(commands: Commands) -> None:
    """Adds the command to the parser."""
    predict = add_command(commands, "predict", predict_images)
    add = predict.add_argument
    add("model", help=inputs.MODEL_HELP)
    add("images", nargs="+", metavar="IMAGE", help="files and folders; skipped files are named")
    add("--head", metavar="NAME", help="the joint classifier by default")
    inputs.add_weights_options(predict, "weights for that architecture")
    number = "number of classes; by default that in the file of --checkpoint"
    add("--classes", type=int, metavar="C", help=number)
    names = (
        "UTF-8 text file with one class name per line, the first that of class 0, in place of the "
        "model's own names; without either, classes are numbers"
    )
    add("--names", type=Path, metavar="FILE", help=names)
    add("--top", type=positive, default=3, metavar="N", help="classes of each image; 3 by default")
    form = predict.add_mutually_exclusive_group()
    form.add_argument("--format", choices=FORMATS, help="table, or the ending of --output")
    form.add_argument("--json", action="store_const", const="json", dest="format", help="JSON")
    add("--output", type=Path, metavar="FILE", help="write CSV or JSON there")
    inputs.add_compute_options(predict, workers=0)
    add_log_options(predict, quiet="the predictions")


def predict_images(arguments: argparse.Namespace) -> None:
    """Prints the most probable classes of images.

    Examples:
        timm-lt predict output/birds a.jpg b.jpg --head tau_norm
        timm-lt predict resnet50 photos --format csv --top 1
        timm-lt predict hf-hub:me/birds a.jpg --format json
        timm-lt predict resnet50 a.jpg --checkpoint own.pth --names names.txt
    """
    set_cpu_threads(arguments.threads)
    output, given = arguments.output, arguments.background
    form = arguments.format or ("table" if output is None else output.suffix[1:].lower())
    if output is not None and form not in FORMATS[1:]:
        raise UsageError(f"--output {output}: give --format csv or --format json")
    background = None if given == "auto" else check_background(given)
    paths, errors = find_files(arguments.images)
    options = {} if arguments.classes is None else {"num_classes": arguments.classes}
    name = ModelSource.parse(arguments.model, bare_repo=True).name
    recipe = inputs.model_recipe(arguments, name)
    model = inputs.load_model(recipe, arguments.image_size, head=arguments.head, **options)
    names = class_names(model, arguments.names, arguments.class_order)
    files = ImageFiles(paths, model, background or background_of(model), errors)
    found = predict_files(model, files, names=names, top=arguments.top, workers=arguments.workers)
    text = as_json(found) if form == "json" else _csv(found)
    if form == "table":
        result_console().print(_table(found))
    elif output is None:
        say(text)
    else:
        write_atomic(output, f"{text}\n")
        log.info("wrote %s", output)
    damaged = [f"{row['image']} ({row['error']})" for row in found if "error" in row]
    if damaged:
        raise UsageError(
            f"{len(damaged)} of {len(found)} images cannot be read: {shown_names(damaged)}"
        )


def find_files(given: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Returns the images among files and in folders, sorted, and why some cannot be read, by path.

    Photos that Pillow cannot decode are among them; other files of a folder are logged.
    """
    paths: list[str] = []
    others: list[str] = []
    errors: dict[str, str] = {}
    for path in (Path(text).expanduser() for text in given):
        if not (path.is_dir() or path.is_file()):
            raise UsageError(f"{path} does not exist; expected an image or a folder of images")
        found = find_images(str(path)) if path.is_dir() else Found(images=[str(path)])
        photos = [other for other in found.others if suffix(other) in PHOTOS]
        images = sorted([*found.images, *photos, *found.broken])
        if not images:
            only = f"; found only {counted_suffixes(found.others)}" if found.others else ""
            raise UsageError(f"no images in {path}{only}")
        errors |= found.broken
        paths += images
        others += [other for other in found.others if other not in photos]
    if others:
        names = shown_names([shown_path(other) for other in others], SHOWN_OTHERS)
        count = counted_suffixes(others)
        log.warning("not images by their suffix, skipped: %d (%s): %s", len(others), count, names)
    for text in paths:
        # Camera raw is a TIFF whose first image is a preview.
        if (end := suffix(text)) not in ("", *IMAGE_SUFFIXES):
            errors.setdefault(
                text, f"files with the suffix .{end} are not read; convert images to JPEG"
            )
    return paths, errors


class ImageFiles(Dataset[tuple[Tensor, str]]):
    """Image files as a model takes them, or why they cannot be read."""

    def __init__(
        self, paths: Sequence[str], model: nn.Module, background: str, errors: Mapping[str, str]
    ) -> None:
        self.paths, self.background, self.errors = paths, background, errors
        self.transform: Any = timm.data.create_transform(**image_config(model))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        path = self.paths[index]
        if path in self.errors:
            return torch.empty(0), self.errors[path]
        try:
            image = decode_image({"path": path, "bytes": None}, background=self.background)
        except ImageError as error:
            return torch.empty(0), str(error)
        return self.transform(image), ""


def class_names(model: nn.Module, file: Path | None, order: ClassOrder | None) -> list[str] | None:
    """Returns the names of a model's classes, (C,), from a file or the model; None if unknown."""
    if file is None:
        if order is not None:
            raise UsageError("--class-order is for the names of --names; remove it, or give these")
        own = label_names(model)
        return None if own is None else [one_line(name, 200) for name in own]
    with prefixed("--names"):
        text = read_text(file.expanduser())
    lines = (text or "").removeprefix("\ufeff").rstrip().splitlines()
    names = [one_line(line, 200) for line in lines]
    if len(names) != model.num_classes or "" in names:
        found = "does not exist" if text is None else f"has {len([*filter(None, names)])} names"
        raise UsageError(
            f"--names: {file} {found}; write a line with the name of each of the model's "
            f"{model.num_classes} classes, in their order"
        )
    orders = class_orders(names)
    if order is None and names == orders["sorted"] != orders["timm"]:
        log.warning(
            "the names are sorted, and the weights must have the same order; if they number the "
            "classes as timm does, say --class-order timm (%s)",
            shown_names(orders["timm"]),
        )
    return names if order is None else orders[order]


def predict_files(
    model: nn.Module, files: ImageFiles, *, names: list[str] | None, top: int, workers: int
) -> list[dict[str, Any]]:
    """Returns each ``image`` with its most probable ``classes``, by softmax, or its ``error``.

    Without names, the classes are their numbers.
    """
    loader: DataLoader[Any] = DataLoader(files, BATCH_SIZE, num_workers=workers, collate_fn=list)
    device = default_device()
    model = model.to(device)
    found: list[dict[str, Any]] = []
    for batch in loader:
        best: Iterator[tuple[list[float], list[int]]] = iter(())
        readable = [image for image, error in batch if not error]
        if readable:
            with torch.inference_mode():
                shares = model(torch.stack(readable).to(device)).softmax(dim=1)
            chosen = shares.topk(min(top, shares.shape[1]))
            best = zip(chosen.values.tolist(), chosen.indices.tolist(), strict=True)
        for _, error in batch:
            pairs = [] if error else zip(*next(best), strict=True)
            classes = [
                {"name": names[label] if names else str(label), "probability": share}
                for share, label in pairs
            ]
            row = {"image": files.paths[len(found)], "classes": classes}
            found.append(row | ({"error": error} if error else {}))
    return found


def _table(found: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("image", "class", Column("%", justify="right"), box=None, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    for row in found:
        image = escape(row["image"])
        if "error" in row:
            table.add_row(image, f"[dim]{escape('({error})'.format(**row))}", "")
        for rank, best in enumerate(row["classes"]):
            share = f"{100 * best['probability']:.1f}"
            table.add_row("" if rank else image, escape(best["name"]), share)
    return table


def _csv(found: Sequence[Mapping[str, Any]]) -> str:
    """Returns a row for each image, with a column ``error`` if some cannot be read."""
    rows = []
    for entry in found:
        rows.append({key: entry[key] for key in ("image", "error") if key in entry})
        for rank, best in enumerate(entry["classes"], 1):
            share = f"{best['probability']:.6f}"
            rows[-1] |= {f"class_{rank}": best["name"], f"probability_{rank}": share}
    columns = sorted(dict.fromkeys(key for row in rows for key in row), key="error".__eq__)
    text = io.StringIO()
    table = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().rstrip("\n")
