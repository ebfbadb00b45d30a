"""What ships about published lists: counts, classes, hashes and totals, pinned."""

import json
from hashlib import sha256

import pytest

from timm_lt.data import published as facts
from timm_lt.data.published import published
from timm_lt.utils.checks import UsageError
from timm_lt.utils.longtail import SHOT_RULES


def shot_groups(counts, rule):
    bounds = SHOT_RULES[rule]
    many, few = (counts >= bounds.many_min).sum(), (counts <= bounds.few_max).sum()
    return many, len(counts) - many - few, few


def test_counts_are_those_of_the_papers():
    imagenet = published("imagenet_lt")
    counts = imagenet.lists["train"].class_counts
    assert (counts.sum(), counts.max(), counts.min(), len(counts)) == (115_846, 1280, 5, 1000)
    assert shot_groups(counts, "fb") == (385, 479, 136)
    assert imagenet.class_names == sorted(set(imagenet.class_names))
    assert (imagenet.class_names[0], imagenet.class_names[-1]) == ("n01440764", "n15075141")
    places = published("places_lt")
    counts = places.lists["train"].class_counts
    assert (counts.sum(), counts.max(), counts.min(), len(counts)) == (62_500, 4980, 5, 365)
    assert shot_groups(counts, "fb") == (131, 163, 71)
    assert shot_groups(counts, "oltr") == (132, 156, 77)
    # Sorted as if "-" were "_": the order that Places365 does not have.
    assert places.class_names == sorted(places.class_names, key=lambda n: n.replace("-", "_"))
    for name in facts.NAMES:
        known = published(name)
        assert known.class_names is None or len(set(known.class_names)) == known.num_classes
        for split, one in known.lists.items():
            assert one.class_counts is None or one.class_counts.sum() == one.lines, (name, split)
            assert sum(one.group_totals.values()) in (0, one.lines)
    with pytest.raises(UsageError, match="one of: imagenet_lt, places_lt, inat2018"):
        published("cifar10_lt")


@pytest.mark.parametrize(
    ("name", "counts", "classes"),
    [
        (
            "imagenet_lt",
            # Counts as a third project publishes them; wnids as in the validation list.
            "64a07a28b7593405306977b20fd8da39e454c8e94a8ba351810d0b420da1190a",
            "624954f06d059ddd477ab500dc059cf2628ac01e441d8a648d1dc6fbfe504c5a",
        ),
        (
            "places_lt",
            # Counted in the training list.
            "d03c4cbb6af2564a37d0e14c54dc5f5d0b939ef78ac4d1c2bff6c4a5a09ed8cd",
            "d145337ed9950d3960551ce241a94152988321deff3abd75f8fd71413fbadb10",
        ),
    ],
)
def test_counts_and_classes_are_those_of_the_lists(name, counts, classes):
    known = published(name)
    found = known.lists["train"].class_counts.tolist()
    assert sha256(json.dumps(found).encode()).hexdigest() == counts
    assert sha256(json.dumps(known.class_names).encode()).hexdigest() == classes


def test_hashes_and_totals_are_those_of_the_lists():
    hashes = {
        (name, split): one.sha256
        for name in facts.NAMES
        for split, one in published(name).lists.items()
        if one.sha256
    }
    # Of the sorted lines "basename label", by sha256sum.
    assert hashes == {
        ("imagenet_lt", "val"): "b3c5c4b470bac7141cfde18190f7cae9183c6812e0d49818defef92c5a63c1f5",
        ("places_lt", "train"): "35590600ad82450ab85aaaccaf1b64a5efa89186bb18a9a916012d722055bfae",
        ("places_lt", "val"): "20742c0c1a1ade5e6c524c57f77c6693d21cfea75bd88ac7fa08a143c69a44d5",
    }
    inat = published("inat2018")
    train, test = inat.lists["train"], inat.lists["test"]
    assert inat.num_classes == 8142
    assert (train.lines, train.smallest, train.largest, test.lines) == (437_513, 2, 1000, 24_426)
    groups = (
        "Plantae Insecta Aves Actinopterygii Fungi Reptilia Mollusca Mammalia Animalia Amphibia"
    )
    groups = [*groups.split(), "Arachnida", "Chromista", "Protozoa", "Bacteria"]
    totals = "118800 87192 143950 7835 6864 22754 8007 20104 5966 11156 4037 621 211 16"
    assert train.group_totals == dict(zip(groups, map(int, totals.split()), strict=True))
    classes = [2917, 2031, 1258, 369, 321, 284, 262, 234, 178, 144, 114, 25, 4, 1]
    assert test.group_totals == dict(zip(groups, (3 * c for c in classes), strict=True))
