"""Data sets of the Hub, over loopback, and local parquet and arrow files; all that is wrong."""

import io

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from PIL import Image

from timm_lt.data import Splits, create_loader, create_splits, dataset_labels
from timm_lt.data.columns import find_image_column, find_label_column
from timm_lt.data.hub import choose_splits, find_tables
from timm_lt.data.sources import find_splits
from timm_lt.utils.checks import UsageError

NAMES = ["daisy", "rose", "tulip"]
REPO = "me/flowers"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


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
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(table if isinstance(table, bytes) else parquet(table))
        return find_splits("hub", root=root, **options)

    return build


def png(value):
    """An image, all of whose pixels are of one value."""
    file = io.BytesIO()
    Image.fromarray(np.full((3, 2), value, np.uint8)).save(file, "png")
    return file.getvalue()


def table(labels, names=NAMES, *, image="img", label="label", first=0):
    """A table of the images first, first + 1, ... with labels; names make it a ClassLabel."""
    columns = {image: [{"bytes": png(first + i), "path": None} for i in range(len(labels))]}
    kinds = {image: datasets.Image()}
    if names:
        kinds[label] = datasets.ClassLabel(names=names)
    else:
        kinds[label] = datasets.Value("string" if str in map(type, labels) else "int64")
    columns[label] = labels
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def parquet(rows):
    file = io.BytesIO()
    if isinstance(rows, pa.Table):
        pq.write_table(rows, file)
    else:
        rows.to_parquet(file)
    return file.getvalue()


def values(rows):
    """The value of every image, which says which one it is."""
    return [np.asarray(image)[0, 0].tolist() for image in rows["image"]]


def sharded(**splits):
    return {f"data/{name}-00000-of-00001.parquet": parquet(rows) for name, rows in splits.items()}


ALL = {"train": table([0, 1, 2, 0]), "validation": table([1], first=4), "test": table([2], first=5)}


# What is there, is found.


def test_a_data_set_of_the_hub_becomes_three_splits(hub):
    found = hub(sharded(**ALL))
    assert list(found) == ["train", "val", "test"]
    for rows in found.values():
        assert rows.column_names == ["image", "label"]
        assert rows.features["image"].mode == "RGB"
        assert rows.features["label"].names == NAMES
    assert found["train"]["label"][:] == [0, 1, 2, 0]
    assert values(found["train"]) == [[i, i, i] for i in range(4)]
    assert values(found["test"]) == [[5, 5, 5]]


def test_what_is_prepared_is_not_downloaded_again(hub):
    hub(sharded(**ALL))
    hub.server.forget()
    assert len(hub()["train"]) == 4
    assert hub.server.downloads() == []


def test_a_folder_here_of_the_same_name_is_not_taken_instead(hub, tmp_path, monkeypatch):
    (tmp_path / REPO).mkdir(parents=True)
    (tmp_path / REPO / "train.parquet").write_bytes(parquet(table([0])))
    monkeypatch.chdir(tmp_path)
    assert len(hub(sharded(**ALL))["train"]) == 4


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub):
    hub(sharded(**ALL))
    old = hub.server.commits(f"datasets/{REPO}")[0].id
    hub.server.commit(f"datasets/{REPO}", sharded(train=table([0, 1, 2])))
    assert len(hub()["train"]) == 3
    assert len(hub(repo=f"{REPO}@{old}")["train"]) == 4
    assert len(hub(revision=old)["train"]) == 4
    with pytest.raises(UsageError, match="names a revision, and revision='v2' another"):
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
    files["README.md"] = CARD
    assert len(hub(files, config="small")["train"]) == 2
    with pytest.raises(UsageError, match=r"^me/flowers has several configs: large, small; say wh"):
        hub()
    with pytest.raises(UsageError, match=r"unknown config of me/flowers: 'smal' .*: large, small"):
        hub(config="smal")


