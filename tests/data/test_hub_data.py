"""Data sets of the loopback hub, and local parquet and arrow files."""

import io

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from PIL import Image

from timm_lt.data import Splits
from timm_lt.data.hub import choose_splits
from timm_lt.data.items import image_column, label_column
from timm_lt.data.sources import find_splits
from timm_lt.utils.checks import UsageError

NAMES = ["daisy", "rose", "tulip"]
REPO = "me/flowers"


@pytest.fixture
def hub(loopback_hub, tmp_path, monkeypatch):
    """Builds a data set of the loopback hub, with caches of its own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")

    def build(files=None, repo=REPO, **options):
        if files is not None:
            loopback_hub.create(f"datasets/{repo}", files)
        return find_splits("hub", **{"repo": repo} | options)

    build.server = loopback_hub
    return build


@pytest.fixture
def local(tmp_path, monkeypatch):
    """Builds a data set of local files, each a table by its name."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")

    def build(files, root=tmp_path / "root", **options):
        for name, table in files.items():
            file = root / (name if "." in name else f"{name}.parquet")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(table if isinstance(table, bytes) else parquet(table))
        return find_splits("hub", root=root, **options)

    return build


def png(value):
    """Encodes an image, all of whose pixels are of one value."""
    file = io.BytesIO()
    Image.fromarray(np.full((3, 2), value, np.uint8)).save(file, "png")
    return file.getvalue()


def table(labels, names=NAMES, *, image="img", label="label", first=0):
    """Makes a table of the images first, first + 1, ... with labels; names make it a ClassLabel."""
    images = [{"bytes": png(first + i), "path": None} for i in range(len(labels))]
    plain = datasets.Value("string" if str in map(type, labels) else "int64")
    kind = datasets.ClassLabel(names=names) if names else plain
    features = datasets.Features({image: datasets.Image(), label: kind})
    return datasets.Dataset.from_dict({image: images, label: labels}, features=features)


def parquet(rows):
    file = io.BytesIO()
    if isinstance(rows, pa.Table):
        pq.write_table(rows, file)
    else:
        rows.to_parquet(file)
    return file.getvalue()


def values(rows):
    """Returns the value of every image, which identifies it."""
    return [np.asarray(image)[0, 0, 0].item() for image in rows["image"]]


def labels_of(found):
    return {split: rows["label"][:] for split, rows in found.items()}


def sharded(**splits):
    return {f"data/{name}-00000-of-00001.parquet": parquet(rows) for name, rows in splits.items()}


ALL = {"train": table([0, 1, 2, 0]), "validation": table([1], first=4), "test": table([2], first=5)}


def test_a_data_set_of_the_hub_becomes_three_splits(hub, tmp_path, monkeypatch):
    # A local folder of the same name is not read instead.
    (tmp_path / REPO).mkdir(parents=True)
    (tmp_path / REPO / "train.parquet").write_bytes(parquet(table([0])))
    monkeypatch.chdir(tmp_path)
    found = hub(sharded(**ALL))
    for rows in found.values():
        assert rows.column_names == ["image", "label"]
        assert rows.features["image"].mode == "RGB"
        assert rows.features["label"].names == NAMES
    assert labels_of(found) == {"train": [0, 1, 2, 0], "val": [1], "test": [2]}
    assert values(found["train"]) == [0, 1, 2, 3]
    assert values(found["test"]) == [5]


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub):
    hub(sharded(**ALL))
    old = hub.server.commits(f"datasets/{REPO}")[0].id
    hub.server.commit(f"datasets/{REPO}", sharded(train=table([0, 1, 2])))
    assert len(hub()["train"]) == 3
    assert len(hub(repo=f"{REPO}@{old}")["train"]) == 4
    assert len(hub(revision=old)["train"]) == 4
    with pytest.raises(UsageError, match="with at most one revision"):
        hub(repo=f"{REPO}@{old}", revision="v2")


CARD = b"""---
configs:
- config_name: large
  data_files: [{split: train, path: l.parquet}, {split: test, path: t.parquet}]
- config_name: small
  data_files: [{split: train, path: s.parquet}, {split: test, path: t.parquet}]
---
"""


