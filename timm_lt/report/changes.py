"""Classes that gain, lose or are confused under a head, with example images."""

import base64
import functools
import io
from collections.abc import Mapping
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from timm_lt.data.decode import encoded_images, read_image
from timm_lt.report.record import ExampleImages, Report
from timm_lt.report.tables import GROUPS, percent
from timm_lt.utils.checks import UsageError

# At most so many classes that gained or lost, pictures of each, and confusions of a head.
CHANGES, PICTURES, MISTAKES = 5, 4, 6
# With fewer test images a class gains or loses by chance.
FEW_IMAGES = 5
# Pixels of a picture's longer side, and bytes of its file.
SIDE, MAX_BYTES = 88, 3000
QUALITIES = (80, 60, 40, 20)


class Picture(NamedTuple):
    """Small picture: its data URI, its alternative text, and a note to show below it."""

    uri: str
    text: str
    note: str


class Change(NamedTuple):
    """Class with its test images, those that the joint classifier (before) and a head get right.

    The pictures are test images on which the two differ.
    """

    label: int
    before: int
    after: int
    images: int
    pictures: list[Picture]


class Comparison(NamedTuple):
    """Classes that gained and lost most, and the numbers of all that gained and that lost."""

    gained: list[Change]
    lost: list[Change]
    better: int
    worse: int


class Mistake(NamedTuple):
    """Frequent confusion: true and predicted class, its test images, and their share of the class.

    The pictures are a confused test image, and a training image of the predicted class.
    """

    label: int
    pred: int
    images: int
    share: float
    pictures: list[Picture]


class Thumbnails:
    """Small pictures of example images, each decoded once; None has no pictures."""

    def __init__(self, images: ExampleImages | None) -> None:
        self._images = images
        self._rows = functools.cache(lambda split: encoded_images(getattr(images, split)))
        self._uri = functools.cache(self._encode)

    def test(self, image: int) -> str | None:
        """Returns the data URI of an evaluated image; None if it is unreadable or unknown."""
        if self._images is None or self._images.test_rows is None:
            return None
        return self._uri("test", int(self._images.test_rows[image]))

    def of_class(self, label: int) -> str | None:
        """Returns the data URI of the first training image of a class, if it has one."""
        if self._images is None:
            return None
        rows = (self._images.train_labels == label).nonzero()
        return self._uri("train", int(rows[0])) if len(rows) else None

    def _encode(self, split: str, row: int) -> str | None:
        column = getattr(self._images, split).features["image"]
        try:
            return data_uri(read_image(self._rows(split)[row]["image"], row, column))
        except UsageError:
            # The loader has reported unreadable images already.
            return None


