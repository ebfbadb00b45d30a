"""Data sets of published lists: facts, layouts of lists and images, and wrong downloads."""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from timm_lt.data import check_image_list
from timm_lt.data.list_files import ImageList
from timm_lt.data.lists import find_difference, pairs_hash, published, published_splits
from timm_lt.data.sources import Paths, find_splits
from timm_lt.utils.checks import UsageError

NAMES = {
    "imagenet_lt": ["n01440764", "n01443537", "n01484850"],
    "places_lt": ["airfield", "desert_road", "desert-sand"],
    "inat2018": None,
}
COUNTS = {"train": [5, 3, 2], "val": [1, 1, 1], "test": [2, 2, 2]}


def small(name):
    """Facts about a data set of three classes in place of those that are published."""
    lists = {}
    for split, known in published(name).items():
        facts = {"lines": sum(COUNTS[split]), "num_classes": 3, "class_names": NAMES[name]}
        if known.class_counts is None:
            facts["group_totals"] = {"Aves": 8, "Fungi": 2}
        else:
            facts |= {"class_counts": COUNTS[split], "group_totals": {}}
        lists[split] = replace(known, sha256=None, probes={}, **facts)
    return lists


def images(name):
    """Split, class and number of every image."""
    for split in published(name):
        for label, count in enumerate(COUNTS[split]):
            yield from ((split, label, row) for row in range(count))


def imagenet(layout, split, label, row):
    wnid = NAMES["imagenet_lt"][label]
    if split != "test":
        prefix = "ILSVRC/Data/CLS-LOC/" if layout == "kaggle" else ""
        return f"{prefix}train/{wnid}/{wnid}_{split}{row}.JPEG"
    file = f"ILSVRC2012_val_{label}{row}.JPEG"
    return {
        "folders": f"val/{wnid}/{file}",
        "flat": f"val/{file}",
        "kaggle": f"ILSVRC/Data/CLS-LOC/val/{file}",
    }[layout]


def places(layout, split, label, row):
    name = ["airfield", "desert_road", "desert-sand"][label]
    nested = ["a/airfield", "d/desert_road", "d/desert/sand"][label]
    if split == "test":
        file = f"Places365_val_{label}{row}.jpg"
        return f"val/{name}/{file}" if layout == "v1" else f"val_256/{file}"
    file = f"{split}{row}.jpg"
    return {
        "v1": f"train/{name}/{file}",
        "v2": f"data_256/{nested}/{file}",
        "torchvision": f"data_256_standard/{nested}/{file}",
    }[layout]


def inat(layout, split, label, row):
    group = ["Aves", "Aves", "Fungi"][label]
    prefix = "" if layout == "inside" else "train_val2018/"
    return f"{prefix}{group}/{label}/{split}{row}.jpg"


LAYOUTS = {"imagenet_lt": imagenet, "places_lt": places, "inat2018": inat}
FILES = {name: {split: one.files[0] for split, one in published(name).items()} for name in NAMES}


def put(root, name, disk):
    """Makes the images."""
    for image in images(name):
        path = root / LAYOUTS[name](disk, *image)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (1, 1)).save(path, "png")


def rows_of(name, layout, split):
    return [(LAYOUTS[name](layout, *i), i[1]) for i in images(name) if i[0] == split]


def write_lists(root, name, layout):
    root.mkdir(parents=True, exist_ok=True)
    for split, file in FILES[name].items():
        lines = [f"{path} {label}\n" for path, label in rows_of(name, layout, split)]
        (root / file).write_text("".join(lines))


def build(name, root, **given):
    return published_splits(small(name), root, *(given.get(split) for split in FILES[name]))


def files_of(dataset, root):
    images = dataset.data.column("image").combine_chunks().field("path").to_pylist()
    return [path.removeprefix(f"{root}/") for path in images]


