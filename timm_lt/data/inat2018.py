"""inat2018: iNaturalist 2018, 8,142 species with 1,000 to 2 training images."""

from pathlib import Path
from typing import TYPE_CHECKING

from timm_lt.data.published_lists import published, published_splits
from timm_lt.data.sources import Split, register_dataset

if TYPE_CHECKING:
    from datasets import Dataset


# Their code has no validation split here: the best epoch, and tau, are those of the test split.
@register_dataset("inat2018", selected_on_test="Kang et al., ICLR 2020")
def inat2018(
    *, root: str | Path, train: str | Path | None = None, test: str | Path | None = None
) -> "dict[Split, Dataset]":
    """Builds iNaturalist 2018 from the competition's images and lists.

    437,513 training images, and the official validation images, 3 a class, as the test split that
    papers report on: there is no split for validation, and a run holds out a part of training, or
    selects on the test split as Kang et al. did (``protocol="paper"``).
    The images are in ``train_val2018/<super category>/<class>/``, below the root or as the root.

    The lists are the official JSON files, or the text files of Kang et al. made of them. They are
    checked: see :func:`~timm_lt.data.check_image_list`. Classes have names if the list of training
    images, or that of test images, is JSON.

    Args:
        root: The folder with the images.
        train: The training list; None looks for ``iNaturalist18_train.txt`` and ``train2018.json``
            in the root and in its usual folders. A relative path is looked for in the root, then in
            the working directory.
        test: That of test images, ``iNaturalist18_val.txt`` or ``val2018.json``.

    Raises:
        UsageError: For all that is wrong at once: see
            :func:`~timm_lt.data.published_lists.published_splits`.

    References:
        Van Horn et al., The iNaturalist Species Classification and Detection Dataset, CVPR 2018,
        https://arxiv.org/abs/1707.06642
    """
    return published_splits(published("inat2018"), root, {"train": train, "test": test})
