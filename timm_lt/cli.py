"""The command line ``timm-lt COMMAND``, also ``python -m timm_lt COMMAND``."""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import timm
import torch
import yaml
from rich.console import Console
from rich.table import Table

import timm_lt
import train_lt
from timm_lt.checkpoint import (
    CARD,
    CONFIG,
    METRICS,
    PLOTS,
    RECIPE,
    CheckpointInfo,
    load_heads,
    read_checkpoint,
    save_checkpoint,
)
from timm_lt.console import start_logging
from timm_lt.convert import convert_checkpoint
from timm_lt.data import list_augmentations
from timm_lt.files import read_json, write_json
from timm_lt.folding import FOLDED_ENTRIES, FoldReport, write_folded
from timm_lt.heads import head_option_names
from timm_lt.hub import push_to_hub
from timm_lt.model import LOCAL_DIR
from timm_lt.recipe import shipped_recipes
from timm_lt.registry import UsageError, unknown_name
from timm_lt.repo import Repo
from timm_lt.report import head_table
from timm_lt.run_folder import CHECKPOINT_ENTRIES, new_folder

# argparse has no public name for what add_subparsers returns.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
DIGESTS = "logits_sha256"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        # Its arguments are those of a recipe, which has its own parser.
        return train_lt.main(argv[1:], prog="timm-lt train")
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], None] = arguments.command
    try:
        command(arguments)
    except UsageError as error:
        # One line, whatever a message quotes from a file.
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="timm-lt", description="Long-tailed image recognition on timm."
    )
    parser.add_argument("--version", action="version", version=f"timm_lt {timm_lt.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands.add_parser("train", help="train a backbone, fit and compare heads", add_help=False)
    listing = commands.add_parser(
        "list",
        help="name what there is; or the heads of a checkpoint",
        description=(
            "Names the registered models, heads, samplers, losses, data sets and recipes; or the "
            "heads of a checkpoint with options and metrics, without downloading weights. "
            "Examples: timm-lt list; timm-lt list me/birds; timm-lt list output/birds"
        ),
    )
    listing.add_argument(
        "checkpoint", nargs="?", help="folder, or Hub repo NAMESPACE/NAME[@REVISION]"
    )
    listing.set_defaults(command=list_parts)
    _add_pack(commands)
    _add_push(commands)
    _add_fold(commands)
    _add_convert(commands)
    return parser


def _add_push(commands: Commands) -> None:
    push = commands.add_parser(
        "push",
        help="push a checkpoint to the Hugging Face Hub",
        description=(
            "Pushes a decoupled checkpoint to a model repo of the Hub in one commit, of which only "
            "what has changed is uploaded. Log in first: hf auth login, or HF_TOKEN. Example: "
            "timm-lt push output/lt_test_resnet.glyph_lt me/glyphs --license apache-2.0"
        ),
    )
    push.add_argument("folder", type=Path, help="folder of a run, or a decoupled checkpoint")
    push.add_argument("repo", metavar="NAMESPACE/NAME", help="the repo; made if it is missing")
    push.add_argument("--private", action="store_true", default=None, help="make it private")
    push.add_argument("--revision", metavar="BRANCH", help="branch to push to; made if missing")
    push.add_argument("--license", metavar="ID", help="licence for the card, such as apache-2.0")
    push.add_argument("--message", help="title of the commit")
    push.add_argument(
        "--overwrite", action="store_true", help="remove heads that the folder does not have"
    )
    push.set_defaults(command=push_checkpoint)


def _add_pack(commands: Commands) -> None:
    pack = commands.add_parser(
        "pack",
        help="write a smaller copy of a run's checkpoint",
        description=(
            "Copies the decoupled checkpoint of a run without its training state, in half "
            "precision. Example: timm-lt pack output/lt_test_resnet.glyph_lt birds"
        ),
    )
    pack.add_argument("source", type=Path, help="folder of a run, or a decoupled checkpoint")
    pack.add_argument("destination", type=Path, help="folder to write; must not exist")
    pack.add_argument("--dtype", choices=DTYPES, default="float16", help="type of the tensors")
    pack.add_argument("--overwrite", action="store_true", help="replace a checkpoint there")
    pack.set_defaults(command=pack_checkpoint)


def _add_fold(commands: Commands) -> None:
    fold = commands.add_parser(
        "fold",
        help="write a head as a plain timm checkpoint, or ONNX, to ship",
        description=(
            "Folds a head into a plain classifier and writes what plain timm loads, without "
            "timm_lt. What was written is loaded again and compared. Example: timm-lt fold "
            "output/lt_test_resnet.glyph_lt ship --head tau_norm --option tau=0.7 --onnx"
        ),
    )
    fold.add_argument("source", help="folder of a decoupled checkpoint, or a pretrained name")
    fold.add_argument("destination", type=Path, help="folder to write; must not exist")
    fold.add_argument(
        "--head",
        nargs="+",
        default=["linear"],
        metavar="NAME",
        help="head to fold, the joint classifier unless given; several go to DESTINATION/NAME",
    )
    fold.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of the head that takes the place of the stored one; may be repeated",
    )
    fold.add_argument("--onnx", action="store_true", help="write model.onnx as well")
    fold.add_argument("--overwrite", action="store_true", help="replace a folded checkpoint there")
    fold.set_defaults(command=fold_checkpoint)


