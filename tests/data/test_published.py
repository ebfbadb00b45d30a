"""Data sets of published lists: each layout of lists and images, and every wrong download."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from timm_lt.data import check_image_list, create_splits
from timm_lt.data.list_files import ImageList, Paths
from timm_lt.data.published import note_differences, pairs_hash, published, published_splits
from timm_lt.data.sources import find_splits
from timm_lt.utils.checks import Problems, UsageError

NAMES = {
    "imagenet_lt": ["n01440764", "n01443537", "n01484850"],
    "places_lt": ["airfield", "desert_road", "desert-sand"],
    "inat2018": None,
}
COUNTS = {"train": [5, 3, 2], "val": [1, 1, 1], "test": [2, 2, 2]}


def small(name):
    """What is known of a data set, of three classes."""
    known = published(name)
    lists = {}
    for split, one in known.lists.items():
        counts = np.array(COUNTS[split])
        if one.class_counts is None:
            lists[split] = replace(
                one, lines=10, smallest=2, largest=5, group_totals={"Aves": 8, "Fungi": 2}
            )
        else:
            lists[split] = replace(
                one,
                lines=counts.sum(),
                class_counts=counts,
                sha256=None,
                group_totals={},
                probes={},
            )
    return replace(known, num_classes=3, class_names=NAMES[name], lists=lists)


def images(name):
    """Split, class and file name of every image."""
    for split, counts in COUNTS.items():
        if split in published(name).lists:
            for label, count in enumerate(counts):
                for row in range(count):
                    yield split, label, row


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
FILES = {
    name: {split: one.files[0] for split, one in published(name).lists.items()} for name in NAMES
}


def encoded(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


PIXEL = encoded(Image.new("L", (1, 1)))


def put(root, name, disk, folder=""):
    """Makes the images."""
    for image in images(name):
        path = root / folder / LAYOUTS[name](disk, *image)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PIXEL)


def write_lists(root, name, layout, change=lambda path, label: (path, label)):
    root.mkdir(parents=True, exist_ok=True)
    lines = {split: [] for split in FILES[name]}
    for split, label, row in images(name):
        path = LAYOUTS[name](layout, split, label, row)
        lines[split].append("{} {}\n".format(*change(path, label)))
    for split, file in FILES[name].items():
        (root / file).write_text("".join(lines[split]))


def build(name, root, **given):
    given = {split: given.get(split) for split in FILES[name]}
    return published_splits(small(name), root, given)


def problems_of(name, root, **given):
    with pytest.raises(UsageError) as caught:
        build(name, root, **given)
    owner = f"{published(name).title} in {root}: "
    return [problem.removeprefix(owner) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("name", "listed", "disk", "where"),
    [
        *(("imagenet_lt", a, b, "") for a in ("folders", "flat") for b in ("folders", "flat")),
        ("imagenet_lt", "folders", "kaggle", "data_txt/ImageNet_LT"),
        *(("places_lt", a, b, "") for a in ("v1", "v2") for b in ("v1", "v2", "torchvision")),
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
        expected = [
            (str(tmp_path / LAYOUTS[name](disk, *image)), image[1])
            for image in images(name)
            if image[0] == split
        ]
        paths = dataset.data.column("image").combine_chunks().field("path").to_pylist()
        assert list(zip(paths, dataset["label"][:], strict=True)) == expected
        assert getattr(dataset.features["label"], "names", None) == NAMES[name]


# By the layout of the published lists.
SHIPPED = [
    (name, split, layout)
    for name in NAMES
    for split, one in published(name).lists.items()
    for layout in one.layouts
]


@pytest.mark.parametrize(("name", "split", "layout"), SHIPPED)
def test_every_layout_of_a_download_is_found(tmp_path, name, split, layout):
    published_in = {"imagenet_lt": "folders", "places_lt": "v1", "inat2018": "outside"}[name]
    put(tmp_path, name, published_in)
    write_lists(tmp_path, name, published_in)
    nested = ["a/airfield", "d/desert_road", "d/desert/sand"]
    expected = []
    for image in images(name):
        if image[0] != split:
            continue
        usual = LAYOUTS[name](published_in, *image)
        file = usual.removeprefix("train_val2018/") if name == "inat2018" else Path(usual).name
        places = {"{file}": file, "{nested}": nested[image[1]]}
        if NAMES[name]:
            places["{name}"] = NAMES[name][image[1]]
        place = layout
        for key, value in places.items():
            place = place.replace(key, value)
        (tmp_path / usual).rename(tmp_path / "moved")
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "moved").rename(tmp_path / place)
        expected.append(str(tmp_path / place))
    dataset = build(name, tmp_path)[split]
    assert dataset.data.column("image").combine_chunks().field("path").to_pylist() == expected


def test_an_image_in_two_lists_is_found(tmp_path):
    put(tmp_path, "imagenet_lt", "folders")
    write_lists(
        tmp_path,
        "imagenet_lt",
        "folders",
        lambda path, label: (path.replace("n01440764_val0", "n01440764_train3"), label),
    )
    (problem,) = problems_of("imagenet_lt", tmp_path)
    assert problem == (
        f"1 images are in both the train list and the val list: {tmp_path}/train/n01440764/"
        "n01440764_train3.JPEG"
    )


def test_official_annotations_give_names(tmp_path):
    put(tmp_path, "inat2018", "outside")
    categories = [{"id": label, "name": f"species {label}"} for label in (2, 0, 1)]
    for split, file in (("train", "train2018.json"), ("test", "val2018.json")):
        rows = [image for image in images("inat2018") if image[0] == split]
        content = {
            "images": [{"id": i, "file_name": inat("", *row)} for i, row in enumerate(rows)],
            "annotations": [
                {"id": i, "image_id": i, "category_id": row[1]} for i, row in enumerate(rows)
            ],
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


def test_a_missing_root_is_reported_with_the_missing_lists(tmp_path):
    found = problems_of("inat2018", tmp_path / "none")
    assert found[0].endswith("none does not exist: it is the one with iNaturalist 2018's images")
    assert found[1].startswith("train list: there is no iNaturalist18_train.txt nor train2018.json")
    assert len(found) == 3


def test_the_download_is_named_and_what_was_found(tmp_path):
    write_lists(tmp_path, "imagenet_lt", "folders")
    (tmp_path / "train").mkdir()
    for wnid in NAMES["imagenet_lt"]:
        (tmp_path / "train" / f"{wnid}.tar").touch()
    (tmp_path / "val").mkdir()
    for row in range(7):
        (tmp_path / "val" / f"other{row}.JPEG").touch()
    train, val, test = problems_of("imagenet_lt", tmp_path)
    wnid = NAMES["imagenet_lt"][0]
    assert train == (
        f"the images of the train split are not there, e.g. train/{wnid}/{wnid}_train0.JPEG: "
        "ImageNet-LT needs ILSVRC2012_img_train.tar (138 GiB), with each of its 1,000 tar files "
        f"unpacked into train/<wnid>/; found in {tmp_path}: train/ with 3 tar files to be unpacked,"
        " val/ with 7 files, ImageNet_LT_test.txt, ImageNet_LT_train.txt, ImageNet_LT_val.txt"
    )
    assert "its validation images are among ImageNet's training images" in val
    assert "needs ILSVRC2012_img_val.tar (6.3 GiB)" in test


def test_the_right_root_is_named(tmp_path):
    put(tmp_path, "imagenet_lt", "flat", "data/ILSVRC2012")
    write_lists(tmp_path, "imagenet_lt", "flat")
    right = f"{tmp_path}/data/ILSVRC2012"
    given = {split: tmp_path / file for split, file in FILES["imagenet_lt"].items()}
    for problem in problems_of("imagenet_lt", tmp_path / "data", **given):
        assert problem.endswith(
            "ILSVRC2012/ with 2 folders; they are in " + right + ": give that as root"
        )


def test_no_root_is_named_that_has_some_splits_alone(tmp_path):
    put(tmp_path, "imagenet_lt", "flat")
    (tmp_path / "train").rename(tmp_path / "Train")
    write_lists(tmp_path, "imagenet_lt", "flat")
    found = problems_of("imagenet_lt", tmp_path)
    assert [problem.split(" are not there")[0] for problem in found] == [
        "the images of the train split",
        "the images of the val split",
    ]
    assert not any("give that as root" in problem for problem in found)


def test_images_of_a_refused_list_are_not_looked_for(tmp_path):
    put(tmp_path, "imagenet_lt", "flat")
    write_lists(tmp_path, "imagenet_lt", "flat")
    (tmp_path / "ImageNet_LT_test.txt").write_text("other/n01440764/1.JPEG 0\n" * 6)
    (problem,) = problems_of("imagenet_lt", tmp_path)
    assert problem.startswith("test list: ")
    assert "is not the published list" in problem


def test_some_missing_images_are_counted(tmp_path):
    put(tmp_path, "places_lt", "v2")
    write_lists(tmp_path, "places_lt", "v1")
    for row in (0, 3):
        (tmp_path / f"data_256/a/airfield/train{row}.jpg").unlink()
    (tmp_path / "data_256/a/airfield/train1.jpg").write_bytes(b"")
    problem, damaged = problems_of("places_lt", tmp_path)
    assert "data_256/a/airfield/train1.jpg) cannot be decoded: 0 bytes" in damaged
    first, second = (f"{tmp_path}/data_256/a/airfield/train{row}.jpg" for row in (0, 3))
    assert problem == f"train list: 2 of 10 files are not there: {first}, {second}"


def test_a_list_that_is_not_the_published_one_is_refused(tmp_path):
    put(tmp_path, "places_lt", "v1")
    write_lists(tmp_path, "places_lt", "v1")
    lines = (tmp_path / "Places_LT_train.txt").read_text().splitlines(keepends=True)
    (tmp_path / "Places_LT_train.txt").write_text("".join(lines[1:] + lines[-1:]))
    (problem,) = problems_of("places_lt", tmp_path)
    assert problem == (
        f"train list: {tmp_path}/Places_LT_train.txt is not the published list: 2 classes have "
        "other numbers of images: class 0 (airfield) has 4 images, not 5; class 2 (desert-sand) "
        "has 3 images, not 2; 1 images are on several lines: train1.jpg (class 2 (desert-sand), "
        "2 lines); for a list of your own there is the data set 'list'"
    )


def test_labels_of_places365_are_recognised(tmp_path):
    put(tmp_path, "places_lt", "v1")
    swapped = {0: 0, 1: 2, 2: 1}
    write_lists(tmp_path, "places_lt", "v2", lambda path, label: (path, swapped[label]))
    (problem, *_) = problems_of("places_lt", tmp_path)
    assert "5 images are in the directory of another class than their label's" in problem
    assert "directories in sorted order, those of Places-LT differ from that in 2" in problem


def differences(name, split, rows, known=None):
    problems = Problems()
    paths, labels = zip(*rows, strict=True)
    listed = ImageList(Paths(list(paths)), np.array(labels))
    note_differences(problems, known or small(name), split, listed)
    return problems.found


def rows_of(name, layout, split):
    return [
        (LAYOUTS[name](layout, *image), image[1]) for image in images(name) if image[0] == split
    ]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("imagenet_lt", "folders"),
        ("imagenet_lt", "flat"),
        ("places_lt", "v1"),
        ("places_lt", "v2"),
        ("inat2018", "outside"),
        ("inat2018", "inside"),
    ],
)
def test_the_right_list_has_no_differences(name, layout):
    for split in FILES[name]:
        assert differences(name, split, rows_of(name, layout, split)) == []


def test_what_is_known_of_inaturalist_is_checked():
    rows = rows_of("inat2018", "outside", "train")
    moved = [(path.replace("Aves/1/train0", "Fungi/1/train0"), label) for path, label in rows]
    assert differences("inat2018", "train", moved) == [
        "2 groups of classes differ: Aves has 7 images, not 8; Fungi has 3 images, not 2"
    ]
    fewer = [*rows[:-1], ("train_val2018/Aves/1/new.jpg", 1)]
    assert differences("inat2018", "train", fewer)[0] == (
        "the smallest class, 2, has 1 images, not 2"
    )
    other = [
        ("train_val2018/Fungi/1/x.jpg", 2) if path.endswith("2/train0.jpg") else (path, label)
        for path, label in rows
    ]
    (problem,) = differences("inat2018", "train", other)
    assert problem.startswith("1 images are in the directory of another class than their label's:")
    assert problem.endswith("train_val2018/Fungi/1/x.jpg (2)")


def test_other_images_are_found_by_their_hash():
    rows = rows_of("places_lt", "v1", "train")
    listed = ImageList(Paths([path for path, _ in rows]), np.array([label for _, label in rows]))
    known = small("places_lt")
    one = replace(known.lists["train"], sha256=pairs_hash(listed))
    known = replace(known, lists={"train": one})
    assert differences("places_lt", "train", rows_of("places_lt", "v2", "train")[::-1], known) == []
    other = [("train/airfield/9.jpg", 0), *rows[1:]]
    assert differences("places_lt", "train", other, known) == [
        "each class has the right number of images, but not all are the same images"
    ]


@pytest.mark.parametrize(
    ("name", "split", "layout", "shown"),
    [
        ("imagenet_lt", "test", "flat", "ILSVRC2012_val_00.JPEG (class 0 (n01440764), 2 lines)"),
        ("places_lt", "val", "v2", None),
        ("places_lt", "test", "v1", "Places365_val_00.jpg (class 0 (airfield), 2 lines)"),
        ("inat2018", "test", "outside", "test0.jpg (class 0, 2 lines)"),
    ],
)
def test_an_image_on_several_lines_is_refused(name, split, layout, shown):
    rows = rows_of(name, layout, split)
    if split == "val":  # One image of each class, all of one file name.
        assert differences(name, split, rows) == []
        return
    rows[1] = rows[0]
    assert differences(name, split, rows) == [f"1 images are on several lines: {shown}"]


def flat_test_list(name, labels, probes):
    """A flat test list whose first images are given, with as many images a class as published."""
    known = published(name)
    each = known.lists["test"].lines // known.num_classes
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


@pytest.mark.parametrize(
    ("name", "labels", "lacking", "expected"),
    [
        ("imagenet_lt", {}, 0, None),
        (
            "imagenet_lt",
            {0: 1, 1: 0},
            0,
            "1 of the 1 .* differ: ILSVRC2012_val_00000293.JPEG has label 1, not 0$",
        ),
        ("imagenet_lt", {}, 1, "ILSVRC2012_val_00000293.JPEG is not in the list$"),
        ("places_lt", {}, 0, None),
        # Places365's order.
        (
            "places_lt",
            {116: 118, 117: 116, 118: 117, 141: 142, 142: 141},
            0,
            (
                "5 of the 6 .* differ: Places365_val_00036328.jpg has label 118, not 116; "
                "Places365_val_00030493.jpg has label 116, not 117; "
                "Places365_val_00013365.jpg has label 117, not 118; "
                "Places365_val_00007093.jpg has label 142, not 141; "
                "Places365_val_00033447.jpg has label 141, not 142$"
            ),
        ),
    ],
)
def test_a_flat_test_list_is_known_by_a_few_images(name, labels, lacking, expected):
    probes = dict(list(READ[name].items())[lacking:])
    found = differences(name, "test", flat_test_list(name, labels, probes), published(name))
    assert len(found) == (expected is not None)
    assert expected is None or re.search(expected, found[0])


def test_the_hash_is_that_of_sorted_lines():
    # printf '1.jpg 7\n2.jpg 0\n2.jpg 10' | sha256sum
    listed = ImageList(Paths(["b/2.jpg", "a/2.jpg", "x/1.jpg"]), np.array([10, 0, 7]))
    expected = "a9a8c3c4619d0569ed41635df8966d9d36ade86c15e55a8bf65b39bd0f3f8a0e"
    assert pairs_hash(listed) == expected


@pytest.fixture(scope="module")
def whole_list(tmp_path_factory):
    """A list with as many images of each class as the training list of ImageNet-LT."""
    known = published("imagenet_lt")
    counts = known.lists["train"].class_counts.tolist()
    path = tmp_path_factory.mktemp("lists") / "train.txt"
    path.write_text(
        "".join(
            f"train/{wnid}/{wnid}_{row}.JPEG {label}\n"
            for label, (wnid, count) in enumerate(zip(known.class_names, counts, strict=True))
            for row in range(count)
        )
    )
    return path


def test_a_whole_list_is_checked_without_images(whole_list, tmp_path):
    assert len(check_image_list("imagenet_lt", "train", whole_list).paths) == 115_846
    with pytest.raises(UsageError, match=r"not the test list of ImageNet-LT: .* own train"):
        check_image_list("imagenet_lt", "test", whole_list)
    with pytest.raises(UsageError, match="it seems to be the train list of ImageNet-LT"):
        check_image_list("places_lt", "train", whole_list)
    with pytest.raises(UsageError, match="one of: train, test"):
        check_image_list("inat2018", "val", whole_list)
    more = whole_list.read_text() + "train/n01530575/1.JPEG 10\ntrain/n01530575/2.JPEG 10\n"
    (tmp_path / "more.txt").write_text(more)
    with pytest.raises(UsageError) as caught:
        check_image_list("imagenet_lt", "train", tmp_path / "more.txt")
    assert caught.value.problems == [
        "it has 115,848 images, not 115,846",
        "1 classes have other numbers of images: class 10 (n01530575) has 36 images, not 34",
    ]
    (tmp_path / "beyond.txt").write_text(more + "train/n01530575/1.JPEG 1000\n")
    with pytest.raises(UsageError, match="label 1000 is beyond the 1,000 classes"):
        check_image_list("imagenet_lt", "train", tmp_path / "beyond.txt")


@pytest.mark.parametrize("name", NAMES)
def test_the_registered_data_sets_ask_for_the_published_lists(tmp_path, name):
    with pytest.raises(UsageError, match="reads files: give their folder"):
        create_splits(name)
    with pytest.raises(UsageError) as caught:
        find_splits(name, root=tmp_path, train="mine.txt")
    assert caught.value.problems[0] == (
        f"train list: there is no file {tmp_path}/mine.txt nor {Path.cwd()}/mine.txt"
    )
    assert len(caught.value.problems) == len(FILES[name])
