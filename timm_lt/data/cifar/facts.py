"""What is known of CIFAR-10 and CIFAR-100, and the order of their rows that subsets are taken in.

LDAM-DRW shuffles the indices of each class, so that its subset hangs on the order of the rows. That
is torchvision's: ``data_batch_1`` to ``data_batch_5``. The Hub's copy of CIFAR-10 was made from the
archive, whose members have another order: ``data_batch_4``, 3, 2, 5, 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from timm_lt.utils.checks import Problems, UsageError, shown_names
from timm_lt.utils.longtail import class_counts

# As the datasets library stores an image without a label.
NO_LABEL = -1


@dataclass(frozen=True)
class Batch:
    """One file of training images, as its labels tell it.

    Attributes:
        first: Its first labels.
        counts: Its images per class, (C,).
    """

    first: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class CifarFacts:
    """One of the two data sets.

    Attributes:
        name: What people call it.
        repo: Its copy on the Hub.
        label: The column of labels in that copy.
        names: Class names, (C,), in the order of the labels.
        batches: The training images in the official order, in files of one size.
        test_per_class: Test images per class.
        python: Folder of the Python version, which torchvision reads.
        binary: Folder of the binary version.
        binary_train: Its training files, in the official order.
        binary_test: Its test file.
        label_bytes: Bytes before the pixels of an image in a binary file; the last is the label.
    """

    name: str
    repo: str
    label: str
    names: tuple[str, ...]
    batches: tuple[Batch, ...]
    test_per_class: int
    python: str
    binary: str
    binary_train: tuple[str, ...]
    binary_test: str
    label_bytes: int

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.names)

    @property
    def train_per_class(self) -> int:
        """Training images per class."""
        return sum(batch.counts[0] for batch in self.batches)


def check_counts(facts: CifarFacts, labels: NDArray[np.int64], per_class: int) -> None:
    """Checks that every class has as many images as published.

    Raises:
        UsageError: If one has not, or an image has no label; names the first five.
    """
    expected = facts.num_classes * per_class
    problems = Problems()
    if len(labels) != expected:
        problems.add(f"there are {len(labels):,} images, not {expected:,}")
    unlabelled = np.flatnonzero(labels == NO_LABEL)
    if len(unlabelled):
        rows = shown_names(unlabelled[:6].tolist())
        problems.add(f"{len(unlabelled):,} images have no label, only null or -1: rows {rows}")
        problems.check()
    with problems.collected():
        counts = class_counts(labels, facts.num_classes).tolist()
        wrong = [f"{facts.names[c]} has {n}" for c, n in enumerate(counts) if n != per_class]
        if wrong:
            problems.add(
                f"{len(wrong)} of {facts.num_classes} classes have not {per_class} images: "
                f"{shown_names(wrong)}"
            )
    problems.check()


def official_rows(facts: CifarFacts, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Finds the official order of training images that are stored in any order of their files.

    Each file is recognised by its first labels and by its images per class.

    Args:
        facts: The data set.
        labels: The labels as they are stored, (N,), all of them.

    Returns:
        (N,): the image at place i of the official order is in row ``official_rows[i]``.

    Raises:
        UsageError: If some file is not recognised: a subset of these rows would not be the
            published one.
    """
    blocks = np.arange(len(labels)).reshape(len(facts.batches), -1)
    found: dict[int, NDArray[np.int64]] = {}
    for rows in blocks:
        number = _recognised(facts, labels[rows])
        if number is not None:
            found[number] = rows
    if len(found) < len(blocks):
        begins = " ".join(map(str, labels[: len(facts.batches[0].first)]))
        official = " ".join(map(str, facts.batches[0].first))
        raise UsageError(
            f"the order of the rows is not known: the labels begin with {begins}, officially with "
            f"{official}, and {len(blocks) - len(found)} of {len(blocks)} blocks are no file of "
            f"{facts.name}; a subset of them would not be the published one. Take the official "
            "files, or data set 'hub' and make_long_tailed"
        )
    return np.concatenate([found[number] for number in range(len(blocks))])


def _recognised(facts: CifarFacts, labels: NDArray[np.int64]) -> int | None:
    counts = tuple(class_counts(labels, facts.num_classes).tolist())
    for number, batch in enumerate(facts.batches):
        if tuple(labels[: len(batch.first)].tolist()) == batch.first and counts == batch.counts:
            return number
    return None


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


def _batches(*pairs: Sequence[str]) -> tuple[Batch, ...]:
    return tuple(Batch(_numbers(first), _numbers(counts)) for first, counts in pairs)


CIFAR10 = CifarFacts(
    name="CIFAR-10",
    repo="uoft-cs/cifar10",
    label="label",
    names=_words("airplane automobile bird cat deer dog frog horse ship truck"),
    batches=_batches(
        (
            "6 9 9 4 1 1 2 7 8 3 4 7 7 2 9 9 9 3 2 6",
            "1005 974 1032 1016 999 937 1030 1001 1025 981",
        ),
        (
            "1 6 6 8 8 3 4 6 0 6 0 3 6 6 5 4 8 3 2 6",
            "984 1007 1010 995 1010 988 1008 1026 987 985",
        ),
        (
            "8 5 0 6 9 2 8 3 6 2 7 4 6 9 0 0 7 3 7 2",
            "994 1042 965 997 990 1029 978 1015 961 1029",
        ),
        (
            "0 6 0 2 7 2 1 2 4 1 5 6 6 3 1 3 5 5 8 1",
            "1003 963 1041 976 1004 1021 1004 981 1024 983",
        ),
        (
            "1 8 5 1 5 7 4 3 8 2 7 2 0 1 5 9 6 2 0 8",
            "1014 1014 952 1016 997 1025 980 977 1003 1022",
        ),
    ),
    test_per_class=1000,
    python="cifar-10-batches-py",
    binary="cifar-10-batches-bin",
    binary_train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    binary_test="test_batch.bin",
    label_bytes=1,
)

CIFAR100 = CifarFacts(
    name="CIFAR-100",
    repo="uoft-cs/cifar100",
    label="fine_label",
    names=_words(
        """
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
        butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
        crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house
        kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
        mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree
        plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew
        skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
        telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf
        woman worm
        """
    ),
    batches=(Batch(_numbers("19 29 0 11 1 86 90 28 23 31"), (500,) * 100),),
    test_per_class=100,
    python="cifar-100-python",
    binary="cifar-100-binary",
    binary_train=("train.bin",),
    binary_test="test.bin",
    label_bytes=2,
)
