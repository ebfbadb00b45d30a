"""Copies of CIFAR in every layout: labels at once, images only when they are taken.

What is known of CIFAR-10 and CIFAR-100, and the order of their rows that subsets are taken in.

LDAM-DRW shuffles the indices of each class, so that its subset hangs on the order of the rows. That
is torchvision's: ``data_batch_1`` to ``data_batch_5``. The Hub's copy of CIFAR-10 was made from the
archive, whose members have another order: ``data_batch_4``, 3, 2, 5, 1.

cifar10_lt and cifar100_lt: the long-tailed CIFAR that most papers report on.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from timm_lt.data.columns import find_image_column
from timm_lt.data.hub import find_tables, open_repo
from timm_lt.data.long_tailed import check_manifest, long_tailed_indices, subset_manifest
from timm_lt.data.sources import Split, dataset_from_arrays, register_dataset
from timm_lt.utils.checks import Problems, UsageError, check_choice, check_integer, shown_names
from timm_lt.utils.longtail import Profile, class_counts

if TYPE_CHECKING:
    from datasets import Dataset, Features

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


Part = Literal["train", "test"]
PIXELS = 3 * 32 * 32
# What the Hub's copy of CIFAR-100 calls a class.
MISSPELT = {"cra": "crab"}


@dataclass(frozen=True)
class StoredPart:
    """The training or the test images of a copy.

    Attributes:
        labels: As they are stored, (N,); ``NO_LABEL`` where there is none.
        take: Returns the images of some rows, in that order, as a data set.
    """

    labels: NDArray[np.int64]
    take: "Callable[[NDArray[np.int64]], Dataset]"


def open_copy(
    facts: CifarFacts, root: Path | None, cache_dir: str | Path | None = None
) -> dict[Part, StoredPart]:
    """Opens a copy: the Hub's, or a local one in one of three layouts.

    A folder of the Python version is read through torchvision, which unpickles a file only after
    its MD5 was found to be the published one. The binary version and parquet hold no code.

    Args:
        facts: Which data set.
        root: Folder with the Hub's parquet files, or with the Python or the binary version, or one
            of these itself; None is the Hub.
        cache_dir: Where the ``datasets`` library keeps what it prepares of the Hub's copy.

    Raises:
        UsageError: If there is no copy, or it is damaged.
    """
    if root is None:
        return _open_repo(facts, cache_dir)
    if not root.is_dir():
        raise UsageError(f"root {str(root)!r} is no folder: {_wanted(facts)}")
    for folder, read in ((facts.python, _open_python), (facts.binary, _open_binary)):
        found = root if root.name == folder else root / folder
        if found.is_dir():
            return read(facts, found)
    if any(root.rglob("*.parquet")):
        return _open_parquet(facts, root)
    content = shown_names(sorted(path.name for path in root.iterdir())) or "nothing"
    raise UsageError(f"root {str(root)!r} has {content}: {_wanted(facts)}")


def _wanted(facts: CifarFacts) -> str:
    archives = f"{facts.python.removesuffix('-batches-py').removesuffix('-python')}"
    return (
        f"{facts.name} is the folder {facts.python} (unpack {archives}-python.tar.gz), the folder "
        f"{facts.binary} (unpack {archives}-binary.tar.gz), or the parquet files of {facts.repo}; "
        "without a root it comes from the Hub"
    )


def _open_python(facts: CifarFacts, folder: Path) -> dict[Part, StoredPart]:
    from torchvision import datasets as torchvision

    loader: Any = getattr(torchvision, facts.name.replace("-", ""))
    try:
        with warnings.catch_warnings():
            # Of NumPy, about how these old files describe their arrays.
            warnings.simplefilter("ignore")
            parts = {
                train: loader(folder.parent, train=train, download=False) for train in (True, False)
            }
    except RuntimeError as error:
        expected = [name for name, _ in [*loader.train_list, *loader.test_list]]
        missing = [name for name in expected if not (folder / name).is_file()]
        why = f"lacks {shown_names(missing)}" if missing else "has a file with another MD5"
        raise UsageError(
            f"{folder} is not the official Python version of {facts.name}: it {why}; such files "
            "can hold code, and are read only as they were published"
        ) from error
    return {
        name: _from_arrays(facts, parts[name == "train"].data, parts[name == "train"].targets)
        for name in ("train", "test")
    }


def _open_binary(facts: CifarFacts, folder: Path) -> dict[Part, StoredPart]:
    files: dict[Part, Sequence[str]] = {"train": facts.binary_train, "test": (facts.binary_test,)}
    if missing := [n for names in files.values() for n in names if not (folder / n).is_file()]:
        raise UsageError(f"{folder} lacks {shown_names(missing)}: {_wanted(facts)}")
    parts: dict[Part, StoredPart] = {}
    for part, names in files.items():
        rows = np.concatenate([_read_binary(folder / name, facts.label_bytes) for name in names])
        images = rows[:, facts.label_bytes :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        parts[part] = _from_arrays(facts, images, rows[:, facts.label_bytes - 1])
    return parts


def _read_binary(file: Path, label_bytes: int) -> NDArray[np.uint8]:
    content = np.fromfile(file, np.uint8)
    size = label_bytes + PIXELS
    if len(content) == 0 or len(content) % size:
        raise UsageError(
            f"{file} has {len(content):,} bytes, no multiple of {size:,}, the bytes of an image: "
            "it is cut off, or another file"
        )
    return content.reshape(-1, size)


def _from_arrays(
    facts: CifarFacts, images: NDArray[np.uint8], labels: Sequence[int] | NDArray[Any]
) -> StoredPart:
    numbers = np.asarray(labels, np.int64)
    return StoredPart(
        numbers, lambda rows: dataset_from_arrays(images[rows], numbers[rows], list(facts.names))
    )


def _open_parquet(facts: CifarFacts, root: Path) -> dict[Part, StoredPart]:
    import pyarrow.parquet as pq
    from datasets import Features

    files = find_tables(root)
    if missing := [part for part in ("train", "test") if part not in files]:
        raise UsageError(
            f"root {str(root)!r} has no parquet file of {' and '.join(missing)}, only "
            f"{', '.join(files)}"
        )
    parts: dict[Part, StoredPart] = {}
    for part in ("train", "test"):
        try:
            tables = [pq.read_table(file) for file in files[part]]
        except (OSError, ValueError) as error:
            raise UsageError(f"{files[part][0]} cannot be read: {error}") from error
        table = pa.concat_tables(tables)
        features = Features.from_arrow_schema(table.schema)
        image = _checked_columns(facts, features)
        labels = _label_numbers(table.column(facts.label))
        parts[part] = StoredPart(labels, _taker(facts, table.column(image), labels))
    return parts


def _taker(
    facts: CifarFacts, images: pa.ChunkedArray, labels: NDArray[np.int64]
) -> "Callable[[NDArray[np.int64]], Dataset]":
    from datasets import ClassLabel, Dataset, Features, Image

    features = Features({"image": Image(mode="RGB"), "label": ClassLabel(names=list(facts.names))})

    def take(rows: NDArray[np.int64]) -> "Dataset":
        table = pa.table({"image": images.take(pa.array(rows)), "label": labels[rows]})
        return Dataset(table.cast(features.arrow_schema))

    return take


def _open_repo(facts: CifarFacts, cache_dir: str | Path | None) -> dict[Part, StoredPart]:
    tables = open_repo(facts.repo, None, None, cache_dir).read(["train", "test"])
    parts: dict[Part, StoredPart] = {}
    for part in ("train", "test"):
        table = tables[part].with_format("arrow")
        image = _checked_columns(facts, table.features)
        labels = cast(pa.Table, table.select_columns(facts.label)[:]).column(0)
        numbers = _label_numbers(labels)
        images = cast(pa.Table, table.select_columns(image)[:]).column(0)
        parts[part] = StoredPart(numbers, _taker(facts, images, numbers))
    return parts


def _label_numbers(labels: pa.ChunkedArray) -> NDArray[np.int64]:
    numbers: NDArray[np.int64] = labels.cast(pa.int64(), safe=False).fill_null(NO_LABEL).to_numpy()
    return numbers


def _checked_columns(facts: CifarFacts, features: "Features") -> str:
    """Returns the column of images, after a check that the labels are those of the data set."""
    if facts.label not in features:
        raise UsageError(
            f"the table has no column {facts.label!r} as {facts.repo} has, only "
            f"{', '.join(features)}"
        )
    names = [MISSPELT.get(name, name) for name in getattr(features[facts.label], "names", [])]
    if names and names != list(facts.names):
        raise UsageError(
            f"the classes of column {facts.label!r} are {shown_names(names)}, not those of "
            f"{facts.name}: {shown_names(facts.names)}"
        )
    return find_image_column(features)


CifarName = Literal["cifar10_lt", "cifar100_lt"]
FACTS: dict[CifarName, CifarFacts] = {"cifar10_lt": CIFAR10, "cifar100_lt": CIFAR100}
# Papers that keep the best epoch on the test split, as their code has it.
BEST_TEST_EPOCH = "Cao et al., NeurIPS 2019, and Zhou et al., CVPR 2020"
ORDER = "torchvision's: the training files one after the other, data_batch_1 to 5 for CIFAR-10"


@register_dataset("cifar10_lt", selected_on_test=BEST_TEST_EPOCH)
def cifar10_lt(
    *,
    root: str | Path | None = None,
    imbalance_factor: float = 100.0,
    profile: Profile = "exponential",
    seed: int = 0,
    manifest: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> "dict[Split, Dataset]":
    """Builds CIFAR-10-LT: 5,000 training images of the first class, fewer of each later one.

    Train is a subset of the 50,000 training images, test all 10,000 test images; a run holds
    validation images out of train, or selects on the test split as papers did
    (``protocol="paper"``). With seed 0 the subset is LDAM-DRW's: the rows of every copy are
    brought into the official order first, and a copy whose order is not recognised is refused.

    Args:
        root: A local copy: the folder that holds ``cifar-10-batches-py``, ``cifar-10-batches-bin``
            or the parquet files of ``uoft-cs/cifar10``. None loads the Hub's copy.
        imbalance_factor: Largest class over smallest class, from 1, the balanced set, to 5,000.
        profile: ``"exponential"``, ``"step"`` or ``"pareto"``.
        seed: Of the choice of images, a non-negative integer below 2^32.
        manifest: JSON file of :func:`cifar_manifest` that the subset must agree with.
        cache_dir: Where the ``datasets`` library keeps what it prepares of the Hub's copy.

    Raises:
        UsageError: If there is no copy, it is not CIFAR-10 as published, or an option is out of
            range.

    References:
        Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009,
        https://www.cs.toronto.edu/~kriz/cifar.html
        Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS
        2019, https://arxiv.org/abs/1906.07413
    """
    options = {"imbalance_factor": imbalance_factor, "profile": profile, "seed": seed}
    return _splits("cifar10_lt", root, manifest, cache_dir, options)


@register_dataset("cifar100_lt", selected_on_test=BEST_TEST_EPOCH)
def cifar100_lt(
    *,
    root: str | Path | None = None,
    imbalance_factor: float = 100.0,
    profile: Profile = "exponential",
    seed: int = 0,
    manifest: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> "dict[Split, Dataset]":
    """Builds CIFAR-100-LT over the 100 fine classes; 500 training images of the first.

    All else is as for :func:`cifar10_lt`.

    Args:
        root: A local copy: the folder that holds ``cifar-100-python``, ``cifar-100-binary`` or the
            parquet files of ``uoft-cs/cifar100``. None loads the Hub's copy.
        imbalance_factor: Largest class over smallest class, from 1, the balanced set, to 500.
        profile: ``"exponential"``, ``"step"`` or ``"pareto"``.
        seed: Of the choice of images, a non-negative integer below 2^32.
        manifest: JSON file of :func:`cifar_manifest` that the subset must agree with.
        cache_dir: Where the ``datasets`` library keeps what it prepares of the Hub's copy.

    Raises:
        UsageError: If there is no copy, it is not CIFAR-100 as published, or an option is out of
            range.
    """
    options = {"imbalance_factor": imbalance_factor, "profile": profile, "seed": seed}
    return _splits("cifar100_lt", root, manifest, cache_dir, options)


def cifar_manifest(
    name: CifarName,
    *,
    root: str | Path | None = None,
    imbalance_factor: float = 100.0,
    profile: Profile = "exponential",
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Describes the training images of ``cifar10_lt`` or ``cifar100_lt``, ready for JSON.

    The indices count in the official order, whatever the order of the copy. Whoever has the same
    ``indices_sha256`` and ``all_labels_sha256`` trains on the same images.

    Args:
        name: ``"cifar10_lt"`` or ``"cifar100_lt"``.
        root: As for :func:`cifar10_lt`.
        imbalance_factor: As for :func:`cifar10_lt`.
        profile: As for :func:`cifar10_lt`.
        seed: As for :func:`cifar10_lt`.
        cache_dir: As for :func:`cifar10_lt`.

    Returns:
        What :func:`~timm_lt.data.long_tailed.subset_manifest` returns, and how the subset was made.

    Raises:
        UsageError: As :func:`cifar10_lt`.
    """
    check_choice("data set", name, get_args(CifarName))
    options = {"imbalance_factor": imbalance_factor, "profile": profile, "seed": seed}
    parts = _opened(FACTS[name], root, cache_dir)
    return _manifest(name, parts["train"], options)[0]