def test_a_config_is_chosen(hub):
    files = {"l": table([0, 1] * 3), "s": table([0, 1]), "t": table([1])}
    files = {f"{name}.parquet": parquet(rows) for name, rows in files.items()}
    assert len(hub(files | {"README.md": CARD}, config="small")["train"]) == 2
    with pytest.raises(UsageError, match=r"^me/flowers cannot be .*onfig.*'large', 'small'"):
        hub()


@pytest.mark.parametrize("layout", ["data/{}-00000-of-00001", "{}", "{}/0000", "default/{}/0000"])
def test_local_parquet_is_found_in_every_layout(local, layout):
    found = local({layout.format(name): rows for name, rows in ALL.items()})
    assert labels_of(found) == {"train": [0, 1, 2, 0], "val": [1], "test": [2]}


def test_shards_are_in_order_and_odd_paths_are_no_patterns(local, tmp_path):
    shards = {f"train-0000{i}-of-00002": table([i] * 2, first=2 * i) for i in (0, 1)}
    root = tmp_path / "odd [x] *na?me"
    assert values(local(shards | {"test": table([1])}, root)["train"]) == [0, 1, 2, 3]
    assert find_splits("hub", root=root / "train-00000-of-00002.parquet")["test"]["label"][:] == [0]


def test_a_subfolder_is_a_config_and_hidden_files_are_ignored(local):
    files = {f"{n}/part-{i}": table([0, 1, 2], first=3 * i) for n in "ab" for i in (0, 1)}
    files["b/._test.parquet"] = b"no table"
    found = local(files, config="b")
    # Without a split in their names, all files are train.
    assert sorted(values(found["train"]) + values(found["test"])) == list(range(6))


def test_arrow_files_and_what_save_to_disk_wrote(tmp_path, local):
    datasets.DatasetDict(ALL).save_to_disk(tmp_path / "several")
    assert values(find_splits("hub", root=tmp_path / "several")["val"]) == [4]
    table([0, 0, 1, 1]).save_to_disk(tmp_path / "one")
    found = find_splits("hub", root=tmp_path / "one", test_fraction=0.5)
    assert sorted(values(found["train"]) + values(found["test"])) == [0, 1, 2, 3]
    (file,) = (tmp_path / "one").glob("*.arrow")
    local({"data/train.arrow": file.read_bytes(), "data/test.arrow": file.read_bytes()})
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(UsageError, match=r"one cannot be read: "):
        find_splits("hub", root=tmp_path / "one")


@pytest.mark.parametrize(
    ("available", "options", "expected"),
    [
        (["train", "validation", "test"], {}, "train validation test"),
        (["Train", "dev", "Test"], {}, "Train dev Test"),
        (["train", "valid"], {}, "train - valid"),
        (["train", "valid"], {"val": "valid"}, "train valid train"),
        (["train", "test"], {}, "train - test"),
        (["train"], {}, "train - train"),
        (["full"], {"train": "full"}, "full - full"),
        (["train", "validation", "test"], {"test": "validation"}, "train - validation"),
        (["train", "validation", "test"], {"val": "train"}, "train - test"),
        (["train", "validation", "test"], {"test": "train"}, "train validation train"),
        (["a", "b", "test"], {"train": "a", "val": "b"}, "a b test"),
        (["full", "test"], {}, "none of the splits full, test could be the train split; name one"),
        (["train", "dev", "val"], {}, "several of the splits dev, val could be the val split"),
        (["train", "test"], {"test": "tset"}, r"split for test=: 'tset' \(did you mean 'test'"),
        (["train", "test"], {"val": "test"}, "'test' cannot be validation and test at once"),
    ],
)
def test_splits_are_found_or_named_or_refused(available, options, expected):
    if len(expected.split()) > 3:
        with pytest.raises(UsageError, match=expected):
            choose_splits(available, **options)
    else:
        chosen = choose_splits(available, **options)
        assert [chosen.get(split, "-") for split in ("train", "val", "test")] == expected.split()


@pytest.mark.parametrize("names", [NAMES, None])
def test_small_classes_are_left_out_of_every_split(local, names):
    files = {"train": table([0, 2, 2, 2, 0, 0, 1], names)}
    files |= {"test": table([2, 1, 0, 2], names, first=7)}
    found = local(files, min_images=2)
    expected = ["daisy", "tulip"] if names else ["0", "2"]
    assert found["train"].features["label"].names == expected
    assert labels_of(found) == {"train": [0, 1, 1, 1, 0, 0], "test": [1, 0, 1]}
    assert values(found["train"]) == list(range(6))
    assert values(found["test"]) == [7, 9, 10]
    with pytest.raises(UsageError, match="no class has 9 images"):
        local({}, min_images=9)


