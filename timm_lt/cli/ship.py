"""``timm-lt fold``, ``pack``, ``convert`` and ``push``: checkpoints to ship and to publish."""

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import timm
import torch

import timm_lt
from timm_lt.checkpoint import (
    CARD,
    CONFIG,
    METRICS,
    PLOTS,
    RECIPE,
    load_heads,
    read_checkpoint,
    read_config,
    save_checkpoint,
)
from timm_lt.cli import inputs
from timm_lt.cli.common import Commands, add_command, add_output_options, parse_options, show_result
from timm_lt.hub import push_to_hub
from timm_lt.models.convert import convert_checkpoint
from timm_lt.models.create import label_names
from timm_lt.models.fold import FOLDED_ENTRIES, FoldReport, write_folded
from timm_lt.models.repo import ModelSource
from timm_lt.run.folder import CHECKPOINT_ENTRIES, LOCK
from timm_lt.utils.checks import WHITE, UsageError, shown_names, unknown_name, user_errors
from timm_lt.utils.files import read_json, write_json
from timm_lt.utils.longtail import ClassCounts

DIGESTS = "logits_sha256"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Fields of the description that a packed checkpoint has, too.
KEPT = ("class_counts", "label_names", "dataset", "shot_rule", "protocol", "seed")


def add_destination(parser: argparse.ArgumentParser, kind: str) -> None:
    """Adds the argument ``destination``, and ``--overwrite`` for a checkpoint of that kind."""
    parser.add_argument("destination", type=Path, help="folder to write; must not exist")
    parser.add_argument("--overwrite", action="store_true", help=f"replace {kind} there")


@contextmanager
def new_folder(
    arguments: argparse.Namespace, names: Set[str], source: Path | None = None
) -> Iterator[Path]:
    """Yields a folder to fill, which becomes the destination when the block ends without error.

    A destination that is the source, or has other files than ``names``, is not replaced.
    """
    destination: Path = arguments.destination
    # A symbolic link stays: the folder that it points to is replaced.
    target = destination.resolve()
    with user_errors(f"{destination} cannot be written"):
        inside = list(target.iterdir()) if target.exists() else []
        foreign = sorted({path.name for path in inside} - names - {LOCK})
        is_whole = (target / CONFIG).is_file() or all((path / CONFIG).is_file() for path in inside)
        reason = None
        if source is not None and inside and target == source.resolve():
            reason = "is the same folder as the source"
        elif inside and not arguments.overwrite:
            reason = "exists; replace it with --overwrite"
        elif foreign or not is_whole:
            culprits = shown_names(foreign, 3) or f"no {CONFIG}"
            reason = f"holds more than a checkpoint, or none: {culprits}"
        if reason is not None:
            raise UsageError(f"{destination} {reason}")
        parent = next(parent for parent in target.parents if parent.is_dir())
        with tempfile.TemporaryDirectory(dir=parent, prefix=".timm_lt.") as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            yield new
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target.rename(Path(scratch) / "old")
            new.rename(target)


def add_fold(commands: Commands) -> None:
    """Adds the command to the parser."""
    fold = add_command(commands, "fold", fold_checkpoint)
    add = fold.add_argument
    add("source", help=f"{inputs.CHECKPOINT_HELP}, or a pretrained name")
    add_destination(fold, "a folded checkpoint")
    which = "head to fold, the joint classifier unless given; several go to DESTINATION/NAME"
    add("--head", nargs="+", default=["linear"], metavar="NAME", help=which)
    inputs.add_option(fold, "option of the head that takes the place of the stored one")
    add("--onnx", action="store_true", help="write model.onnx as well")
    program = "write model.pt2 of torch.export as well, which runs without timm"
    add("--program", action="store_true", help=program)
    add_output_options(fold, quiet="what was written")


