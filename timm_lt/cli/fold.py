"""``timm-lt fold``: a head as a plain timm checkpoint, ONNX file or exported program."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm

import timm_lt
from timm_lt.checkpoint import CheckpointInfo, find_entry, read_config
from timm_lt.cli.common import (
    Commands,
    add_command,
    add_output_options,
    parse_options,
    show_result,
)
from timm_lt.heads import head_option_names
from timm_lt.models.create import label_names
from timm_lt.models.fold import FOLDED_ENTRIES, FoldReport, write_folded
from timm_lt.models.pretrained import PUBLISHED
from timm_lt.models.repo import ModelSource
from timm_lt.run.folder import new_folder
from timm_lt.utils.checks import WHITE, UsageError, unknown_name


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    fold = add_command(
        commands,
        "fold",
        description=(
            "Folds a head into a plain classifier and writes what plain timm loads, without "
            "timm_lt. The written model is loaded again and compared."
        ),
        examples=[
            "timm-lt fold output/birds ship --head tau_norm --option tau=0.7 --onnx",
            "timm-lt fold hf-hub:me/birds ship --head crt lws --program",
        ],
    )
    fold.add_argument(
        "source",
        help="folder or local-dir:FOLDER, repo NAMESPACE/NAME[@REVISION] or hf-hub:NAMESPACE/NAME, "
        "or a pretrained name",
    )
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
    fold.add_argument(
        "--program",
        action="store_true",
        help="write model.pt2 of torch.export as well, which runs without timm",
    )
    fold.add_argument("--overwrite", action="store_true", help="replace a folded checkpoint there")
    add_output_options(fold, quiet="what was written")
    fold.set_defaults(command=fold_checkpoint)


def fold_checkpoint(arguments: argparse.Namespace) -> None:
    """Writes heads of a checkpoint as plain timm checkpoints, and compares each with its head."""
    destination, heads = arguments.destination, arguments.head
    source = ModelSource.find(arguments.source)
    name, folder = source.name, source.folder
    if folder is None and not timm.models.is_model_pretrained(name):
        noun = "checkpoint (no such folder, nor a pretrained model of timm):"
        raise unknown_name(noun, name, timm.list_pretrained("lt_*"))
    info = source.read_info()
    kinds = {head: _kind(head, arguments.source, info) for head in heads}
    options = _options_by_head(arguments.option, kinds)
    models = {head: timm_lt.create_model(name, True, head=head, **options[head]) for head in heads}
    single = len(models) == 1
    entries = FOLDED_ENTRIES if single else set(heads)
    lines, written = [], []
    with new_folder(destination, entries, overwrite=arguments.overwrite, source=folder) as new:
        for head, model in models.items():
            part = "" if single else head
            report = write_folded(
                new / part,
                model,
                onnx=arguments.onnx,
                program=arguments.program,
                label_names=label_names(model) if info is None else info.label_names,
            )
            same = "the same logits" if report.exact else "the same predictions"
            lines.append(f"{destination / part}: {head} folded, {same}; {_differences(report)}")
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


def _kind(head: str, given: str, info: CheckpointInfo | None) -> str:
    """Returns the registered kind of a head of a checkpoint, or of a published name."""
    if info is None and given in PUBLISHED and head in PUBLISHED[given].heads:
        return head
    return find_entry(info, head, given).kind


def _options_by_head(texts: list[str], kinds: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Returns the options of each head; an option that no head takes raises UsageError."""
    options = parse_options(texts, "tau=0.7")
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
    runs = {"timm": report.difference, **report.others}
    shown = ", ".join(f"{runner} {found:.1g}" for runner, found in runs.items())
    return f"read back; largest difference of logits, over the largest logit: {shown}"