@pytest.mark.parametrize("layout", ["data/{}-00000-of-00001", "{}", "{}/0000", "default/{}/0000"])
def test_local_parquet_is_found_in_every_layout(local, layout):
    found = local({f"{layout.format(name)}.parquet": rows for name, rows in ALL.items()})
    assert {split: rows["label"][:] for split, rows in found.items()} == {
        "train": [0, 1, 2, 0],
        "val": [1],
        "test": [2],
    }


def test_shards_are_in_order_and_odd_paths_are_no_patterns(local, tmp_path):
    shards = {f"train-0000{i}-of-00002.parquet": table([i] * 2, first=2 * i) for i in (0, 1)}
    root = tmp_path / "odd [x] *na?me"
    found = local(shards | {"test.parquet": table([1])}, root)
    assert values(found["train"]) == [[i, i, i] for i in range(4)]
    assert find_splits("hub", root=root / "train-00000-of-00002.parquet")["test"]["label"][:] == [0]


def test_files_without_a_split_in_their_name_are_train(local):
    parts = {f"part-{i}.parquet": table([0, 1, 2], first=3 * i) for i in range(2)}
    found = local(parts)
    assert sorted(values(found["train"]) + values(found["test"])) == [[i] * 3 for i in range(6)]


def test_copies_of_the_system_are_no_tables(local):
    files = {f"{p}train.parquet": b"no table" for p in ("._", "@eaDir/", "__MACOSX/")}
    found = local({"train.parquet": table([0] * 5 + [1] * 5)} | files)
    assert len(found["train"]) + len(found["test"]) == 10


def test_a_subfolder_is_a_config(local):
    files = {f"{name}/train.parquet": table([0, 0, 1, 1]) for name in ("a", "b")}
    with pytest.raises(UsageError, match="has several configs: a, b; say which"):
        local(files)
    assert len(local(files, config="b")["train"]) == 2
    with pytest.raises(UsageError, match=r"unknown config of .*'c'.*: a, b"):
        local(files, config="c")


def test_arrow_files_and_what_save_to_disk_wrote(tmp_path, local):
    saved = datasets.DatasetDict(ALL)
    saved.save_to_disk(tmp_path / "several")
    assert values(find_splits("hub", root=tmp_path / "several")["val"]) == [[4, 4, 4]]
    table([0, 0, 1, 1]).save_to_disk(tmp_path / "one")
    found = find_splits("hub", root=tmp_path / "one", test_fraction=0.5)
    assert sorted(values(found["train"]) + values(found["test"])) == [[i] * 3 for i in range(4)]
    (file,) = (tmp_path / "one").glob("*.arrow")
    local({"data/train.arrow": file.read_bytes(), "data/test.arrow": file.read_bytes()})
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read as what save_to_disk wrote"):
        find_splits("hub", root=tmp_path / "one")


def test_a_run_takes_it_by_name_and_options(local, tmp_path):
    labels = [0, 1, 2] * 4
    local({"train.parquet": table(labels), "test.parquet": table([0, 1, 2])})
    splits = create_splits("hub", root=str(tmp_path / "root"), image="img", label="label")
    assert splits.val_source == "train"
    assert splits.label_names == NAMES
    assert splits.class_counts.tolist() == [3, 3, 3]
    images = splits.images("test", size=None, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert images.images[:, 0, 0, 0].tolist() == [0, 1, 2]


# Which split is which.


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
    ],
)
def test_splits_are_found_or_named(available, options, expected):
    chosen = choose_splits(available, **{"train": None, "val": None, "test": None} | options)
    assert " ".join(chosen.get(split, "-") for split in ("train", "val", "test")) == expected


@pytest.mark.parametrize(
    ("available", "options", "message"),
    [
        (["full", "test"], {}, "no split is called train, only full, test: say which"),
        (["train", "dev", "val"], {}, "several splits could be val: dev, val; name it"),
        (["train", "test"], {"test": "tset"}, r"split for test=: 'tset' \(did you mean 'test'"),
        (["train", "test"], {"val": "test"}, "'test' cannot be validation and test at once"),
    ],
)
def test_splits_that_cannot_be_told_are_refused(available, options, message):
    with pytest.raises(UsageError, match=message):
        choose_splits(available, **{"train": None, "val": None, "test": None} | options)