def problems_of(name, root, **given):
    with pytest.raises(UsageError) as caught:
        build(name, root, **given)
    owner = f"{published(name)['train'].title} in {root}: "
    return [problem.removeprefix(owner) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("name", "listed", "disk", "where"),
    [
        ("imagenet_lt", "flat", "folders", ""),
        ("imagenet_lt", "folders", "kaggle", "data_txt/ImageNet_LT"),
        ("places_lt", "v1", "v2", ""),
        ("places_lt", "v2", "torchvision", ""),
        ("inat2018", "outside", "outside", "iNaturalist18"),
        ("inat2018", "outside", "inside", ""),
    ],
)
def test_lists_and_images_may_each_have_any_layout(tmp_path, name, listed, disk, where):
    put(tmp_path, name, disk)
    write_lists(tmp_path / where, name, listed)
    found = build(name, tmp_path)
    assert list(found) == list(FILES[name])
    for split, dataset in found.items():
        rows = zip(files_of(dataset, tmp_path), dataset["label"][:], strict=True)
        assert list(rows) == rows_of(name, disk, split)
        assert getattr(dataset.features["label"], "names", None) == NAMES[name]


def test_official_annotations_give_names(tmp_path):
    put(tmp_path, "inat2018", "outside")
    categories = [{"id": label, "name": f"species {label}"} for label in (2, 0, 1)]
    for split, file in (("train", "train2018.json"), ("test", "val2018.json")):
        rows = list(enumerate(rows_of("inat2018", "outside", split)))
        content = {
            "images": [{"id": i, "file_name": path} for i, (path, _) in rows],
            "annotations": [{"image_id": i, "category_id": label} for i, (_, label) in rows],
            "categories": categories,
        }
        (tmp_path / file).write_text(json.dumps(content))
    found = build("inat2018", tmp_path)
    assert found["test"].features["label"].names == ["species 0", "species 1", "species 2"]
    assert found["test"]["label"][:] == [0, 0, 1, 1, 2, 2]


def test_lists_are_named_by_option(tmp_path, monkeypatch):
    put(tmp_path / "images", "places_lt", "v1")
    write_lists(tmp_path / "lists", "places_lt", "v1")
    monkeypatch.chdir(tmp_path)
    (problem, *_) = problems_of("places_lt", tmp_path / "images")
    assert problem.startswith("train list: there is no Places_LT_train.txt in the root nor in its")
    assert "name it with the option 'train'" in problem
    given = {split: Path("lists") / file for split, file in FILES["places_lt"].items()}
    assert len(build("places_lt", "images", **given)["train"]) == 10


def test_the_download_is_named_and_the_contents_of_the_root(tmp_path):
    write_lists(tmp_path, "imagenet_lt", "folders")
    (tmp_path / "ILSVRC").mkdir()
    train, val, test = problems_of("imagenet_lt", tmp_path)
    wnid = NAMES["imagenet_lt"][0]
    assert train == (
        f"the images of the train split do not exist, e.g. train/{wnid}/{wnid}_train0.JPEG: "
        "ImageNet-LT needs ILSVRC2012_img_train.tar (138 GiB), with each of its 1,000 tar files "
        f"unpacked into train/<wnid>/; {tmp_path} contains ILSVRC, ImageNet_LT_test.txt, "
        "ImageNet_LT_train.txt, ImageNet_LT_val.txt"
    )
    assert "its validation images are among ImageNet's training images" in val
    assert "needs ILSVRC2012_img_val.tar (6.3 GiB)" in test


