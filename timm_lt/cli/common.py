"""What the commands share."""

import argparse
from typing import Any, TypeAlias

import yaml

from timm_lt.registry import UsageError

# argparse has no public name for what add_subparsers returns.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def say(line: str) -> None:
    """Prints a line on standard output."""
    print(line)  # noqa: T201


def parse_options(texts: list[str], example: str) -> dict[str, Any]:
    """Parses ``KEY=VALUE`` arguments; values are written as in YAML.

    Raises:
        UsageError: If one is none; the message has the example.
    """
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key.isidentifier() and equals):
            raise UsageError(f"--option takes KEY=VALUE, e.g. {example}, got {text!r}")
        try:
            options[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            raise UsageError(f"--option {text!r}: the value cannot be read") from error
    return options