def test_a_test_split_is_dealt_out_of_each_class(local):
    found = local({"train.parquet": table([0] * 10 + [1] * 5)}, test_fraction=0.4)
    assert np.bincount(found["test"]["label"][:]).tolist() == [4, 2]
    assert sorted(values(found["train"]) + values(found["test"])) == [[i] * 3 for i in range(15)]
    assert values(local({}, test_fraction=0.4)["test"]) == values(found["test"])


@pytest.mark.parametrize("names", [NAMES, None])
def test_small_classes_are_left_out_of_every_split(local, names):
    files = {"train.parquet": table([0, 2, 2, 2, 0, 0, 1], names)}
    files |= {"test.parquet": table([2, 1, 0], names, first=7)}
    found = local(files, min_images=2)
    expected = ["daisy", "tulip"] if names else ["0", "2"]
    assert found["train"].features["label"].names == expected
    assert found["train"]["label"][:] == [0, 1, 1, 1, 0, 0]
    assert values(found["train"]) == [[i] * 3 for i in range(6)]
    assert (found["test"]["label"][:], values(found["test"])) == ([1, 0], [[7] * 3, [9] * 3])
    with pytest.raises(UsageError, match="no class has 9 images"):
        local({}, min_images=9)


def test_columns_that_are_not_used_are_named_once(local, caplog):
    rows = table([0] * 5 + [1] * 5).add_column("photographer", ["me"] * 10)
    local({"train.parquet": rows, "test.parquet": rows})
    assert caplog.text.count("columns that are not used: photographer") == 1


def test_a_class_of_one_image_cannot_be_dealt_out(local):
    with pytest.raises(UsageError, match=r"held out for test: 2 \(tulip\); give a test"):
        local({"train.parquet": table([0, 0, 1, 1, 2])})


def test_an_unlabelled_test_split_is_said_so(local):
    unlabelled = table([-1, -1])
    files = ALL | {"test": unlabelled}
    files = {f"{name}.parquet": rows for name, rows in files.items()}
    message = r"split 'test' has no labels .* test= \(there are train, validation, test\); the na"
    with pytest.raises(UsageError, match=message):
        local(files)
    found = local(files, test="validation")
    assert list(found) == ["train", "test"]
    assert values(found["test"]) == [[4, 4, 4]]
    files["train.parquet"] = table([0, -1, 1, 2, -1])
    with pytest.raises(UsageError, match="split 'train' has 2 of 5 rows without label: 1, 4; mend"):
        local(files, test="validation")
    found = local(files, test="validation", incomplete="drop")
    assert values(found["train"]) == [[i] * 3 for i in (0, 2, 3)]


# Which column is which.

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


def features(**columns):
    return datasets.Features({name: KINDS[kind] for name, kind in columns.items()})


@pytest.mark.parametrize(
    ("columns", "image", "label"),
    [
        ({"img": "image", "raw": "binary", "fine": "class", "label": "text"}, "img", "fine"),
        ({"pic": "struct", "raw": "binary", "x": "integer", "Target": "integer"}, "pic", "Target"),
        ({"raw": "binary", "label": "class", "coarse": "class"}, "raw", "label"),
        ({"raw": "binary", "label": "text", "category": "text"}, "raw", "label"),
    ],
)
def test_columns_are_found(columns, image, label):
    assert find_image_column(features(**columns)) == image
    assert find_label_column(features(**columns)) == label


@pytest.mark.parametrize(
    ("find", "columns", "named", "message"),
    [
        (find_image_column, {"a": "image", "b": "image"}, None, "could be the image: a, b; say"),
        (find_image_column, {"a": "text"}, None, r"no column of images .* only a \(string\)"),
        (find_image_column, {"a": "text"}, "a", "column 'a' holds string, no images"),
        (find_image_column, {"a": "text"}, "b", "unknown column for image=: 'b'.*one of: a"),
        (find_label_column, {"a": "class", "b": "class"}, None, "could be the label: a, b; say"),
        (find_label_column, {"label": "number"}, None, r"no column of labels.*label \(float32\)"),
        (find_label_column, {"label": "list"}, "label", "holds List, no labels"),
        (find_label_column, {"label": "class"}, "lable", "did you mean 'label'"),
    ],
)
def test_columns_that_cannot_be_told_are_refused(find, columns, named, message):
    with pytest.raises(UsageError, match=message):
        find(features(**columns), named)


