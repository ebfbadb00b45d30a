"""``timm-lt predict``: what a model sees in images."""

import argparse
import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm.data
import torch
from datasets import Image as ImageColumn
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from timm_lt.accelerator import default_device, set_cpu_threads
from timm_lt.cli.common import Commands, add_command, add_log_options, as_json, say
from timm_lt.cli.model_argument import MODEL_HELP, class_names, load_model
from timm_lt.console import log, one_line, result_console
from timm_lt.data.folder.files import find_images
from timm_lt.data.reading import DAMAGE, damage_of, decode_image
from timm_lt.files import write_atomic
from timm_lt.registry import UsageError, check_integer, shown_names

BATCH_SIZE = 32
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
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="files, and folders of them")
    predict.add_argument("--head", metavar="NAME", help="the joint classifier unless given")
    predict.add_argument("--checkpoint", metavar="FILE", help="weights for that architecture")
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
        help="text file with the name of each class in a line, in their order; needed for weights "
        "that have no names, whose classes are numbers otherwise",
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
    paths = image_files(arguments.images)
    options = {} if arguments.classes is None else {"num_classes": arguments.classes}
    model = load_model(
        arguments.model, head=arguments.head, checkpoint=arguments.checkpoint, **options
    )
    names = None if arguments.names is None else read_names(arguments.names, model)
    found = list(
        predictions(model, paths, names=names, top=arguments.top, workers=arguments.workers)
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


def image_files(places: Sequence[str]) -> list[str]:
    """Returns the files that are meant: each file, and the images in each folder, sorted.

    Raises:
        UsageError: If there is no such file, or a folder has no images.
    """
    paths: list[str] = []
    for place in places:
        path = Path(place).expanduser()
        if path.is_dir():
            found = sorted(find_images(str(path)).images)
            if not found:
                raise UsageError(f"there is no image in {path}")
            paths += found
        elif path.is_file():
            paths.append(str(path))
        else:
            raise UsageError(f"there is no image {path}")
    return paths


class _Files(Dataset[tuple[Tensor, str]]):
    """Image files as a model takes them; of one that is damaged, the reason."""

    def __init__(self, paths: Sequence[str], transform: Any) -> None:  # noqa: ANN401
        self.paths, self.transform = paths, transform
        self.column = ImageColumn()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            image = decode_image({"path": self.paths[index], "bytes": None}, self.column)
        except DAMAGE as error:
            return torch.empty(0), damage_of(error)
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


def predictions(
    model: nn.Module,
    paths: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    top: int = 3,
    workers: int = 0,
) -> Iterator[Prediction]:
    """Yields each image with its most probable classes, by softmax.

    Args:
        model: In evaluation mode.
        paths: Image files.
        names: Names of the classes, (C,); None takes the model's own, or numbers.
        top: Number of classes, all if there are fewer.
        workers: Processes that decode.
    """
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    loader: DataLoader[Any] = DataLoader(
        _Files(paths, transform), BATCH_SIZE, num_workers=workers, collate_fn=list
    )
    device = default_device()
    model = model.to(device)
    done = 0
    for batch in loader:
        readable = [image for image, reason in batch if not reason]
        rows = iter(_best(model, torch.stack(readable).to(device), names, top) if readable else [])
        for _, reason in batch:
            yield paths[done], [] if reason else next(rows), reason or None
            done += 1


def _best(
    model: nn.Module, images: Tensor, names: Sequence[str] | None, top: int
) -> list[list[tuple[str, float]]]:
    with torch.inference_mode():
        shares = model(images).softmax(dim=1)
    names = class_names(model, shares.shape[1]) if names is None else names
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
