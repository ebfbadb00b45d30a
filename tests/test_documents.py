"""README, recipes and licences: what they promise is there and runs."""

import inspect
import re
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState

import timm_lt
import train_lt
from timm_lt.data.sources import DATASETS
from timm_lt.published import CHECKPOINTS, PUBLISHED
from timm_lt.recipe import load_recipe, shipped_recipes

ROOT = Path(train_lt.__file__).parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_blocks_of_the_readme_run(number, capsys, request):
    code = blocks("python")[number]
    if "hf-hub:" in code:
        # The push above the block, to a hub on 127.0.0.1.
        request.getfixturevalue("loopback_hub")
        timm_lt.push_to_hub(CHECKPOINTS / "lt_test_resnet.glyph_lt", "me/glyphs")
    packaged = CHECKPOINTS / "lt_test_resnet.glyph_lt"
    # The main job would have written this folder; the packaged checkpoint is one of the same form.
    code = code.replace("output/lt_test_resnet.glyph_lt", str(packaged))
    try:
        exec(compile(code, f"README block {number}", "exec"), {})
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    if "evaluate_logits" in code:
        assert re.search(r"all \d\d\.\d %", capsys.readouterr().out)


def test_the_first_two_shell_blocks_install_and_run():
    run, test = blocks("bash")[:2]
    assert run.split("\n")[:2] == ["pip install .", "accelerate launch train_lt.py"]
    assert test.split("\n")[:2] == ['pip install ".[test]"', "pytest -n 2 --dist worksteal"]


def test_the_readme_names_every_part():
    parts = [*timm_lt.list_heads(), *timm_lt.list_samplers(), *timm_lt.list_losses()]
    # Other tests register data sets of their own.
    own = [name for name in DATASETS if DATASETS[name].__module__.startswith("timm_lt.")]
    for name in [*parts, *own]:
        assert f"`{name}`" in README, name


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
    assert f"`{name}`" in (ROOT / "hub_configs" / "README.md").read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_catalogue_has_every_published_name_and_its_figures(name):
    text = (ROOT / "hub_configs" / "README.md").read_text()
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