@pytest.mark.parametrize("kind", ["Image", "struct", "binary", "large_binary"])
def test_an_image_may_be_stored_in_several_ways(local, kind):
    rows = [png(i) for i in range(3)]
    encoded = pa.array([{"bytes": row, "path": f"{i}.png"} for i, row in enumerate(rows)])
    column = {"struct": encoded}.get(kind)
    if column is None:
        column = pa.array(rows, getattr(pa, kind, pa.binary)())
    plain = pa.table({"pic": column, "label": [0, 1, 2]})
    plain = table([0, 1, 2], image="pic") if kind == "Image" else plain
    found = local({"train.parquet": plain, "test.parquet": plain})
    assert values(found["train"]) == [[i, i, i] for i in range(3)]


# Labels of every kind.


def test_texts_are_class_names_sorted_over_all_splits(local):
    files = {"train.parquet": table(["b", "c", "b"], None), "test.parquet": table(["a"], None)}
    found = local(files)
    assert found["train"].features["label"].names == ["a", "b", "c"]
    assert found["train"]["label"][:] == [1, 2, 1]
    assert found["test"]["label"][:] == [0]


def test_integers_have_no_names(local):
    found = local({"train.parquet": table([1, 0], None), "test.parquet": table([2], None)})
    assert found["test"].features["label"] == datasets.Value("int64")
    assert found["train"]["label"][:] == [1, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 4], "the largest is 4, and 2 below it occur in no split: 2, 3; renumber"),
        ([1, 2, 3], "1 below it occur in no split: 0"),
        ([0, 10**12], r"999999999999 below it occur in no split: 1, 2, 3, 4, 5, \.\.\."),
        ([0, -2, 1], "negative labels: -2"),
        (["Cat", "dog", "cat "], "1 classes .* written in several ways: 'Cat' and 'cat '"),
        (["a", None], "split 'train' has 1 of 2 rows without label: 1"),
        (["a", "", " "], "split 'train' has 2 of 3 rows without label: 1, 2"),
    ],
)
def test_labels_that_are_none_are_refused(local, labels, message):
    rows = table(labels, None)
    with pytest.raises(UsageError, match=message):
        local({"train.parquet": rows, "test.parquet": rows})


def test_labels_beyond_an_int64_are_refused(local):
    rows = pa.table({"img": [png(0)] * 2, "label": pa.array([0, 2**64 - 1], pa.uint64())})
    with pytest.raises(UsageError, match=r"must be 0 to C - 1, got 18446744073709551615$"):
        local({"train.parquet": rows, "test.parquet": rows})


def test_class_names_in_another_order_are_renumbered(local):
    other = table([0, 1, 2], NAMES[::-1])
    found = local({"train.parquet": ALL["train"], "test.parquet": other})
    assert found["test"].features["label"].names == NAMES
    assert found["test"]["label"][:] == [2, 1, 0]


def test_other_classes_in_another_split_are_refused(local):
    other = table([0], ["daisy", "oak", "rose"])
    with pytest.raises(UsageError, match=r"1 classes of split 'test' are not among .*'train': oak"):
        local({"train.parquet": ALL["train"], "test.parquet": other})
    with pytest.raises(UsageError, match="'label' is int64 in split 'test' but ClassLabel in 'tr"):
        local({"train.parquet": ALL["train"], "test.parquet": table([0], None)})
    rows = table([0], label="class")
    with pytest.raises(UsageError, match="split 'test' has no column 'label', only img, class"):
        local({"train.parquet": ALL["train"], "test.parquet": rows})


