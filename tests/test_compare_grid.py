"""Grids: what a file says, what is wrong with it, and the recipes of its runs."""

import dataclasses

import pytest
import yaml

from timm_lt.run.comparison import Cell, find_grid, load_grid, make_plan, shipped_grids
from timm_lt.run.parse import find_recipe, load_recipe
from timm_lt.run.recipe import Recipe
from timm_lt.utils.checks import UsageError

BASE = load_recipe(find_recipe("lt_test_resnet.digits_lt"))
GOOD = {
    "title": "What is re-trained",
    "source": "a paper",
    "recipe": "lt_test_resnet.digits_lt",
    "representations": {
        "joint": None,
        "again": {
            "after": "joint",
            "lr_factor": 0.1,
            "model": {"trained": ["last_block"], "fresh_classifier": True},
            "epochs": 3,
        },
        "smooth": {"loss": {"name": "logit_adjustment", "options": {"tau": 0.5}}},
    },
    "heads": {"half": {"kind": "tau_norm", "tau": 0.5}},
    "rows": [
        {"label": "joint", "representation": "joint", "head": "linear", "quoted": {"all": 0.5}},
        {"label": "half", "representation": "joint", "head": "half"},
        {"label": "LWS", "representation": "joint", "head": "lws"},
        {"label": "LB + C", "representation": "again", "head": "linear"},
        {"label": "LA", "representation": "smooth", "head": "ncm"},
    ],
}


@pytest.fixture
def grid(tmp_path):
    """Returns a function: changes to a good grid -> the grid of a file with them."""

    def load(**changes):
        path = tmp_path / "mine.yaml"
        values = {k: v for k, v in (GOOD | changes).items() if v is not ...}
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return load_grid(path)

    return load


def plan(grid, tmp_path, *, base=BASE, seeds=(0, 1), **options):
    return make_plan(grid, base, tmp_path / "out", seeds=seeds, **options)


def test_runs_are_made_once_each_behind_what_they_go_on_from(grid, tmp_path):
    runs = plan(grid(), tmp_path).runs
    names = ["joint", "again", "smooth"]
    assert [run.name for run in runs] == [f"{n}.seed_{s}" for s in (0, 1) for n in names]
    joint, again, smooth = runs[3:]
    assert (joint.after, again.after, smooth.after) == (None, joint, None)
    # What the base has and the representation does not change is the same.
    assert dataclasses.replace(joint.recipe, heads={}, seed=0) == dataclasses.replace(
        BASE, heads={}, seed=0
    )
    assert [run.recipe.seed for run in runs] == [0, 0, 0, 1, 1, 1]
    lws = BASE.heads["lws"]
    assert joint.recipe.heads == {
        "linear": {},
        "half": {"kind": "tau_norm", "tau": 0.5},
        "lws": lws,
    }
    assert lws == {"steps": 100}
    model = again.recipe.model
    assert model.name == f"local-dir:{joint.folder}"
    assert (model.pretrained, model.fresh_classifier, model.trained) == (True, True, ["last_block"])
    assert again.recipe.optimizer.lr == pytest.approx(0.1 * BASE.optimizer.lr)
    assert (again.recipe.epochs, again.recipe.heads) == (3, {"linear": {}})
    assert smooth.recipe.loss.options == {"tau": 0.5}
    command = again.command(threads=2)
    assert command[1:4] == ["-m", "timm_lt", "train"]
    assert command[4:] == [
        str(again.file), "--output", str(again.folder), "--resume", "--threads", "2"
    ]  # fmt: skip


def test_some_rows_have_the_runs_that_they_need_with_all_of_their_heads(grid, tmp_path):
    some = plan(grid(), tmp_path, only=["LB + C"], seeds=[5])
    assert [run.name for run in some.runs] == ["joint.seed_5", "again.seed_5"]
    assert [cell.row for cell in some.cells] == ["LB + C"]
    # Else the other rows could not go on with the run.
    assert list(some.runs[0].recipe.heads) == ["linear", "half", "lws"]


def test_a_row_may_have_a_head_of_the_recipe_under_its_own_name(grid, tmp_path):
    own = {"crt_smote": {"kind": "crt", "smote": 100}}
    base = dataclasses.replace(BASE, heads={**BASE.heads, **own})
    row = {"label": "x", "representation": "joint", "head": "crt_smote"}
    runs = plan(grid(rows=[*GOOD["rows"], row]), tmp_path, base=base, seeds=[0]).runs
    assert runs[0].recipe.heads["crt_smote"] == own["crt_smote"]


def test_another_part_has_none_of_the_former_ones_options(grid, tmp_path):
    base = dataclasses.replace(
        BASE, loss=dataclasses.replace(BASE.loss, options={"smoothing": 0.1})
    )
    runs = {run.representation: run for run in plan(grid(), tmp_path, base=base, seeds=[0]).runs}
    assert runs["joint"].recipe.loss.options == {"smoothing": 0.1}
    assert runs["smooth"].recipe.loss.options == {"tau": 0.5}


