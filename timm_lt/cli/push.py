"""``timm-lt push``: pushes a checkpoint to the Hub."""

import argparse
from pathlib import Path

from timm_lt.cli.common import Commands, add_command, add_output_options, show_result
from timm_lt.hub import push_to_hub


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    push = add_command(
        commands,
        "push",
        description=(
            "Pushes a decoupled checkpoint to a model repo of the Hub in one commit; only changed "
            "files are uploaded. Log in first: hf auth login, or HF_TOKEN."
        ),
        examples=[
            "timm-lt push output/lt_test_resnet.glyph_lt me/glyphs --license apache-2.0",
        ],
    )
    push.add_argument("folder", type=Path, help="folder of a run, or a decoupled checkpoint")
    push.add_argument("repo", metavar="NAMESPACE/NAME", help="the repo; created if missing")
    push.add_argument("--private", action="store_true", default=None, help="make it private")
    push.add_argument("--revision", metavar="BRANCH", help="branch to push to; created if missing")
    push.add_argument("--license", metavar="ID", help="licence for the card, such as apache-2.0")
    push.add_argument("--message", help="title of the commit")
    push.add_argument(
        "--overwrite", action="store_true", help="remove heads that the folder does not have"
    )
    add_output_options(push, quiet="what was pushed")
    push.set_defaults(command=push_checkpoint)


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
    result = {"url": pushed.url, "commit": pushed.commit, "changed": pushed.changed}
    show_result(arguments, result, f"{done}, commit {pushed.commit[:8]}")
