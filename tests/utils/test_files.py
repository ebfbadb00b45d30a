import hashlib
import json
import os
import stat

import pytest

from timm_lt.utils.checks import UsageError
from timm_lt.utils.files import read_json, read_yaml, sha256, write_atomic, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("content", "stored"), [(b"\x00\xff", b"\x00\xff"), ("é\n", b"\xc3\xa9\n")]
)
def test_write_makes_folders_and_replaces(tmp_path, content, stored):
    path = tmp_path / "a" / "b.txt"
    write_atomic(path, "old and longer")
    write_atomic(path, content)
    assert path.read_bytes() == stored
    assert names(path.parent) == ["b.txt"]


def test_written_files_have_the_usual_rights(tmp_path):
    (tmp_path / "usual").write_text("")
    write_atomic(tmp_path / "ours", "")
    modes = [stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("usual", "ours")]  # noqa: PTH116
    assert modes[0] == modes[1]


def test_files_that_are_replaced_keep_their_rights(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")
    path.chmod(0o640)

    def refuse(_):
        raise AssertionError("another thread would make its files with it")

    monkeypatch.setattr(os, "umask", refuse)
    write_atomic(path, "new")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", 0o640)


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace", "shutil.copymode"])
def test_a_failure_leaves_the_old_content_and_no_rest(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        with pytest.raises(OSError, match="disk full"):
            write_atomic(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_an_interrupt_leaves_no_rest_either(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", "new")
    assert names(tmp_path) == []


def test_json_round_trip(tmp_path):
    content = {"a": [1, 2.5, None, True], "é": {"b": "c"}}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content
    assert json.loads((tmp_path / "x.json").read_text()) == content


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_json_is_not_written(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": value})
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not a readable JSON file"),
        (b"", "is not a readable JSON file"),
        (b'{"a": "\xff"}', "is not a readable JSON file"),
        (b"[1]", "must hold a JSON object, got list"),
        (b"null", "must hold a JSON object, got NoneType"),
        (b'{"a": 1, "b": 2, "a": 3}', "key 'a' is given twice"),
        (b'{"a": {"c": 1, "c": 1}}', "key 'c' is given twice"),
    ],
)
def test_bad_json_is_refused_and_named(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_missing_json(tmp_path):
    with pytest.raises(UsageError, match=r"x\.json does not exist"):
        read_json(tmp_path / "x.json")
    with pytest.raises(UsageError, match="is not a readable JSON file"):
        read_json(tmp_path)


def test_utf8_whatever_the_locale(tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getencoding", lambda: "ascii", raising=False)
    (tmp_path / "x.json").write_bytes('{"a": "é"}'.encode())
    assert read_json(tmp_path / "x.json") == {"a": "é"}


def test_sha256_of_the_standard_example():
    assert sha256(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(b"x") == hashlib.sha256(b"x").hexdigest()


def test_numbers_beyond_all_numbers_are_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1e999}')
    with pytest.raises(UsageError, match="1e999 is beyond all numbers"):
        read_json(path)


def test_a_hundred_thousand_keys_are_looked_at_once(tmp_path):
    path = tmp_path / "a.json"
    keys = ", ".join(f'"{i}": 0' for i in range(110_000))
    path.write_text(f'{{{keys}, "109999": 1}}')
    with pytest.raises(UsageError, match="key '109999' is given twice"):
        read_json(path)


@pytest.mark.parametrize(
    "text",
    ["a: 2020-99-99", "a: !!bool foo", "a: !!int ''", "a: !!timestamp foo", "a: " + "[" * 3000],
    ids=lambda text: text[:14],
)
def test_values_that_are_none_of_their_yaml_type_are_refused(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match="is not valid YAML"):
        read_yaml(path)
