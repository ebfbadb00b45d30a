"""The recipe: a complete experiment as typed data, from YAML and the command line.

Only ``train_lt.py`` and ``timm_lt/cli.py`` know recipes; everything below takes plain arguments.
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from timm_lt.registry import UsageError, check_integer, unknown_name

DEFAULT_RECIPE = "lt_test_resnet.glyph_lt"
DEFAULT_HEADS = ("linear", "crt", "tau_norm", "lws", "ncm", "logit_adjusted")
PRINT = "--print_config"


@dataclass(frozen=True)
class DataRecipe:
    """Which images.

    Args:
        name: A registered data set; `timm-lt list` names them.
        root: Folder with the files, for data sets that read files.
        options: Options of the data set.
        image_size: Height and width in pixels; null takes the model's.
        augmentation: A registered augmentation of the training images.
        augmentation_options: Options of the augmentation.
    """

    name: str = "glyph_lt"
    root: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    augmentation: str = "none"
    augmentation_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.image_size is not None:
            check_integer("data.image_size", self.image_size, minimum=1)


@dataclass(frozen=True)
class ModelRecipe:
    """Which network.

    Args:
        name: Any timm architecture, or an lt_* one; a tag chooses a configuration.
        pretrained: Start from that configuration's published weights.
        options: Further arguments of timm.create_model.
    """

    name: str = "lt_test_resnet"
    pretrained: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplerRecipe:
    """How often each class is drawn in the representation stage.

    Args:
        name: A registered sampler.
        options: Options of the sampler.
    """

    name: str = "instance_balanced"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LossRecipe:
    """What the representation stage minimises.

    Args:
        name: A registered loss.
        options: Options of the loss.
    """

    name: str = "cross_entropy"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimizerRecipe:
    """How the representation stage updates weights.

    Args:
        name: An optimiser of timm; sgd is with Nesterov momentum there.
        lr: Peak learning rate, > 0.
        weight_decay: On all weights but biases and norms, >= 0.
        momentum: In [0, 1).
        options: Further arguments of timm.optim.create_optimizer_v2.
    """

    name: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 5e-4
    momentum: float = 0.9
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SchedulerRecipe:
    """How the learning rate changes, update by update.

    Args:
        name: A scheduler of timm.
        warmup_epochs: Epochs of linear warm-up, counted within the epochs.
        options: Further arguments of timm.scheduler.create_scheduler_v2.
    """

    name: str = "cosine"
    warmup_epochs: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_integer("scheduler.warmup_epochs", self.warmup_epochs, minimum=0)


@dataclass(frozen=True)
class Recipe:
    """A complete experiment.

    Args:
        data: Which images.
        model: Which network.
        sampler: How often each class is drawn.
        loss: What is minimised.
        optimizer: How weights are updated.
        scheduler: How the learning rate changes.
        epochs: Epochs of the representation stage, >= 1.
        batch_size: Images per update, over all processes, >= 1.
        heads: Heads to fit, each with its options; timm-lt list names them.
        shot_rule: fb counts > 100 as many-shot and < 20 as few-shot; oltr takes >= and <=.
        mixed_precision: auto takes bf16 where the processor computes it natively.
        seed: Seed of everything random, >= 0.
    """

    data: DataRecipe = field(default_factory=DataRecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    sampler: SamplerRecipe = field(default_factory=SamplerRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    scheduler: SchedulerRecipe = field(default_factory=SchedulerRecipe)
    epochs: int = 30
    batch_size: int = 128
    heads: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {name: {} for name in DEFAULT_HEADS}
    )
    shot_rule: Literal["fb", "oltr"] = "fb"
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("epochs", self.epochs, minimum=1)
        check_integer("batch_size", self.batch_size, minimum=1)
        check_integer("seed", self.seed, minimum=0)

    def to_yaml(self) -> str:
        """Returns the recipe as YAML that reads back to the same recipe."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class RunOptions:
    """How to run, as opposed to what.

    Attributes:
        output: Folder of the run; None means ``output/<recipe name>``.
        resume: Go on with the run in that folder, or start it if there is none.
        overwrite: Delete the run in that folder first.
        threads: Threads per process on a CPU; None is this process's share of the cores.
        tracker: ``"none"``, or a tracker that accelerate knows and that is installed.
        quiet: Print the final table only.
    """

    output: str | None = None
    resume: bool = False
    overwrite: bool = False
    threads: int | None = None
    tracker: str = "none"
    quiet: bool = False


def recipes_folder() -> Path:
    """Returns the folder of the shipped recipes: in an installed package, or in the repository."""
    package = Path(__file__).parent
    inside = package / "hub_configs"
    return inside if inside.is_dir() else package.parent / "hub_configs"


