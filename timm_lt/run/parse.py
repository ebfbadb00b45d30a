"""Recipes from YAML files and the command line."""

import argparse
import dataclasses
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import docstring_parser

from timm_lt.models.pretrained import PUBLISHED_BLOCK, hub_configs
from timm_lt.run.recipe import Recipe, RunOptions, prefixed
from timm_lt.utils.checks import T, UsageError, unknown_name
from timm_lt.utils.console import epilog, start_logging, wrapped
from timm_lt.utils.files import YAML_ERRORS, parse_yaml, read_yaml

DEFAULT_RECIPE = "lt_test_resnet.glyph_lt"


def shipped_recipes() -> dict[str, Path]:
    """Returns the files of the shipped recipes by name."""
    return {path.stem: path for path in hub_configs() if set(read_yaml(path)) != {PUBLISHED_BLOCK}}


def find_recipe(name: str | None) -> Path:
    """Returns the file of a recipe: a path, or a shipped name; None is the embedded one."""
    # Including those that only describe published weights: reading one says how to load them.
    shipped = {path.stem: path for path in hub_configs()}
    path = Path(name or DEFAULT_RECIPE)
    stem = path.name.removesuffix(".yaml")
    if name is not None and path.is_file():
        return path
    if stem in shipped and path.parent in (Path(), Path("hub_configs")):
        return shipped[stem]
    raise unknown_name("recipe (and no such file):", name, list(shipped_recipes()))


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe; messages name the file and the key."""
    values = read_yaml(path, "recipe")
    # Published weights are not part of the experiment.
    values.pop(PUBLISHED_BLOCK, None)
    if not values:
        raise UsageError(
            f"{path} describes published weights and is not a recipe; load them with "
            f"timm.create_model({path.stem!r}, pretrained=True)"
        )
    with prefixed(f"recipe {path}"):
        return parse_values(Recipe, values)


def parse_values(cls: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """Creates a dataclass from values of a file, whose keys messages begin with ``prefix``."""
    hints = _hints(cls)
    for key in values:
        if key not in hints:
            raise unknown_name("key", f"{prefix}{key}", [f"{prefix}{known}" for known in hints])
    return cls(**{key: _parse(v, hints[key], f"{prefix}{key}") for key, v in values.items()})


def _parse(value: Any, hint: Any, name: str) -> Any:  # noqa: ANN401
    """Returns a value of the annotated type, in which mappings become dataclasses."""
    inner = get_args(hint)[0] if get_origin(hint) is list else None
    if isinstance(value, list) and dataclasses.is_dataclass(inner):
        return [_parse(item, inner, f"{name}[{number}]") for number, item in enumerate(value)]
    is_part = dataclasses.is_dataclass(hint)
    if isinstance(value, dict) and hint == dict[str, dict[str, Any]]:
        # `tau_norm:` with nothing behind it is a head without options.
        value = {key: {} if given is None else given for key, given in value.items()}
    if fits(value, dict if is_part else hint):
        return parse_values(hint, value, f"{name}.") if is_part else value
    if choices := _choices(hint):
        raise unknown_name(name, value, choices)
    is_mapping = is_part or get_origin(hint) is dict
    kind = "a mapping" if is_mapping else inspect.formatannotation(hint)
    raise UsageError(f"{name} must be {kind}, got {value!r}")


def _hints(cls: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def fits(value: object, hint: Any) -> bool:  # noqa: ANN401
    """Returns whether a value from YAML has the annotated type.

    >>> fits({"crt": {"lr": 0.1}}, dict[str, dict[str, Any]]), fits(True, int | None)
    (True, False)
    """
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Any or kind is Literal:
        return kind is Any or value in inner
    if kind in (Union, UnionType):
        return any(fits(value, part) for part in inner)
    # In Python, true and false are integers.
    right = isinstance(value, int | float if kind is float else kind)
    if not right or isinstance(value, bool) != (kind is bool):
        return False
    if isinstance(value, list):
        return all(fits(item, *inner) for item in value)
    if isinstance(value, dict) and inner:
        return all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    return True


def parse_command_line(prog: str, argv: list[str]) -> tuple[str, Recipe, RunOptions]:
    """Parses ``[RECIPE] [--option value ...]``, the arguments of a program.

    Returns:
        The recipe's name, the recipe with the overrides, and the options of the run.

    Raises:
        UsageError: For any mistake in the recipe or the arguments.
        SystemExit: After ``--help`` and ``--print_config``.
    """
    if "--verbose" in argv:
        # Before anything can go wrong.
        start_logging(verbose=True)
    named = bool(argv) and not argv[0].startswith("-")
    path = find_recipe(argv[0] if named else None)
    base = load_recipe(path)
    given = _parse_options(create_parser(prog, base), base, argv[1:] if named else argv)
    print_config = given.pop("print_config", False)
    run = {field.name: given.pop(field.name) for field in dataclasses.fields(RunOptions)}
    values, hints = dataclasses.asdict(base), {key: hint for key, hint, *_ in _options(base)}
    for key, text in given.items():
        *parents, last = key.split(".")
        target = values
        for name in parents:
            if not isinstance(target.get(name), dict):
                target[name] = {}
            target = target[name]
        target[last] = _value(text, hints.get(key, Any))
    recipe = parse_values(Recipe, values)
    if print_config:
        print(recipe.to_yaml(), end="")  # noqa: T201
        raise SystemExit
    return path.stem, recipe, RunOptions(**run | {"resume": bool(run["resume"])})


def _parse_options(
    parser: argparse.ArgumentParser, recipe: Recipe, argv: list[str]
) -> dict[str, Any]:
    """Returns the options by key, among them keys of mappings, as in ``--heads.tau_norm.tau``."""
    known = [f"--{key}" for key, *_ in _options(recipe)]
    mappings = tuple(f"{key}." for key in known if key == "--heads" or key.endswith("options"))
    for name in dict.fromkeys(argument.partition("=")[0] for argument in argv):
        if name.startswith(mappings):
            parser.add_argument(name)
    parsed, rest = parser.parse_known_args(argv)
    if rest:
        name = rest[0].partition("=")[0]
        if not name.startswith("--"):
            raise UsageError(f"unexpected argument {name!r}; RECIPE comes before the options")
        inner = [key for key in known if key.endswith(f".{name[2:]}")]
        run = [f"--{field.name}" for field in dataclasses.fields(RunOptions)]
        raise unknown_name("option", name, inner or [*known, *run])
    return vars(parsed)


def _value(text: str, hint: Any) -> Any:  # noqa: ANN401
    """Returns the value of an option, parsed as YAML if that has the right type."""
    try:
        value = parse_yaml(text)
    except YAML_ERRORS:
        return text
    return value if fits(value, hint) else text


def _options(part: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:  # noqa: ANN401
    """Yields key, type, value and explanation of each option in a dataclass and its parts."""
    described = docstring_parser.parse_from_object(type(part)).params
    texts = {field.arg_name: field.description for field in described}
    for name, hint in _hints(type(part)).items():
        value = getattr(part, name)
        if dataclasses.is_dataclass(value):
            yield from _options(value, f"{name}.")
        else:
            yield f"{prefix}{name}", hint, value, " ".join((texts[name] or "").split())


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as :class:`UsageError`."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def create_parser(prog: str, recipe: Recipe | None = None) -> argparse.ArgumentParser:
    """Creates the parser of the options of a recipe, with its values as defaults, and of a run."""
    examples = [
        prog,
        f"{prog} resnet18.folder --data.root photos --output birds",
        f"{prog} --epochs 5 --heads.tau_norm.tau 0.7 --loss.name balanced_softmax",
        f"{prog} --resume --json",
        f"{prog} lt_test_resnet.glyph_lt_quick --print_config",
    ]
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [RECIPE] [--option value ...]",
        description=wrapped(
            "Trains a backbone, fits every classifier head on its frozen features, and compares "
            "them. RECIPE is a YAML file or the name of a shipped one; options take the place of "
            "its values. Without a recipe it runs the embedded one, without a network."
        ),
        epilog=epilog(examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("recipe")
    for key, hint, value, text in _options(recipe or Recipe()):
        group.add_argument(
            f"--{key}",
            metavar=None if _choices(hint) else key.rpartition(".")[2].upper(),
            choices=_choices(hint),
            help=f"{text} (default: {json.dumps(value, default=str)})".replace("%", "%%"),
        )
    group = parser.add_argument_group("how to run")
    level, folder = (group.add_mutually_exclusive_group() for _ in range(2))
    owners = {"quiet": level, "verbose": level, "resume": folder, "overwrite": folder}
    for key, hint, value, text in _options(RunOptions()):
        how: dict[str, Any] = {"type": int if fits(1, hint) else str}
        if key == "resume":
            how = {"nargs": "?", "const": "auto", "choices": ["auto"]}
        elif hint is bool:
            how = {"action": "store_true"}
        owners.get(key, group).add_argument(f"--{key}", help=text, default=value, **how)
    group.add_argument("--print_config", action="store_true", help="Print the recipe and exit.")
    return parser


def _choices(hint: Any) -> list[str] | None:  # noqa: ANN401
    """Returns the values of an option that has a closed set of them."""
    literals = [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal]
    if not literals:
        return None
    return [*map(str, get_args(literals[0])), *(["null"] if fits(None, hint) else [])]
