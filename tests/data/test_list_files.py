"""Lists of images: every format against what is read line by line, every fault with its place."""

import csv
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import timm_lt
from timm_lt.data import list_files, read_image_list
from timm_lt.data.list_files import Paths
from timm_lt.utils.checks import UsageError

LINES = [("a/1.jpg", 0), ("my photos/é 2.jpg", 12), ("b", 123456), ("3 4/5", 99999), ("c.jpg", 7)]


def written(folder, content, name="list.txt"):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(folder, content, name="list.txt"):
    paths, labels = read_image_list(written(folder, content, name))
    return list(zip(paths, labels.tolist(), strict=True))


def in_plain_python(content):
    pairs = (line.rsplit(None, 1) for line in content.split("\n") if line.strip())
    return [(path, int(label)) for path, label in pairs]


# Paths may have blanks inside, not at their ends.
names = st.text(st.sampled_from("ab 7/.é\t"), min_size=1, max_size=12).map(str.strip).filter(bool)
labels = st.integers(0, 10**18 - 1) | st.integers(0, 11_000)
blanks = st.sampled_from([" ", "\t", "  ", " \t"])
ends = st.sampled_from([" \n", "\r\n", "\n\n", "\n \r\n"])


def lists_of(blanks, ends):
    return st.lists(st.tuples(names, blanks, labels, ends), min_size=1)


@given(
    lists_of(blanks, st.just("\n"))
    | lists_of(st.just(" "), st.just("\r\n"))
    | lists_of(blanks, ends | st.just("\n")),
    st.integers(40, 90),
)
@example([("a", " ", 5, "\n")], 40)
def test_text_is_read_as_line_by_line(tmp_path_factory, parts, block):
    content = "".join(f"{path}{blank}{label}{end}" for path, blank, label, end in parts)
    with pytest.MonkeyPatch.context() as patch:
        # A few lines long, so that lines lie across the ends of blocks.
        patch.setattr(list_files, "BLOCK", block)
        found = read(tmp_path_factory.getbasetemp(), content)
    assert found == in_plain_python(content)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "  \n"])
@pytest.mark.parametrize("blank", [" ", "\t", "   "])
def test_text_of_any_editor(tmp_path, monkeypatch, blank, end):
    if len(blank) == 1 and end in ("\n", "\r\n"):
        # Usual lists are not read line by line.
        monkeypatch.setattr(list_files, "_read_lines", None)
    content = "\ufeff" + end.join(f"{path}{blank}{label}" for path, label in LINES)
    assert read(tmp_path, content) == LINES
    assert read(tmp_path, content + end, "list.lst") == LINES


def test_a_list_unpacks_and_its_paths_are_a_sequence_of_strings(tmp_path):
    listed = timm_lt.read_image_list(written(tmp_path, "a/1.jpg 3\nb/2.jpg 0\nc/3.jpg 1\n"))
    paths, labels = listed
    assert listed.names is None
    assert labels.dtype == np.int64
    assert (paths[0], paths[-1], len(paths)) == ("a/1.jpg", "c/3.jpg", 3)
    assert paths == ["a/1.jpg", "b/2.jpg", "c/3.jpg"]
    assert paths[1:] == Paths(["b/2.jpg", "c/3.jpg"])
    assert paths[::-2] == ["c/3.jpg", "a/1.jpg"]
    assert pa.array(paths).to_pylist() == list(paths)
    assert paths.take(np.array([2, 0])) == ["c/3.jpg", "a/1.jpg"]
    assert repr(paths) == "Paths(['a/1.jpg', 'b/2.jpg', 'c/3.jpg'])"
    with pytest.raises(IndexError):
        paths[3]


TABLE = "id,filepath,label\n1,a/1.jpg,3\n2,b/2.jpg,0\n"


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (TABLE, "l.csv"),
        (TABLE, "l.txt"),
        ("\ufeff" + TABLE.replace("\n", "\r\n"), "l.csv"),
        (TABLE.replace(",", "\t"), "l.tsv"),
        (TABLE.replace("filepath", "Image").replace("label", "target") + "\n\n", "l.csv"),
        ("label,path\n3,a/1.jpg\n0,b/2.jpg", "l.csv"),
        ("a/1.jpg,3\nb/2.jpg,0", "l.csv"),
        ('class,file_name\n"3","a/1.jpg"\n0,"b/2.jpg"\n', "l.csv"),
    ],
)
def test_tables(tmp_path, content, name, caplog):
    assert read(tmp_path, content, name) == [("a/1.jpg", 3), ("b/2.jpg", 0)]
    logged = [f"{tmp_path}/{name}: columns that are not used: id"] if "id" in content else []
    assert caplog.messages == logged


