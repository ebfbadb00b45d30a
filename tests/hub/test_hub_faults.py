"""Failing requests to the Hub, and hostile repos: one error, nothing half done."""

import json
import shutil
from functools import partial

import pytest
import torch

import timm_lt
from timm_lt.cli import main
from timm_lt.heads import get_head
from timm_lt.models.pretrained import CHECKPOINTS
from timm_lt.models.repo import Repo
from timm_lt.utils.checks import UsageError

PACKAGED = CHECKPOINTS / "lt_test_resnet.glyph_lt"
PATHS = [path for path in PACKAGED.rglob("*") if path.is_file()]
FILES = {path.relative_to(PACKAGED).as_posix(): path.read_bytes() for path in PATHS}
WEIGHTS, HEAD, CONFIG = "model.safetensors", "heads/lws.safetensors", "config.json"
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.usefixtures("no_waiting")


@pytest.fixture
def birds(loopback_hub):
    loopback_hub.create("me/birds", FILES)
    return loopback_hub


def load(cache, head="lws", name="me/birds", **options):
    return timm_lt.create_model(f"hf-hub:{name}", head=head, cache_dir=cache, **options).eval()


def check_whole(cache, head="lws"):
    """Compares the loaded model with the packaged one."""
    local = timm_lt.create_model(f"local-dir:{PACKAGED}", head=head).eval()
    with torch.no_grad():
        assert torch.equal(load(cache, head)(IMAGES), local(IMAGES))


# ---- loading -------------------------------------------------------------------------------------

STATUS = {
    401: "the token is not valid",
    403: "the token has no permission",
    429: "the Hub answered 429.*; try again later",
    500: r"the Hub answered 500 .*; try again later",
    418: "the Hub answered 418",
}


@pytest.mark.parametrize(
    ("status", "file"), [*((status, WEIGHTS) for status in STATUS), (500, CONFIG), (500, HEAD)]
)
def test_a_refusal_names_its_reason_and_is_not_kept(birds, tmp_path, status, file):
    birds.fault("HEAD", f"/resolve/.*/{file}", status=status)
    with pytest.raises(UsageError, match=STATUS[status]) as caught:
        load(tmp_path)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)
    birds.clear_faults()
    check_whole(tmp_path)


def test_missing_repos_revisions_and_files(birds, tmp_path, monkeypatch):
    birds.create("me/empty")
    birds.create("me/gated", FILES, gated=True)
    for name, message in (
        ("me/nobody", "there is no model repo me/nobody"),
        ("me/birds@v2", r"me/birds has no branch, tag or commit 'v2'"),
        ("me/empty", r"me/empty has no file config\.json"),
    ):
        with pytest.raises(UsageError, match=message):
            load(tmp_path, name=name)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UsageError, match="me/gated is gated: ask for access at http"):
        load(tmp_path, name="me/gated")
    monkeypatch.setenv("HF_TOKEN", "hf_nonsense")
    with pytest.raises(UsageError, match=r"the token is not valid .*hf auth login"):
        load(tmp_path)
    for name in ("birds", "me/", "me/birds@", "a/b/c", "me/bi rds", "../x", "me/..", "/etc"):
        with pytest.raises(UsageError, match="is not a valid repo id"):
            load(tmp_path, name=name)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("file", [WEIGHTS, HEAD])
def test_wrong_bytes_do_not_stay_in_the_cache(birds, tmp_path, file):
    birds.fault("GET", file, corrupt=True)
    with pytest.raises(UsageError, match=r"not the one that config\.json describes .*not kept"):
        load(tmp_path)
    assert not list(tmp_path.rglob(file.rpartition("/")[2]))
    birds.clear_faults()
    # Damaged once on the way, and once more on the disk.
    birds.fault("GET", file, corrupt=True, times=1)
    check_whole(tmp_path)
    (path,) = tmp_path.rglob(f"snapshots/*/{file}")
    path.resolve().write_bytes(b"damaged")
    check_whole(tmp_path)


def test_a_push_between_two_downloads_mixes_nothing(birds, tmp_path, monkeypatch):
    fetch = Repo.fetch

    def fetch_then_commit(self, file, **options):
        path = fetch(self, file, **options)
        # Other weights and heads under the same names, once the config is here.
        birds.commit("me/birds", {WEIGHTS: b"other", HEAD: b"other"})
        return path

    monkeypatch.setattr(Repo, "fetch", fetch_then_commit)
    check_whole(tmp_path)


def test_a_broken_commit_takes_nothing_from_one_that_is_in_the_cache(birds, tmp_path):
    good = birds.commits("me/birds")[0].id
    load(tmp_path, name=f"me/birds@{good}")
    commit_config(birds, block(weights_sha256="1" * 64))
    with pytest.raises(UsageError, match="not the one"):
        load(tmp_path)
    birds.fault("GET", WEIGHTS, status=500)
    assert get_head(load(tmp_path, name=f"me/birds@{good}")).kind == "lws"


# ---- repos that mean harm ------------------------------------------------------------------------


def changed(*keys, **values):
    config = part = json.loads(FILES[CONFIG])
    for key in keys:
        part = part[key]
    part |= values
    return config


def commit_config(hub, config):
    text = config if isinstance(config, str) else json.dumps(config)
    hub.commit("me/birds", {CONFIG: text.encode()})


block = partial(changed, "timm_lt")
with_head = partial(changed, "timm_lt", "heads", "lws")
with_arguments = partial(changed, "model_args")


