import json
import os
import stat

import pytest

from timm_lt.utils.checks import UsageError
from timm_lt.utils.files import read_json, read_yaml, sha256, write_atomic, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b.txt"
    for content, stored in ((b"\x00\xff", b"\x00\xff"), ("é\n", b"\xc3\xa9\n")):
        write_atomic(path, "old and longer")
        write_atomic(path, content)
        assert path.read_bytes() == stored
    assert names(path.parent) == ["b.txt"]


def test_files_have_the_usual_rights_or_keep_theirs(tmp_path, monkeypatch):
    (tmp_path / "usual").write_text("")
    write_atomic(tmp_path / "ours", "")
    modes = [stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("usual", "ours")]  # noqa: PTH116
    assert modes[0] == modes[1]
    path = tmp_path / "ours"
    path.chmod(0o640)
    # Another thread would make its files with a changed umask.
    monkeypatch.delattr(os, "umask")
    write_atomic(path, "new")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", 0o640)


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace", "shutil.copymode"])
def test_a_failure_leaves_the_old_content_and_no_other_file(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def fail(*_):
        raise error("disk full")

    for error in (OSError, KeyboardInterrupt):
        with monkeypatch.context() as patch:
            patch.setattr(step, fail)
            with pytest.raises(error, match="disk full"):
                write_atomic(path, "new")
        assert path.read_text() == "old"
        assert names(tmp_path) == ["file"]


def test_json_round_trip(tmp_path, monkeypatch):
    path, content = tmp_path / "x.json", {"a": [1, 2.5, None, True], "é": {"b": "c"}}
    # UTF-8, whatever the locale.
    monkeypatch.setattr("locale.getencoding", lambda: "ascii", raising=False)
    write_json(path, content)
    assert read_json(path) == json.loads(path.read_text()) == content
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == content
    path.write_bytes('{"a": "é"}'.encode())
    assert read_json(path) == {"a": "é"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "Expecting property name"),
        (b"", "Expecting value"),
        (b'{"a": "\xff"}', "codec can't decode"),
        (b"[1]", "must be a JSON object, not a list"),
        (b"null", "must be a JSON object, not a NoneType"),
        (b'{"a": {"c": 1, "c": 1}}', "key 'c' is given twice"),
        (b'{"a": 1e999}', "not JSON compliant"),
        (b'{"a": NaN}', "not JSON compliant"),
        (b"[" * 100_000, "recursion"),
        (b'{"a": "' + b"x" * 10**6 + b'"}', "has 1,000,009 bytes, more than 100,000"),
        # Quadratic code would take minutes.
        (b"{%b}" % b",".join(b'"%d": 0' % (i % 9999) for i in range(10_000)), "'0' is given twice"),
    ],
    ids=range(11),
)
def test_invalid_json_is_refused_and_named(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=rf"x\.json is not a readable JSON file: .*{message}"):
        read_json(path, limit=100_000)


def test_missing_json_and_a_digest(tmp_path):
    with pytest.raises(UsageError, match=r"x\.json does not exist"):
        read_json(tmp_path / "x.json")
    with pytest.raises(UsageError, match="is not a readable JSON file"):
        read_json(tmp_path)
    # The standard's example.
    assert sha256(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    "text",
    ["a: 2020-99-99", "a: !!bool foo", "a: !!int ''", "a: !!timestamp foo", "a: " + "[" * 3000,
     "a: 1\na: 2", "[a]: 1"],
    ids=lambda text: text[:14],
)  # fmt: skip
def test_invalid_yaml_is_refused(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"a\.yaml is not valid YAML"):
        read_yaml(path)