@pytest.mark.parametrize("header", [[], [("image", "category")]])
@pytest.mark.parametrize(("name", "delimiter"), [("l.csv", ","), ("l.tsv", "\t")])
def test_quoted_fields_and_words_as_labels(tmp_path, header, name, delimiter):
    rows = [("a, b/1.jpg", "sea lion"), ('say "x".JPG', "ant"), ("c.jpg", "sea lion")]
    with (tmp_path / name).open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([*header, *rows])
    listed = read_image_list(tmp_path / name)
    assert listed.names == ["ant", "sea lion"]
    assert listed.labels.tolist() == [1, 0, 1]
    assert listed.paths == [path for path, _ in rows]


@pytest.mark.parametrize("key", ["fpath", "im_path", "file_name"])
def test_annotations_with_paths(tmp_path, key):
    entries = [{key: "a/1.jpg", "category_id": 3}, {key: "b/2.jpg", "category_id": 0}]
    content = {"annotations": entries, "num_classes": 9}
    assert read(tmp_path, json.dumps(content), "l.json") == [("a/1.jpg", 3), ("b/2.jpg", 0)]
    assert read_image_list(tmp_path / "l.json").num_classes == 9
    assert read(tmp_path, json.dumps(entries), "l.txt") == [("a/1.jpg", 3), ("b/2.jpg", 0)]


def test_a_path_may_start_like_json(tmp_path):
    assert read(tmp_path, "{x}.jpg 0\n[1].jpg\t13") == [("{x}.jpg", 0), ("[1].jpg", 13)]
    assert read(tmp_path, "[1].jpg,0\nb.jpg,13", "l.csv") == [("[1].jpg", 0), ("b.jpg", 13)]


def coco(**changed):
    return {
        "images": [{"id": 7, "file_name": "x.jpg"}, {"id": 5, "file_name": "y.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 90},
            {"id": 2, "image_id": 7, "category_id": 1},
            {"id": 3, "image_id": 5, "category_id": 90},
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}],
    } | changed


def test_annotations_of_images_and_categories(tmp_path):
    listed = read_image_list(written(tmp_path, json.dumps(coco()), "l.json"))
    assert (list(listed.paths), listed.labels.tolist()) == (["x.jpg", "y.jpg"], [0, 1])
    assert listed.names == ["person", "toothbrush"]
    bare = coco()
    del bare["categories"]
    assert read(tmp_path, json.dumps(bare)) == [("x.jpg", 1), ("y.jpg", 90)]


FAULTS = {
    "no label": ("a 1\nb.jpg\nc 2\n", "line 2: expected a path, a blank and a label .* 'b.jpg'"),
    "no path": ("\ufeffa 1\n\n 7\n", "line 3: .* found '7'"),
    "word": ("a 1\nb 2\n\nc/d.jpg x7\n", "line 4: .* non-negative integer, found 'c/d.jpg x7'"),
    "negative": ("a -1\n", "line 1: .* 'a -1'"),
    "fraction": ("a 1.0\n", "line 1: .* 'a 1.0'"),
    "too long": ("a 1234567890123456789\n", "line 1: .* 'a 1234567890123456789'"),
    "comma": ("a b.jpg,1\n", "line 1: .* 'a b.jpg,1'; a list separated by commas is named .csv"),
    "bytes": (b"a 1\nb\xff 2\nb x\n", "line 2: byte 0xff is not UTF-8"),
    "UTF-16": ("a 1\nb 2\n".encode("utf-16-le"), "line 1: expected"),
    "return": ("a 1\nb\r2.jpg 1\n", "line 2: .* found 'b'"),
    "empty": (" \n\r\n", "list .*list.txt is empty"),
}


def test_the_line_of_a_fault_is_counted_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(list_files, "BLOCK", 64)
    content = "".join(f"folder/{row}.jpg {row}\n" * (1 + row % 2) for row in range(40))
    with pytest.raises(UsageError, match=r"line 61: .* found 'a b'"):
        read(tmp_path, content + "a b\n")
    with pytest.raises(UsageError, match="line 61: byte 0xfe"):
        read(tmp_path, content.encode() + b"a\xfe 1\n")
    assert len(read(tmp_path, content + "a" * 200 + " 1")) == 61