def fold_checkpoint(arguments: argparse.Namespace) -> None:
    """Folds a head into a plain classifier and writes what plain timm loads, without timm_lt.

    The written model is loaded again and compared.

    Examples:
        timm-lt fold output/birds ship --head tau_norm --option tau=0.7 --onnx
        timm-lt fold hf-hub:me/birds ship --head crt lws --program
    """
    destination, source = arguments.destination, ModelSource.find(arguments.source)
    name, folder = source.name, source.folder
    if folder is None and not timm.models.is_model_pretrained(name):
        noun = "checkpoint (no such folder, nor a pretrained model of timm):"
        raise unknown_name(noun, name, timm.list_pretrained("lt_*"))
    info = source.read_info()
    options = parse_options(arguments.option, "tau=0.7")
    models = {h: timm_lt.create_model(name, True, head=h, **options) for h in arguments.head}
    single = len(models) == 1
    lines, written = [], []
    with new_folder(arguments, FOLDED_ENTRIES if single else set(models), folder) as new:
        for head, model in models.items():
            part = "" if single else head
            names = label_names(model) if info is None else info.label_names
            files = {"onnx": arguments.onnx, "program": arguments.program}
            report = write_folded(new / part, model, label_names=names, **files)
            lines.append(f"{destination / part}: {head} folded, {_described(report)}")
            written.append({"folder": str(destination / part), "head": head, **asdict(report)})
        architecture = read_config(new / part)["architecture"]
    if info is not None and info.background != WHITE:
        lines.append(
            f"it was fitted to images on the background {info.background}, which a folded "
            f"checkpoint does not record; pass it to predict: --background '{info.background}'"
        )
    if architecture.startswith("lt_"):
        lines.append(f"timm has no {architecture}: import timm_lt before timm loads it")
    show_result(arguments, written, "\n".join(lines))


def _described(report: FoldReport) -> str:
    same = "the same logits" if report.exact else "the same predictions"
    runs = {"timm": report.difference, **report.others}
    shown = ", ".join(f"{runner} {found:.1g}" for runner, found in runs.items())
    return f"{same}; read back; largest difference of logits, over the largest logit: {shown}"


def add_pack(commands: Commands) -> None:
    """Adds the command to the parser."""
    pack = add_command(commands, "pack", pack_checkpoint)
    pack.add_argument("source", type=Path, help="folder of a run, or a decoupled checkpoint")
    add_destination(pack, "a checkpoint")
    pack.add_argument("--dtype", choices=DTYPES, default="float16", help="type of the tensors")
    add_output_options(pack, quiet="what was written")


def pack_checkpoint(arguments: argparse.Namespace) -> None:
    """Copies the decoupled checkpoint of a run without its training state, in half precision.

    Examples:
        timm-lt pack output/lt_test_resnet.glyph_lt birds
    """
    source, destination = arguments.source, arguments.destination
    info = read_checkpoint(source)
    with new_folder(arguments, CHECKPOINT_ENTRIES, source) as folder:
        model = timm_lt.create_model(f"local-dir:{source}")
        save_checkpoint(
            folder,
            model,
            heads={name: load_heads(source, name, model) for name in info.heads},
            metrics={name: entry.metrics for name, entry in info.heads.items()},
            dtype=DTYPES[arguments.dtype],
            **{key: getattr(info, key) for key in KEPT},
        )
        if (source / METRICS).is_file():
            # The digests are those of the logits in full precision.
            metrics = read_json(source / METRICS)
            write_json(folder / METRICS, {k: v for k, v in metrics.items() if k != DIGESTS})
        for name in (RECIPE, CARD):
            if (source / name).is_file():
                shutil.copy2(source / name, folder / name)
        if (source / PLOTS).is_dir():
            shutil.copytree(source / PLOTS, folder / PLOTS)
    result = {"folder": str(destination), "dtype": arguments.dtype, "heads": list(info.heads)}
    show_result(arguments, result, f"wrote {destination}")


