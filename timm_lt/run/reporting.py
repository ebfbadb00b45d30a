"""What the report of a run says."""

from collections.abc import Mapping

from timm_lt.fitting import AUTO, AccuracyCurve
from timm_lt.fitting.selection import predictions
from timm_lt.heads import Head
from timm_lt.metrics import objective_value, shot_accuracy
from timm_lt.report.content import ReportContent
from timm_lt.report.gather import gather_report
from timm_lt.report.tables import TEST_SELECTION
from timm_lt.report.thumbnails import ExampleImages, evaluated_rows
from timm_lt.run.setup import Run
from timm_lt.run.stages import Evaluation, RunFeatures


def report_of_run(
    run: Run,
    heads: Mapping[str, Head],
    evaluated: Mapping[str, Evaluation],
    features: RunFeatures,
    curves: Mapping[str, tuple[AccuracyCurve, float]],
) -> ReportContent:
    """Gathers what the report of a run says; ``auto`` is the head that it took.

    Args:
        run: The run.
        heads: Its heads by name.
        evaluated: What they do on the test images.
        features: Features of the splits.
        curves: Accuracy on validation against tau, by head.
    """
    recipe, splits = run.recipe, run.splits
    own = {name: head for name, head in heads.items() if name != AUTO}
    return gather_report(
        title=run.name,
        reports={name: evaluated[name].report for name in own},
        class_counts=splits.class_counts,
        targets=features.shared["test"].targets,
        predictions={name: evaluated[name].predictions for name in own},
        label_names=splits.label_names,
        curves=curves,
        selections={name: head.selection for name, head in own.items()},
        seconds=run.seconds["heads"] | {"linear": run.seconds["representation"]},
        recommended=best_on_validation(run, heads, features),
        images=_example_images(run, features),
        history=run.history,
        kept_epoch=run.kept_epoch or None,
        recipe=recipe.to_yaml(),
        facts={
            "Data": recipe.data.title,
            "Model": recipe.model.name,
            "Validation": f"{run.val_name}, objective {run.objective}",
            "Seed": str(recipe.seed),
        },
        warning=TEST_SELECTION if recipe.protocol == "paper" else None,
    )


def best_on_validation(run: Run, heads: Mapping[str, Head], features: RunFeatures) -> str:
    """Returns the name of the head with the highest objective on validation."""
    if AUTO in heads:
        return str(heads[AUTO].selection["head"])
    values = {}
    for name, head in heads.items():
        val = features.of(name, "val")
        preds, rule = predictions(head, val), run.recipe.shot_rule
        report = shot_accuracy(preds, val.targets, run.splits.class_counts, rule)
        # Of equals, the mean over the classes decides.
        values[name] = objective_value(report, run.objective), report.class_mean
    return max(values, key=values.__getitem__)


def _example_images(run: Run, features: RunFeatures) -> ExampleImages:
    splits, evaluated = run.splits, features.shared["test"].num_images
    unreadable = run.unreadable_rows.get("test", [])
    return ExampleImages(
        train=splits.datasets["train"],
        train_labels=splits.labels["train"],
        test=splits.datasets["test"],
        test_rows=evaluated_rows(len(splits.labels["test"]), unreadable, evaluated),
    )