HARM = {
    "path out of the repo": (with_head(file="../../evil.safetensors"), r"heads\.lws\.file"),
    "path out by a detour": (with_head(file="heads/../../x.safetensors"), r"heads\.lws\.file"),
    "absolute path": (with_head(file="/etc/passwd"), r"heads\.lws\.file"),
    "name out of the repo": (block(heads={"../lws": {"kind": "linear"}}), r"heads\.\.\./lws"),
    "unknown kind": (with_head(kind="os.system"), r"heads\.lws\.kind"),
    "option of the wrong type": (with_head(options={"scale_bias": "no"}), r"heads\.lws\.options"),
    "unknown option": (with_head(options={"__class__": 1}), r"heads\.lws\.options"),
    "digest": (with_head(sha256="0" * 63), r"heads\.lws\.sha256"),
    "other version": (block(version=2), r"timm_lt\.version must be 1 .* found 2"),
    "class counts": (block(class_counts=[1, "2"]), r"timm_lt\.class_counts"),
    "a billion classes": (block(class_counts=None) | {"num_classes": 10**9}, "num_classes must be"),
    "a million layers": (with_arguments(layers=[10**6] * 4), r"model_args\.layers"),
    "weights from elsewhere": (with_arguments(pretrained_cfg={"url": "x"}), "pretrained_cfg"),
    "a cache elsewhere": (with_arguments(cache_dir="/tmp/x"), "cache_dir"),
    "unknown architecture": (changed(architecture="os"), "Unknown"),
    "ten megabytes": (block(label_names=["x" * 10**5] * 100), "has 10,0.* bytes, more than"),
    "a key given twice": ('{"timm_lt": {"version": 1, "version": 1}}', "'version' is given twice"),
    "no object": ([1, 2], "must be a JSON object"),
}


@pytest.mark.parametrize(("config", "message"), HARM.values(), ids=HARM)
def test_harm_is_refused_and_named(birds, tmp_path, config, message):
    commit_config(birds, config)
    before = birds.commits("me/birds")
    with pytest.raises(UsageError, match=message):
        load(tmp_path / "cache")
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}
    assert birds.commits("me/birds") == before


def test_files_that_are_not_needed_are_not_even_downloaded(birds, tmp_path):
    with pytest.raises(UsageError, match=r"unknown head of me/birds: 'lsw' \(did you mean 'lws'"):
        load(tmp_path, "lsw")
    assert birds.downloads() == [CONFIG]
    commit_config(birds, " " * 10**7)
    birds.forget()
    with pytest.raises(UsageError, match=r"config\.json of me/birds has 10,000,000 bytes"):
        timm_lt.list_repo_heads("me/birds", cache_dir=tmp_path)
    assert birds.downloads() == []


def test_no_pickle_is_read_in_place_of_missing_weights(loopback_hub, tmp_path):
    files = {path: content for path, content in FILES.items() if path != WEIGHTS}
    loopback_hub.create("me/birds", {**files, "pytorch_model.bin": b"\x80\x04."})
    with pytest.raises(UsageError, match=rf"me/birds has no file {WEIGHTS}"):
        load(tmp_path)
    assert "pytorch_model.bin" not in loopback_hub.downloads()


# ---- pushing -------------------------------------------------------------------------------------

LOST = ({"drop": "request"}, "cannot be reached")
COMMIT = ("POST", "/commit/")


@pytest.mark.parametrize(
    ("step", "fault", "message"),
    [
        (COMMIT, {"status": 403}, "the token has no permission"),
        (COMMIT, {"status": 401}, "the token is not valid"),
        (COMMIT, {"status": 500}, "the Hub answered 500"),
        (COMMIT, {"status": 400}, "the Hub answered 400"),
        *((s, *LOST) for s in (COMMIT, ("POST", "/preupload/"), ("POST", "/batch"), ("PUT", ""))),
    ],
)
def test_an_interrupted_push_changes_nothing_and_the_next_completes_it(
    birds, tmp_path, step, fault, message
):
    folder = shutil.copytree(PACKAGED, tmp_path / "run")
    model = timm_lt.create_model(f"local-dir:{folder}")
    with torch.no_grad():
        model.fc.bias += 1
    timm_lt.save_checkpoint(folder, model, heads={}, class_counts=range(1, 101), dataset="birds")
    before, commits = birds.files("me/birds"), birds.commits("me/birds")
    birds.fault(*step, **fault)
    with pytest.raises(UsageError, match=message):
        timm_lt.push_to_hub(folder, "me/birds", overwrite=True)
    assert (birds.files("me/birds"), birds.commits("me/birds")) == (before, commits)
    birds.clear_faults()
    timm_lt.push_to_hub(folder, "me/birds", overwrite=True)
    now = birds.files("me/birds")
    assert now[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    assert HEAD not in now
    assert len(birds.commits("me/birds")) == len(commits) + 1


def test_the_next_push_finds_a_commit_without_an_answer(birds):
    birds.commit("me/birds", {"recipe.yaml": b"epochs: 1\n"})
    birds.fault("POST", "/commit/", drop="answer")
    with pytest.raises(UsageError, match="cannot be reached"):
        timm_lt.push_to_hub(PACKAGED, "me/birds")
    birds.clear_faults()
    assert not timm_lt.push_to_hub(PACKAGED, "me/birds").changed
    assert birds.files("me/birds")["recipe.yaml"] == FILES["recipe.yaml"]


def test_a_repo_cannot_write_on_the_terminal(birds, capsys):
    evil = "\x1b]0;pwn\x07\x1b[2J"
    config = with_arguments(**{evil: 10**9})
    config["timm_lt"]["heads"][evil] = {"kind": "linear"}
    commit_config(birds, config)
    assert main(["list", "me/birds"]) == 2
    error = capsys.readouterr().err
    assert "ASCII letters" in error
    assert not {"\x1b", "\x07"} & set(error)