def add_convert(commands: Commands) -> None:
    """Adds the command to the parser."""
    convert = add_command(commands, "convert", convert_weights)
    add = convert.add_argument
    add("source", help="a published name, a URL, or a file")
    add_destination(convert, "a checkpoint")
    add("--model", help="the architecture; found by itself where it can be")
    heads = "a head from a file with the same backbone; may be repeated"
    add("--head", action="append", default=[], metavar="NAME=URL_OR_FILE", help=heads)
    counts = "JSON with the training images per class: a list in label order, or an object by label"
    add("--class-counts", type=Path, metavar="FILE", help=counts)
    inputs.add_weights_options(convert, None)
    add_output_options(convert, quiet="what was written")


def convert_weights(arguments: argparse.Namespace) -> None:
    """Writes the weights of another project as a decoupled checkpoint.

    Reads a checkpoint of Kang et al., of timm's train.py, or a plain state dict.

    Examples:
        timm-lt convert lt_resnext50.imagenet_lt x50
        timm-lt convert net.pth birds --model convnext_tiny --head crt=crt.pth
    """
    heads = dict(text.partition("=")[::2] for text in arguments.head)
    if len(heads) < len(arguments.head) or not all([*heads, *heads.values()]):
        raise UsageError(f"--head takes NAME=URL_OR_FILE, each NAME once; got {arguments.head}")
    path, destination = arguments.class_counts, arguments.destination
    with new_folder(arguments, CHECKPOINT_ENTRIES) as folder:
        done = convert_checkpoint(
            arguments.source,
            folder,
            model=arguments.model,
            heads=heads,
            class_counts=None if path is None else _class_counts(path),
            key=arguments.checkpoint_key,
            image_size=arguments.image_size,
            options=parse_options(arguments.model_option, "global_pool=max", "--model-option"),
        )
    name, found, number, written = done.name, done.found, done.num_classes, done.heads
    result = {"folder": str(destination), "model": name, "found": found, "num_classes": number}
    shown = f"{name} ({found}), {number} classes, heads {', '.join(written)}"
    show_result(arguments, result | {"heads": written}, f"{destination}: {shown}")


def _class_counts(path: Path) -> ClassCounts:
    with user_errors(f"--class-counts {path} cannot be read", OSError, ValueError, RecursionError):
        counts: ClassCounts = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(counts, dict):
            # Keys are strings in JSON; 007 is a class name, not a label.
            return {int(k) if k == str(int(k)) else k: v for k, v in counts.items()}
    return counts


def add_push(commands: Commands) -> None:
    """Adds the command to the parser."""
    push = add_command(commands, "push", push_checkpoint)
    add = push.add_argument
    add("folder", type=Path, help="folder of a run, or a decoupled checkpoint")
    add("repo", metavar="NAMESPACE/NAME", help="the repo; created if missing")
    add("--private", action="store_true", default=None, help="make it private")
    add("--revision", metavar="BRANCH", help="branch to push to; created if missing")
    add("--license", metavar="ID", help="licence for the card, such as apache-2.0")
    add("--message", help="title of the commit")
    add("--overwrite", action="store_true", help="remove heads that the folder does not have")
    add_output_options(push, quiet="what was pushed")


def push_checkpoint(arguments: argparse.Namespace) -> None:
    """Pushes a decoupled checkpoint to a model repo of the Hub in one commit.

    Only changed files are uploaded. Log in first: hf auth login, or HF_TOKEN.

    Examples:
        timm-lt push output/lt_test_resnet.glyph_lt me/glyphs --license apache-2.0
    """
    names = ("private", "revision", "license", "overwrite")
    options = {name: getattr(arguments, name) for name in names}
    pushed = push_to_hub(
        arguments.folder, arguments.repo, commit_message=arguments.message, **options
    )
    done = f"pushed to {pushed.url}" if pushed.changed else f"{pushed.url} has it all already"
    show_result(arguments, asdict(pushed), f"{done}, commit {pushed.commit[:8]}")
