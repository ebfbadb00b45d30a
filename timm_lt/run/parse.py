"""Recipes from YAML files and the command line."""

import dataclasses
import json
import re
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from timm_lt.models.published import PUBLISHED_BLOCK, hub_configs
from timm_lt.run.recipe import Recipe, RunOptions
from timm_lt.utils.checks import UsageError, unknown_name
from timm_lt.utils.console import epilog, wrapped
from timm_lt.utils.files import read_yaml

DEFAULT_RECIPE = "lt_test_resnet.glyph_lt"


PRINT = "--print_config"
# Stands before a text of a recipe, in hexadecimal digits: jsonargparse would read "null" or "1e-3"
# as something else than a text.
TEXT = "_text_"
# What to do about the mistakes that jsonargparse only names.
HINTS = {
    "unrecognized arguments": "; RECIPE comes before the options",
    'Parser key "heads"': "; heads are a mapping of names to options, e.g. '{crt: {}, ncm: {}}'",
}


def shipped_recipes() -> dict[str, Path]:
    """Returns the files of the shipped recipes by name."""
    return {path.stem: path for path in hub_configs() if set(read_yaml(path)) != {PUBLISHED_BLOCK}}


def find_recipe(name: str | None) -> Path:
    """Returns the file of a recipe.

    Args:
        name: A path, or the name of a shipped recipe with or without ``.yaml``; None is the
            embedded one.

    Raises:
        UsageError: If there is no such file; lists the shipped recipes.
    """
    # With those that only describe published weights: reading one says what to do with it.
    shipped = {path.stem: path for path in hub_configs()}
    if name is None:
        return shipped[DEFAULT_RECIPE]
    if Path(name).is_file():
        return Path(name)
    stem = Path(name).name.removesuffix(".yaml")
    if stem in shipped and Path(name).parent in (Path(), Path("hub_configs")):
        return shipped[stem]
    raise unknown_name("recipe (and no such file):", name, list(shipped_recipes()))


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe.

    Raises:
        UsageError: If the file is no YAML mapping, or a key is unknown, given twice, or has a value
            of the wrong type; the message names the file and the key.
    """
    parser, arguments = _parser_for(path, "train_lt.py")
    return _parse(parser, arguments)[0]


def parse_recipe(values: dict[str, Any], noun: str) -> Recipe:
    """Makes a recipe of the mapping that a file of it would hold.

    Args:
        values: The mapping, without a ``published:`` block.
        noun: Whose recipe it is, for messages.

    Raises:
        UsageError: If a key is unknown, or has a value of the wrong type; the message names it.
    """
    _check_keys(Recipe, values, f"key of {noun}:")
    try:
        return _parse(create_parser("train_lt.py"), _arguments(noun, _flatten(values)))[0]
    except UsageError as error:
        raise UsageError(f"{noun}: {error}") from error


def parse_command_line(prog: str, argv: list[str]) -> tuple[str, Recipe, RunOptions] | None:
    """Parses ``[RECIPE] [--option value ...]``.

    Args:
        prog: Name of the program in the help text.
        argv: The arguments after it.

    Returns:
        The recipe's name, the recipe with the overrides, and how to run it; None if the arguments
        asked for the resolved recipe, which has been printed then.

    Raises:
        UsageError: For whatever is wrong with the recipe or the arguments.
        SystemExit: After ``--help``.
    """
    named = bool(argv) and not argv[0].startswith("-")
    path = find_recipe(argv[0] if named else None)
    parser, arguments = _parser_for(path, prog)
    given = argv[1:] if named else argv
    recipe, options = _parse(parser, arguments + [a for a in given if a != PRINT])
    if PRINT in given:
        print(recipe.to_yaml(), end="")  # noqa: T201
        return None
    return path.stem, recipe, options


class _Help(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Help with defaults, and a line for each example."""