def _add_convert(commands: Commands) -> None:
    convert = commands.add_parser(
        "convert",
        help="write weights of another project as a decoupled checkpoint",
        description=(
            "Reads a checkpoint of Kang et al., of timm's train.py, or a plain state dict, and "
            "writes a decoupled checkpoint. Examples: timm-lt convert lt_resnext50.imagenet_lt "
            "x50; timm-lt convert net.pth birds --model convnext_tiny --head crt=crt.pth"
        ),
    )
    convert.add_argument("source", help="a published name, a URL, or a file")
    convert.add_argument("destination", type=Path, help="folder to write; must not exist")
    convert.add_argument("--model", help="the architecture; found by itself where it can be")
    convert.add_argument(
        "--head",
        action="append",
        default=[],
        metavar="NAME=URL_OR_FILE",
        help="a head from a file with the same backbone; may be repeated",
    )
    convert.add_argument(
        "--class-counts", type=Path, help="JSON list of the training images of each class"
    )
    convert.add_argument("--overwrite", action="store_true", help="replace a checkpoint there")
    convert.set_defaults(command=convert_weights)


def push_checkpoint(arguments: argparse.Namespace) -> None:
    """Pushes a checkpoint folder to the Hub."""
    pushed = push_to_hub(
        arguments.folder,
        arguments.repo,
        private=arguments.private,
        revision=arguments.revision,
        license=arguments.license,
        overwrite=arguments.overwrite,
        commit_message=arguments.message,
    )
    done = f"pushed to {pushed.url}" if pushed.changed else f"{pushed.url} has it all already"
    _say(f"{done}, commit {pushed.commit[:8]}")


def list_parts(arguments: argparse.Namespace) -> None:
    """Prints the registered names, one row per kind; or the heads of a checkpoint."""
    place = arguments.checkpoint
    if place is not None:
        is_folder = Path(place).is_dir()
        if not is_folder and "/" not in place:
            raise UsageError(f"{place!r} is no folder here, nor a repo NAMESPACE/NAME of the Hub")
        info = read_checkpoint(place) if is_folder else Repo.parse(place).read_info()
        Console().print(head_table(info))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows: dict[str, Iterable[str]] = {
        "models": [*timm.list_models("lt_*"), "and any other timm architecture"],
        "pretrained": timm.list_pretrained("lt_*"),
        "heads": timm_lt.list_heads(),
        "samplers": timm_lt.list_samplers(),
        "losses": timm_lt.list_losses(),
        "data sets": timm_lt.list_datasets(),
        "augmentations": list_augmentations(),
        "recipes": shipped_recipes(),
    }
    for kind, names in rows.items():
        table.add_row(f"[bold]{kind}", ", ".join(names))
    Console().print(table)


def pack_checkpoint(arguments: argparse.Namespace) -> None:
    """Writes a checkpoint again in another type, with its reports but no training state."""
    source, destination = arguments.source, arguments.destination
    info = read_checkpoint(source)
    with new_folder(
        destination, CHECKPOINT_ENTRIES, overwrite=arguments.overwrite, source=source
    ) as folder:
        _pack(source, folder, info, DTYPES[arguments.dtype])
    _say(f"wrote {destination}")


def _pack(source: Path, destination: Path, info: CheckpointInfo, dtype: torch.dtype) -> None:
    model = timm_lt.create_model(f"local-dir:{source}")
    save_checkpoint(
        destination,
        model,
        heads={name: load_heads(source, name, model) for name in info.heads},
        class_counts=info.class_counts,
        metrics={name: entry.metrics for name, entry in info.heads.items()},
        label_names=info.label_names,
        dataset=info.dataset,
        shot_rule=info.shot_rule,
        seed=info.seed,
        dtype=dtype,
    )
    if (source / METRICS).is_file():
        # The digests are those of the logits in full precision.
        metrics = read_json(source / METRICS)
        write_json(destination / METRICS, {k: v for k, v in metrics.items() if k != DIGESTS})
    for name in (RECIPE, CARD):
        if (source / name).is_file():
            shutil.copy2(source / name, destination / name)
    if (source / PLOTS).is_dir():
        shutil.copytree(source / PLOTS, destination / PLOTS)


