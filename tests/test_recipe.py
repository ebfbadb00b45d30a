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
from timm_lt.run.recipe import DataRecipe, OptimizerRecipe, Recipe, RunOptions, SchedulerRecipe
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


QUOTED = ["null", "true", "1e-3", "", "~", "[1]", "{a: 1}", "12", "yes", "it's", "ä", "--x", "a=b"]


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
    with pytest.raises(UsageError) as error:
        read(f"objective: {given}")
    assert f"unknown objective {text!r}" in str(error.value)


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


@pytest.mark.parametrize("text", ["5e-4", "5E-4", "5.e-4", ".5e-3", "+5e-4", "0.0005", "5.0e-4"])
def test_numbers_with_an_exponent_are_numbers(read, text):
    recipe, _ = read(f"heads: {{crt: {{lr: {text}}}}}\noptimizer: {{lr: {text}}}")
    assert recipe.heads["crt"]["lr"] == recipe.optimizer.lr == 0.0005
    recipe, _ = read("seed: 1", "--optimizer.lr", text, f"--heads.crt.lr={text}")
    assert recipe.heads["crt"]["lr"] == recipe.optimizer.lr == 0.0005


def test_overrides_take_the_place_of_single_values(read):
    recipe, options = read(
        "epochs: 5\nheads: {tau_norm: {tau: .5}, lws:}\ndata: {options: {a: 1, b: 2}}",
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
    assert recipe.heads == {"tau_norm": {"tau": 0.7}, "lws": {}, "crt": {"steps": 9}}
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


def test_merged_mappings_are_no_duplicates(read):
    recipe, _ = read("data: &d {name: digits_lt}\nmodel: {<<: *d, pretrained: true}")
    assert (recipe.model.name, recipe.model.pretrained) == ("digits_lt", True)


def test_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().epochs = 3


# ---- what is wrong -------------------------------------------------------------------------------

BAD_FILES = [
    ("epoch: 5", r"unknown key .*'epoch' \(did you mean 'epochs'\?\); choose one of: data, model"),
    ("model: {nmae: x}", r"'model.nmae'.*did you mean 'model.name'.*model.pretrained"),
    ("epochs: 5\nseed: 1\nepochs: 6", r"key 'epochs' is given twice, the second time in line 3"),
    ("heads: {crt: {}, crt: {}}", r"key 'crt' is given twice"),
    ("model: {name: a, name: b}", r"key 'name' is given twice"),
    ("epochs: five", r'"epochs": Expected a .*int.*five'),
    ("epochs: 1.5", r'"epochs"'),
    ("epochs: true", r'"epochs"'),
    ("epochs: -1", r"epochs must be an integer >= 0, got -1"),
    ("epochs: 0", r"epochs 0 trains no backbone: it needs model\.pretrained"),
    (
        "model: {pretrained: true, checkpoint: x.pth}",
        r"model\.checkpoint has all weights, and model\.pretrained no effect",
    ),
    ("batch_size: -1", r"batch_size must be an integer >= 1"),
    ("seed: -1", r"seed must be an integer from 0"),
    ("data: {image_size: 0}", r"data\.image_size must be an integer >= 1"),
    ("scheduler: {warmup_epochs: -1}", r"scheduler\.warmup_epochs must be an integer >= 0"),
    ("optimizer: {lr: fast}", r'"optimizer.lr"'),
    ("model: {pretrained: maybe}", r'"model.pretrained"'),
    ("protocol: test", r"protocol.*'standard', 'paper'.*test"),
    ("model: {trained: layer4.2}", r'"model.trained".*layer4.2'),
    ("model: {bn: moving}", r"model.bn.*'frozen', 'shift'.*moving"),
    ("shot_rule: fbi", r"shot_rule.*'fb', 'oltr'.*fbi"),
    ("mixed_precision: fp8", r"mixed_precision.*'bf16', 'fp16'.*fp8"),
    ("model: 5", r"model must be a mapping, got 5"),
    ("model:", r"model must be a mapping, got None"),
    ("heads: [linear]", r'"heads".*dict'),
    ("heads: {crt: 5}", r'"heads".*dict'),
    ("heads:", r'"heads".*dict'),
    ("data: {options: 3}", r'"data.options"'),
    ("data: {options: {day: 2020-01-01}}", r"data.options has a value that is no text, number"),
    ("- a", "must be a mapping of keys to values"),
    ("", "must be a mapping of keys to values"),
    ("a: [1", "is not valid YAML"),
    ("a: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ("{[a]: 1}", "key in line 1 must be a word"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_bad_file_is_refused_and_named(read, tmp_path, text, message):
    with pytest.raises(UsageError, match=message) as caught:
        read(text)
    assert str(tmp_path / "mine.yaml") in str(caught.value)


BAD_ARGUMENTS = [
    (["--sed", "4"], r"unknown option '--sed' \(did you mean '--seed'\?\).*--epochs"),
    (["--model.nmae", "x"], r"unknown option '--model.nmae' \(did you mean '--model.name'"),
    (["--config", "x"], "unknown option '--config'"),
    (["--data.optionsx.a", "1"], "unknown option '--data.optionsx.a'"),
    (["--epochs"], "--epochs: expected one argument"),
    (["--epochs", "x"], '"epochs"'),
    (["--epochs", "-1"], "epochs must be an integer >= 0"),
    (["--seed", "-4"], "seed must be an integer from 0"),
    (["--shot_rule", "x"], "'fb', 'oltr'"),
    (["--heads.crt", "5"], "heads"),
    (["other.yaml"], "unrecognized arguments: other.yaml"),
    (["-x"], "unrecognized arguments: -x"),
]


@pytest.mark.parametrize(("argv", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(read, argv, message):
    with pytest.raises(UsageError, match=message) as caught:
        read("seed: 0", *argv)
    assert "mine.yaml" not in str(caught.value)


@pytest.mark.parametrize("name", ["nope.yaml", "lt_test_resnet.gylph_lt", "elsewhere/x.yaml", "."])
def test_missing_recipe_lists_the_shipped_ones(name):
    with pytest.raises(UsageError, match=f"no such file.*{DEFAULT_RECIPE}"):
        parse_command_line("train_lt.py", [name])


def test_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match=r"x\.yaml cannot be read"):
        load_recipe(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError, match=r"x\.yaml is not valid YAML"):
        load_recipe(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (Recipe, {"epochs": 0}),
        (DataRecipe, {"image_size": -3}),
        (SchedulerRecipe, {"warmup_epochs": -1}),
    ],
)
def test_recipes_made_in_python_are_checked_too(cls, values):
    with pytest.raises(UsageError, match=next(iter(values))):
        cls(**values)


# ---- help ----------------------------------------------------------------------------------------


def test_help_explains_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        parse_command_line("train_lt.py", ["--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: train_lt.py [RECIPE] [--option value ...]"
    for name in option_names():
        at = next(i for i, line in enumerate(lines) if line.split()[:1] == [name])
        # The explanation stands behind the name, or in the line below a long one.
        text = " ".join(lines[at : at + 2]).split("  ")
        explanation = next(part for part in text[2:] if part.strip())
        assert len(explanation.split()) >= 3, name
        assert not explanation.strip().startswith("(type"), name


def test_help_shows_the_values_of_the_recipe(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "mine.yaml").write_text("epochs: 77")
    with pytest.raises(SystemExit):
        parse_command_line("train_lt.py", [str(tmp_path / "mine.yaml"), "--help"])
    assert "default: 77" in capsys.readouterr().out


def test_published_weights_without_a_recipe_say_so(tmp_path):
    for name in ("lt_resnet32.cifar10_lt", "hub_configs/lt_resnet32.cifar10_lt.yaml"):
        with pytest.raises(UsageError, match=r"is no recipe to run; load them with timm.create_mo"):
            parse_command_line("train_lt.py", [name])


def test_resume_is_a_flag_or_auto():
    for arguments, resumes in ((["--resume"], True), (["--resume", "auto"], True), ([], False)):
        _, _, options = parse_command_line("train_lt.py", arguments)
        assert options.resume is resumes


@pytest.mark.parametrize(
    ("given", "value"),
    [("auto", "auto"), ("black", "black"), ("#808080", "#808080"), ("[1, 2, 3]", [1, 2, 3])],
)
def test_a_background_is_a_name_a_code_or_three_levels(given, value, tmp_path):
    # In YAML a bare # begins a comment.
    _, recipe, _ = parse_command_line("train_lt.py", ["--data.background", given])
    assert recipe.data.background == value
    (tmp_path / "own.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "own.yaml").data.background == value


def test_a_background_that_is_no_colour_is_refused():
    with pytest.raises(UsageError, match="background 'blurple' is not a valid colour"):
        parse_command_line("train_lt.py", ["--data.background", "blurple"])