def test_shards_with_other_classes_are_refused(local, hub):
    shards = [table([0, 1, 2]), table([0, 1, 2], NAMES[::-1])]
    files = {f"train-0000{i}-of-00002.parquet": rows for i, rows in enumerate(shards)}
    with pytest.raises(UsageError, match=r"00001-of.* lists the classes of column 'label' otherw"):
        local(files)
    with pytest.raises(UsageError, match=r"test-0.* lists the classes of column 'label' otherwise"):
        hub(sharded(train=shards[0], test=shards[1]))


# Images that are none.


def test_missing_and_empty_images_are_found_before_training_all_together(local):
    def rows(*images):
        return pa.table({"image": pa.array(images), "label": [0, 1] * (len(images) // 2)})

    good = {"bytes": png(1), "path": None}
    none, empty = {"bytes": None, "path": None}, {"bytes": b"", "path": None}
    lost = {"bytes": None, "path": "/not/there.png"}
    no_image = "it is not an image, or has a format that Pillow does not read"
    text = {"bytes": b"no image", "path": None}
    files = {
        "train.parquet": rows(good, none, None, good, empty, good),
        "test.parquet": rows(good, lost, text, good),
    }
    with pytest.raises(UsageError) as caught:
        local(files)
    assert [problem.partition(";")[0] for problem in caught.value.problems] == [
        "split 'test' has 1 of 4 rows without the image file: 1",
        "split 'train' has 2 of 6 rows without image: 1, 2",
        "split 'train' has 1 of 6 rows without bytes in their image: 4",
        "'test' split: image 2 cannot be decoded: " + no_image,
    ]
    found = local(files, incomplete="drop")
    assert [len(found[split]) for split in ("train", "test")] == [3, 3]
    assert found["train"]["label"][:] == [0, 1, 1]


def test_a_split_that_test_is_a_part_of_is_looked_at_once(local):
    rows = pa.table({"image": [png(i) for i in range(6)], "label": [0, None, 0, 0, 0, 0]})
    with pytest.raises(UsageError) as caught:
        local({"train.parquet": rows})
    assert len(caught.value.problems) == 1
    found = local({}, incomplete="drop")
    shown = [value for rows in found.values() for value, *_ in values(rows)]
    assert sorted(shown) == [0, 2, 3, 4, 5]


@pytest.mark.parametrize("saved", [True, False])
def test_a_wrong_split_and_wrong_columns_are_reported_together(local, tmp_path, saved):
    wrong = {"test": "tests", "image": "picture", "label": "clas"}
    if saved:
        datasets.DatasetDict(ALL).save_to_disk(tmp_path / "root")
    files = {} if saved else {"train.parquet": ALL["train"]}
    with pytest.raises(UsageError) as caught:
        local(files, **wrong)
    assert len(caught.value.problems) == 3


# What cannot be read.


def test_local_files_that_are_not_there_or_damaged(local, tmp_path):
    with pytest.raises(UsageError, match=r"root '.*nowhere' is not there"):
        find_splits("hub", root=tmp_path / "nowhere")
    (tmp_path / "root" / "cats").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"no parquet .*but cats; .* is data set 'folder'"):
        find_splits("hub", root=tmp_path / "root")
    for content in (b"", b"PAR1 and no more"):
        with pytest.raises(UsageError, match=r"train\.parquet is damaged, or no parquet file"):
            local({"train.parquet": content})
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    (tmp_path / "saved" / "state.json").write_text("[]")
    with pytest.raises(UsageError, match=r"saved' cannot be read as what save_to_disk wrote: "):
        find_splits("hub", root=tmp_path / "saved")
    (tmp_path / "train.csv").write_text("image,label\n")
    with pytest.raises(UsageError, match=r"train\.csv' is no parquet or arrow file"):
        find_splits("hub", root=tmp_path / "train.csv")
    (tmp_path / "root" / "train.parquet").unlink()
    with pytest.raises(UsageError, match=r"train\.arrow cannot be read: "):
        local({"train.arrow": b"no arrow"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs either repo, .* got neither"),
        ({"repo": REPO, "root": "."}, "got both"),
        ({"root": ".", "revision": "v1"}, "revision is of a data set on the Hub"),
        ({"repo": "flowers"}, "'flowers' is no repo; write namespace/name"),
        ({"repo": REPO, "streaming": True}, "takes no streaming=True: a stream has no length"),
        ({"repo": REPO, "test_fraction": 1}, r"test_fraction .* must be a number in \(0, 1\)"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(UsageError, match=message):
        find_splits("hub", **options)


def test_what_the_hub_does_not_have_is_one_sentence(hub):
    with pytest.raises(UsageError, match="there is no data set me/missing, or it is private"):
        hub(repo="me/missing")
    with pytest.raises(UsageError, match="me/flowers has no branch, tag or commit 'v2'"):
        hub(sharded(**ALL), revision="v2")
    with pytest.raises(UsageError, match="unknown split for test=: 'tests'"):
        hub(test="tests")
    with pytest.raises(UsageError, match=r"me/empty cannot be read: .*contain any data files"):
        hub({"README.md": b"---\nlicense: mit\n---\n"}, "me/empty")
    with pytest.raises(UsageError, match=r"me/code is a loading script.*code@refs/convert/parquet"):
        hub({"code.py": b"raise SystemExit"}, "me/code")
    with pytest.raises(UsageError, match=r"me/bad.*train\.parquet is damaged, or no parquet file"):
        hub({"train.parquet": b"PAR1 and no more", "test.parquet": b"PAR1"}, "me/bad")
    hub.server.create("datasets/you/gated", sharded(**ALL), gated=True)
    with pytest.raises(UsageError, match=r"gated: ask for access at http.*/datasets/you/gated and"):
        hub(repo="you/gated")


def test_a_private_data_set_needs_a_token(hub, monkeypatch):
    hub.server.create(f"datasets/{REPO}", sharded(**ALL), private=True)
    assert len(hub()["train"]) == 4
    monkeypatch.setenv("HF_TOKEN", hub.server.STRANGER)
    with pytest.raises(UsageError, match="there is no data set me/flowers, or it is private"):
        hub()


def test_offline_the_cache_is_used_but_never_for_another_revision(hub, monkeypatch):
    hub(sharded(**ALL))
    old = hub.server.commits(f"datasets/{REPO}")[0].id
    hub.server.forget()
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    assert len(hub()["train"]) == 4
    assert len(hub(revision=old)["train"]) == 4
    with pytest.raises(UsageError, match=f"as of commit {old}, and whether that is v2 cannot be"):
        hub(revision="v2")
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set; unset it to reach the Hub"):
        hub(repo="me/other")
    assert hub.server.requests == []


def test_a_hub_that_is_out_of_reach_is_said_so(hub, no_waiting):
    hub.server.fault(".*", ".*", drop="request")
    with pytest.raises(UsageError, match=r"me/flowers.* cannot be reached"):
        hub()


# Streams, wherever a data set is taken.


@pytest.mark.parametrize(
    "take",
    [
        dataset_labels,
        lambda rows: create_loader(rows, (3, 2, 2), 1),
        lambda rows: Splits.from_datasets({"train": rows, "test": rows}),
    ],
)
def test_a_stream_is_refused_with_the_reason(take):
    with pytest.raises(UsageError, match="is a stream: it has no length, no class counts and no"):
        take(table([0, 1]).to_iterable_dataset())


@pytest.mark.parametrize("names", [["birds"], ["birds-00000-of-00002", "birds-00001-of-00002"]])
def test_without_a_split_in_any_name_all_files_are_train(tmp_path, names):
    for name in names:
        (tmp_path / f"{name}.parquet").touch()
    found = find_tables(tmp_path)
    assert {split: [file.stem for file in files] for split, files in found.items()} == {
        "train": names
    }


def test_a_root_may_be_in_the_home(local, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    local({"train.parquet": table([0, 0, 1, 1, 2, 2])})
    assert len(find_splits("hub", root="~/root")["train"]) == 3


def test_tables_are_split_by_folder_or_file_name(tmp_path):
    for name in ("x/train-a.parquet", "x/test/0000.parquet", "x/test/0001.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_tables(tmp_path)
    assert {split: len(files) for split, files in found.items()} == {"train-a": 1, "test": 2}
