"""places_lt: Places-LT, 365 classes with 4,980 to 5 training images."""

from pathlib import Path
from typing import TYPE_CHECKING

from timm_lt.data.published_lists import published, published_splits
from timm_lt.data.sources import Split, register_dataset

if TYPE_CHECKING:
    from datasets import Dataset


@register_dataset("places_lt")
def places_lt(
    *,
    root: str | Path,
    train: str | Path | None = None,
    val: str | Path | None = None,
    test: str | Path | None = None,
) -> "dict[Split, Dataset]":
    """Builds Places-LT from the images of Places365-Standard and the published lists.

    62,500 training images; 20 a class for validation, out of Places365's training images; for
    testing Places365's validation images, 100 a class. Lists and images may each have either
    layout: ``train/apartment_building-outdoor/`` and ``val/<class>/``, or
    ``data_256/a/apartment_building/outdoor/`` and ``val_256/``; torchvision's
    ``data_256_standard`` and the large images are known too.

    The lists are checked: see :func:`~timm_lt.data.check_image_list`. Which images are in the test
    list is not known, only how many of each class. Five classes have other labels than in
    Places365: a list that numbers them so is refused, a test list without directories of classes
    by the labels of six images, which are all that is checked of it beside that.

    Args:
        root: The folder with the images.
        train: The training list; None looks for ``Places_LT_train.txt`` in the root and in its
            usual folders. A relative path is looked for in the root, then in the working directory.
        val: That of validation images, ``Places_LT_val.txt``.
        test: That of test images, ``Places_LT_test.txt``.

    Raises:
        UsageError: For all that is wrong at once: see
            :func:`~timm_lt.data.published_lists.published_splits`.

    References:
        Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019,
        https://arxiv.org/abs/1904.05160
    """
    given: dict[Split, str | Path | None] = {"train": train, "val": val, "test": test}
    return published_splits(published("places_lt"), root, given)
