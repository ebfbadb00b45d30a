"""The loopback hub speaks the Hub's protocol: the plain client works against it, and fails."""

import hashlib
import sys
from pathlib import Path

import httpx2
import pytest
from hub_server import LoopbackHub, real_hub
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

CARD = b"---\nlicense: apache-2.0\ntags: [long-tailed]\nlibrary_name: timm\n---\n# A model\n"
FILES = {
    "README.md": CARD,
    "config.json": b"Hello, World!",
    "heads/crt.safetensors": bytes(range(256)) * 8,
    "model.safetensors": b"weights" * 1000,
}
REPO = "me/model"


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "folder", FILES)


def write(folder, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def upload(repo_id, folder, **options):
    return HfApi().upload_folder(repo_id=repo_id, folder_path=folder, **options)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def get(repo_id, path, cache, **options):
    """Downloads a file and returns its content."""
    return Path(hf_hub_download(repo_id, path, cache_dir=cache, **options)).read_bytes()


def test_what_is_uploaded_can_be_downloaded(hub, folder):
    HfApi().create_repo(hub.repo_id)
    assert HfApi().create_repo(hub.repo_id, exist_ok=True).repo_id == hub.repo_id
    with pytest.raises(HfHubHTTPError, match="409"):
        HfApi().create_repo(hub.repo_id)
    assert list(hub.files()) == [".gitattributes"]
    info = upload(hub.repo_id, folder, commit_message="All of it")
    assert hub.changed() == sorted(FILES)
    files = hub.files()
    # `git hash-object` of a file that says "Hello, World!"
    assert files["config.json"] == "b45ef6fec89518d314f546fd6c3025367b721684"
    assert files["model.safetensors"] == sha256(FILES["model.safetensors"])
    assert hub.commits() == ["All of it", "initial commit"]
    found = HfApi().model_info(hub.repo_id)
    assert (found.sha, found.private) == (info.oid, False)
    assert {"license:apache-2.0", "long-tailed"} <= set(found.tags)

    for path in ("config.json", "heads/crt.safetensors"):
        assert get(hub.repo_id, path, hub.cache) == FILES[path]
    assert hub.on_the_wire() == ["config.json", "heads/crt.safetensors"]
    snapshot_download(hub.repo_id, cache_dir=hub.cache)
    assert hub.on_the_wire() == [".gitattributes", *sorted(FILES)]


def test_only_what_changed_is_uploaded(hub, folder):
    HfApi().create_repo(hub.repo_id)
    first = upload(hub.repo_id, folder).oid
    hub.files()
    assert upload(hub.repo_id, folder).oid == first
    assert hub.changed() == []
    assert len(hub.commits()) == 2
    for path in ("config.json", "model.safetensors"):
        write(folder, {path: b"new"})
        upload(hub.repo_id, folder)
        assert hub.changed() == [path]
    assert len(hub.commits()) == 4


def test_log(loopback_hub, folder, tmp_path):
    HfApi().create_repo(REPO)
    upload(REPO, folder)
    assert loopback_hub.uploads() == sorted(FILES)
    put = {r.path for r in loopback_hub.requests if r.method == "PUT"}
    weights = ("heads/crt.safetensors", "model.safetensors")
    assert put == {f"/lfs/{REPO}/{sha256(FILES[path])}" for path in weights}
    loopback_hub.forget()
    upload(REPO, folder)
    assert loopback_hub.uploads() == []
    write(folder, {"model.safetensors": b"new"})
    upload(REPO, folder)
    assert loopback_hub.uploads() == ["model.safetensors"]
    assert loopback_hub.commits(REPO)[0].changed == ["model.safetensors"]
    assert loopback_hub.files(REPO)["model.safetensors"] == b"new"

    loopback_hub.forget()
    for _ in range(2):
        get(REPO, "config.json", tmp_path)
    asked = [(r.method, r.path, r.status, r.sent) for r in loopback_hub.requests]
    url = f"/{REPO}/resolve/main/config.json"
    assert asked == [("HEAD", url, 200, 0), ("GET", url, 200, 13), ("HEAD", url, 200, 0)]
    assert loopback_hub.downloads() == ["config.json"]


def test_binary_file_without_a_pattern_becomes_lfs(loopback_hub):
    HfApi().create_repo(REPO)
    operation = CommitOperationAdd("plot.png", b"\x89PNG\r\n\x1a\n\0\0")
    HfApi().create_commit(REPO, [operation], commit_message="Plot")
    assert loopback_hub.commits(REPO)[0].changed == [".gitattributes", "plot.png"]
    assert loopback_hub.files(REPO)[".gitattributes"].endswith(
        b"\nplot.png filter=lfs diff=lfs merge=lfs -text\n"
    )


def test_revisions(hub):
    api = HfApi()
    api.create_repo(hub.repo_id)

    def commit(content, **options):
        operation = CommitOperationAdd("config.json", content)
        return api.create_commit(hub.repo_id, [operation], commit_message="C", **options).oid

    first = commit(b"one")
    api.create_tag(hub.repo_id, tag="v1")
    api.create_branch(hub.repo_id, branch="next/2")
    api.create_branch(hub.repo_id, branch="next/2", exist_ok=True)
    second = commit(b"two", revision="next/2")
    for revision, content in {
        None: b"one",
        "main": b"one",
        "v1": b"one",
        first: b"one",
        "next/2": b"two",
        second: b"two",
    }.items():
        assert get(hub.repo_id, "config.json", hub.cache, revision=revision) == content
        assert api.model_info(hub.repo_id, revision=revision).sha == (
            first if content == b"one" else second
        )
    refs = api.list_repo_refs(hub.repo_id)
    assert {b.name: b.target_commit for b in refs.branches} == {"main": first, "next/2": second}
    assert [t.name for t in refs.tags] == ["v1"]
    api.delete_branch(hub.repo_id, branch="next/2")
    with pytest.raises(RevisionNotFoundError, match="Invalid rev id"):
        get(hub.repo_id, "config.json", hub.cache, revision="next/2")


def test_tree_and_delete(hub, folder):
    api = HfApi()
    api.create_repo(hub.repo_id)
    upload(hub.repo_id, folder)
    names = {entry.path for entry in api.list_repo_tree(hub.repo_id)}
    assert names == {".gitattributes", "README.md", "config.json", "heads", "model.safetensors"}
    assert [e.path for e in api.list_repo_tree(hub.repo_id, "heads")] == ["heads/crt.safetensors"]
    info = api.get_paths_info(hub.repo_id, ["model.safetensors", "missing"])
    assert [file.size for file in info] == [7000]
    siblings = api.model_info(hub.repo_id, files_metadata=True).siblings
    assert {s.rfilename: s.size for s in siblings}["config.json"] == 13

    hub.files()
    operations = [CommitOperationDelete("heads/"), CommitOperationDelete("config.json")]
    api.create_commit(hub.repo_id, operations, commit_message="Less")
    assert hub.changed() == ["config.json", "heads/crt.safetensors"]
    with pytest.raises(RemoteEntryNotFoundError):
        api.create_commit(hub.repo_id, operations, commit_message="Again")
    api.delete_repo(hub.repo_id)
    api.delete_repo(hub.repo_id, missing_ok=True)
    assert not api.repo_exists(hub.repo_id)


def test_broken_card(hub):
    HfApi().create_repo(hub.repo_id)
    operation = CommitOperationAdd("README.md", b"---\ntags: [\n---\n")
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        HfApi().create_commit(hub.repo_id, [operation], commit_message="Card")
    operation = CommitOperationAdd("README.md", b"no front matter")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        HfApi().create_commit(hub.repo_id, [operation], commit_message="Card")


def test_who_may_read(loopback_hub, tmp_path):
    loopback_hub.create(REPO, FILES, private=True)
    loopback_hub.create("you/gated", FILES, gated=True)
    for token in (loopback_hub.WRITER, loopback_hub.READER):
        assert get(REPO, "config.json", tmp_path / token, token=token) == FILES["config.json"]
    for token, status in ((loopback_hub.STRANGER, 404), (False, 401)):
        for repo_id in (REPO, "me/missing"):
            with pytest.raises(RepositoryNotFoundError, match=f"{status} Client Error"):
                get(repo_id, "config.json", tmp_path / "no", token=token)
            with pytest.raises(RepositoryNotFoundError, match=f"{status} Client Error"):
                HfApi().model_info(repo_id, token=token)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization") as caught:
        get(REPO, "config.json", tmp_path / "no", token="hf_wrong")
    assert not isinstance(caught.value, RepositoryNotFoundError)
    for token in (None, False):
        with pytest.raises(GatedRepoError, match="restricted"):
            get("you/gated", "config.json", tmp_path / "no", token=token)
    assert loopback_hub.downloads() == ["config.json"]


def test_who_may_write(loopback_hub, folder):
    loopback_hub.create(REPO)
    cases = ((loopback_hub.READER, 403), (loopback_hub.STRANGER, 403), (False, 401), ("no", 401))
    for token, status in cases:
        with pytest.raises(HfHubHTTPError, match=str(status)):
            upload(REPO, folder, token=token)
        with pytest.raises(HfHubHTTPError, match=str(status)):
            HfApi().create_repo("me/other", token=token)
        with pytest.raises(HfHubHTTPError, match=str(status)):
            HfApi().delete_repo(REPO, token=token)
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi().create_repo("them/model")
    assert len(loopback_hub.commits(REPO)) == 1
    assert loopback_hub.uploads() == []
    assert HfApi().whoami()["name"] == "me"


def test_token_is_read_at_each_call(loopback_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", loopback_hub.STRANGER)
    assert HfApi().whoami()["name"] == "you"


def test_what_is_missing(loopback_hub, tmp_path):
    loopback_hub.create(REPO, FILES)
    with pytest.raises(RemoteEntryNotFoundError):
        get(REPO, "missing.json", tmp_path)
    with pytest.raises(RevisionNotFoundError):
        get(REPO, "config.json", tmp_path, revision="missing")
    with pytest.raises(RepositoryNotFoundError):
        get("me/missing", "config.json", tmp_path)
    assert loopback_hub.downloads() == []


def test_parent_commit(loopback_hub):
    loopback_hub.create(REPO)
    old = loopback_hub.commits(REPO)[0].id
    loopback_hub.commit(REPO, {"a.txt": b"a"})
    operation = CommitOperationAdd("b.txt", b"b")
    with pytest.raises(HfHubHTTPError, match="412"):
        HfApi().create_commit(REPO, [operation], commit_message="B", parent_commit=old)
    assert "b.txt" not in loopback_hub.files(REPO)


def test_rate_limit(loopback_hub, no_waiting, tmp_path):
    loopback_hub.create(REPO, FILES)
    loopback_hub.fault("GET", "/resolve/", status=429, headers={"Retry-After": "30"}, times=2)
    assert get(REPO, "config.json", tmp_path) == FILES["config.json"]
    assert no_waiting == [31, 31]
    assert [r.status for r in loopback_hub.requests] == [200, 429, 429, 200]


def test_server_error_forever(loopback_hub, no_waiting, tmp_path):
    loopback_hub.create(REPO, FILES)
    loopback_hub.fault("HEAD|GET", "/resolve/", status=500)
    with pytest.raises(LocalEntryNotFoundError, match="An error happened"):
        get(REPO, "config.json", tmp_path)
    assert no_waiting == [1, 2, 4, 8, 8]
    loopback_hub.clear_faults()
    loopback_hub.fault("GET", "/resolve/", status=503)
    with pytest.raises(HfHubHTTPError, match="503"):
        get(REPO, "config.json", tmp_path)
    loopback_hub.clear_faults()
    assert get(REPO, "config.json", tmp_path) == FILES["config.json"]
    loopback_hub.fault("HEAD", "/resolve/", status=500)
    assert get(REPO, "config.json", tmp_path) == FILES["config.json"]


def test_cut_download_is_resumed(loopback_hub, no_waiting, tmp_path):
    chunk = constants.DOWNLOAD_CHUNK_SIZE  # What is shorter starts again from the first byte.
    weights = bytes(chunk) + b"weights" * 1000
    loopback_hub.create(REPO, FILES | {"model.safetensors": weights})
    loopback_hub.fault("GET", "model.safetensors", cut=chunk + 3000, times=1)
    loopback_hub.fault("GET", "config.json", cut=5, times=1)
    assert get(REPO, "model.safetensors", tmp_path) == weights
    assert get(REPO, "config.json", tmp_path) == FILES["config.json"]
    gets = [(r.status, r.sent) for r in loopback_hub.requests if r.method == "GET"]
    assert gets == [(200, chunk + 3000), (206, 7000), (200, 5), (200, 13)]
    assert no_waiting == [1, 1]


def test_wrong_bytes(loopback_hub, tmp_path):
    loopback_hub.create(REPO, FILES)
    loopback_hub.fault("GET", "model.safetensors", corrupt=True)
    loopback_hub.fault("GET", "config.json", replace=b"Hello, Hacker")
    loopback_hub.fault("GET", "README.md", replace=b"short")
    content = get(REPO, "model.safetensors", tmp_path)
    true = FILES["model.safetensors"]
    assert len(content) == len(true)
    assert sum(a != b for a, b in zip(content, true, strict=True)) == 1
    assert HfApi().get_paths_info(REPO, "model.safetensors")[0].lfs.sha256 == sha256(true)
    assert get(REPO, "config.json", tmp_path) == b"Hello, Hacker"
    with pytest.raises(OSError, match="Consistency check failed"):
        get(REPO, "README.md", tmp_path)


def test_dropped_commit(loopback_hub, folder):
    loopback_hub.create(REPO)
    loopback_hub.fault("POST", "/commit/", drop="request", times=1)
    with pytest.raises(httpx2.TransportError):
        upload(REPO, folder)
    assert list(loopback_hub.files(REPO)) == [".gitattributes"]
    put = sorted(f"lfs:{sha256(FILES[p])}" for p in FILES if p.endswith("safetensors"))
    assert loopback_hub.uploads() == put

    loopback_hub.forget()
    loopback_hub.fault("POST", "/commit/", drop="answer", times=1)
    with pytest.raises(httpx2.RemoteProtocolError):
        upload(REPO, folder)
    assert loopback_hub.uploads() == ["README.md", "config.json"]
    assert len(loopback_hub.commits(REPO)) == 2
    upload(REPO, folder)
    assert len(loopback_hub.commits(REPO)) == 2


def test_dropped_lfs_upload(loopback_hub, no_waiting, folder):
    loopback_hub.create(REPO)
    loopback_hub.fault("PUT", "/lfs/", drop="request", times=1)
    upload(REPO, folder)
    assert no_waiting == [1]
    assert loopback_hub.uploads() == sorted(FILES)

    write(folder, {"model.safetensors": b"new" * 1_000_000})
    loopback_hub.fault("PUT", "/lfs/", drop="request")
    with pytest.raises(RuntimeError, match=r"Error while uploading 'model\.safetensors'"):
        upload(REPO, folder)
    assert loopback_hub.files(REPO)["model.safetensors"] == FILES["model.safetensors"]


def test_lfs_object_that_was_never_uploaded(loopback_hub):
    loopback_hub.create(REPO)
    operation = CommitOperationAdd("model.safetensors", b"weights")
    operation._is_uploaded = True
    operation._upload_mode = "lfs"
    with pytest.raises(HfHubHTTPError, match="file that does not exist"):
        HfApi().create_commit(REPO, [operation], commit_message="Weights")
    assert len(loopback_hub.commits(REPO)) == 1


def test_environment(loopback_hub):
    assert loopback_hub.endpoint == constants.ENDPOINT
    assert constants.HF_HUB_DISABLE_XET
    idle = LoopbackHub()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(idle.endpoint)
    idle.close()


@pytest.mark.parametrize(
    ("arguments", "real"),
    [
        ("-m hub", True),
        ("-q -mhub tests", True),
        ("-m=hub", True),
        ("-m not\thub", False),
        ("-k hub tests", False),
        ("-m slow", False),
        ("", False),
    ],
)
def test_real_hub_is_asked_for_by_name(monkeypatch, arguments, real):
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setattr(
        sys, "argv", ["pytest", *(a.replace("\t", " ") for a in arguments.split(" "))]
    )
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert real_hub() is real
    monkeypatch.delenv("HF_TOKEN")
    assert real_hub() is False