def test_the_command_line_shortens_every_run_and_sets_nothing_of_the_grids(grid, tmp_path):
    base = dataclasses.replace(BASE, epochs=1)
    runs = plan(grid(), tmp_path, base=base, given=["epochs"]).runs
    assert {run.recipe.epochs for run in runs} == {1}
    for key, message in (
        ("loss.name", "--loss.name is what representation 'smooth' sets: leave it out"),
        ("model.trained", "is what representation 'again' sets"),
        ("seed", "--seed is no option of a comparison: give --seeds"),
        ("heads.lws.steps", "the rows of the grid say which heads"),
    ):
        with pytest.raises(UsageError, match=message):
            plan(grid(), tmp_path, given=[key])


def test_rows_and_columns_make_cells(grid):
    found = grid(
        rows=[{"label": "CE", "head": "crt"}, {"label": "RS", "head": "ncm"}],
        columns=[
            {"label": "a", "representation": "again"},
            {"label": "b", "representation": "smooth"},
        ],
    )
    assert found.cells() == [
        Cell("CE", "a", "again", "crt", {}),
        Cell("CE", "b", "smooth", "crt", {}),
        Cell("RS", "a", "again", "ncm", {}),
        Cell("RS", "b", "smooth", "ncm", {}),
    ]
    assert [cell.row for cell in found.cells(["RS"])] == ["RS", "RS"]