def data_uri(image: Image.Image) -> str | None:
    """Returns an RGB image as a JPEG of at most 88 pixels and 3,000 bytes; None if larger."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    for quality in QUALITIES:
        file = io.BytesIO()
        small.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= MAX_BYTES:
            return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return None


def evaluated_rows(size: int, unreadable: list[int], evaluated: int) -> Tensor | None:
    """Returns the evaluated rows of a data set, None if not all unreadable rows are known.

    >>> evaluated_rows(4, [1], 3)
    tensor([0, 2, 3])
    """
    readable = torch.ones(size, dtype=torch.bool)
    readable[unreadable] = False
    rows = readable.nonzero().flatten()
    return rows if len(rows) == evaluated else None


def min_images(report: Report) -> dict[str, int]:
    """Returns the test images that a class needs for its change to be shown, by shot group.

    These are five or, in a group where no class has five, as many as its largest class has.
    """
    images = report.images_per_class
    of_groups = {group: images[report.group_of == k] for k, group in enumerate(GROUPS)}
    return {group: min(FEW_IMAGES, int(n.max())) for group, n in of_groups.items() if n.any()}


def compare(report: Report, head: str, thumbnails: Thumbnails) -> Comparison:
    """Compares a head with the joint classifier class by class."""
    before, images = report.reports[report.joint].right_and_images()
    after, _ = report.reports[head].right_and_images()
    change = ((after - before) / images.double()).nan_to_num(0)
    needed = min_images(report)
    enough = images >= torch.tensor([needed.get(g, 0) for g in GROUPS])[report.group_of]

    def most(gain: Tensor, right: str, wrong: str) -> list[Change]:
        """Returns the classes with the largest gain; among equals, those with more images."""
        classes: list[int] = ((gain > 0) & enough).nonzero().flatten().tolist()
        classes.sort(key=lambda c: (-float(gain[c]), -int(images[c])))
        return [
            Change(
                *(c, int(before[c]), int(after[c]), int(images[c])),
                _differing(report, c, right, wrong, thumbnails),
            )
            for c in classes[:CHANGES]
        ]

    return Comparison(
        gained=most(change, head, report.joint),
        lost=most(-change, report.joint, head),
        better=int((change > 0).sum()),
        worse=int((change < 0).sum()),
    )


def _differing(
    report: Report, label: int, right: str, wrong: str, thumbnails: Thumbnails
) -> list[Picture]:
    """Returns images of a class on which one head is right and the other wrong."""
    who = "the joint classifier" if wrong == report.joint else "this head"
    preds = report.preds(wrong)
    rows = (report.targets == label) & (report.preds(right) == label) & (preds != label)
    pictures = []
    for row in rows.nonzero().flatten()[:PICTURES].tolist():
        if (uri := thumbnails.test(row)) is not None:
            pred = report.names[int(preds[row])]
            sure = _confidence(report, wrong, row)
            pictures.append(
                Picture(uri, f"{report.names[label]}, which {who} takes for {pred}{sure}", pred)
            )
    return pictures


def _confidence(report: Report, head: str, row: int) -> str:
    confidences = report.predictions[head].confidences
    return "" if confidences is None else f" ({percent(float(confidences[row]))} % sure)"


def confused_groups(report: Report, head: str) -> Mapping[str, Mapping[str, float]]:
    """Returns the outcomes of each shot group's test images, as shares that sum to 1.

    The outcomes are ``right`` and, for wrong predictions, the shot group of the predicted class.
    """
    preds, targets = report.preds(head), report.targets
    outcomes = [*GROUPS, "right"]
    outcome = torch.where(preds == targets, len(GROUPS), report.group_of[preds])
    cells = report.group_of[targets] * len(outcomes) + outcome
    counts = torch.bincount(cells, minlength=len(GROUPS) * len(outcomes)).double()
    return {
        group: dict(zip(outcomes, (row / row.sum()).tolist(), strict=True))
        for group, row in zip(GROUPS, counts.view(len(GROUPS), -1), strict=True)
        if row.sum() > 0
    }


def frequent_mistakes(report: Report, head: str, thumbnails: Thumbnails) -> list[Mistake]:
    """Returns the most frequent confusions of a head.

    Only pairs of classes that occur are counted, so memory does not grow with C².
    """
    preds, targets, names = report.preds(head), report.targets, report.names
    wrong = preds != targets
    pairs, times = (targets[wrong] * len(names) + preds[wrong]).unique(return_counts=True)
    mistakes = []
    for k in times.argsort(descending=True, stable=True)[:MISTAKES].tolist():
        label, pred = divmod(int(pairs[k]), len(names))
        row = int(((targets == label) & (preds == pred)).nonzero()[0])
        test, train = thumbnails.test(row), thumbnails.of_class(pred)
        pictures = []
        if test is not None and train is not None:
            sure = _confidence(report, head, row)
            pictures = [
                Picture(test, f"{names[label]}, taken for {names[pred]}{sure}", "test"),
                Picture(train, f"a training image of {names[pred]}", "train"),
            ]
        share = int(times[k]) / int(report.images_per_class[label])
        mistakes.append(Mistake(label, pred, int(times[k]), share, pictures))
    return mistakes