def test_rows_without_a_label_are_found(local):
    files = ALL | {"test": table([-1, -1])}
    with pytest.raises(UsageError, match=r"'test' has no labels.* test split; name another one"):
        local(files)
    found = local(files, test="validation")
    assert {split: values(rows) for split, rows in found.items()} == {
        "train": [0, 1, 2, 3],
        "test": [4],
    }
    files["train"] = table([0, -1, 1, 2, -1])
    with pytest.raises(UsageError, match="'train' has 2 of 5 rows without a label: 1, 4; add"):
        local(files, test="validation")
    found = local(files, test="validation", incomplete="drop", min_images=1)
    assert values(found["train"]) == [0, 2, 3]


KINDS = {
    "image": datasets.Image(),
    "struct": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
    "binary": datasets.Value("binary"),
    "class": datasets.ClassLabel(names=NAMES),
    "integer": datasets.Value("int32"),
    "text": datasets.Value("string"),
    "number": datasets.Value("float32"),
    "list": datasets.List(datasets.Value("int64")),
}


def empty(**columns):
    features = datasets.Features({name: KINDS[kind] for name, kind in columns.items()})
    return datasets.Dataset.from_dict({name: [] for name in columns}, features)


@pytest.mark.parametrize(
    ("columns", "image", "label"),
    [
        ({"img": "image", "raw": "binary", "fine": "class", "label": "text"}, "img", "fine"),
        ({"pic": "struct", "raw": "binary", "x": "integer", "Target": "integer"}, "pic", "Target"),
        ({"image": "image", "mask": "image", "labels": "integer", "z": "class"}, "image", "labels"),
        ({"raw": "binary", "label": "text", "category": "text"}, "raw", "label"),
    ],
)
def test_columns_are_found(columns, image, label):
    assert image_column(empty(**columns)) == image
    assert label_column(empty(**columns)) == label


@pytest.mark.parametrize(
    ("find", "columns", "named", "message"),
    [
        (image_column, {"a": "image", "b": "image"}, None, "could be the image: a, b; name one"),
        (image_column, {"a": "text"}, "a", r"no column 'a' of images; .* a \(string\)"),
        (label_column, {"a": "class", "b": "class"}, None, "could be the label: a, b; name one"),
        (label_column, {"label": "number"}, None, r"no column of labels.*label \(float32\)"),
        (label_column, {"label": "list"}, "label", r"no column 'label' .* label \(List\)"),
    ],
)
def test_columns_that_cannot_be_told_are_refused(find, columns, named, message):
    with pytest.raises(UsageError, match=message):
        find(empty(**columns), named)


@pytest.mark.parametrize("kind", ["struct", "binary", "large_binary"])
def test_an_image_may_be_stored_in_several_ways(local, kind):
    rows = [png(i) for i in range(3)]
    if kind == "struct":
        column = pa.array([{"bytes": row, "path": f"{i}.png"} for i, row in enumerate(rows)])
    else:
        column = pa.array(rows, getattr(pa, kind)())
    plain = pa.table({"pic": column, "label": [0, 1, 2]})
    assert values(local({"train": plain, "test": plain})["train"]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("train", "test", "names", "expected"),
    [
        # Texts are names, sorted over all splits; integers have none.
        ((["b", "c", "b"], None), (["a"], None), ["a", "b", "c"], ([1, 2, 1], [0])),
        (([1, 0], None), ([2], None), None, ([1, 0], [2])),
        # A split with another order of the names is renumbered.
        (([0, 2], NAMES), ([0, 1, 2], NAMES[::-1]), NAMES, ([0, 2], [2, 1, 0])),
    ],
)
def test_labels_of_every_kind(local, train, test, names, expected):
    found = local({"train": table(*train), "test": table(*test)})
    assert getattr(found["test"].features["label"], "names", None) == names
    assert (found["train"]["label"][:], found["test"]["label"][:]) == expected


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (table([0, 1, 4] * 2, None), None, "train split: .*2, 3"),
        (table([0, -2, 1], None), None, "-2"),
        (
            pa.table({"img": [png(0)], "label": pa.array([2**64 - 1], pa.uint64())}),
            *(None, "18446744073709551615 not in range"),
        ),
        (table(["a", "", " ", None], None), None, "'train' has 3 of 4 rows without a label: 1, 2"),
        (ALL["train"], table([0], ["daisy", "oak"]), "'test', oak, are not among those of split"),
        (ALL["train"], table([0], None), r"'test', int64, are not among those .* \(ClassLabel\)"),
        (ALL["train"], table([0], label="class"), "split 'test': no column 'label' of labels"),
    ],
)
def test_wrong_labels_are_refused(local, train, test, message):
    with pytest.raises(UsageError, match=message):
        Splits.from_datasets(local({"train": train, "test": test or train}))