ROW = {"label": "x", "representation": "joint", "head": "linear"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"titel": "x"}, r"unknown key 'titel' \(did you mean 'title'"),
        ({"rows": ...}, "rows is missing"),
        ({"rows": [3]}, "rows must be a list of mappings"),
        ({"rows": [ROW, ROW]}, "rows has the label 'x' twice"),
        ({"rows": [{**ROW, "representation": "jiont"}]}, "representation of 'x'.*mean 'joint'"),
        ({"rows": [{"label": "x", "head": "linear"}]}, "'x' has no representations: give one"),
        ({"rows": [{**ROW, "heda": 1}]}, "key of rows 1: 'heda'.*'head'"),
        ({"rows": [{**ROW, "quoted": {"few": 0.1}}]}, "quoted of 'x': 'few'.*few_shot"),
        ({"rows": [{**ROW, "quoted": {"all": 41.8}}]}, r"all of 'x' must be a number in \[0, 1\]"),
        ({"rows": [ROW], "columns": [{"label": "y", "head": "crt"}]}, "'x' / 'y' has 2 heads"),
        ({"rows": [ROW]}, "representation 'again' is in no row: leave it out"),
        ({"metric": "loss"}, "unknown metric 'loss'.*accuracy, error"),
        ({"plot": True}, "plot needs columns"),
        ({"metric": "error"}, "metric error is for a table with columns"),
        ({"representations": {"a b": {}}}, "'a b' must be letters"),
        ({"representations": ["joint"]}, "representations must map names to mappings"),
        (
            {"representations": GOOD["representations"] | {"joint": {"after": "again"}}},
            "representation 'joint' comes after itself",
        ),
        (
            {"representations": GOOD["representations"] | {"again": {"after": "jiont"}}},
            "after which 'again' comes: 'jiont'",
        ),
    ],
)
def test_a_wrong_file_is_refused_and_named(grid, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        grid(**changes)
    assert str(caught.value).startswith(f"grid {tmp_path / 'mine.yaml'}: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"name": "focall"}}, "unknown loss 'focall'"),
        ({"loss": {"nmae": "focal"}}, "'loss.nmae'"),
        ({"sampler": {"name": "bilateral"}}, "not bilateral: model, loss"),
        ({"loss": {"name": "ldam"}}, "cosine"),
        ({"sampler": {"name": "power", "options": {"q": 2}}}, r"q must be a number in \[0, 1\]"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr"),
        ({"optimizer": {"name": "sdg"}}, "sdg"),
        ({"model": {"name": "resnet51"}}, "unknown architecture 'resnet51'"),
        ({"model": {"trained": ["layer9"]}}, "unknown module in trained: 'layer9'"),
        ({"model": {"fresh_classifier": True}}, "fresh_classifier has no effect"),
        ({"after": "joint", "model": {"name": "resnet18"}}, "leave out model.name"),
        ({"after": "joint", "model": {"trained": ["layer9"]}}, "'layer9'"),
        ({"lr_factor": 0}, "lr_factor of representation 'smooth' must be"),
        ({"seed": 3}, "representation 'smooth' sets seed: give --seeds"),
        ({"heads": {"crt": {}}}, "sets heads: the rows of the grid"),
        ({"protocol": "paper"}, "sets protocol, which has to be the same for all rows"),
        ({"epochs": 0}, "epochs 0 trains no backbone"),
        ({"clip_grad": -1.0}, r"clip_grad must be a number in \(0, inf\)"),
        ({"data": {"augmentation": "crop", "augmentation_options": {"paddin": 1}}}, "padding"),
        ({"data": {"image_size": 4}, "model": {"name": "dla46_c"}}, "of size.*4"),
        (
            {"data": {"options": {"imbalance_factor": 3}}},
            "sets data.options, but differences are p",
        ),
        ({"ema": {"decay": 2.0}}, r"ema.decay must be a number in \[0, 1\)"),
        ({"mixup": {"mixup_alpha": -0.2}}, r"mixup.mixup_alpha must be a number in \[0, inf\)"),
        ({"mixup": {"mixup_alpha": 0.2}, "loss": {"name": "range"}}, "no soft targets"),
        ({"features": {"views": 2}, "data": {"augmentation": "none"}}, "views has no effect"),
        ({"accumulation_steps": 5}, "multiple of 5"),
        ({"after": "joint", "loss": {"name": "ldam"}}, "ldam .* needs cosines"),
        ({"after": "joint", "sampler": {"name": "bilateral"}}, "not bilateral: model, loss"),
        ({"after": "joint", "model": {"options": {"drop_rat": 0.1}}}, "drop_rat"),
        ({"after": "joint", "model": {"options": {"head": "lws"}}}, "remove head="),
    ],
)
def test_a_wrong_representation_is_refused_and_named(grid, tmp_path, changes, message):
    wrong = grid(representations=GOOD["representations"] | {"smooth": changes})
    with pytest.raises(UsageError, match=message) as caught:
        plan(wrong, tmp_path)
    assert "representation 'smooth'" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_goes_on_may_have_a_head_of_its_own_or_the_folded_one(grid, tmp_path):
    ldam = {"model": {"options": {"head": "cosine", "scale": 1.0}}, "loss": {"name": "ldam"}}
    found = grid(
        representations={
            "joint": ldam,
            "again": {"after": "joint"} | ldam,
            "smooth": {"after": "joint"},
        }
    )
    again, smooth = plan(found, tmp_path, seeds=[0]).runs[1:]
    assert again.recipe.model.options == ldam["model"]["options"]
    assert smooth.recipe.model.options == {}


def test_a_wrong_head_or_row_is_refused_and_named(grid, tmp_path):
    with pytest.raises(UsageError, match=r"head of 'x': 'crtt' \(did you mean 'crt'\?\).*half"):
        plan(grid(rows=[*GOOD["rows"], {**ROW, "head": "crtt"}]), tmp_path)
    with pytest.raises(UsageError, match="head 'tau_norm' has no option 'tua'"):
        plan(grid(heads={"half": {"kind": "tau_norm", "tua": 1}}), tmp_path)
    with pytest.raises(UsageError, match=r"row of mine: 'ncm'.*joint, half, LWS"):
        plan(grid(), tmp_path, only=["ncm"])


def test_grids_are_found_by_name_or_path(tmp_path):
    assert set(shipped_grids()) >= {"kang_table1", "kang_table2", "kang_figure1", "bbn_figure2"}
    path = shipped_grids()["kang_table1"]
    assert find_grid("kang_table1") == find_grid("kang_table1.yaml") == find_grid(str(path)) == path
    with pytest.raises(UsageError, match=r"'kang_tabel1'.*did you mean 'kang_table1'.*kang_fig"):
        find_grid("kang_tabel1")


@pytest.mark.parametrize("name", shipped_grids())
def test_a_shipped_grid_says_its_command_and_names_parts_that_there_are(name, tmp_path):
    path = shipped_grids()[name]
    assert path.read_text(encoding="utf-8").startswith(f"# timm-lt compare {name}\n")
    grid = load_grid(path)
    base: Recipe = load_recipe(find_recipe(grid.recipe))
    runs = make_plan(grid, base, tmp_path, seeds=[0]).runs
    assert {run.representation for run in runs} == set(grid.representations)


def test_the_papers_tables_have_their_rows(tmp_path):
    labels = {name: [row.label for row in load_grid(p).rows] for name, p in shipped_grids().items()}
    assert labels["kang_table1"] == ["B + C", "B + C (0.1 × lr)", "LB + C", "C"]
    assert len(labels["kang_table2"]) == 17
    assert labels["bbn_figure2"] == ["CE", "RW", "RS"]
    assert len(labels["kang_figure1"]) == 4


def test_table_1_trains_what_its_rows_say(tmp_path):
    base = load_recipe(find_recipe("lt_test_resnet.glyph_lt_quick"))
    plan = make_plan(load_grid(find_grid("kang_table1")), base, tmp_path, seeds=[0])
    recipes = {run.representation: run.recipe for run in plan.runs}
    rates = {name: recipe.optimizer.lr / base.optimizer.lr for name, recipe in recipes.items()}
    assert rates == pytest.approx(
        {"joint": 1, "backbone": 1, "backbone_low_lr": 0.1, "last_block": 1, "classifier": 1}
    )
    assert {name: recipe.model.trained for name, recipe in recipes.items()} == {
        "joint": None,
        "backbone": None,
        "backbone_low_lr": None,
        "last_block": ["last_block"],
        "classifier": [],
    }
