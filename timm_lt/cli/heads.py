"""``timm-lt heads``: fits and compares heads on a model as it is, for a user's own images."""

import argparse
from dataclasses import fields, replace
from pathlib import Path

from timm_lt.cli import inputs
from timm_lt.cli.common import Commands, add_command, add_log_options
from timm_lt.fitting import AUTO, DEFAULT_HEADS
from timm_lt.metrics import OBJECTIVES
from timm_lt.models.repo import LOCAL_DIR, ModelSource
from timm_lt.report.tables import JOINT
from timm_lt.run.execution import run_recipe
from timm_lt.run.recipe import FeaturesRecipe, Recipe, RunOptions
from timm_lt.utils.hub import HF_HUB


def add_heads(commands: Commands) -> None:
    """Adds the command to the parser."""
    heads = add_command(commands, "heads", fit_heads)
    add = heads.add_argument
    add("data", help=inputs.DATA_HELP)
    add("--model", required=True, metavar="NAME", help=inputs.MODEL_HELP)
    inputs.add_weights_options(heads, "weights that you trained, for these classes")
    others = "heads beside linear; by default all but oltr, fslwf and cosine"
    add("--heads", nargs="+", default=list(DEFAULT_HEADS), metavar="HEAD", help=others)
    inputs.add_data_options(heads)
    add("--output", help="folder to write; output/MODEL.DATA by default")
    there = heads.add_mutually_exclusive_group()
    there.add_argument("--overwrite", action="store_true", help="delete the run in that folder")
    there.add_argument("--resume", action="store_true", help="continue the run in that folder")
    add("--objective", choices=OBJECTIVES, help="figure to choose by (docs/choose-a-head.md)")
    fresh = "fit the linear classifier anew, even if the model has one of as many classes"
    add("--fresh-classifier", action="store_true", help=fresh)
    add("--cache-dir", help="folder that keeps the features for the next time")
    add("--seed", type=int, default=0, help="seed of the fits")
    inputs.add_compute_options(heads)
    add("--json", action="store_true", help="for machines: print metrics.json instead of the table")
    add_log_options(heads, quiet="the final table")


def fit_heads(arguments: argparse.Namespace) -> None:
    """Fits every classifier head on the features of your images, which are extracted once.

    Chooses on validation, and writes a checkpoint with all heads and a report. Only heads are
    trained.

    Examples:
        timm-lt heads photos --model resnet50.a1_in1k
        timm-lt heads photos --model resnet50 --checkpoint model_best.pth.tar
        timm-lt heads train.txt --root photos --model output/birds --heads crt tau_norm
    """
    # The others are compared with the joint classifier.
    names = list(dict.fromkeys([JOINT, *arguments.heads]))
    names += [AUTO] if len(names) > 1 and AUTO not in names else []
    model = inputs.model_recipe(arguments, ModelSource.parse(arguments.model, bare_repo=True).name)
    recipe = Recipe(
        data=inputs.data_recipe(arguments),
        model=replace(model, fresh_classifier=arguments.fresh_classifier),
        epochs=0,
        features=FeaturesRecipe(cache_dir=arguments.cache_dir),
        heads={name: {} for name in names},
        objective=arguments.objective,
        seed=arguments.seed,
    )
    known = {field.name for field in fields(RunOptions)}
    options = {key: value for key, value in vars(arguments).items() if key in known}
    run_recipe(default_name(arguments.model, recipe.data.title), recipe, RunOptions(**options))


def default_name(model: str, data: str) -> str:
    """Returns the name of a run of heads.

    >>> default_name("hf-hub:me/birds@v2", "photos"), default_name("local-dir:output/x", "me/y")
    ('birds.photos', 'x.y')
    """
    plain = model.removeprefix(HF_HUB).removeprefix(LOCAL_DIR).partition("@")[0]
    return f"{Path(plain).name}.{Path(data).name}"
