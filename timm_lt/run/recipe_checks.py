"""What can be wrong with a recipe and is found before anything is trained or written."""

from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Literal, get_args

from timm_lt.checkpoint import check_head_name
from timm_lt.data import Splits
from timm_lt.fitting import AUTO, check_fit_classes, check_fit_options
from timm_lt.run.recipe import Recipe
from timm_lt.training import image_options
from timm_lt.utils.checks import Problems, UsageError, check_choice
from timm_lt.utils.longtail import shot_groups

# Options that have another place in a recipe, or are not for it to set.
SET_ELSEWHERE = {
    "sampler": ("labels", "seed", "num_classes", "rank", "num_replicas"),
    "loss": ("class_counts", "reduction"),
    "optimizer": ("model_or_params", "opt", "lr", "weight_decay", "momentum"),
    "scheduler": (
        *("optimizer", "sched", "warmup_epochs"),
        *("num_epochs", "step_on_epochs", "updates_per_epoch"),
    ),
    "mixup": (
        *("mixup_alpha", "cutmix_alpha", "remix_kappa", "remix_tau"),
        *("num_classes", "label_smoothing"),
    ),
    "ema": ("model", "decay", "device"),
}
# What a head is fitted on: features that are taken once, or images through the frozen backbone.
Stage = Literal["features", "images"]


def check_options_of_parts(recipe: Recipe) -> None:
    """Checks that no part has an option that is set elsewhere, or has no effect."""
    for part, names in SET_ELSEWHERE.items():
        for name in getattr(recipe, part).options:
            if name in names:
                raise UsageError(f"{part}.options: {name} is set elsewhere; leave it out")
    if recipe.mixup.off_epoch is not None and not recipe.mixup.mixes():
        raise UsageError("mixup.off_epoch has no effect without mixup_alpha or cutmix_alpha")


def check_heads(recipe: Recipe) -> None:
    """Checks the heads of a recipe and their options."""
    if not recipe.heads:
        raise UsageError("the recipe has no heads to fit; give at least one under heads:")
    if AUTO in recipe.heads:
        if recipe.heads[AUTO]:
            raise UsageError("head 'auto' is the best of the recipe's others and takes no options")
        if len(recipe.heads) == 1:
            raise UsageError("head 'auto' is the best of the recipe's others: give at least one")
    for name, options in recipe.heads.items():
        check_choice(f"stage of head {name!r}:", options.get("stage", "features"), get_args(Stage))
        check_head_name(f"head name {name!r}", name, head_kind(recipe, name))
    for name, options in stage_heads(recipe, "images").items():
        image_options(head_kind(recipe, name), options)
    for name, options in stage_heads(recipe, "features").items():
        if "bn" in options:
            raise UsageError(
                f"bn of head {name!r} is for stage images, where the backbone runs again: leave it "
                "out, or add stage: images"
            )
        check_fit_options(head_kind(recipe, name), options)


def check_heads_of_data(recipe: Recipe, splits: Splits) -> None:
    """Checks that there are classes to tell apart, and that the heads can be fitted on them."""
    if splits.num_classes < 2:
        raise UsageError("the data have one class: there is nothing to tell apart")
    for name, options in stage_heads(recipe, "features").items():
        check_fit_classes(
            head_kind(recipe, name),
            options,
            splits.class_counts,
            rule=recipe.shot_rule,
            views=recipe.features.views or 1,
        )


def check_objective(recipe: Recipe, splits: Splits) -> None:
    """Checks that validation has images of the classes that are to be judged by."""
    if recipe.objective != "few_shot":
        return
    few = shot_groups(splits.class_counts, recipe.shot_rule)["few_shot"]
    if not few[splits.labels["val"]].any():
        raise UsageError(
            "objective few_shot: the data have no few-shot class; take class_mean, or worst_class"
        )


def check_output(recipe: Recipe, folder: Path) -> None:
    """Checks that nothing is written among images that are read by their directories."""
    if recipe.data.name != "folder" or recipe.data.root is None:
        return
    root = Path(recipe.data.root).expanduser().resolve()
    problems = Problems()
    for name, path in {"--output": folder, "features.cache_dir": recipe.features.cache_dir}.items():
        if path is not None and Path(path).resolve().is_relative_to(root):
            problems.add(
                f"{name} {path} lies in data.root {recipe.data.root}, where the next run would "
                "take it for a class: choose a folder elsewhere"
            )
    problems.check()


def check_views(recipe: Recipe) -> None:
    """Checks that views of an image differ."""
    if recipe.features.views is not None and recipe.data.augmentation == "none":
        raise UsageError(
            "features.views has no effect with data.augmentation none: every view would be the same"
        )


def check_features(recipe: Recipe, folder: Path) -> None:
    """Checks before training that features can be taken as the recipe has it."""
    check_views(recipe)
    features = recipe.features
    if features.cache_dir is None:
        return
    cache = Path(features.cache_dir).resolve()
    if cache.is_relative_to(folder.resolve()):
        raise UsageError(
            f"features.cache_dir {features.cache_dir} lies in the folder of the run, which holds "
            "nothing but the run: choose another"
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise UsageError(
            f"features.cache_dir {features.cache_dir} cannot be written: {error}"
        ) from error


def head_kind(recipe: Recipe, name: str) -> str:
    """Returns which registered head one of a recipe is: its option ``kind``, or its name."""
    return str(recipe.heads[name].get("kind", name))


def stage_heads(recipe: Recipe, stage: Stage) -> dict[str, dict[str, Any]]:
    """Returns the heads of a recipe that are fitted on features, or on images, with their options.

    The stage itself, like the kind, is no option of a fit and is left out.
    """
    return {
        name: {key: value for key, value in options.items() if key not in ("stage", "kind")}
        for name, options in recipe.heads.items()
        if name != AUTO and options.get("stage", "features") == stage
    }
