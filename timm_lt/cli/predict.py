"""``timm-lt predict``: what a model sees in images."""

import argparse
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import timm.data
import torch
from PIL import Image
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from timm_lt.checkpoint import background_of
from timm_lt.cli.arguments import (
    MODEL_HELP,
    add_background_option,
    add_weights_options,
    class_names,
    load_model,
    model_options,
)
from timm_lt.cli.common import Commands, add_command, add_log_options, as_json, say
from timm_lt.data.decode import (
    DAMAGE,
    check_background,
    damage_of,
    decode_image,
    describe_huge,
    is_huge,
    shown_path,
)
from timm_lt.data.folder import HEIC_SUFFIXES, counted_suffixes, find_images, suffix
from timm_lt.models.create import image_config
from timm_lt.run.network import class_orders
from timm_lt.run.recipe import ClassOrder
from timm_lt.utils.accelerator import default_device, set_cpu_threads
from timm_lt.utils.checks import UsageError, check_integer, shown_names
from timm_lt.utils.console import log, one_line, result_console
from timm_lt.utils.files import write_atomic

BATCH_SIZE = 32
# Raw files of cameras, of which Pillow would decode a preview at most.
RAW_SUFFIXES = frozenset(
    (
        *("3fr", "arw", "cr2", "cr3", "crw", "dcr", "dng", "erf", "fff", "iiq", "k25", "kdc"),
        *("mef", "mos", "mrw", "nef", "nrw", "orf", "pef", "raf", "raw", "rw2", "rwl", "sr2"),
        *("srf", "srw", "x3f"),
    )
)
# Images that no folder of a run has, since Pillow does not decode them or only in part.
UNUSUAL_SUFFIXES = frozenset(
    (
        *(*RAW_SUFFIXES, *HEIC_SUFFIXES, "hif", "heics", "heifs", "avci", "avifs", "jxl", "jxr"),
        *("hdp", "wdp", "jpm", "jls", "psd", "psb", "xcf", "kra", "svg", "svgz", "exr", "hdr"),
        *("dcm", "ico", "cur", "icns", "dds", "sgi", "bpg", "flif"),
    )
)
CONVERT = "convert it to JPEG"
# Files that are not images, named one by one.
SHOWN_OTHERS = 100
FORMATS = ("table", "csv", "json")
# An image, its best classes and their probabilities; or why it cannot be read.
Prediction = tuple[str, list[tuple[str, float]], str | None]


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    predict = add_command(
        commands,
        "predict",
        summary="classes and probabilities of images",
        description=("Prints the most probable classes of images."),
        examples=[
            "timm-lt predict output/birds a.jpg b.jpg --head tau_norm",
            "timm-lt predict resnet50 photos --format csv --top 1",
            "timm-lt predict hf-hub:me/birds a.jpg --format json",
            "timm-lt predict resnet50 a.jpg --checkpoint own.pth --names names.txt",
        ],
    )
    predict.add_argument("model", help=MODEL_HELP)
    predict.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="files, and folders of them; what is not read is named",
    )
    predict.add_argument("--head", metavar="NAME", help="the joint classifier unless given")
    add_weights_options(predict, "weights for that architecture")
    predict.add_argument(
        "--classes",
        type=int,
        metavar="C",
        help="how many, as in the file of --checkpoint unless given",
    )
    predict.add_argument(
        "--names",
        type=Path,
        metavar="FILE",
        help="UTF-8 text file with one class name per line, the first that of class 0; takes the "
        "place of the model's own names. Without either, classes are numbers",
    )
    add_background_option(predict)
    predict.add_argument(
        "--class-order",
        choices=get_args(ClassOrder),
        help="order of the names in the weights, if it is not that of the file: timm (1, 2, 10) or "
        "sorted (1, 10, 2)",
    )
    predict.add_argument(
        "--top",
        type=int,
        default=3,
        metavar="N",
        help="classes of each image, all if there are fewer; 3 unless given",
    )
    form = predict.add_mutually_exclusive_group()
    form.add_argument("--format", choices=FORMATS, help="table, or the ending of --output")
    form.add_argument(
        "--json",
        action="store_const",
        const="json",
        dest="format",
        help="the same as --format json",
    )
    predict.add_argument("--output", type=Path, metavar="FILE", help="write CSV or JSON there")
    predict.add_argument("--threads", type=int, help="CPU threads; all unless given")
    predict.add_argument(
        "--workers", type=int, default=0, help="processes that decode images; none unless given"
    )
    add_log_options(predict, quiet="the predictions")
    predict.set_defaults(command=predict_images)


