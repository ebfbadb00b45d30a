"""Pushing to a hub and loading from it: the files that move, and the mistakes.

``pytest`` runs this against a hub on 127.0.0.1; ``HF_TOKEN=... pytest -m hub`` runs what takes the
fixture ``hub`` against the real one.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import fill
from huggingface_hub import HfApi, ModelCard
from timm.models import _registry

import timm_lt
import train_lt
from timm_lt.checkpoint import load_heads, read_checkpoint, save_checkpoint
from timm_lt.cli import main
from timm_lt.heads import HEADS, get_head
from timm_lt.models.lt_resnet import _cfg
from timm_lt.models.pretrained import CHECKPOINTS, read_published
from timm_lt.models.repo import ModelSource
from timm_lt.utils.checks import UsageError

PACKAGED = CHECKPOINTS / "lt_test_resnet.glyph_lt"
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
CRT, LWS, MINE = (f"heads/{name}.safetensors" for name in ("crt", "lws", "mine"))
ALL = sorted(p.relative_to(PACKAGED).as_posix() for p in PACKAGED.rglob("*") if p.is_file())
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    """The packaged checkpoint as a run leaves it, beside files that must never be pushed."""
    run = shutil.copytree(PACKAGED, tmp_path / "run")
    for path in ("state/random.pkl", "logs/events", "photo.jpg", "heads/old.bin", "plots/a.png"):
        (run / path).parent.mkdir(exist_ok=True)
        (run / path).write_bytes(b"secret")
    return run


@pytest.fixture
def pushed(hub, folder):
    """The hub with that checkpoint in it."""
    timm_lt.push_to_hub(folder, hub.repo_id, private=True, license="apache-2.0")
    hub.files()
    hub.forget()
    return hub


def load(hub, head=None, *, revision=None, **options):
    name = f"hf-hub:{hub.repo_id}" + (f"@{revision}" if revision else "")
    return timm_lt.create_model(name, head=head, cache_dir=hub.cache, **options).eval()


def logits(model):
    with torch.no_grad():
        return model(IMAGES)


def local_logits(head=None, **options):
    return logits(timm_lt.create_model(f"local-dir:{PACKAGED}", head=head, **options).eval())


def sum_of(values):
    return values.double().sum().item()


def add_tau(hub, name, tau=0.25, **options):
    """Publishes one more head, which needs no file."""
    head = HEADS["tau_norm"].from_classifier(load(hub).fc, tau=tau)
    return timm_lt.add_head(hub.repo_id, name, head, cache_dir=hub.cache, **options)


# ---- push ----------------------------------------------------------------------------------------


def test_push_makes_one_commit_with_the_checkpoint_and_nothing_else(hub, folder):
    assert timm_lt.push_to_hub(folder, hub.repo_id, private=True).changed
    assert sorted(set(hub.files()) - {".gitattributes"}) == ALL
    name = hub.repo_id.partition("/")[2]
    hub.check_commits(f"Push {name} with timm_lt", "initial commit")
    assert HfApi().model_info(hub.repo_id).private
    hub.check_uploads(ALL)
    for path in set(ALL) - {CARD}:
        assert hub.read(path) == (PACKAGED / path).read_bytes(), path
    # Unchanged, it uploads nothing.
    hub.forget()
    assert not timm_lt.push_to_hub(folder, hub.repo_id).changed
    assert hub.changed() == []
    hub.check_commits(f"Push {name} with timm_lt", "initial commit")
    hub.check_uploads([])


def with_one_more(folder):
    """Saves the checkpoint again with the head ``mine``."""
    info, model = read_checkpoint(folder), timm_lt.create_model(f"local-dir:{folder}")
    heads = {key: load_heads(folder, key, model) for key in info.heads}
    heads["mine"] = fill(HEADS["lws"].from_classifier(model.fc))
    counts = info.class_counts
    save_checkpoint(folder, model, heads=heads, class_counts=counts, dtype=torch.float16)
    return heads["mine"]


def test_one_more_head_on_a_branch_and_at_a_commit(pushed, folder):
    head = with_one_more(folder)
    done = timm_lt.push_to_hub(folder, pushed.repo_id, revision="next")
    pushed.check_uploads([CARD, CONFIG, MINE])
    assert pushed.changed() == []
    features = torch.randn(3, 96)
    for revision in ("next", done.commit):
        loaded = get_head(load(pushed, "mine", revision=revision))
        torch.testing.assert_close(loaded(features), head(features), rtol=1e-2, atol=1e-2)
    with pytest.raises(UsageError, match=r"unknown head of .*'mine'"):
        load(pushed, "mine")
    with pytest.raises(UsageError, match="has no branch, tag or commit 'v9'"):
        load(pushed, "mine", revision="v9")


def test_heads_of_the_repo_are_not_removed_by_the_way(pushed, folder, capsys):
    with_one_more(folder)
    timm_lt.push_to_hub(folder, pushed.repo_id)
    add_tau(pushed, "without_a_file")
    with pytest.raises(UsageError, match=r"the folder lacks \(mine, without_a_file\)"):
        timm_lt.push_to_hub(PACKAGED, pushed.repo_id)
    pushed.files()
    assert main(["push", str(PACKAGED), pushed.repo_id, "--overwrite"]) == 0
    assert pushed.changed() == [CARD, CONFIG, MINE]
    assert MINE not in pushed.files()
    assert f"pushed to {HfApi().endpoint}/{pushed.repo_id}, commit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("there", "asked", "message"),
    [
        ({"private": True}, False, "exists and is private; change that in its settings"),
        ({"private": False}, True, "exists and is public; change that in its settings"),
        ({"files": {".gitignore": b"*"}}, None, r"has a \.gitignore, which may keep files out"),
    ],
)
def test_an_unsuitable_repo_is_refused(loopback_hub, there, asked, message):
    loopback_hub.create("me/birds", **there)
    with pytest.raises(UsageError, match=message):
        timm_lt.push_to_hub(PACKAGED, "me/birds", private=asked)
    assert loopback_hub.uploads() == []


@pytest.mark.parametrize("path", [CARD, "plots"])
def test_links_to_elsewhere_are_not_followed(loopback_hub, folder, tmp_path, path):
    elsewhere = tmp_path / "elsewhere"
    (folder / path).rename(elsewhere)
    (folder / path).symlink_to(elsewhere)
    with pytest.raises(UsageError, match="is a link to a file outside of the folder"):
        timm_lt.push_to_hub(folder, "me/birds")
    assert loopback_hub.repos == {}


def test_a_folder_of_the_cache_and_one_with_fewer_files_are_pushed(pushed, folder):
    for name in ("crt", "lws", "ncm"):
        load(pushed, name)
    (snapshot,) = pushed.cache.glob("models--*/snapshots/*")
    assert any(path.is_symlink() for path in snapshot.rglob("*"))
    assert timm_lt.push_to_hub(snapshot, pushed.repo_id, revision="copy").changed
    gone = ["metrics.json", "plots/calibration.png", "recipe.yaml"]
    for path in gone:
        (folder / path).unlink()
    theirs = {"path_or_fileobj": b"mine", "path_in_repo": "plots/mine.txt"}
    HfApi().upload_file(**theirs, repo_id=pushed.repo_id)
    pushed.files()
    timm_lt.push_to_hub(folder, pushed.repo_id)
    assert pushed.changed() == [CARD, *gone]


def test_a_token_can_be_given(loopback_hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    token = {"token": loopback_hub.WRITER}
    timm_lt.push_to_hub(PACKAGED, "me/birds", private=True, **token)
    model = timm_lt.create_model("hf-hub:me/birds", cache_dir=tmp_path, **token)
    tau = HEADS["tau_norm"].from_classifier(model.fc, tau=0.25)
    timm_lt.add_head("me/birds", "mine", tau, cache_dir=tmp_path, **token)
    assert "mine" in timm_lt.list_repo_heads("me/birds", cache_dir=tmp_path, **token)
    with pytest.raises(UsageError, match="token only applies to names that start with hf-hub:"):
        timm_lt.create_model("lt_test_resnet", **token)


def test_a_card_that_a_person_edited_keeps_its_text(pushed, folder):
    # On the Hub, then in the folder, which comes first.
    card = ModelCard.load(pushed.repo_id)
    card.text += "\nPhotographed by us.\n"
    card.data.tags.append("birds")
    card.push_to_hub(pushed.repo_id)
    timm_lt.push_to_hub(folder, pushed.repo_id)
    add_tau(pushed, "quarter", metrics={"all": 0.5})
    edited = ModelCard.load(pushed.repo_id)
    assert edited.text == card.text
    assert "birds" in edited.data.tags
    assert edited.data.license == "apache-2.0"
    names = [result.metric_name for result in edited.data.eval_results]
    assert "overall accuracy, head quarter" in names
    (folder / CARD).write_text("# Ours\n")
    timm_lt.push_to_hub(folder, pushed.repo_id, overwrite=True)
    assert ModelCard.load(pushed.repo_id).text == "# Ours\n"


BAD_FOLDERS = {
    WEIGHTS: (b"x", "is not the file that config.json describes"),
    CRT: (b"x", "crt.safetensors is missing or altered"),
    "plots/calibration.png": (b"#!/bin/sh", "is not a PNG file"),
    "metrics.json": (b"{", "is not a readable JSON file"),
    "recipe.yaml": (b"a: [", "is not valid YAML"),
    CARD: (b"---\n: [\n---\n# Mine\n", CARD),
    CONFIG: (b"{}", "architecture must be a string"),
}


@pytest.mark.parametrize("path", BAD_FOLDERS)
def test_an_incomplete_folder_is_not_pushed(loopback_hub, folder, path):
    content, message = BAD_FOLDERS[path]
    (folder / path).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        timm_lt.push_to_hub(folder, "me/birds")
    assert loopback_hub.uploads() == []


# ---- load ----------------------------------------------------------------------------------------


def test_loading_downloads_config_backbone_and_one_head(pushed):
    assert torch.equal(logits(load(pushed, "lws")), local_logits("lws"))
    assert pushed.on_the_wire() == [CONFIG, LWS, WEIGHTS]
    pushed.forget()
    assert torch.equal(logits(load(pushed, "crt")), local_logits("crt"))
    pushed.check_downloads([CRT])
    pushed.forget()
    for head, options in (("tau_norm", {"tau": 0.5}), ("logit_adjusted", {}), (None, {})):
        assert torch.equal(logits(load(pushed, head, **options)), local_logits(head, **options))
    pushed.check_downloads([])
    assert pushed.downloaded() == [CONFIG, CRT, LWS, WEIGHTS]
    config = load(pushed, "lws").pretrained_cfg
    assert (config["source"], config["hf_hub_id"]) == ("hf-hub", pushed.repo_id)
    assert config["mean"] == [0.5, 0.5, 0.5]


def test_plain_timm_loads_the_repo(plain_server, pushed):
    code = f"""
