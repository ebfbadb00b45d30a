"""README, documentation, recipes: names, links and commands are valid, and the code runs."""

import collections
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState

import timm_lt
from timm_lt import cli
from timm_lt.cli.common import COMMANDS
from timm_lt.cli.run import parse_sampler
from timm_lt.data.sources import DATASETS
from timm_lt.heads.base import HEADS
from timm_lt.losses import LOSSES
from timm_lt.models.pretrained import CHECKPOINTS, PUBLISHED
from timm_lt.run.comparison import load_grid
from timm_lt.run.parse import load_recipe, parse_command_line, shipped_recipes
from timm_lt.run.setup import check_heads, training_options
from timm_lt.samplers import SAMPLERS

ROOT = Path(__file__).parents[1]
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
    """Blocks of code in some languages by page and number."""
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


def parsed(parse, *arguments):
    """Returns the result of a parser; --help is not a mistake."""
    try:
        return parse(*arguments)
    except SystemExit as stopped:
        if stopped.code:
            raise AssertionError(arguments) from stopped
        return None


def check_command(words):
    """Parses a command with the parser that it would meet, and runs nothing."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    program, *arguments = words
    if program == "accelerate" and arguments != ["config"]:
        assert arguments.pop(0) == "launch"
        launch = launch_command_parser().parse_args(arguments)
        program, arguments = "python", [launch.training_script, *launch.training_script_args]
    if program == "python" and arguments[:2] == ["-m", "timm_lt"]:
        program, arguments = "timm-lt", arguments[2:]
    if program == "python" and arguments[0] == "train_lt.py":
        program, arguments = "timm-lt", ["train", *arguments[1:]]
    if program == "timm-lt":
        check_timm_lt(*arguments)
    elif program == "python" and arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]), arguments
    elif program == "python":
        # timm's own train.py is not in its package.
        assert arguments[0] == "train.py" or (ROOT / arguments[0]).is_file(), arguments
    elif program == "pip":
        assert arguments[0] == "install"
        assert set(re.findall(r"\[(.*)\]", arguments[-1])) <= set(EXTRAS), arguments
    else:
        assert program in {*ELSEWHERE, "accelerate"}, f"who parses {program}?"


def check_timm_lt(command, *arguments):
    """Parses the arguments of a command; RECIPE and GRID stand for any."""
    arguments = [word for word in arguments if word not in ("RECIPE", "RECIPE.yaml", "GRID")]
    if command == "train":
        parsed(parse_command_line, "train_lt.py", arguments)
    elif command == "compare":
        own, others = parsed(cli.create_parser([command]).parse_known_args, [command, *arguments])
        if own.grid is not None:
            grid = load_grid(own.grid)
            assert {*(own.only or [])} <= {row.label for row in grid.rows}
            check_timm_lt("train", own.recipe or grid.recipe, *others)
    elif command == "run":
        assert len(arguments) > 1 or arguments == ["SCRIPT"]
        if "--sampler" in arguments[:-1]:
            parse_sampler(arguments[arguments.index("--sampler") + 1])
    else:
        parsed(cli.create_parser([command]).parse_args, [command, *arguments])


README = TEXTS["README.md"]
PACKAGED = CHECKPOINTS / "lt_test_resnet.glyph_lt"
PYTHON = blocks("python")
REFERENCE = "\n".join(TEXTS[page] for page in PAGES if page.startswith("docs/api/"))


@pytest.mark.slow
@pytest.mark.parametrize("block", PYTHON)
def test_python_blocks_run(block, tmp_path, monkeypatch, capsys, request):
    # The main job would have written this folder; the packaged checkpoint is one of the same form.
    code = PYTHON[block].replace("output/lt_test_resnet.glyph_lt", str(PACKAGED))
    if "hf-hub:" in code:
        # The push above the block, to a hub on 127.0.0.1.
        request.getfixturevalue("loopback_hub")
        timm_lt.push_to_hub(PACKAGED, "me/glyphs")
    monkeypatch.chdir(tmp_path)
    for registry in (HEADS, LOSSES, SAMPLERS):
        monkeypatch.setattr(registry, "_parts", dict(registry._parts))
    try:
        exec(compile(code, block, "exec"), {})
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    if "evaluate_logits(model" in code:
        assert re.search(r"all \d\d\.\d %", capsys.readouterr().out)


@pytest.mark.parametrize("block", blocks("bash", "sh"))
def test_shell_lines_are_valid(block):
    for words in shell_lines(blocks("bash", "sh")[block]):
        check_command(words)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_yaml_blocks_are_recipes_or_grids(block, tmp_path):
    code = blocks("yaml")[block]
    path = tmp_path / "own.yaml"
    path.write_text(code)
    if "representations" in yaml.safe_load(code):
        assert load_grid(str(path)).rows
        return
    recipe = load_recipe(path)
    check_heads(recipe)
    training_options(recipe)


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files_and_headings(name):
    for link in re.findall(r"\]\((?!https?:)([^)\s]*)\)", prose(name)):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT).as_posix()), link


def own(registry):
    """The parts that the package registers; other tests register some of their own."""
    return {n: registry[n] for n in registry if registry[n].__module__.startswith("timm_lt.")}


@pytest.mark.parametrize("registry", [HEADS, SAMPLERS, LOSSES], ids=lambda r: r.noun)
def test_every_part_has_its_name_its_formula_and_its_class_in_the_docs(registry):
    rows = [line.split(" | ") for line in TEXTS["docs/definitions.md"].splitlines()]
    shown = [resolve(name) for name in re.findall(r"^::: (\S+)", REFERENCE, re.MULTILINE)]
    for name, part in own(registry).items():
        assert f"`{name}`" in README, name
        formulas = [row for row in rows if len(row) == 3 and f"`{name}`" in row[0]]
        assert any(len(formula[1]) > 5 for formula in formulas), name
        assert part in shown, name


def resolve(path):
    """The object of a dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_the_docs_have_every_data_set_and_public_name():
    for name in own(DATASETS):
        assert f"`{name}`" in README
        assert f"`{name}`" in TEXTS["docs/your-data.md"]
    public = {f"timm_lt.{name}" for name in timm_lt._MODULES}
    counts = collections.Counter(re.findall(r"^::: (\S+)", REFERENCE, re.MULTILINE))
    assert not public - set(counts)
    assert set(counts.values()) == {1}
    assert all(resolve(name) for name in counts)


