"""Which classes a head gets right that the joint classifier does not, and what is confused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from timm_lt.report.content import Change, ClassNote, Comparison, Confusions, Mistake, Picture
from timm_lt.report.tables import percent
from timm_lt.report.thumbnails import Thumbnails

# Classes that gained and that lost, images of each, and confusions of a head.
CHANGES, PICTURES, MISTAKES = 5, 4, 6
# With fewer test images a class gains or loses by chance. Where no class of a shot group has so
# many, those with the most do, or the rare classes would never be shown.
FEW_IMAGES = 5


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a head says of the test images.

    Args:
        preds: Predicted classes, (N,), of any integer type.
        confidences: Probabilities of these, (N,); None if not known.
    """

    preds: Tensor
    confidences: Tensor | None = None


@dataclass(frozen=True, eq=False)
class EvaluatedImages:
    """The test images as their figures know them.

    Attributes:
        targets: True classes, (N,) int64.
        notes: The classes, C of them.
        group_of: Index of each class's shot group, (C,) int64.
        groups: Names of the groups.
        thumbnails: Makes pictures of the images.
    """

    targets: Tensor
    notes: Sequence[ClassNote]
    group_of: Tensor
    groups: Sequence[str]
    thumbnails: Thumbnails

    def images_per_class(self) -> Tensor:
        """Returns the test images of each class, (C,)."""
        return torch.bincount(self.targets, minlength=len(self.notes))

    def min_images(self) -> dict[str, int]:
        """Returns how many test images a class must have for its change to be shown, by shot group.

        Five, or as many as a class of the group has at most; groups without images are left out.
        """
        images = self.images_per_class()
        of_groups = {g: images[self.group_of == index] for index, g in enumerate(self.groups)}
        return {g: min(FEW_IMAGES, int(n.max())) for g, n in of_groups.items() if n.any()}


def compare_with_joint(head: Predictions, joint: Predictions, test: EvaluatedImages) -> Comparison:
    """Returns which classes gained and lost most against the joint classifier.

    Args:
        head: What the head says.
        joint: What the joint classifier says of the same images.
        test: The images.
    """
    images, needed = test.images_per_class(), test.min_images()
    right = [test.targets[p.preds.long() == test.targets] for p in (joint, head)]
    before, after = (torch.bincount(r, minlength=len(images)) for r in right)
    change = ((after - before) / images.double()).nan_to_num(0)

    def most(sign: int, wrong: Predictions, who: str) -> list[Change]:
        """The classes with the largest change; of equals, those with more test images."""
        by = (sign * change).tolist()
        moved = [c for c, change in enumerate(by) if change > 0]
        classes = [c for c in moved if images[c] >= needed[test.notes[c].group]]
        classes.sort(key=lambda c: (-by[c], -int(images[c])))
        return [
            Change(
                test.notes[c],
                int(before[c]),
                int(after[c]),
                int(images[c]),
                _changed_pictures(c, joint if wrong is head else head, wrong, who, test),
            )
            for c in classes[:CHANGES]
        ]

    return Comparison(
        gained=most(1, joint, "the joint classifier"),
        lost=most(-1, head, "this head"),
        better=int((change > 0).sum()),
        worse=int((change < 0).sum()),
    )


def _changed_pictures(
    label: int, right: Predictions, wrong: Predictions, who: str, test: EvaluatedImages
) -> list[Picture]:
    """Returns images of a class that one classifier has right and the other, ``who``, wrong."""
    target = test.targets
    rows = (target == label) & (right.preds.long() == label) & (wrong.preds.long() != label)
    name = test.notes[label].name
    pictures = []
    for row in rows.nonzero().flatten()[:PICTURES].tolist():
        uri = test.thumbnails.test(row)
        if uri is not None:
            other = test.notes[int(wrong.preds[row])].name
            text = f"{name}, which {who} takes for {other}{_sure(wrong, row)}"
            pictures.append(Picture(uri, text, other))
    return pictures


def _sure(predictions: Predictions, row: int) -> str:
    if predictions.confidences is None:
        return ""
    return f" ({percent(float(predictions.confidences[row]))} % sure)"


def count_confusions(head: Predictions, test: EvaluatedImages) -> Confusions:
    """Returns what a head takes for what, by shot group and the most frequent single confusions.

    Counts are kept of the pairs that occur only, so memory does not grow with C².

    Args:
        head: What the head says.
        test: The images.
    """
    preds, targets = head.preds.long(), test.targets
    num_classes, num_groups = len(test.notes), len(test.groups)
    wrong = preds != targets
    # One more column for what is right.
    column = torch.where(wrong, test.group_of[preds], num_groups)
    cells = test.group_of[targets] * (num_groups + 1) + column
    counted = torch.bincount(cells, minlength=num_groups * (num_groups + 1)).view(num_groups, -1)
    pairs, times = (targets[wrong] * num_classes + preds[wrong]).unique(return_counts=True)
    most = times.argsort(descending=True, stable=True)[:MISTAKES]
    images = test.images_per_class()
    mistakes = []
    for pair, number in zip(pairs[most].tolist(), times[most].tolist(), strict=True):
        label, other = divmod(pair, num_classes)
        mistakes.append(
            Mistake(
                test.notes[label],
                test.notes[other],
                number,
                number / int(images[label]),
                _mistaken_pictures(label, other, head, test),
            )
        )
    return Confusions(_shares(counted, test.groups), mistakes)


def _shares(counted: Tensor, groups: Sequence[str]) -> Mapping[str, Mapping[str, float]]:
    """Returns the counts of a confusion of groups as shares of the groups that have images."""
    columns = [*groups, "right"]
    return {
        group: dict(zip(columns, (row / row.sum()).tolist(), strict=True))
        for group, row in zip(groups, counted.double(), strict=True)
        if row.sum() > 0
    }


def _mistaken_pictures(
    label: int, other: int, head: Predictions, test: EvaluatedImages
) -> Sequence[Picture]:
    rows = ((test.targets == label) & (head.preds == other)).nonzero().flatten()
    first, second = test.thumbnails.test(int(rows[0])), test.thumbnails.of_class(other)
    if first is None or second is None:
        return ()
    name, taken = test.notes[label].name, test.notes[other].name
    return (
        Picture(first, f"{name}, taken for {taken}{_sure(head, int(rows[0]))}", "test"),
        Picture(second, f"a training image of {taken}", "train"),
    )
