"""``timm-lt run``: one of timm's own scripts, with the models of timm_lt registered."""

import argparse
import runpy
import sys
from pathlib import Path

from timm_lt.cli.common import Commands, add_command
from timm_lt.registry import UsageError


def add_parser(commands: Commands) -> None:
    """Adds the command to the parser."""
    run = add_command(
        commands,
        "run",
        summary="run one of timm's scripts, with the lt_* models registered",
        description=(
            "Runs a script, such as timm's validate.py, inference.py and train.py, which lie in "
            "timm's repository and not in its package, after timm_lt has registered its models. "
            "What follows SCRIPT is for the script."
        ),
        examples=[
            "timm-lt run validate.py photos --model lt_resnext50.imagenet_lt --pretrained",
        ],
    )
    run.add_argument("script", metavar="SCRIPT", help="a Python file")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    run.set_defaults(command=run_script)


def run_script(arguments: argparse.Namespace) -> None:
    """Runs a script as if Python did, and ends as it does."""
    path = Path(arguments.script)
    if not path.is_file():
        raise UsageError(
            f"there is no script {path}: timm's own are in its repository, not in its package; "
            "clone it, and give the path of the script"
        )
    before = sys.argv, sys.path[:]
    sys.argv = [str(path), *arguments.arguments]
    sys.path.insert(0, str(path.resolve().parent))
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before