WORDS = "expected one of path, image, .* and one of label, target, class, category"
TABLE_FAULTS = {
    "columns": ("id,label\n1,2\n", f"no header .*: its first line is 'id', 'label'; {WORDS}"),
    "semicolon": ("path;label\na;1\n", "no header .*: its first line is 'path;label'"),
    "no header": ("a.jpg,ant,3\n", "no header .*: its first line is 'a.jpg', 'ant', '3'"),
    "fields": ("path,label\na,1\nb,c,2\n", "line 3: expected 2 fields .* 'b,c,2'; .* needs quotes"),
    "empty label": ("path,label\na,1\nb,\n", "line 3: .* found 'b,'"),
    "empty path": ("path,label\n,1\n", "line 2: .* found ',1'"),
    "negative": ("path,label\na,1\nb,-1\n", "line 3: .* a non-negative integer .* 'b,-1'"),
    "float": ("path,label\na,1.0\nb,2.0\n", "line 2: .* a non-negative integer .* 'a,1.0'"),
    "mixed": ("path,label\na,ant\nb,2\n", "line 2: .*labels are all integers or all names"),
    "bytes": (b"path,label\na,1\n\xe9,2\n", "line 3: byte 0xe9 is not UTF-8"),
    "split": ("path,label,split\na,1,holdout\n", "not the name of a split: 'holdout'; expected"),
    "header alone": ("path,label\n", "is empty"),
}


def entry(**values):
    return {"annotations": [{"path": "a", "category_id": 0}, {"path": "b", **values}]}


TWICE = [{"image_id": i, "category_id": c} for i, c in ((5, 1), (7, 1), (5, 90))]
JSON_FAULTS = {
    "syntax": ('{\n"annotations": [}', "cannot be read: .*line 2 column 17"),
    "bytes": (b'{\n"\xff": 1}', "line 2: byte 0xff is not UTF-8"),
    "test set": ({"images": [], "info": {}}, "no 'annotations'.* test set .*keys images, info"),
    "keys": ({"annotations": [{"x": 1}]}, r"annotations\[0\] must have fpath or .*, a text; .*'x'"),
    "text": (entry(category_id="3"), r"annotations\[1\] must have category_id .*integer; .*'3'"),
    "negative": (entry(category_id=-3), "image b has label -3; expected 0 to"),
    "beyond": (entry(category_id=4) | {"num_classes": 4}, "image b has label 4; expected 0 to 3"),
    "labels": (entry(category_id=10**22), "too large"),
    "deep": ("[" * 100_000, "cannot be read: maximum recursion depth"),
    "half": (entry(path="\ud800", category_id=0), "cannot be read: .*surrogates not allowed"),
    "list": ({"annotations": [3]}, r"annotations\[0\] must have"),
    "image": (coco(images=[{"id": 5, "file_name": "y"}]), "not exactly one image has the id 7$"),
    "category": (coco(categories=[{"id": "90", "name": "a"}]), "one category has the id 90, 1$"),
    "two": (coco(annotations=TWICE), r"1 images have annotations of different categories: y\.jpg"),
    "bare": (coco(annotations=[]), "is empty: it has no image with a label"),
    "id": (coco(images=[{"id": 5.5, "file_name": "y"}]), "an integer or a text; .* 5.5"),
    "image ids": (
        coco(images=[{"id": 5, "file_name": "y"}] * 2),
        "not exactly one image has the id",
    ),
}


ALL = {"list.txt": FAULTS, "l.csv": TABLE_FAULTS, "l.json": JSON_FAULTS}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, faults in ALL.items() for kind in faults]
)
def test_faults_name_the_file_and_the_line(tmp_path, name, kind):
    content, message = ALL[name][kind]
    content = json.dumps(content) if isinstance(content, dict) else content
    with pytest.raises(UsageError, match=message) as caught:
        read_image_list(written(tmp_path, content, name))
    assert name in str(caught.value)


def test_a_list_that_does_not_exist(tmp_path):
    with pytest.raises(UsageError, match=r"list .*none\.txt cannot be read: No such file"):
        read_image_list(tmp_path / "none.txt")
