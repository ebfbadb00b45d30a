"""``timm-lt fold``: a head as a plain timm checkpoint, ONNX file or exported program."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import timm_lt
from timm_lt.checkpoint import CONFIG, CheckpointInfo, HeadEntry
from timm_lt.cli.arguments import decoupled_info, find_checkpoint
from timm_lt.cli.common import (
    Commands,
    add_command,
    add_output_options,
    parse_options,
    show_result,
)
from timm_lt.heads import HEADS, create_head, head_option_names
from timm_lt.models.fold import FOLDED_ENTRIES, FoldReport, write_folded
from timm_lt.models.label_names import own_names
from timm_lt.models.published import PUBLISHED
from timm_lt.run.folder import new_folder
from timm_lt.utils.checks import WHITE, UsageError, unknown_name
from timm_lt.utils.files import read_json


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    fold = add_command(
        commands,
        "fold",
        description=(
            "Folds a head into a plain classifier and writes what plain timm loads, without "
            "timm_lt. What was written is loaded again and compared."
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
    """Writes heads of a checkpoint as plain timm checkpoints, each compared after it is read."""
    destination, heads = arguments.destination, arguments.head
    name, source = find_checkpoint(arguments.source)
    if source is None and not timm.models.is_model_pretrained(name):
        noun = "checkpoint (no such folder, nor a pretrained model of timm):"
        raise unknown_name(noun, name, timm.list_pretrained("lt_*"))
    info = decoupled_info(source)
    kinds = _kinds_of_heads(heads, arguments.source, info)
    options = _options_by_head(arguments.option, kinds)
    models = {head: timm_lt.create_model(name, True, head=head, **options[head]) for head in heads}
    single = len(models) == 1
    entries = FOLDED_ENTRIES if single else set(heads)
    lines, written = [], []
    with new_folder(destination, entries, overwrite=arguments.overwrite, source=source) as folder:
        for head, model in models.items():
            target = folder if single else folder / head
            report = write_folded(
                target,
                model,
                onnx=arguments.onnx,
                program=arguments.program,
                label_names=_label_names(model, info),
            )
            same = "the same logits" if report.exact else "the same predictions"
            where = destination if single else destination / head
            lines.append(f"{where}: {head} folded, {same}; {_differences(report)}")
            written.append({"folder": str(where), "head": head, **asdict(report)})
        architecture = read_json(target / CONFIG)["architecture"]
    if info is not None and info.background != WHITE:
        lines.append(
            f"it was fitted to images on the background {info.background}, which a folded "
            f"checkpoint does not record: give predict --background '{info.background}'"
        )
    if architecture.startswith("lt_"):
        lines.append(f"timm has no {architecture}: import timm_lt before timm loads it")
    show_result(arguments, written, "\n".join(lines))


def _kinds_of_heads(heads: list[str], given: str, info: CheckpointInfo | None) -> dict[str, str]:
    """Returns the kind of each head; a wrong name raises UsageError, listing those that fold."""
    entries = {} if info is None else info.heads
    kinds = {name: entry.kind for name, entry in entries.items()}
    if given in PUBLISHED:
        kinds = {name: name for name in PUBLISHED[given].heads} | kinds
    # What needs no fit can be made from any joint classifier.
    kinds |= {kind: kind for kind in HEADS if not HEADS[kind].own_state and kind not in kinds}
    for head in heads:
        if head not in kinds:
            folding = [name for name in kinds if name not in entries or _folds(entries[name])]
            raise unknown_name(f"head of {given}:", head, folding)
    return {head: kinds[head] for head in heads}


def _label_names(model: nn.Module, info: CheckpointInfo | None) -> list[str] | None:
    """Returns the names of the classes: the checkpoint's, of timm's own those in its config."""
    return own_names(model) if info is None else info.label_names


def _folds(entry: HeadEntry) -> bool:
    """Returns whether a head of that kind with those options is linear in the features."""
    head = create_head(entry.kind, 2, 2, **entry.options)
    with torch.no_grad():
        for state in head.fitted_state:
            getattr(head, state).fill_(1)
    try:
        head.fold()
    except UsageError:
        return False
    return True


def _options_by_head(texts: list[str], kinds: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Gives each head the options that it takes; one that no head takes raises UsageError."""
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
