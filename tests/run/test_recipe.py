"""Recipes: YAML with overrides becomes typed data, and mistakes are named."""

import dataclasses
import json

import pytest

from timm_lt.fitting import AUTO, DEFAULT_HEADS
from timm_lt.heads import list_heads
from timm_lt.run.parse import (
    DEFAULT_RECIPE,
    find_recipe,
    load_recipe,
    parse_command_line,
    parse_values,
    shipped_recipes,
)
from timm_lt.run.recipe import OptimizerRecipe, Recipe, RunOptions
from timm_lt.utils.checks import UsageError


@pytest.fixture
def read(tmp_path):
    """Returns a function: recipe text and arguments -> (recipe, run options)."""

    def parse(text, *argv):
        path = tmp_path / "mine.yaml"
        path.write_bytes(text.encode())
        return parse_command_line("train_lt.py", [str(path), *argv])[1:]

    return parse


@pytest.mark.parametrize("text", ["null", "1e-3", "", "{a: 1}", "yes", "it's", "ä", "--x"])
def test_a_quoted_text_stays_a_text(text, read):
    given = json.dumps(text)
    data = f"{{name: {given}, root: {given}, options: {{k: {given}, m: {{n: [{given}, 1e-3]}}}}}}"
    model = f"{{checkpoint: {given}, trained: [{given}]}}"
    recipe, _ = read(f"data: {data}\nmodel: {model}\nheads: {{ncm: {{a: {given}}}}}", "--seed=3")
    assert recipe.data.name == recipe.data.root == recipe.model.checkpoint == text
    assert recipe.data.options == {"k": text, "m": {"n": [text, 1e-3]}}
    assert recipe.model.trained == [text]
    assert recipe.heads == {"ncm": {"a": text}}
    # The resolved recipe of a run reads back to the same.
    assert read(recipe.to_yaml())[0] == recipe
    assert parse_values(Recipe, dataclasses.asdict(recipe)) == recipe
    changed, _ = read(f"data: {data}", "--data.options.k=null", "--data.root=null")
    assert changed.data.options == {"k": None, "m": {"n": [text, 1e-3]}}
    assert changed.data.root is None


def test_defaults_and_the_embedded_recipe(read):
    recipe, options = read("seed: 0")
    assert (recipe, options) == (Recipe(), RunOptions())
    assert list(recipe.heads) == list(DEFAULT_HEADS)
    name, recipe, _ = parse_command_line("train_lt.py", ["--seed", "2"])
    assert (name, recipe.data.name, recipe.seed) == (DEFAULT_RECIPE, "glyph_lt", 2)
    assert (recipe.epochs, recipe.batch_size, recipe.optimizer.weight_decay) == (30, 128, 2e-3)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_reads_back(name, tmp_path):
    recipe = load_recipe(find_recipe(name))
    assert set(recipe.heads) <= {*list_heads(), AUTO}
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(again) == recipe


def test_shipped_recipes_are_found_by_any_of_their_names():
    path = shipped_recipes()[DEFAULT_RECIPE]
    for name in (None, DEFAULT_RECIPE, f"{DEFAULT_RECIPE}.yaml", f"hub_configs/{DEFAULT_RECIPE}"):
        assert find_recipe(name) == path
    assert find_recipe(str(path)) == path


def test_values_of_a_file(read):
    recipe, _ = read(
        """
        optimizer: {name: adamw, lr: 5e-4, weight_decay: 1E-2, options: {betas: [0.9, 0.95]}}
        data: {name: digits_lt, root: /data/é, options: {imbalance_factor: 20, note: null}}
        model: {pretrained: true, trained: [layer4.2, norm], options: {drop_rate: .5}}
        heads: {tau_norm:, crt: {weight_decay: 1e-3}, ncm: {metric: euclidean}}
        """
    )
    assert recipe.optimizer == OptimizerRecipe("adamw", 0.0005, 0.01, 0.9, {"betas": [0.9, 0.95]})
    options = {"imbalance_factor": 20, "note": None}
    assert (recipe.data.root, recipe.data.options) == ("/data/é", options)
    assert (recipe.model.pretrained, recipe.model.options) == (True, {"drop_rate": 0.5})
    assert recipe.model.trained == ["layer4.2", "norm"]
    heads = {"tau_norm": {}, "crt": {"weight_decay": 0.001}, "ncm": {"metric": "euclidean"}}
    assert recipe.heads == heads


@pytest.mark.parametrize("text", ["5e-4", "5.E-4", ".5e-3", "+5e-4", "0.0005"])
def test_numbers_with_an_exponent_are_numbers(read, text):
    for recipe, _ in (
        read(f"heads: {{crt: {{lr: {text}}}}}\noptimizer: {{lr: {text}}}"),
        read("seed: 1", "--optimizer.lr", text, f"--heads.crt.lr={text}"),
    ):
        assert recipe.heads["crt"]["lr"] == recipe.optimizer.lr == 0.0005


def test_overrides_take_the_place_of_single_values(read):
    recipe, options = read(
        "epochs: 5\nheads: {tau_norm: {tau: .5, keep_bias: true}, lws:}\n"
        "data: {options: {a: 1, b: 2}}",
        *["--epochs=7", "--seed", "3", "--seed", "4"],
        *["--heads.tau_norm.tau", "0.7", "--heads.crt.steps=9", "--data.options.a", "5"],
        *["--model.name", "test_vit", "--model.trained", "[blocks.5]"],
        *["--output", "x/y", "--quiet", "--resume"],
    )
    assert (recipe.epochs, recipe.seed, recipe.model.name) == (7, 4, "test_vit")
    assert recipe.model.trained == ["blocks.5"]
    tau_norm = {"tau": 0.7, "keep_bias": True}
    assert recipe.heads == {"tau_norm": tau_norm, "lws": {}, "crt": {"steps": 9}}
    assert recipe.data.options == {"a": 5, "b": 2}
    assert options == RunOptions(output="x/y", resume=True, quiet=True)
    recipe, options = read("seed: 0", "--heads", '{"ncm": {"metric": "l2"}}', "--resume", "auto")
    assert (recipe.heads, options.resume) == ({"ncm": {"metric": "l2"}}, True)


