"""The three splits of a data set, checked before anything is trained on them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from datasets import Dataset
from torch import Tensor

from timm_lt.data.augment import Augmentation
from timm_lt.data.images import ImageTensors, decode_images, label_names, label_tensor
from timm_lt.data.sources import Split, create_dataset
from timm_lt.longtail import check_no_empty_class, class_counts
from timm_lt.registry import UsageError


@dataclass(frozen=True)
class Splits:
    """Train, validation and test split with what is known of their classes.

    Attributes:
        datasets: The splits by name, each with the columns ``image`` and ``label``.
        labels: Their labels, (N,) int64, by name.
        class_counts: Training images per class, (C,).
        label_names: Class names, (C,), if known.
    """

    datasets: Mapping[str, Dataset]
    labels: Mapping[str, Tensor]
    class_counts: Tensor
    label_names: list[str] | None

    @classmethod
    def from_datasets(cls, datasets: Mapping[str, Dataset]) -> "Splits":
        """Checks three data sets and counts their classes.

        Raises:
            UsageError: If a split is empty, a label is negative or beyond the classes, or a class
                has no training or no validation image; the message names split and class.
        """
        for split, dataset in datasets.items():
            if len(dataset) == 0:
                raise UsageError(f"the {split} split has no images")
        labels = {split: label_tensor(dataset) for split, dataset in datasets.items()}
        names = label_names(datasets["train"])
        num_classes = len(names) if names else int(labels["train"].max()) + 1
        counts = {}
        for split, values in labels.items():
            try:
                counts[split] = class_counts(values, num_classes)
                if split != "test":
                    check_no_empty_class(counts[split])
            except UsageError as error:
                raise UsageError(f"{split} split: {error}") from error
        return cls(datasets, labels, counts["train"], names)

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.class_counts)

    def images(
        self,
        split: Split,
        *,
        size: tuple[int, int] | None,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> ImageTensors:
        """Decodes a split into memory; see :class:`~timm_lt.data.images.ImageTensors`."""
        return ImageTensors(
            decode_images(self.datasets[split], size),
            self.labels[split],
            mean=mean,
            std=std,
            augmentation=augmentation,
            seed=seed,
        )


def create_splits(name: str, *, root: str | None = None, **options: Any) -> Splits:
    """Creates the three splits of a registered data set.

    Raises:
        UsageError: As :func:`~timm_lt.data.sources.create_dataset` and
            :meth:`Splits.from_datasets`.
    """
    splits = get_args(Split)
    return Splits.from_datasets(
        {split: create_dataset(name, split=split, root=root, **options) for split in splits}
    )