def test_every_package_is_in_the_tree_of_the_house():
    tree = TEXTS["CONTRIBUTING.md"].partition("\ntimm_lt/\n")[2].partition("```")[0]
    packages = {p.parent.name for p in (ROOT / "timm_lt").glob("*/__init__.py")}
    assert packages == set(re.findall(r"^  (\w+)/", tree, re.MULTILINE))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_nothing_of_a_network(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    subprocess.run(build, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=True)
    site = tmp_path / "site"
    pages = {p.relative_to(site).as_posix(): p.read_text() for p in site.rglob("*.html")}
    assert {page.removeprefix("docs/").replace(".md", ".html") for page in PAGES} < set(pages)
    loads = re.compile(r'<(?:script|img|iframe)[^>]*src="[^"]*//|<link[^>]*href="[^"]*//')
    assert not [name for name, page in pages.items() if loads.search(page)]
    assert "lt_bbn_resnet50.inat2018" in pages["catalogue.html"]
    commands = pages["command-line.html"]
    assert set(re.findall(r'<h2 id="timm-lt-(\w+)">', commands)) == set(COMMANDS)
    assert "--accumulation_steps" in commands
    assert 'id="timm_lt.create_model"' in pages["api/models.html"]


@pytest.mark.parametrize(("name", "path"), shipped_recipes().items())
def test_recipes_say_their_command_and_load(name, path):
    first = path.read_text().splitlines()[0]
    recipe = load_recipe(path)
    command = "# accelerate launch train_lt.py"
    if name != "lt_test_resnet.glyph_lt":
        command += f" hub_configs/{name}.yaml"
    root = inspect.signature(DATASETS[recipe.data.name]).parameters.get("root")
    if root is not None and root.default is root.empty:
        command += " --data.root FOLDER"
    assert first == command
    assert next(iter(recipe.heads)) == "linear"
    assert yaml.safe_load(recipe.to_yaml())["epochs"] == recipe.epochs
    assert f"`{name}`" in TEXTS["hub_configs/README.md"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_catalogue_has_every_published_name_and_its_figures(name):
    text = TEXTS["hub_configs/README.md"]
    (row,) = [line for line in text.splitlines() if line.startswith("|") and f"`{name}`" in line]
    for head in PUBLISHED[name].heads.values():
        if head.quoted:
            figures = [head.quoted[key] for key in ("many_shot", "medium_shot", "few_shot", "all")]
            assert " / ".join(f"{100 * figure:.1f}" for figure in figures) in row
            assert PUBLISHED[name].quoted_from
        # What was measured here is in the README's table of results.
        for key in ("many_shot", "all"):
            if head.measured:
                assert f"{100 * head.measured[key]:.1f}" in README


NUMBER = re.compile(r"\d+(?:\.\d+)?")


def tables(notebook):
    """The printed tables of a notebook."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [output.text for output in outputs if output.get("name") == "stdout"]
    return [text for text in texts if text.startswith("head ")]


# In a process of its own, since the client leaves sockets open. The kernel is reached over sockets
# in the folder, not over ports that others could reach.
RUN_NOTEBOOK = """
import sys, nbclient, nbformat
from jupyter_client import AsyncKernelManager
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, km=AsyncKernelManager(transport="ipc"), timeout=500).execute()
nbformat.write(notebook, "executed.ipynb")
"""


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_notebook_runs_and_reproduces_its_outputs(path, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN_NOTEBOOK, path]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    stored, executed = (nbformat.read(p, as_version=4) for p in (path, tmp_path / "executed.ipynb"))
    nbformat.validate(stored)
    (old,), (new,) = tables(stored), tables(executed)
    assert NUMBER.sub("#", old) == NUMBER.sub("#", new)
    figures = [[float(n) for n in NUMBER.findall(text)] for text in (old, new)]
    # Other processors round differently, which moves a few test images.
    assert figures[1] == pytest.approx(figures[0], abs=1.5)