def test_print_config_reads_back_to_the_same_recipe(read, capsys):
    text = "optimizer: {lr: 3e-5}\nheads: {crt: {weight_decay: 1e-10}, tau_norm:}\nepochs: 2"
    arguments = ["--seed", "5", "--heads.tau_norm.tau", "0.5", "--data.root", "a b: #c"]
    recipe, _ = read(text, *arguments)
    with pytest.raises(SystemExit) as caught:
        read(text, *arguments, "--print_config")
    assert not caught.value.code
    printed = capsys.readouterr().out
    assert "lr: 3.0e-05" in printed
    assert read(printed)[0] == recipe


BAD_FILES = [
    ("epoch: 5", r"unknown key 'epoch' \(did you mean 'epochs'\?\); choose one of: data, model"),
    ("model: {nmae: x}", r"'model.nmae'.*did you mean 'model.name'.*model.pretrained"),
    ("epochs: 5\nseed: 1\nepochs: 6", r"key 'epochs' is given twice, the second time in line 3"),
    ("epochs: 1.5", "epochs must be int, got 1.5"),
    ("epochs: 0", "epochs 0 needs the weights of model.pretrained"),
    ("seed: -1", "seed must be an integer from 0"),
    ("data: {image_size: 0}", r"data\.image_size must be an integer >= 1"),
    ("data: {val_fraction: 1}", r"data\.val_fraction must be a number in \(0, 1\)"),
    ("objective: f1", "unknown objective 'f1'.*worst_class"),
    ("protocol:", "unknown protocol None.*standard, paper"),
    ("model: {trained: layer4.2}", r"model.trained must be list\[str\] | None, got 'layer4.2'"),
    ("heads: {crt: 5}", "heads must be a mapping"),
    ("a: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ("- a", "must be a mapping of keys to values"),
    ("{[a]: 1}", "key in line 1 must be a word"),
    # Keys that would have no effect.
    ("model: {fresh_classifier: true}", "model.fresh_classifier has no effect without weights"),
    ("model: {pretrained: true, checkpoint: x.pth}", "model.pretrained has no effect with"),
    ("features: {views: 2}", "features.views has no effect without augmentation"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_bad_file_is_refused_and_named(read, tmp_path, text, message):
    with pytest.raises(UsageError, match=message) as caught:
        read(text)
    assert str(tmp_path / "mine.yaml") in str(caught.value)


BAD_ARGUMENTS = [
    (["--sed", "4"], r"unknown option '--sed' \(did you mean '--seed'\?\).*--epochs"),
    (["--lr", "0.1"], "choose one of: --optimizer.lr"),
    (["--data.optionsx.a", "1"], "unknown option '--data.optionsx.a'"),
    (["--heads.crt.lr"], "--heads.crt.lr: expected one argument"),
    (["--epochs", "x"], "epochs must be int, got 'x'"),
    (["--shot_rule", "x"], "'fb', 'oltr'"),
    (["--heads.crt", "5"], "heads must be a mapping"),
    (["other.yaml"], "unexpected argument 'other.yaml'; RECIPE comes before"),
    (["--quiet", "--verbose"], "not allowed with"),
    (["--resume", "--overwrite"], "not allowed with"),
]


@pytest.mark.parametrize(("argv", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(read, argv, message):
    with pytest.raises(UsageError, match=message) as caught:
        read("seed: 0", *argv)
    assert "mine.yaml" not in str(caught.value)


def test_files_that_are_not_a_recipe(tmp_path):
    for name in ("nope.yaml", "lt_test_resnet.gylph_lt", "elsewhere/x.yaml", "."):
        with pytest.raises(UsageError, match=f"no such file.*{DEFAULT_RECIPE}"):
            parse_command_line("train_lt.py", [name])
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError, match=r"x\.yaml is not valid YAML"):
        load_recipe(tmp_path / "x.yaml")
    with pytest.raises(UsageError, match=r"is not a recipe; load them with timm.create_mo"):
        parse_command_line("train_lt.py", ["lt_resnet32.cifar10_lt"])


def test_help_explains_every_option_with_the_values_of_the_recipe(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "mine.yaml").write_text("epochs: 77")
    with pytest.raises(SystemExit) as caught:
        parse_command_line("train_lt.py", [str(tmp_path / "mine.yaml"), "--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: train_lt.py [RECIPE] [--option value ...]"
    keys = []
    for key, value in dataclasses.asdict(Recipe()).items():
        is_part = dataclasses.is_dataclass(getattr(Recipe(), key))
        keys += [f"{key}.{inner}" for inner in value] if is_part else [key]
    for key in (*keys, *dataclasses.asdict(RunOptions()), "print_config"):
        at = next(i for i, line in enumerate(lines) if line.split()[:1] == [f"--{key}"])
        # The explanation stands behind the name, or in the line below a long one.
        explanation = " ".join(lines[at : at + 2]).partition("  ")[2]
        assert len(explanation.split()) >= 3, key
    assert any("--epochs" in line and "(default: 77)" in " ".join(lines) for line in lines)