def test_some_missing_images_are_counted_and_another_list_is_refused(tmp_path):
    put(tmp_path, "places_lt", "v2")
    write_lists(tmp_path, "places_lt", "v1")
    first, second, empty = (f"{tmp_path}/data_256/a/airfield/train{row}.jpg" for row in (0, 3, 1))
    Path(first).unlink()
    Path(second).unlink()
    Path(empty).write_bytes(b"")
    problem, damaged = problems_of("places_lt", tmp_path)
    assert f"{empty}) cannot be decoded: 0 bytes" in damaged
    assert problem == f"train list: 2 of 10 files do not exist: {first}, {second}"
    lines = (tmp_path / "Places_LT_train.txt").read_text().splitlines(keepends=True)
    (tmp_path / "Places_LT_train.txt").write_text("".join(lines[1:] + lines[-1:]))
    assert problems_of("places_lt", tmp_path)[0] == (
        f"train list: {tmp_path}/Places_LT_train.txt is not the published train list of Places-LT: "
        "class 0 (airfield) has 4 images, not 5; for a list of your own use the data set 'list'"
    )


def listed(rows):
    paths, labels = zip(*rows, strict=True)
    return ImageList(Paths(list(paths)), np.array(labels))


def difference(name, split, rows, known=None):
    return find_difference(known or small(name)[split], listed(rows))


def test_other_groups_directories_and_images_are_found():
    rows = rows_of("inat2018", "outside", "train")
    moved = [(path.replace("Aves/1/train0", "Fungi/1/train0"), label) for path, label in rows]
    assert difference("inat2018", "train", moved) == "Aves has 7 images, not 8"
    other = [("train_val2018/Fungi/1/x.jpg", 2), *rows[1:]]
    assert difference("inat2018", "train", other) == (
        "1 images are in the directory of another class than their label's, e.g. "
        "train_val2018/Fungi/1/x.jpg, whose label 2 is 2"
    )
    # Labels of Places365.
    rows = [(path, [0, 2, 1][label]) for path, label in rows_of("places_lt", "v1", "test")]
    found = difference("places_lt", "test", rows)
    assert found.startswith("4 images are in the directory of another class than their label's")
    rows = rows_of("places_lt", "v1", "train")
    known = replace(small("places_lt")["train"], sha256=pairs_hash(listed(rows)))
    same = rows_of("places_lt", "v2", "train")[::-1]
    assert difference("places_lt", "train", same, known) is None
    other = [("train/airfield/9.jpg", 0), *rows[1:]]
    assert "some images are others" in difference("places_lt", "train", other, known)
    # printf '1.jpg 7\n2.jpg 0\n2.jpg 10' | sha256sum
    rows = [("b/2.jpg", 10), ("a/2.jpg", 0), ("x/1.jpg", 7)]
    expected = "a9a8c3c4619d0569ed41635df8966d9d36ade86c15e55a8bf65b39bd0f3f8a0e"
    assert pairs_hash(listed(rows)) == expected


def flat_test_list(name, labels, probes):
    """A flat test list whose first images are given, with as many images a class as published."""
    known = published(name)["test"]
    each = known.lines // known.num_classes
    left = np.bincount(list(probes.values()), minlength=known.num_classes)
    rows = [(f"val/{file}", labels.get(label, label)) for file, label in probes.items()]
    return rows + [
        (f"val/{label}_{row}.jpg", labels.get(label, label))
        for label in range(known.num_classes)
        for row in range(each - left[label])
    ]


# As read in the published lists: one line of ImageNet-LT's, six of Places-LT's.
READ = {
    "imagenet_lt": {"ILSVRC2012_val_00000293.JPEG": 0},
    "places_lt": {
        "Places365_val_00036328.jpg": 116,
        "Places365_val_00030493.jpg": 117,
        "Places365_val_00013365.jpg": 118,
        "Places365_val_00025153.jpg": 119,
        "Places365_val_00007093.jpg": 141,
        "Places365_val_00033447.jpg": 142,
    },
}


# Labels of Places365 by those of Places-LT.
PLACES365 = {116: 118, 117: 116, 118: 117, 141: 142, 142: 141}


