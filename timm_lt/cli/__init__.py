"""The command line ``timm-lt COMMAND``, also ``python -m timm_lt COMMAND``.

Only the module of the command that is called is imported: the others would cost seconds.
"""

import argparse
import errno
import os
import sys
from collections.abc import Collection
from importlib import import_module

import timm_lt
from timm_lt.cli.common import COMMANDS, Commands, start
from timm_lt.utils.console import epilog, error_text, log_traceback, wrapped

# Modules of commands that are not named as the command.
MODULES = dict.fromkeys(("list", "completion"), "listing")
MODULES |= dict.fromkeys(("fold", "pack", "convert", "push"), "ship")
# Exit status of a program whose reader has closed the pipe.
BROKEN_PIPE = 141


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        status = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # `timm-lt list | head -1`; keep the interpreter from flushing once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        log_traceback(error)
        message = error_text(f"{error.filename or 'standard output'}: {error.strerror}")
        print(f"error: {message}", file=sys.stderr)  # noqa: T201
        return 2
    return status


def _run(argv: list[str]) -> int:
    if argv[:1] == ["train"]:
        from timm_lt.run import main as train

        return train(argv[1:], prog="timm-lt train")
    parser = create_parser(argv[:1])
    arguments, others = parser.parse_known_args(argv, argparse.Namespace(argv=argv))
    if others and argv[0] != "compare":
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    arguments.recipe_options = others
    from timm_lt.run.execution import run_to_exit

    status: list[int] = []

    def command() -> None:
        start(arguments)
        status.append(arguments.command(arguments) or 0)

    return run_to_exit(command, "interrupted") or status[0]


def create_parser(names: Collection[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """Creates the parser of ``timm-lt``, with the arguments of some commands.

    The others are only listed; ``train`` has a parser of its own.
    """
    parser = argparse.ArgumentParser(
        prog="timm-lt",
        description=wrapped(
            "Long-tailed image recognition on timm: one backbone, many classifier heads. Each "
            "command has a --help with examples."
        ),
        epilog=epilog(
            [
                "timm-lt heads photos --model resnet50.a1_in1k   # better rare classes, in minutes",
                "timm-lt train                                   # embedded data, no network",
                "timm-lt evaluate output/birds photos",
                "timm-lt completion --help                       # tab completion",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"timm_lt {timm_lt.__version__}")
    commands: Commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        if name == "train" or name not in names:
            commands.add_parser(name, help=summary, add_help=False)
        else:
            module = import_module(f"timm_lt.cli.{MODULES.get(name, name)}")
            getattr(module, f"add_{name}")(commands)
    return parser