def create_parser(prog: str) -> ArgumentParser:
    """Creates the parser of a recipe's options and those of how to run it."""
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [RECIPE] [--option value ...]",
        description=wrapped(
            "Trains a backbone, fits every classifier head on its frozen features, and compares "
            "them. RECIPE is a YAML file or the name of a shipped one; options take the place of "
            "its values. Without a recipe it runs the embedded one, without a network."
        ),
        epilog=epilog(
            [
                prog,
                f"{prog} resnet18.folder --data.root photos --output birds",
                f"{prog} --epochs 5 --heads.tau_norm.tau 0.7 --loss.name balanced_softmax",
                f"{prog} --resume --json",
                f"{prog} lt_test_resnet.glyph_lt_quick --print_config",
            ]
        ),
        formatter_class=_Help,
        exit_on_error=False,
    )
    parser.add_class_arguments(Recipe)
    run = parser.add_argument_group("How to run")
    run.add_argument("--output", type=str | None, help="Folder; null is output/<recipe name>.")
    run.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        default="no",
        choices=("auto", "no"),
        help="Go on with the run in that folder from its last whole state, or start it.",
    )
    run.add_argument(
        "--overwrite", action="store_true", help="Delete the run in that folder first."
    )
    run.add_argument("--threads", type=int | None, help="CPU threads per process; null is all.")
    run.add_argument(
        "--workers", type=int | None, help="Processes that decode images; null is by the cores."
    )
    run.add_argument("--compile", action="store_true", help="Compile the model.")
    run.add_argument("--tracker", default="none", help="tensorboard, or any accelerate tracker.")
    run.add_argument("--quiet", action="store_true", help="Print the final table only.")
    run.add_argument(
        "--verbose", action="store_true", help="Say each step, and where an error arose."
    )
    run.add_argument("--json", action="store_true", help="Print metrics.json, not the table.")
    run.add_argument(
        "--push_to_hub", type=str | None, help="Repo of the Hub to push to, NAMESPACE/NAME."
    )
    run.add_argument("--private", action="store_true", help="Make that repo private.")
    run.add_argument(
        "--license", type=str | None, help="Licence for the model card, such as apache-2.0."
    )
    run.add_argument(PRINT, action="store_true", help="Print the resolved recipe and exit.")
    return parser


def recipe_choices() -> dict[str, tuple[str, ...]]:
    """Returns the values of each option of a recipe that has a closed set of them.

    >>> recipe_choices()["protocol"]
    ('standard', 'paper')
    """
    found: dict[str, tuple[str, ...]] = {}

    def collect(cls: type, prefix: str) -> None:
        for key, hint in get_type_hints(cls).items():
            if dataclasses.is_dataclass(hint) and isinstance(hint, type):
                collect(hint, f"{prefix}{key}.")
                continue
            parts = [hint, *get_args(hint)]
            words = [
                word for part in parts if get_origin(part) is Literal for word in get_args(part)
            ]
            if words:
                found[f"{prefix}{key}"] = tuple(map(str, words))

    collect(Recipe, "")
    return found


def _parse(parser: ArgumentParser, argv: list[str]) -> tuple[Recipe, RunOptions]:
    try:
        parsed = parser.parse_args(_known(parser, argv))
    except ArgumentError as error:
        message = _decoded(" ".join(str(error).split()))
        hint = next((hint for start, hint in HINTS.items() if message.startswith(start)), "")
        raise UsageError(message + hint) from error
    hints = get_type_hints(Recipe)
    parts = {field.name: parsed.pop(field.name) for field in dataclasses.fields(Recipe)}
    for name, given in parts.items():
        value = _mapped(given.as_dict() if isinstance(given, Namespace) else given, _decoded)
        is_part = isinstance(hints[name], type) and dataclasses.is_dataclass(hints[name])
        parts[name] = hints[name](**value) if is_part else value
    run = {field.name: parsed[field.name] for field in dataclasses.fields(RunOptions)}
    run["resume"] = run["resume"] == "auto"
    if run["quiet"] and run["verbose"]:
        raise UsageError("--quiet and --verbose exclude each other")
    return Recipe(**parts), RunOptions(**run)