def test_missing_and_empty_images_are_found_before_training_all_together(local):
    def rows(*images):
        return pa.table({"image": pa.array(images), "label": [0, 1] * (len(images) // 2)})

    good = {"bytes": png(1), "path": None}
    none, empty = {"bytes": None, "path": None}, {"bytes": b"", "path": None}
    lost = {"bytes": None, "path": "/not/there.png"}
    files = {"train": rows(good, none, None, good, empty, good), "test": rows(good, lost)}
    with pytest.raises(UsageError) as caught:
        local(files)
    assert [problem.partition(";")[0] for problem in caught.value.problems] == [
        "split 'train' has 3 of 6 rows without an image: 1, 2, 4",
        "split 'test' has 1 of 2 rows without an image: 1",
    ]
    assert labels_of(local(files, incomplete="drop")) == {"train": [0, 1, 1], "test": [0]}


def test_local_files_that_are_not_there_or_damaged(local, tmp_path):
    (tmp_path / "root" / "cats").mkdir(parents=True)
    (tmp_path / "train.csv").write_text("image,label\n")
    for root in ("nowhere", "root", "train.csv"):
        with pytest.raises(UsageError, match=rf"root '.*{root}' does not exist or has no parquet"):
            find_splits("hub", root=tmp_path / root)
    for content in (b"", b"PAR1 and no more"):
        with pytest.raises(UsageError, match=r"root cannot be read: "):
            local({"train": content})


def test_what_the_hub_does_not_have_is_one_sentence(hub, monkeypatch):
    hub(sharded(**ALL))
    hub.server.create("datasets/you/gated", sharded(**ALL), gated=True)
    cases = {
        None: (None, "needs either repo, .* or root"),
        "flowers": (None, "'flowers' is not a valid repo id; expected 'namespace/name'"),
        "me/missing": (None, "me/missing' doesn't exist on the Hub or cannot be accessed"),
        f"{REPO}@v2": (None, "Revision 'v2' doesn't exist for dataset 'me/flowers'"),
        "me/empty": ({"README.md": b"---\nlicense: mit\n---\n"}, "contain any data files"),
        "me/code": ({"code.py": b"raise SystemExit"}, "scripts are no longer supported"),
        "me/bad": ({"train.parquet": b"PAR1 and no more"}, r"me/bad cannot be read: "),
        "you/gated": (None, "is a gated dataset on the Hub"),
    }
    for repo, (files, message) in cases.items():
        with pytest.raises(UsageError, match=message) as caught:
            hub(files, repo)
        assert "\n" not in str(caught.value)
    hub.server.create("datasets/me/private", sharded(**ALL), private=True)
    monkeypatch.setenv("HF_TOKEN", hub.server.STRANGER)
    with pytest.raises(UsageError, match="doesn't exist on the Hub or cannot be accessed"):
        hub(repo="me/private")


def test_offline_the_cache_is_used_but_never_for_another_revision(hub, monkeypatch):
    hub(sharded(**ALL))
    old = hub.server.commits(f"datasets/{REPO}")[0].id
    hub.server.forget()
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    assert len(hub()["train"]) == 4
    assert len(hub(revision=old)["train"]) == 4
    with pytest.raises(UsageError, match=f"has commit {old} of me/flowers, which may not be v2"):
        hub(revision="v2")
    with pytest.raises(UsageError, match=r"Couldn't reach .*'me/other'.*[Oo]ffline"):
        hub(repo="me/other")
    assert hub.server.requests == []


def test_a_hub_that_is_out_of_reach_is_said_so(hub, no_waiting):
    hub.server.fault(".*", ".*", drop="request")
    with pytest.raises(UsageError, match=r"me/flowers: .* cannot be reached"):
        hub()