def fold_checkpoint(arguments: argparse.Namespace) -> None:
    """Writes heads of a checkpoint as plain timm checkpoints, each compared after it is read."""
    source, destination, heads = arguments.source, arguments.destination, arguments.head
    kinds, labels, name = dict(zip(heads, heads, strict=True)), None, source
    if Path(source).is_dir():
        info = read_checkpoint(source)
        kinds |= {head: info.heads[head].kind for head in heads if head in info.heads}
        labels, name = info.label_names, f"{LOCAL_DIR}{source}"
    elif source not in timm.list_pretrained("lt_*"):
        raise unknown_name("checkpoint (and no such folder):", source, timm.list_pretrained("lt_*"))
    options = _options_by_head(arguments.option, kinds)
    models = {head: timm_lt.create_model(name, True, head=head, **options[head]) for head in heads}
    single = len(models) == 1
    entries = FOLDED_ENTRIES if single else set(heads)
    lines = []
    with new_folder(
        destination, entries, overwrite=arguments.overwrite, source=Path(source)
    ) as folder:
        for head, model in models.items():
            target = folder if single else folder / head
            report = write_folded(target, model, onnx=arguments.onnx, label_names=labels)
            same = "the same logits" if report.exact else "the same predictions"
            where = destination if single else destination / head
            lines.append(f"{where}: {head} folded, {same}; {_differences(report)}")
        architecture = read_json(target / CONFIG)["architecture"]
    if architecture.startswith("lt_"):
        lines.append(f"timm has no {architecture}: import timm_lt before timm loads it")
    _say("\n".join(lines))


def _options_by_head(texts: list[str], kinds: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Gives each head the options that it takes; one that no head takes raises UsageError."""
    options = _options(texts)
    names = {head: head_option_names(kind) for head, kind in kinds.items()}
    for option in options:
        if not any(option in accepted for accepted in names.values()):
            known = sorted({name for accepted in names.values() for name in accepted})
            raise UsageError(
                f"no option {option!r} of head {', '.join(kinds)}; valid options: "
                f"{', '.join(known) or 'none'}"
            )
    return {
        head: {key: value for key, value in options.items() if key in accepted}
        for head, accepted in names.items()
    }


def _differences(report: FoldReport) -> str:
    text = f"read back by plain timm, logits differ by {report.difference:.1g} of the largest"
    if report.onnx_difference is not None:
        text += f", in onnxruntime by {report.onnx_difference:.1g}"
    return text


def _options(texts: list[str]) -> dict[str, Any]:
    """Parses ``KEY=VALUE`` arguments; values are written as in YAML."""
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key.isidentifier() and equals):
            raise UsageError(f"--option takes KEY=VALUE, e.g. tau=0.7, got {text!r}")
        try:
            options[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            raise UsageError(f"--option {text!r}: the value cannot be read") from error
    return options


def convert_weights(arguments: argparse.Namespace) -> None:
    """Writes the weights of another project as a decoupled checkpoint."""
    start_logging()
    heads = {}
    for text in arguments.head:
        name, equals, place = text.partition("=")
        if not (name and equals and place):
            raise UsageError(f"--head takes NAME=URL_OR_FILE, got {text!r}")
        if name in heads:
            raise UsageError(f"--head {name} is given twice")
        heads[name] = place
    counts = None
    if arguments.class_counts is not None:
        counts = _class_counts(arguments.class_counts)
    with new_folder(
        arguments.destination, CHECKPOINT_ENTRIES, overwrite=arguments.overwrite
    ) as folder:
        done = convert_checkpoint(
            arguments.source, folder, model=arguments.model, heads=heads, class_counts=counts
        )
    known = {"given": "as given", "in the file": "as the file says"}.get(done.found, done.found)
    _say(
        f"{arguments.destination}: {done.name} ({known}), {done.num_classes} classes, heads "
        f"{', '.join(done.heads)}"
    )


def _class_counts(path: Path) -> list[int]:
    try:
        counts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--class-counts {path} cannot be read: {error}") from error
    if not isinstance(counts, list) or not all(type(n) is int and 0 <= n < 2**63 for n in counts):
        raise UsageError(f"--class-counts {path} must hold a JSON list of integers, one a class")
    return counts


def _say(line: str) -> None:
    print(line)  # noqa: T201
