"""Recipes: YAML with overrides becomes typed data, and what is wrong is named."""

import dataclasses
import json
import typing

import pytest

from timm_lt.fitting import AUTO, DEFAULT_HEADS
from timm_lt.heads import list_heads
from timm_lt.run.parse import (
    DEFAULT_RECIPE,
    find_recipe,
    load_recipe,
    parse_command_line,
    parse_recipe,
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
        parsed = parse_command_line("train_lt.py", [str(path), *argv])
        return parsed[1:] if parsed else None

    return parse


def option_names():
    """Every option that there must be, by the dataclasses: --epochs, --data.name, --quiet."""
    hints = typing.get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        if dataclasses.is_dataclass(hints[field.name]):
            for inner in dataclasses.fields(hints[field.name]):
                yield f"--{field.name}.{inner.name}"
        else:
            yield f"--{field.name}"
    yield from (f"--{field.name}" for field in dataclasses.fields(RunOptions))
    yield "--print_config"


# ---- what a recipe says --------------------------------------------------------------------------


QUOTED = ["null", "1e-3", "", "{a: 1}", "yes", "it's", "ä", "--x"]


@pytest.mark.parametrize("text", QUOTED)
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
    assert parse_recipe(dataclasses.asdict(recipe), "a grid") == recipe
    # Options on the command line take the place of the recipe's, and leave the others.
    changed, _ = read(f"data: {data}", "--data.options.k=null", "--data.root=null")
    assert changed.data.options == {"k": None, "m": {"n": [text, 1e-3]}}
    assert changed.data.root is None


def test_an_almost_empty_recipe_has_the_defaults(read):
    recipe, options = read("seed: 0")
    assert recipe == Recipe()
    assert options == RunOptions(output=None, resume=False, overwrite=False, quiet=False)
    assert list(recipe.heads) == list(DEFAULT_HEADS)
    assert set(DEFAULT_HEADS) < set(list_heads())
    assert recipe.optimizer == OptimizerRecipe("sgd", 0.1, 0.0005, 0.9, {})


def test_without_a_name_it_is_the_embedded_recipe():
    name, recipe, _ = parse_command_line("train_lt.py", [])
    assert name == DEFAULT_RECIPE
    assert recipe.data.name == "glyph_lt"
    # DESIGN section 7, the default recipe.
    assert (recipe.epochs, recipe.batch_size, recipe.optimizer.weight_decay) == (30, 128, 2e-3)
    _, recipe, _ = parse_command_line("train_lt.py", ["--epochs", "2"])
    assert recipe.epochs == 2
    assert recipe.optimizer.weight_decay == 2e-3


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
        epochs: 5
        optimizer: {name: adamw, lr: 5e-4, weight_decay: 1E-2, options: {betas: [0.9, 0.95]}}
        data: {name: digits_lt, root: /data/é, options: {imbalance_factor: 20, note: null}}
        model: {pretrained: true, trained: [layer4.2, norm], bn: shift, options: {drop_rate: .5}}
        heads: {tau_norm:, crt: {weight_decay: 1e-3}, ncm: {metric: euclidean}}
        shot_rule: oltr
        """
    )
    assert recipe.optimizer == OptimizerRecipe("adamw", 0.0005, 0.01, 0.9, {"betas": [0.9, 0.95]})
    assert recipe.data.root == "/data/é"
    assert recipe.data.options == {"imbalance_factor": 20, "note": None}
    assert recipe.model.pretrained is True
    assert recipe.model.options == {"drop_rate": 0.5}
    assert (recipe.model.trained, recipe.model.bn) == (["layer4.2", "norm"], "shift")
    assert recipe.heads == {
        "tau_norm": {},
        "crt": {"weight_decay": 0.001},
        "ncm": {"metric": "euclidean"},
    }
    assert recipe.shot_rule == "oltr"


@pytest.mark.parametrize("text", ["5e-4", "5.E-4", ".5e-3", "+5e-4", "0.0005"])
def test_numbers_with_an_exponent_are_numbers(read, text):
    recipe, _ = read(f"heads: {{crt: {{lr: {text}}}}}\noptimizer: {{lr: {text}}}")
    assert recipe.heads["crt"]["lr"] == recipe.optimizer.lr == 0.0005
    recipe, _ = read("seed: 1", "--optimizer.lr", text, f"--heads.crt.lr={text}")
    assert recipe.heads["crt"]["lr"] == recipe.optimizer.lr == 0.0005


def test_overrides_take_the_place_of_single_values(read):
    recipe, options = read(
        "epochs: 5\nheads: {tau_norm: {tau: .5, keep_bias: true}, lws:}\n"
        "data: {options: {a: 1, b: 2}}",
        *["--epochs=7", "--seed", "3", "--seed", "4"],
        *["--heads.tau_norm.tau", "0.7", "--heads.crt.steps=9", "--data.options.a", "5"],
        *[
            "--model.name",
            "test_vit",
            "--model.trained",
            "[blocks.5]",
            "--output",
            "x/y",
            "--quiet",
            "--resume",
        ],
    )
    assert (recipe.epochs, recipe.seed, recipe.model.name) == (7, 4, "test_vit")
    assert recipe.model.trained == ["blocks.5"]
    tau_norm = {"tau": 0.7, "keep_bias": True}
    assert recipe.heads == {"tau_norm": tau_norm, "lws": {}, "crt": {"steps": 9}}
    assert recipe.data.options == {"a": 5, "b": 2}
    assert options == RunOptions(output="x/y", resume=True, overwrite=False, quiet=True)
    recipe, _ = read("heads: {tau_norm:}", "--heads", '{"ncm": {"metric": "euclidean"}}')
    assert recipe.heads == {"ncm": {"metric": "euclidean"}}


def test_print_config_reads_back_to_the_same_recipe(read, capsys):
    text = "optimizer: {lr: 3e-5}\nheads: {crt: {weight_decay: 1e-10}, tau_norm:}\nepochs: 2"
    arguments = ["--seed", "5", "--heads.tau_norm.tau", "0.5", "--data.root", "a b: #c"]
    recipe, _ = read(text, *arguments)
    assert read(text, *arguments, "--print_config") is None
    printed = capsys.readouterr().out
    assert "lr: 3.0e-05" in printed
    assert read(printed)[0] == recipe


def test_resume_is_a_flag_or_auto(read):
    for arguments, resumes in ((["--resume"], True), (["--resume", "auto"], True), ([], False)):
        assert read("seed: 0", *arguments)[1].resume is resumes


# ---- mistakes ------------------------------------------------------------------------------------

BAD_FILES = [
    ("epoch: 5", r"unknown key 'epoch' \(did you mean 'epochs'\?\); choose one of: data, model"),
    ("model: {nmae: x}", r"'model.nmae'.*did you mean 'model.name'.*model.pretrained"),
    ("epochs: 5\nseed: 1\nepochs: 6", r"key 'epochs' is given twice, the second time in line 3"),
    ("epochs: five", "epochs must be int, got 'five'"),
    ("epochs: 1.5", "epochs must be int, got 1.5"),
    ("epochs: true", "epochs must be int, got True"),
    ("epochs: -1", "epochs must be an integer >= 0, got -1"),
    ("epochs: 0", "epochs 0 needs the weights of model.pretrained"),
    ("seed: -1", "seed must be an integer from 0"),
    ("data: {image_size: 0}", r"data\.image_size must be an integer >= 1"),
    ("data: {val_fraction: 1}", r"data\.val_fraction must be a number in \(0, 1\)"),
    ("features: {views: 0}", r"features\.views must be an integer >= 1"),
    ("objective: f1", "unknown objective 'f1'.*worst_class"),
    ("optimizer: {lr: fast}", "optimizer.lr must be float, got 'fast'"),
    ("model: {pretrained: maybe}", "model.pretrained must be bool"),
    ("protocol: test", "unknown protocol 'test'.*standard, paper"),
    ("protocol:", "unknown protocol None.*standard, paper"),
    ("model: {trained: layer4.2}", r"model.trained must be list\[str\] | None, got 'layer4.2'"),
    ("model: 5", "model must be a mapping, got 5"),
    ("heads: [linear]", "heads must be a mapping"),
    ("heads: {crt: 5}", "heads must be a mapping"),
    ("data: {options: 3}", "data.options must be a mapping"),
    ("- a", "must be a mapping of keys to values"),
    ("a: [1", "is not valid YAML"),
    ("a: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ("{[a]: 1}", "key in line 1 must be a word"),
    # Keys that would have no effect.
    ("model: {fresh_classifier: true}", "model.fresh_classifier has no effect without weights"),
    ("model: {checkpoint_key: a}", "model.checkpoint_key has no effect"),
    ("model: {pretrained: true, checkpoint: x.pth}", "model.pretrained has no effect with"),
    ("mixup: {off_epoch: 1}", "mixup.off_epoch has no effect without mixup"),
    ("features: {views: 2}", "features.views has no effect without augmentation"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_bad_file_is_refused_and_named(read, tmp_path, text, message):
    with pytest.raises(UsageError, match=message) as caught:
        read(text)
    assert str(tmp_path / "mine.yaml") in str(caught.value)


BAD_ARGUMENTS = [
    (["--sed", "4"], r"unknown option '--sed' \(did you mean '--seed'\?\).*--epochs"),
    (["--model.nmae", "x"], r"unknown option '--model.nmae' \(did you mean '--model.name'"),
    (["--lr", "0.1"], "choose one of: --optimizer.lr"),
    (["--data.optionsx.a", "1"], "unknown option '--data.optionsx.a'"),
    (["--epochs"], "--epochs: expected one argument"),
    (["--heads.crt.lr"], "--heads.crt.lr: expected one argument"),
    (["--epochs", "x"], "epochs must be int, got 'x'"),
    (["--seed", "-4"], "seed must be an integer from 0"),
    (["--shot_rule", "x"], "'fb', 'oltr'"),
    (["--heads", "crt"], "heads must be a mapping, got 'crt'"),
    (["--heads.crt", "5"], "heads must be a mapping"),
    (["other.yaml"], "unexpected argument 'other.yaml'; RECIPE comes before"),
    (["--resume", "always"], "--resume.*auto"),
    (["--quiet", "--verbose"], "not allowed with"),
]


@pytest.mark.parametrize(("argv", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(read, argv, message):
    with pytest.raises(UsageError, match=message) as caught:
        read("seed: 0", *argv)
    assert "mine.yaml" not in str(caught.value)


def test_files_that_are_no_recipe(tmp_path):
    for name in ("nope.yaml", "lt_test_resnet.gylph_lt", "elsewhere/x.yaml", "."):
        with pytest.raises(UsageError, match=f"no such file.*{DEFAULT_RECIPE}"):
            parse_command_line("train_lt.py", [name])
    with pytest.raises(UsageError, match=r"x\.yaml cannot be read"):
        load_recipe(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError, match=r"x\.yaml is not valid YAML"):
        load_recipe(tmp_path / "x.yaml")
    for name in ("lt_resnet32.cifar10_lt", "hub_configs/lt_resnet32.cifar10_lt.yaml"):
        with pytest.raises(UsageError, match=r"is not a recipe; load them with timm.create_mo"):
            parse_command_line("train_lt.py", [name])


def test_an_option_with_a_key_of_its_own_is_refused():
    with pytest.raises(UsageError, match=r"optimizer\.options: lr is set elsewhere; remove it"):
        OptimizerRecipe(options={"lr": 1}).arguments()


# ---- help ----------------------------------------------------------------------------------------


def test_help_explains_every_option_with_the_values_of_the_recipe(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "mine.yaml").write_text("epochs: 77")
    with pytest.raises(SystemExit) as caught:
        parse_command_line("train_lt.py", [str(tmp_path / "mine.yaml"), "--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: train_lt.py [RECIPE] [--option value ...]"
    for name in option_names():
        at = next(i for i, line in enumerate(lines) if line.split()[:1] == [name])
        # The explanation stands behind the name, or in the line below a long one.
        explanation = " ".join(lines[at : at + 2]).partition("  ")[2]
        assert len(explanation.split()) >= 3, name
    assert any("--epochs" in line and "(default: 77)" in " ".join(lines) for line in lines)