def shipped_recipes() -> dict[str, Path]:
    """Returns the files of the shipped recipes by name."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}


def find_recipe(name: str | None) -> Path:
    """Returns the file of a recipe.

    Args:
        name: A path, or the name of a shipped recipe with or without ``.yaml``; None is the
            embedded one.

    Raises:
        UsageError: If there is no such file; lists the shipped recipes.
    """
    shipped = shipped_recipes()
    if name is None:
        return shipped[DEFAULT_RECIPE]
    if Path(name).is_file():
        return Path(name)
    stem = Path(name).name.removesuffix(".yaml")
    if stem in shipped and Path(name).parent in (Path(), Path("hub_configs")):
        return shipped[stem]
    raise unknown_name("recipe (and no such file):", name, list(shipped))


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe.

    Raises:
        UsageError: If the file is no YAML mapping, or a key is unknown, given twice, or has a value
            of the wrong type; the message names the file and the key.
    """
    parser, arguments = _parser_for(path, "train_lt.py")
    return _parse(parser, arguments)[0]


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


def _parser(prog: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [RECIPE] [--option value ...]",
        description=(
            "Trains a backbone, fits every classifier head on its frozen features, and compares "
            "them. RECIPE is a YAML file or the name of a shipped one; options take the place of "
            "its values, e.g. --epochs 5 --heads.tau_norm.tau 0.7."
        ),
        exit_on_error=False,
    )
    parser.add_class_arguments(Recipe)
    run = parser.add_argument_group("How to run")
    run.add_argument("--output", type=str | None, help="Folder; null is output/<recipe name>.")
    run.add_argument("--resume", action="store_true", help="Go on with the run in that folder.")
    run.add_argument(
        "--overwrite", action="store_true", help="Delete the run in that folder first."
    )
    run.add_argument("--threads", type=int | None, help="CPU threads per process; null is all.")
    run.add_argument("--tracker", default="none", help="tensorboard, or any accelerate tracker.")
    run.add_argument("--quiet", action="store_true", help="Print the final table only.")
    run.add_argument(PRINT, action="store_true", help="Print the resolved recipe and exit.")
    return parser


def _parse(parser: ArgumentParser, argv: list[str]) -> tuple[Recipe, RunOptions]:
    try:
        parsed = parser.parse_args(_known(parser, argv))
    except ArgumentError as error:
        raise UsageError(" ".join(str(error).split())) from error
    hints = get_type_hints(Recipe)
    parts = {field.name: parsed.pop(field.name) for field in dataclasses.fields(Recipe)}
    for name, value in parts.items():
        if isinstance(value, Namespace):
            parts[name] = hints[name](**value.as_dict())
    run = {field.name: parsed[field.name] for field in dataclasses.fields(RunOptions)}
    return Recipe(**parts), RunOptions(**run)


def _parser_for(path: Path, prog: str) -> tuple[ArgumentParser, list[str]]:
    """Returns a parser with a recipe's values as defaults, and the same values as arguments."""
    parser = _parser(prog)
    values = _flatten(_read(path))
    # As arguments they are checked against their types; defaults are not, but help shows them.
    texts = {key: _as_text(path, key, value) for key, value in values.items()}
    arguments = [f"--{key}={text}" for key, text in texts.items()]
    try:
        _parse(parser, arguments)
    except UsageError as error:
        raise UsageError(f"recipe {path}: {error}") from error
    parser.set_defaults(values)
    return parser, arguments


def _as_text(path: Path, key: str, value: object) -> str:
    try:
        return value if isinstance(value, str) else json.dumps(value)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"recipe {path}: {key} has a value that is no text, number, list or mapping: {error}"
        ) from error


def _known(parser: ArgumentParser, argv: list[str]) -> list[str]:
    options = [option for action in parser._actions for option in action.option_strings]
    for argument in argv:
        name = argument.partition("=")[0]
        if not name.startswith("--") or name in options:
            continue
        # --heads.tau_norm.tau sets one key of the mapping --heads.
        if any(name.startswith(f"{option}.") for option in ("--heads", *_mappings(options))):
            continue
        raise unknown_name("option", name, [o for o in options if o.startswith("--")])
    return argv


def _mappings(options: list[str]) -> list[str]:
    return [option for option in options if option.endswith("options")]


def _read(path: Path) -> dict[str, Any]:
    """Reads a recipe file and checks its keys, without looking at the types of its values."""
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.load(text, Loader=_StrictLoader)  # noqa: S506
    except OSError as error:
        raise UsageError(f"recipe {path} cannot be read: {error.strerror}") from error
    except UsageError as error:
        raise UsageError(f"recipe {path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"recipe {path} must be a mapping of keys to values")
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


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, and reads 5e-4 as a number as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                line = key_node.start_mark.line + 1
                raise UsageError(f"the key in line {line} must be a word, not a list or mapping")
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise UsageError(f"key {key!r} is given twice, the second time in line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)
