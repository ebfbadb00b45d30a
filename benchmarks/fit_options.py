"""Accuracy of the options of the fits on GlyphLT-100, on the backbones of given runs.

``python benchmarks/fit_options.py RUN [RUN ...] [--split test]``, with folders that
``train_lt.py`` wrote from one recipe with several seeds; on validation unless told. Each line is a
fit with its options and the number of augmented views of the training images (0: the image as it
is); many / medium / few / all in percent, mean of the runs.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator

import timm_lt
from timm_lt.data import create_augmentation, create_splits
from timm_lt.features import Features
from timm_lt.heads import get_head
from timm_lt.run.parse import load_recipe

BATCH = 512
FITS = {
    "crt": [
        {"solver": "sgd"},
        {"solver": "sgd", "epochs": 10},
        {"solver": "sgd", "keep": "best"},
        {"solver": "sgd", "smote": 100},
        {},
        {"loss": "balanced_softmax"},
        {"smote": 100},
    ],
    "lws": [{}, {"keep": "best"}],
}
VIEWS = (0, 4, 8)


def features_of(run: Path) -> tuple[torch.nn.Linear, torch.Tensor, dict[str, Features]]:
    """Returns the joint classifier, the class counts, and features by split; train by views."""
    recipe = load_recipe(run / "recipe.yaml")
    model = timm_lt.create_model(f"local-dir:{run}")
    splits = create_splits(recipe.data.name, **recipe.data.options)
    augmentation = create_augmentation(recipe.data.augmentation, **recipe.data.augmentation_options)
    accelerator, features = Accelerator(cpu=True), {}
    for split in ("train", "val", "test"):
        images = splits.images(
            split,
            size=(32, 32),
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            augmentation=augmentation if split == "train" else None,
            seed=recipe.seed,
        )
        features[split] = timm_lt.extract_features(model, images.eval_loader(BATCH, accelerator))
        if split == "train":
            loader = images.views_loader(BATCH, accelerator)
            features["views"] = timm_lt.extract_features(model, loader, views=max(VIEWS))
    return get_head(model), splits.class_counts, features


def figures(
    joint: torch.nn.Linear, counts: torch.Tensor, features: dict[str, Features], split: str
) -> dict[tuple[str, str, int], torch.Tensor]:
    """Returns the four figures of each fit, by head, options and views."""
    found = {}
    for views in VIEWS:
        train = features["views"].first_views(views) if views else features["train"]
        for name, fits in FITS.items():
            for options in fits:
                head = timm_lt.fit_head(
                    name,
                    train,
                    classifier=joint,
                    class_counts=counts,
                    val=features["val"],
                    **options,
                )
                with torch.inference_mode():
                    logits = head(features[split].values)
                report = timm_lt.evaluate_logits(logits, features[split].targets, counts)
                text = ", ".join(f"{key}={value}" for key, value in options.items())
                groups = (report.many_shot, report.medium_shot, report.few_shot, report.all)
                found[name, text, views] = torch.tensor(groups)
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--split", choices=("val", "test"), default="val")
    arguments = parser.parse_args()
    runs = [figures(*features_of(run), arguments.split) for run in arguments.runs]
    print(f"{'head':5} {'options':28} {'views':>5}  many  medium   few   all")
    for key in runs[0]:
        many, medium, few, overall = torch.stack([run[key] for run in runs]).mean(0).mul(100)
        name, options, views = key
        print(
            f"{name:5} {options:28} {views:5} {many:5.1f} {medium:7.1f} {few:5.1f} {overall:5.1f}"
        )


if __name__ == "__main__":
    main()