def predict_images(arguments: argparse.Namespace) -> None:
    """Predicts, and prints or writes; images that cannot be read are named."""
    set_cpu_threads(arguments.threads)
    form = output_format(arguments.format, arguments.output)
    check_integer("--top", arguments.top, minimum=1)
    check_integer("--workers", arguments.workers, minimum=0)
    given = arguments.background
    background = None if given == "auto" else check_background(given)
    paths, reasons = image_files(arguments.images)
    options = model_options(arguments)
    if arguments.classes is not None:
        options["num_classes"] = arguments.classes
    model = load_model(
        arguments.model,
        head=arguments.head,
        checkpoint=arguments.checkpoint,
        key=arguments.checkpoint_key,
        image_size=arguments.image_size,
        **options,
    )
    names = None if arguments.names is None else read_names(arguments.names, model)
    names = names_in_order(names, arguments.class_order)
    found = list(
        predictions(
            model,
            paths,
            names=names,
            top=arguments.top,
            workers=arguments.workers,
            background=background,
            reasons=reasons,
        )
    )
    if form == "table":
        result_console().print(_table(found))
    else:
        text = _json(found) if form == "json" else _csv(found)
        if arguments.output is None:
            say(text.rstrip("\n"))
        else:
            write_atomic(arguments.output, text)
            log.info("wrote %s", arguments.output)
    damaged = [f"{path} ({reason})" for path, _, reason in found if reason is not None]
    if damaged:
        raise UsageError(
            f"{len(damaged)} of {len(found)} images cannot be read: {shown_names(damaged)}"
        )


def output_format(given: str | None, output: Path | None) -> str:
    """Returns in which format predictions are shown or written.

    >>> output_format(None, None), output_format(None, Path("a.json"))
    ('table', 'json')

    Raises:
        UsageError: If it is unclear, or a table is to be written.
    """
    if output is None:
        return given or "table"
    ending = output.suffix.removeprefix(".").lower()
    form = given or ending
    if form not in FORMATS[1:]:
        raise UsageError(f"--output {output}: say --format csv or --format json")
    return form