def _parser_for(path: Path, prog: str) -> tuple[ArgumentParser, list[str]]:
    """Returns a parser with a recipe's values as defaults, and the same values as arguments."""
    parser = create_parser(prog)
    values = _flatten(_read(path))
    # As arguments they are checked against their types; defaults are not, but help shows them.
    arguments = _arguments(f"recipe {path}", values)
    try:
        _parse(parser, arguments)
    except UsageError as error:
        raise UsageError(f"recipe {path}: {error}") from error
    parser.set_defaults(values)
    return parser, arguments


def _arguments(noun: str, values: dict[str, Any]) -> list[str]:
    """Returns flat values as the arguments that give them."""
    return [f"--{key}={_as_text(noun, key, value)}" for key, value in values.items()]


def _as_text(noun: str, key: str, value: object) -> str:
    part, _, inner = key.partition(".")
    hint = get_type_hints(Recipe)[part]
    hint = get_type_hints(hint)[inner] if inner else hint
    kinds = {hint, get_origin(hint), *(get_origin(kind) or kind for kind in get_args(hint))}
    if kinds & {str, dict, list}:
        value = _mapped(value, lambda text: f"{TEXT}{text.encode().hex()}_")
    try:
        return value if isinstance(value, str) else json.dumps(value)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{noun}: {key} has a value that is no text, number, list or mapping: {error}"
        ) from error


def _mapped(value: Any, change: Callable[[str], str]) -> Any:  # noqa: ANN401
    """Returns a value with a function applied to each text in its lists and mappings."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    return [_mapped(inner, change) for inner in value] if isinstance(value, list) else value


def _decoded(text: str) -> str:
    """Returns a text, such as a message, with the texts of a recipe as they were."""
    return re.sub(f"{TEXT}([0-9a-f]*)_", lambda match: bytes.fromhex(match.group(1)).decode(), text)


def _known(parser: ArgumentParser, argv: list[str]) -> list[str]:
    options = [option for action in parser._actions for option in action.option_strings]
    for argument in argv:
        name = argument.partition("=")[0]
        if not name.startswith("--") or name in options:
            continue
        # --heads.tau_norm.tau sets one key of the mapping --heads.
        if any(name.startswith(f"{option}.") for option in ("--heads", *_mappings(options))):
            continue
        choices = [option for option in options if option.startswith("--")]
        inner = [option for option in choices if option.endswith(f".{name[2:]}")]
        if inner:
            raise UsageError(f"unknown option {name!r}; did you mean {' or '.join(inner)}?")
        raise unknown_name("option", name, choices)
    return argv


def _mappings(options: list[str]) -> list[str]:
    return [option for option in options if option.endswith("options")]


def _read(path: Path) -> dict[str, Any]:
    """Reads a recipe file and checks its keys, without looking at the types of its values."""
    values = read_yaml(path, "recipe")
    # What the file says of published weights is no part of the experiment.
    values.pop(PUBLISHED_BLOCK, None)
    if not values:
        raise UsageError(
            f"{path} describes published weights and is no recipe to run; load them with "
            f"timm.create_model({path.stem!r}, pretrained=True)"
        )
    _check_keys(Recipe, values, f"key of recipe {path}:")
    if isinstance(values.get("heads"), dict):
        # `tau_norm:` with nothing behind it is a head without options.
        values["heads"] = {name: options or {} for name, options in values["heads"].items()}
    return values


def _check_keys(cls: type, values: dict[str, Any], noun: str, prefix: str = "") -> None:
    hints = get_type_hints(cls)
    for key, value in values.items():
        if key not in hints:
            raise unknown_name(noun, f"{prefix}{key}", [f"{prefix}{name}" for name in hints])
        if dataclasses.is_dataclass(hints[key]) and isinstance(hints[key], type):
            if not isinstance(value, dict):
                raise UsageError(f"{noun} {prefix}{key} must be a mapping, got {value!r}")
            _check_keys(hints[key], value, noun, f"{prefix}{key}.")


def _flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Returns ``{"model.name": ...}`` for ``{"model": {"name": ...}}``, one level deep."""
    hints = get_type_hints(Recipe)
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(hints[key]):
            flat |= {f"{key}.{inner}": given for inner, given in value.items()}
        else:
            flat[key] = value
    return flat