import sys, timm, torch
model = timm.create_model("hf-hub:{pushed.repo_id}", pretrained=True, cache_dir=r"{pushed.cache}")
assert type(model.get_classifier()) is torch.nn.Linear and "timm_lt" not in sys.modules
images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
print(model.eval()(images).detach().double().sum().item())
"""
    done = plain_server.python(code, HF_TOKEN=os.environ["HF_TOKEN"])
    assert done.status == 0, done.err
    assert float(done.out) == pytest.approx(sum_of(local_logits()), rel=1e-6)
    assert pushed.on_the_wire() == [CONFIG, WEIGHTS]


NOWHERE = "http://127.0.0.1:9"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reason", "variables"),
    [
        ("HF_HUB_OFFLINE is set", {"HF_HUB_OFFLINE": "1", "HF_TOKEN": ""}),
        pytest.param(
            f"{NOWHERE} cannot be reached",
            {"HF_ENDPOINT": NOWHERE, "HF_HUB_ETAG_TIMEOUT": "1"},
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_without_a_network_the_cache_serves(pushed, reason, variables):
    load(pushed, "lws")
    code = f"""
import time, types, torch
from huggingface_hub.utils import _http
import timm_lt
images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
model = timm_lt.create_model("hf-hub:{pushed.repo_id}", head="lws", cache_dir=r"{pushed.cache}")
print(model.eval()(images).detach().double().sum().item())
_http.time = types.SimpleNamespace(**vars(time) | {{"sleep": lambda _: None}})
timm_lt.create_model("hf-hub:{pushed.repo_id}", head="crt", cache_dir=r"{pushed.cache}")
"""
    options = {"env": os.environ | variables, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], **options, check=False)
    assert float(done.stdout) == pytest.approx(sum_of(local_logits("lws")), rel=1e-6), done.stderr
    assert done.returncode != 0
    assert f"crt.safetensors of {pushed.repo_id} is not in the cache, and {reason}" in done.stderr


def test_a_private_repo_needs_a_token(pushed, monkeypatch):
    token = os.environ["HF_TOKEN"]
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UsageError, match=r"or it is private; .*hf auth login"):
        load(pushed, "lws")
    assert pushed.downloaded() == []
    assert get_head(load(pushed, "lws", token=token)).kind == "lws"


def test_heads_are_listed_without_weights(pushed, capsys):
    heads = timm_lt.list_repo_heads(pushed.repo_id, cache_dir=pushed.cache)
    assert pushed.on_the_wire() == [CONFIG]
    metrics = json.loads((PACKAGED / "metrics.json").read_text())
    assert list(heads) == list(metrics["heads"])
    assert heads["tau_norm"].options["tau"] == metrics["selection"]["tau_norm"]["tau"]
    assert heads["crt"].metrics["few_shot"] == metrics["heads"]["crt"]["few_shot"]
    shown = []
    for name in (pushed.repo_id, str(PACKAGED)):
        assert main(["list", name]) == 0
        shown.append(capsys.readouterr().out.splitlines()[1:])
    assert shown[0] == shown[1]


@pytest.fixture
def published(pushed, tmp_path, monkeypatch):
    """A file of ``hub_configs/`` that names the repo, registered as the shipped ones are."""
    path = tmp_path / "lt_test_resnet.birds.yaml"
    source = Path(timm_lt.__file__).parent.parent / "hub_configs" / "lt_test_resnet.glyph_lt.yaml"
    path.write_text(source.read_text().replace("packaged: true", f"hf_hub_id: {pushed.repo_id}"))
    config = timm.models.PretrainedCfg(**_cfg(read_published(path)), architecture="lt_test_resnet")
    monkeypatch.setitem(_registry._model_pretrained_cfgs, "lt_test_resnet.birds", config)
    return pushed


def test_a_published_name_resolves_through_its_repo(published):
    def create(head, **options):
        options |= {"pretrained": True, "cache_dir": published.cache}
        return timm.create_model("lt_test_resnet.birds", head=head, **options).eval()

    assert torch.equal(logits(create("lws")), local_logits("lws"))
    assert published.on_the_wire() == [CONFIG, LWS, WEIGHTS]
    assert torch.equal(logits(create("tau_norm", tau=0.3)), local_logits("tau_norm", tau=0.3))
    add_tau(published, "quarter")
    own = get_head(create("quarter", keep_bias=True))
    assert own.options() == {"tau": 0.25, "keep_bias": True}
    with pytest.raises(UsageError, match=r"unknown head of .*'cosine'"):
        create("cosine")


def test_a_repo_is_folded_by_its_names(pushed, tmp_path, capsys):
    commit = HfApi().model_info(pushed.repo_id).sha
    for name in (f"hf-hub:{pushed.repo_id}", pushed.repo_id, f"{pushed.repo_id}@main"):
        # All of one commit, whatever happens to the branch meanwhile.
        assert ModelSource.find(name).name == f"hf-hub:{pushed.repo_id}@{commit}"
    ship = tmp_path / "ship"
    assert main(["fold", pushed.repo_id, str(ship), "--head", "crt"]) == 0
    plain = timm.create_model(f"local-dir:{ship}", pretrained=True).eval()
    torch.testing.assert_close(logits(plain), local_logits("crt"), rtol=1e-4, atol=1e-4)
    assert main(["fold", f"{pushed.repo_id}x", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: no folder {pushed.repo_id}x, and as a repo of the Hub")


def test_a_repo_of_timms_own_takes_heads_that_need_no_fit(hub, tmp_path):
    plain = tmp_path / "plain"
    assert main(["fold", str(PACKAGED), str(plain)]) == 0
    HfApi().create_repo(hub.repo_id, private=True)
    HfApi().upload_folder(folder_path=plain, repo_id=hub.repo_id)
    loaded = load(hub, "tau_norm", tau=0.5)
    torch.testing.assert_close(logits(loaded), local_logits("tau_norm", tau=0.5))
    assert hub.downloaded() == [CONFIG, WEIGHTS]
    with pytest.raises(UsageError, match="plain timm checkpoint without heads"):
        timm_lt.list_repo_heads(hub.repo_id, cache_dir=hub.cache)


# ---- one more head -------------------------------------------------------------------------------


def test_add_head_leaves_the_backbone_alone_and_replaces_heads(pushed):
    head = fill(HEADS["lws"].from_classifier(load(pushed).fc))
    report = timm_lt.shot_accuracy([0] * 100, range(100), read_checkpoint(PACKAGED).class_counts)
    done = timm_lt.add_head(pushed.repo_id, "mine", head, metrics=report, cache_dir=pushed.cache)
    assert done.changed
    assert pushed.changed() == [CARD, CONFIG, MINE]
    pushed.check_uploads([CARD, CONFIG, MINE])
    features = torch.randn(3, 96)
    assert torch.equal(get_head(load(pushed, "mine"))(features), head.eval()(features))
    heads = timm_lt.list_repo_heads(pushed.repo_id, cache_dir=pushed.cache)
    assert heads["mine"].metrics["all"] == 0.01
    assert "`mine`" in ModelCard.load(pushed.repo_id).text
    assert torch.equal(logits(load(pushed, "crt")), local_logits("crt"))
    with pytest.raises(UsageError, match="has a head 'mine' already"):
        add_tau(pushed, "mine")
    # A head without a file in its place.
    add_tau(pushed, "mine", overwrite=True)
    assert pushed.changed() == [CARD, CONFIG, MINE]
    assert MINE not in pushed.files()
    assert get_head(load(pushed, "mine")).tau == 0.25


ADD_REFUSED = {
    "not fitted": ("lws", {}, "not fitted"),
    "other backbone": (None, {}, "has another weight than the joint classifier"),
    "bad name": ("linear", {"name": "../x"}, "ASCII"),
    "percent": ("linear", {"metrics": {"all": 70.1}}, r"head 'mine' in metrics must be a number"),
    "other rule": (
        "linear",
        {"metrics": timm_lt.shot_accuracy([0], [0], [5, 5], rule="oltr")},
        "the shot rule 'oltr', the repo's heads 'fb'",
    ),
}


@pytest.mark.parametrize(("kind", "options", "message"), ADD_REFUSED.values(), ids=ADD_REFUSED)
def test_add_head_refuses_and_leaves_the_repo(loopback_hub, tmp_path, kind, options, message):
    timm_lt.push_to_hub(PACKAGED, "me/birds")
    loopback_hub.forget()
    model = timm_lt.create_model("hf-hub:me/birds", cache_dir=tmp_path)
    classifier = torch.nn.Linear(96, 100) if kind is None else model.fc
    head = HEADS[kind or "tau_norm"].from_classifier(classifier)
    arguments = {"name": "mine", "head": head, "cache_dir": tmp_path, **options}
    with pytest.raises(UsageError, match=message):
        timm_lt.add_head("me/birds", **arguments)
    assert loopback_hub.uploads() == []


def test_add_head_notices_that_the_repo_moved_on(loopback_hub, tmp_path, monkeypatch):
    timm_lt.push_to_hub(PACKAGED, "me/birds")
    model = timm_lt.create_model("hf-hub:me/birds", cache_dir=tmp_path)
    head = HEADS["tau_norm"].from_classifier(model.fc, tau=0.1)
    commit = HfApi.create_commit

    def after_somebody_else(self, *arguments, **options):
        loopback_hub.commit("me/birds", {"notes.md": b"new"})
        return commit(self, *arguments, **options)

    monkeypatch.setattr(HfApi, "create_commit", after_somebody_else)
    with pytest.raises(UsageError, match="the branch has changed meanwhile"):
        timm_lt.add_head("me/birds", "mine", head, cache_dir=tmp_path)
    config = json.loads(loopback_hub.files("me/birds")[CONFIG])
    assert "mine" not in config["timm_lt"]["heads"]


# ---- the main job --------------------------------------------------------------------------------

RECIPE = ["lt_test_resnet.digits_lt", "--epochs", "1", "--quiet", "--heads", '{"tau_norm": {}}']


@pytest.mark.slow
def test_the_main_job_pushes_what_it_wrote(hub, tmp_path):
    push = ["--push_to_hub", hub.repo_id, "--private", "--license", "mit"]
    run = [*RECIPE, "--output", str(tmp_path / "run"), *push]
    assert train_lt.main(run) == 0
    written = {p.relative_to(tmp_path / "run").as_posix() for p in (tmp_path / "run").rglob("*")}
    pushed = set(hub.files()) - {".gitattributes"}
    stays = {path for path in written if not path.startswith(("state", "logs"))} - pushed
    # The folder itself, a table whose figures are in metrics.json too, a page with images.
    assert stays == {"plots", "per_class.csv", "report.html"}
    assert {CONFIG, WEIGHTS, CARD, "metrics.json", "recipe.yaml"} <= pushed
    card = ModelCard.load(hub.repo_id)
    assert (card.data.license, card.data.datasets) == ("mit", ["digits_lt"])
    assert HfApi().model_info(hub.repo_id).private
    # A finished run that is resumed has nothing new to push.
    assert train_lt.main([*run, "--resume"]) == 0
    assert hub.changed() == []


def test_the_main_job_asks_the_hub_before_it_trains(loopback_hub, tmp_path, capsys, monkeypatch):
    run = [*RECIPE, "--output", str(tmp_path / "run")]
    for token, repo_id, message in (
        (loopback_hub.READER, "me/birds", "the token may only read"),
        ("hf_nonsense", "me/birds", "the token is not valid"),
        (loopback_hub.WRITER, "birds", "expected 'namespace/name'"),
        (loopback_hub.WRITER, "me/birds@dev", "must be NAMESPACE/NAME"),
        (loopback_hub.WRITER, "you/birds", "you/birds: the token is for me"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        assert train_lt.main([*run, "--push_to_hub", repo_id]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_whose_push_fails_says_how_to_push_it(loopback_hub, tmp_path, capsys):
    loopback_hub.fault("POST", "/commit/", status=403)
    folder = tmp_path / "run"
    assert train_lt.main([*RECIPE, "--output", str(folder), "--push_to_hub", "me/birds"]) == 2
    assert f"timm-lt push {folder} me/birds" in capsys.readouterr().err
    loopback_hub.clear_faults()
    assert main(["push", str(folder), "me/birds"]) == 0
    assert WEIGHTS in loopback_hub.files("me/birds")