def image_files(places: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Returns the files that are meant: each file, and the images in each folder, sorted.

    Files of a folder that are not images are logged.

    Returns:
        The files, and the reasons why some of them are not read: camera raw files, links to
        nothing, names that are not UTF-8.

    Raises:
        UsageError: If a file does not exist, or a folder has no images.
    """
    paths: list[str] = []
    reasons: dict[str, str] = {}
    others: list[str] = []
    for place in places:
        path = Path(place).expanduser()
        if path.is_dir():
            found = find_images(str(path))
            photos = [other for other in found.others if suffix(other) in UNUSUAL_SUFFIXES]
            unnamed = {ascii(name): "its name is not UTF-8; rename it" for name in found.unnamed}
            reasons |= found.broken | unnamed
            images = sorted([*found.images, *photos, *found.broken, *unnamed])
            if not images:
                there = f", only {counted_suffixes(found.others)}" if found.others else ""
                raise UsageError(f"there is no image in {path}{there}")
            paths += images
            others += [other for other in found.others if suffix(other) not in UNUSUAL_SUFFIXES]
        elif path.is_file():
            paths.append(str(path))
        else:
            raise UsageError(f"there is no image {path}")
    if others:
        names = shown_names([shown_path(other) for other in others], SHOWN_OTHERS)
        log.warning(
            "files that are not images by their suffix, not read: %d (%s): %s",
            *(len(others), counted_suffixes(others), names),
        )
    raw = {path: f"a camera raw file; {CONVERT}" for path in paths if suffix(path) in RAW_SUFFIXES}
    return paths, reasons | raw


class _Files(Dataset[tuple[Tensor, str]]):
    """Image files as a model takes them; of one that cannot be read, the reason.

    Attributes:
        huge: Whether Pillow would warn of a file for its size, (N,); shared with the workers.
    """

    def __init__(
        self,
        paths: Sequence[str],
        transform: Any,  # noqa: ANN401
        background: str,
        reasons: Mapping[str, str],
    ) -> None:
        self.paths, self.transform = paths, transform
        self.background, self.reasons = background, reasons
        self.huge = torch.zeros(len(paths), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        path = self.paths[index]
        if path in self.reasons:
            return torch.empty(0), self.reasons[path]
        try:
            image = decode_image({"path": path, "bytes": None}, background=self.background)
        except DAMAGE as error:
            end = suffix(path)
            if end in UNUSUAL_SUFFIXES and f".{end}" not in Image.registered_extensions():
                return torch.empty(0), f"Pillow does not decode .{end}; {CONVERT}"
            return torch.empty(0), damage_of(error)
        self.huge[index] = is_huge(image.size)
        return self.transform(image), ""


def read_names(path: Path, model: nn.Module) -> list[str]:
    """Reads the names of a model's classes, one in a line; empty lines at the end do not count.

    Args:
        path: A text file, UTF-8.
        model: The model.

    Raises:
        UsageError: If it cannot be read, a name is empty, or there are not as many as classes.
    """
    try:
        lines = path.expanduser().read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UsageError(f"--names {path} cannot be read: {reason}") from error
    names = [one_line(line, 200) for line in lines]
    classes = getattr(model, "num_classes", len(names))
    if len(names) != classes:
        raise UsageError(
            f"--names {path} has {len(names)} lines, and the model tells {classes} classes apart: "
            "write a name for each, in the order of the classes"
        )
    if "" in names:
        raise UsageError(f"--names {path} has no name in line {names.index('') + 1}")
    return names


def names_in_order(names: list[str] | None, class_order: ClassOrder | None) -> list[str] | None:
    """Returns class names in the order that the weights have.

    Args:
        names: The names as they were given, if they were.
        class_order: That order; None is the order of the names, and a warning if timm's differs.

    Raises:
        UsageError: If there is an order and no names.
    """
    if names is None:
        if class_order is not None:
            raise UsageError("--class-order is for the names of --names; remove it, or give these")
        return None
    orders = class_orders(names)
    if class_order is not None:
        return orders[class_order]
    if names == orders["sorted"] != orders["timm"]:
        log.warning(
            "the names are sorted, and the weights must have the same order; if they number the "
            "classes as timm does, say --class-order timm (%s)",
            shown_names(orders["timm"]),
        )
    return names


def predictions(
    model: nn.Module,
    paths: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    top: int = 3,
    workers: int = 0,
    background: str | None = None,
    reasons: Mapping[str, str] | None = None,
) -> Iterator[Prediction]:
    """Yields each image with its most probable classes, by softmax.

    Args:
        model: In evaluation mode.
        paths: Image files.
        names: Names of the classes, (C,); None takes the model's own, or numbers.
        top: Number of classes, all if there are fewer.
        workers: Processes that decode.
        background: Colour behind transparent pixels; None is that of the model's checkpoint.
        reasons: Why files are not read, by path.
    """
    transform = timm.data.create_transform(**image_config(model))
    files = _Files(paths, transform, background or background_of(model), reasons or {})
    loader: DataLoader[Any] = DataLoader(files, BATCH_SIZE, num_workers=workers, collate_fn=list)
    device = default_device()
    model = model.to(device)
    done = 0
    for batch in loader:
        readable = [image for image, reason in batch if not reason]
        rows = iter(_best(model, torch.stack(readable).to(device), names, top) if readable else [])
        for _, reason in batch:
            yield paths[done], [] if reason else next(rows), reason or None
            done += 1
    huge = [shown_path(paths[row]) for row in files.huge.nonzero().flatten().tolist()]
    if huge:
        log.warning("%s", describe_huge(len(huge), len(paths), huge))


def _best(
    model: nn.Module, images: Tensor, names: Sequence[str] | None, top: int
) -> list[list[tuple[str, float]]]:
    with torch.inference_mode():
        shares = model(images).softmax(dim=1)
    names = class_names(model) if names is None else names
    best = shares.topk(min(top, shares.shape[1]))
    return [
        [
            (str(label) if names is None else names[label], value)
            for label, value in zip(labels, values, strict=True)
        ]
        for labels, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _table(found: Sequence[Prediction]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name, justify in (("image", "left"), ("class", "left"), ("%", "right")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for path, best, reason in found:
        if reason is not None:
            table.add_row(escape(path), f"[dim]{escape(f'({reason})')}", "")
        for rank, (name, share) in enumerate(best):
            table.add_row("" if rank else escape(path), escape(name), f"{100 * share:.1f}")
    return table


def _csv(found: Sequence[Prediction]) -> str:
    """Returns a row for each image; a column ``error`` if there are some that cannot be read."""
    columns = ["image"]
    for rank in range(1, max(len(best) for _, best, _ in found) + 1):
        columns += [f"class_{rank}", f"probability_{rank}"]
    if any(reason is not None for _, _, reason in found):
        columns.append("error")
    text = io.StringIO()
    rows = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    rows.writeheader()
    for path, best, reason in found:
        row = {"image": path} if reason is None else {"image": path, "error": reason}
        for rank, (name, share) in enumerate(best, 1):
            row |= {f"class_{rank}": name, f"probability_{rank}": f"{share:.6f}"}
        rows.writerow(row)
    return text.getvalue()


def _json(found: Sequence[Prediction]) -> str:
    entries = [
        {
            "image": path,
            "classes": [{"name": name, "probability": share} for name, share in best],
            **({} if reason is None else {"error": reason}),
        }
        for path, best, reason in found
    ]
    return as_json(entries) + "\n"
