"""imagenet_lt: ImageNet-LT, 1,000 classes with 1,280 to 5 training images."""

from pathlib import Path
from typing import TYPE_CHECKING

from timm_lt.data.published_lists import published, published_splits
from timm_lt.data.sources import Split, register_dataset

if TYPE_CHECKING:
    from datasets import Dataset


@register_dataset("imagenet_lt")
def imagenet_lt(
    *,
    root: str | Path,
    train: str | Path | None = None,
    val: str | Path | None = None,
    test: str | Path | None = None,
) -> "dict[Split, Dataset]":
    """Builds ImageNet-LT from ImageNet's images (ILSVRC 2012) and the published lists.

    115,846 training images; 20 a class for validation, out of ImageNet's training images; for
    testing ImageNet's validation images, 50 a class. The training images are in
    ``train/<wnid>/``, those for testing in ``val/<wnid>/`` or in ``val/``, whatever the lists say.
    Classes are called by their wnid.

    The lists are checked: see :func:`~timm_lt.data.check_image_list`. Which images are in the
    training and the test list is not known, only how many of each class. Of a test list that has
    no directories of classes, the label of one image alone is checked beside that.

    Args:
        root: The folder with the images.
        train: The training list; None looks for ``ImageNet_LT_train.txt`` in the root and in its
            usual folders. A relative path is looked for in the root, then in the working directory.
        val: That of validation images, ``ImageNet_LT_val.txt``.
        test: That of test images, ``ImageNet_LT_test.txt``.

    Raises:
        UsageError: For all that is wrong at once: see
            :func:`~timm_lt.data.published_lists.published_splits`.

    References:
        Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019,
        https://arxiv.org/abs/1904.05160
    """
    given: dict[Split, str | Path | None] = {"train": train, "val": val, "test": test}
    return published_splits(published("imagenet_lt"), root, given)