@pytest.mark.parametrize(
    ("name", "labels", "lacking", "expected"),
    [
        ("imagenet_lt", {}, 0, None),
        ("imagenet_lt", {0: 1, 1: 0}, 0, "ILSVRC2012_val_00000293.JPEG has label 1, not 0"),
        ("imagenet_lt", {}, 1, "ILSVRC2012_val_00000293.JPEG has label None, not 0"),
        ("places_lt", {}, 0, None),
        ("places_lt", PLACES365, 0, "Places365_val_00036328.jpg has label 118, not 116"),
    ],
)
def test_a_flat_test_list_is_known_by_a_few_images(name, labels, lacking, expected):
    probes = dict(list(READ[name].items())[lacking:])
    rows = flat_test_list(name, labels, probes)
    assert difference(name, "test", rows, published(name)["test"]) == expected


def test_a_whole_list_is_checked_without_images(tmp_path):
    known = published("imagenet_lt")["train"]
    classes = enumerate(zip(known.class_names, known.class_counts, strict=True))
    lines = [f"train/{n}/{n}_{row}.JPEG {c}\n" for c, (n, count) in classes for row in range(count)]
    whole = tmp_path / "train.txt"
    whole.write_text("".join(lines))
    assert len(check_image_list("imagenet_lt", "train", whole).paths) == 115_846
    with pytest.raises(UsageError, match="one of: train, test"):
        check_image_list("inat2018", "val", whole)
    with pytest.raises(UsageError, match=r"published test .*: it has 115,846 images, not 50,"):
        check_image_list("imagenet_lt", "test", whole)
    for first, last, fault in (
        (lines[1:2], [], "1 images are listed more than once"),
        (
            [],
            ["train/n01530575/1.JPEG 1000\n"],
            "label 1000 is not below the number of classes, 1,",
        ),
    ):
        whole.write_text("".join([*first, *lines[1:], *last]))
        with pytest.raises(UsageError, match=fault):
            check_image_list("imagenet_lt", "train", whole)


@pytest.mark.parametrize("name", NAMES)
def test_the_registered_data_sets_ask_for_the_published_lists(tmp_path, name):
    with pytest.raises(UsageError) as caught:
        find_splits(name, root=tmp_path, train="mine.txt")
    assert caught.value.problems[0] == (
        f"train list: there is no file {tmp_path}/mine.txt nor {Path.cwd()}/mine.txt"
    )
    assert len(caught.value.problems) == len(FILES[name])


# Of counts and classes. Those of ImageNet-LT as a third project publishes its counts, and wnids of
# the validation list; those of Places-LT are counted in the training list.
HASHES = {
    "imagenet_lt": (
        "64a07a28b7593405306977b20fd8da39e454c8e94a8ba351810d0b420da1190a",
        "624954f06d059ddd477ab500dc059cf2628ac01e441d8a648d1dc6fbfe504c5a",
    ),
    "places_lt": (
        "d03c4cbb6af2564a37d0e14c54dc5f5d0b939ef78ac4d1c2bff6c4a5a09ed8cd",
        "d145337ed9950d3960551ce241a94152988321deff3abd75f8fd71413fbadb10",
    ),
}


@pytest.mark.parametrize("name", HASHES)
def test_counts_and_classes_are_those_of_the_lists(name):
    lists = published(name)
    known = lists["train"].class_counts, lists["train"].class_names
    assert tuple(sha256(json.dumps(one).encode()).hexdigest() for one in known) == HASHES[name]
    assert sum(known[0]) == lists.pop("train").lines
    assert all(one.class_counts * one.num_classes == one.lines for one in lists.values())


def test_totals_of_inaturalist_are_those_of_the_competition():
    train, test = published("inat2018").values()
    assert (train.num_classes, train.lines, test.lines) == (8142, 437_513, 24_426)
    assert sum(train.group_totals.values()) == train.lines
    assert train.group_totals["Aves"] == 143_950
    # Three images of each species.
    species = [2917, 2031, 1258, 369, 321, 284, 262, 234, 178, 144, 114, 25, 4, 1]
    assert sorted(test.group_totals.values(), reverse=True) == [3 * number for number in species]
