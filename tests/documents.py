"""The documents of the repository: their code blocks, links and headings; shell lines parsed."""

import contextlib
import importlib.util
import io
import re
import shlex
import tomllib
from pathlib import Path

from accelerate.commands.launch import launch_command_parser

import train_lt
from timm_lt import cli
from timm_lt.cli import compare
from timm_lt.cli.run import parse_sampler
from timm_lt.run.comparison import find_grid, load_grid
from timm_lt.run.parse import parse_command_line

ROOT = Path(train_lt.__file__).parent
PAGES = sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md"))
OUTSIDE = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
OUTSIDE += ["hub_configs/README.md", "benchmarks/README.md"]
TEXTS = {name: (ROOT / name).read_text() for name in [*OUTSIDE, *PAGES]}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LANGUAGES = {"bash", "sh", "python", "yaml", "text"}
# What the shell finds elsewhere: nothing of this project parses its arguments.
ELSEWHERE = {"pytest", "ruff", "mypy", "lint-imports", "mkdocs", "hf"}


def blocks(*languages):
    """The different blocks of code in some languages: name of a page and number, and the text."""
    found = {}
    for name, text in TEXTS.items():
        for number, (language, code) in enumerate(FENCE.findall(text)):
            assert language in LANGUAGES, f"{name}: a block of {language}"
            if language in languages and code not in found.values():
                found[f"{name}:{number}"] = code
    return found


def prose(name):
    """A document without its blocks of code."""
    return FENCE.sub("", TEXTS[name])


def anchors(name):
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(name), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def shell_lines(code):
    """The commands of a block, without comments."""
    for line in code.replace("\\\n", " ").splitlines():
        for command in line.split(" && "):
            words = shlex.split(command, comments=True)
            # Where the shell writes what a command prints.
            words = words[: words.index(">")] if ">" in words else words
            if words:
                yield words


def check_command(words):
    """Parses a command with the parser that it would meet, and runs nothing."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    program, *arguments = words
    if program == "timm-lt":
        check_timm_lt(arguments)
    elif program == "python":
        check_script(arguments)
    elif program == "accelerate" and arguments != ["config"]:
        assert arguments.pop(0) == "launch"
        launch = launch_command_parser().parse_args(arguments)
        check_script([launch.training_script, *launch.training_script_args])
    elif program == "pip":
        assert arguments[0] == "install"
        names = re.findall(r"\[(.*)\]", arguments[-1])
        assert set(names) <= set(EXTRAS), f"no extra {names}"
    else:
        assert program in {*ELSEWHERE, "accelerate"}, f"who parses {program}?"


def check_script(arguments):
    """Parses the command line of a script, of ours or in benchmarks/."""
    script, *rest = arguments
    if script == "-m":
        module, *rest = rest
        assert importlib.util.find_spec(module), module
        if module == "timm_lt":
            check_timm_lt(rest)
    elif script == "train_lt.py":
        check_recipe(rest)
    elif script != "train.py":  # timm's own, which is not in its package
        assert (ROOT / script).is_file(), script


def check_timm_lt(arguments):
    """Parses the arguments of ``timm-lt``."""
    command, *rest = arguments
    if command == "train":
        check_recipe(rest)
    elif command == "compare":
        check_comparison(rest)
    elif command == "run":
        assert len(rest) > 1 or rest == ["SCRIPT"]
        if "--sampler" in rest[:-1]:
            parse_sampler(rest[rest.index("--sampler") + 1])
    else:
        parsed(lambda: cli.create_parser().parse_args(arguments))


def check_recipe(arguments):
    """Parses the arguments of the main job; RECIPE stands for any."""
    if arguments and arguments[0] in ("RECIPE", "RECIPE.yaml"):
        arguments = arguments[1:]
    parsed(lambda: parse_command_line("train_lt.py", arguments))


def check_comparison(arguments):
    """Parses the arguments of ``timm-lt compare``: its own, and those of the recipe."""
    if not arguments:
        return
    name, *rest = arguments
    if name == "GRID":
        return
    grid = load_grid(find_grid(name))
    own, others = parsed(lambda: compare.create_parser().parse_known_args(rest))
    compare.parse_seeds(own.seeds)
    grid.cells(own.only)
    check_recipe([own.recipe or grid.recipe, *others])


def parsed(parse):
    """What a parser returns; a mistake is an error with what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            return parse()
        except SystemExit as stopped:
            if stopped.code:
                raise AssertionError(printed.getvalue()) from stopped
    return None