def published_counts(name: CifarName) -> dict[int, list[int]]:
    """Returns the images per class of the subsets that papers report on, by imbalance factor.

    >>> {factor: sum(counts) for factor, counts in published_counts("cifar100_lt").items()}
    {10: 19573, 50: 12608, 100: 10847, 200: 9502}
    """
    text = files("timm_lt.data").joinpath("facts/cifar.json").read_text(encoding="utf-8")
    return {int(factor): counts for factor, counts in json.loads(text)[name].items()}


def _splits(
    name: CifarName,
    root: str | Path | None,
    manifest: str | Path | None,
    cache_dir: str | Path | None,
    options: dict[str, Any],
) -> "dict[Split, Dataset]":
    parts = _opened(FACTS[name], root, cache_dir)
    found, rows = _manifest(name, parts["train"], options)
    if manifest is not None:
        check_manifest(found, Path(manifest).expanduser())
    everything = np.arange(len(parts["test"].labels))
    return {"train": parts["train"].take(rows), "test": parts["test"].take(everything)}


def _opened(
    facts: CifarFacts, root: str | Path | None, cache_dir: str | Path | None
) -> dict[Part, StoredPart]:
    parts = open_copy(facts, None if root is None else Path(root).expanduser(), cache_dir)
    problems = Problems(f"the copy of {facts.name} in {facts.repo if root is None else root}")
    per_class: dict[Part, int] = {"train": facts.train_per_class, "test": facts.test_per_class}
    for part, number in per_class.items():
        with problems.collected(f"{part}: "):
            check_counts(facts, parts[part].labels, number)
    problems.check()
    return parts


def _manifest(
    name: CifarName, train: StoredPart, options: dict[str, Any]
) -> "tuple[dict[str, Any], np.ndarray[Any, np.dtype[np.int64]]]":
    """Returns the manifest of the subset, and its rows as the copy stores them."""
    check_integer("seed", options["seed"], minimum=0, maximum=2**32 - 1)
    facts = FACTS[name]
    order = official_rows(facts, train.labels)
    labels = train.labels[order]
    chosen = long_tailed_indices(labels, num_classes=facts.num_classes, **options)
    found = subset_manifest(
        labels, chosen, num_classes=facts.num_classes, data=name, **options, order=ORDER
    )
    published = published_counts(name).get(options["imbalance_factor"])
    if options["profile"] == "exponential" and published not in (None, found["class_counts"]):
        raise UsageError(f"the classes of {name} have {found['class_counts']} images: a defect")
    return found, order[chosen]
