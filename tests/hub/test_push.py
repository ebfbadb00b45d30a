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
ALL = sorted(
    path.relative_to(PACKAGED).as_posix() for path in PACKAGED.rglob("*") if path.is_file()
)
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
    if hub.server:
        hub.server.forget()
    return hub


def load(hub, head=None, *, revision=None, **options):
    name = f"hf-hub:{hub.repo_id}" + (f"@{revision}" if revision else "")
    return timm_lt.create_model(name, head=head, cache_dir=hub.cache, **options).eval()


def logits(model):
    with torch.no_grad():
        return model(IMAGES)


def local_logits(head=None, **options):
    return logits(timm_lt.create_model(f"local-dir:{PACKAGED}", head=head, **options).eval())


def add_tau(hub, name, tau=0.25, **options):
    """Publishes one more head, which needs no file."""
    head = HEADS["tau_norm"].from_classifier(load(hub).fc, tau=tau)
    return timm_lt.add_head(hub.repo_id, name, head, cache_dir=hub.cache, **options)


# ---- push ----------------------------------------------------------------------------------------


def test_push_makes_one_commit_with_the_checkpoint_and_nothing_else(hub, folder):
    assert timm_lt.push_to_hub(folder, hub.repo_id, private=True).changed
    assert sorted(set(hub.files()) - {".gitattributes"}) == ALL
    assert len(hub.commits()) == 2  # the hub's own first one, and ours
    assert HfApi().model_info(hub.repo_id).private
    if hub.server:
        assert hub.server.uploads() == ALL
        content = hub.server.files(hub.repo_id)
        for path in set(ALL) - {CARD}:
            assert content[path] == (PACKAGED / path).read_bytes(), path
        hub.server.forget()
    # Unchanged, it uploads nothing.
    assert not timm_lt.push_to_hub(folder, hub.repo_id).changed
    assert hub.changed() == []
    assert len(hub.commits()) == 2
    assert not hub.server or hub.server.uploads() == []


def with_one_more(folder, name="mine"):
    """Saves the checkpoint again with one more head."""
    info, model = read_checkpoint(folder), timm_lt.create_model(f"local-dir:{folder}")
    heads = {key: load_heads(folder, key, model) for key in info.heads}
    heads[name] = fill(HEADS["lws"].from_classifier(model.fc))
    save_checkpoint(
        folder,
        model,
        heads=heads,
        class_counts=info.class_counts,
        metrics={key: entry.metrics for key, entry in info.heads.items()} | {name: {"all": 0.5}},
        label_names=info.label_names,
        dataset=info.dataset,
        shot_rule=info.shot_rule,
        seed=info.seed,
        dtype=torch.float16,
    )
    return heads[name]


def test_one_more_head_uploads_that_head_the_card_and_the_config(pushed, folder):
    head = with_one_more(folder)
    timm_lt.push_to_hub(folder, pushed.repo_id)
    assert pushed.changed() == sorted([CARD, CONFIG, "heads/mine.safetensors"])
    if pushed.server:
        assert pushed.server.uploads() == sorted([CARD, CONFIG, "heads/mine.safetensors"])
    features = torch.randn(3, 96)
    loaded = get_head(load(pushed, "mine"))
    torch.testing.assert_close(loaded(features), head(features), rtol=1e-2, atol=1e-2)


def test_a_branch_a_tag_and_a_commit(pushed, folder):
    with_one_more(folder)
    done = timm_lt.push_to_hub(folder, pushed.repo_id, revision="next")
    assert "heads/mine.safetensors" not in pushed.files()
    HfApi().create_tag(pushed.repo_id, tag="v1", revision=done.commit)
    for revision in ("next", "v1", done.commit):
        assert get_head(load(pushed, "mine", revision=revision)).kind == "lws"
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
    assert main(["push", str(PACKAGED), pushed.repo_id, "--overwrite", "--message", "Less"]) == 0
    assert pushed.changed() == sorted([CARD, CONFIG, "heads/mine.safetensors"])
    assert "heads/mine.safetensors" not in pushed.files()
    assert pushed.commits()[0] == "Less"
    assert f"pushed to {HfApi().endpoint}/{pushed.repo_id}, commit" in capsys.readouterr().out


@pytest.mark.parametrize("private", [True, False])
def test_a_repo_of_the_other_visibility_is_refused(loopback_hub, private):
    HfApi().create_repo("me/birds", private=private)
    loopback_hub.forget()
    there = "private" if private else "public"
    with pytest.raises(UsageError, match=f"exists and is {there}; change that in its settings"):
        timm_lt.push_to_hub(PACKAGED, "me/birds", private=not private)
    assert loopback_hub.uploads() == []


def test_a_repo_with_an_ignore_file_is_refused(loopback_hub):
    loopback_hub.create("me/birds", {".gitignore": b"*.safetensors\n"})
    with pytest.raises(UsageError, match=r"has a \.gitignore, which may keep files out"):
        timm_lt.push_to_hub(PACKAGED, "me/birds")
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
    load(pushed, "crt")
    (snapshot,) = pushed.cache.glob("models--*/snapshots/*")
    for name in ("lws", "ncm"):
        load(pushed, name)
    assert any(path.is_symlink() for path in snapshot.rglob("*"))
    assert timm_lt.push_to_hub(snapshot, pushed.repo_id, revision="copy").changed
    gone = ["plots/calibration.png", "metrics.json", "recipe.yaml"]
    for path in gone:
        (folder / path).unlink()
    HfApi().upload_file(
        path_or_fileobj=b"mine", path_in_repo="plots/mine.txt", repo_id=pushed.repo_id
    )
    pushed.files()
    timm_lt.push_to_hub(folder, pushed.repo_id)
    assert pushed.changed() == sorted([CARD, *gone])


def test_a_token_can_be_given(loopback_hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    token = {"token": loopback_hub.WRITER}
    timm_lt.push_to_hub(PACKAGED, "me/birds", private=True, **token)
    timm_lt.push_to_hub(PACKAGED, "me/birds", **token)
    model = timm_lt.create_model("hf-hub:me/birds", cache_dir=tmp_path, **token)
    tau = HEADS["tau_norm"].from_classifier(model.fc, tau=0.25)
    timm_lt.add_head("me/birds", "mine", tau, cache_dir=tmp_path, **token)
    assert "mine" in timm_lt.list_repo_heads("me/birds", cache_dir=tmp_path, **token)
    with pytest.raises(UsageError, match="token only applies to names that start with hf-hub:"):
        timm_lt.create_model("lt_test_resnet", **token)


def test_a_card_that_a_person_edited_keeps_its_text(pushed, folder):
    with_one_more(folder)
    timm_lt.push_to_hub(folder, pushed.repo_id)
    card = ModelCard.load(pushed.repo_id)
    assert "`mine`" in card.text
    assert card.data.license == "apache-2.0"
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


BAD_FOLDERS = {
    "altered weights": (WEIGHTS, b"x", "is not the file that config.json describes"),
    "altered head": ("heads/crt.safetensors", b"x", "crt.safetensors is missing or altered"),
    "a picture that is none": ("plots/calibration.png", b"#!/bin/sh", "is not a PNG file"),
    "metrics": ("metrics.json", b"{", "is not a readable JSON file"),
    "recipe": ("recipe.yaml", b"a: [", "is not valid YAML"),
    "card": (CARD, b"---\n: [\n---\n# Mine\n", CARD),
    "config": (CONFIG, b"{}", "architecture must be a string"),
}


@pytest.mark.parametrize(("path", "content", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_an_incomplete_folder_is_not_pushed(loopback_hub, folder, path, content, message):
    (folder / path).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        timm_lt.push_to_hub(folder, "me/birds")
    assert loopback_hub.uploads() == []


# ---- load ----------------------------------------------------------------------------------------


def test_loading_downloads_config_backbone_and_one_head(pushed):
    assert torch.equal(logits(load(pushed, "lws")), local_logits("lws"))
    assert pushed.on_the_wire() == [CONFIG, "heads/lws.safetensors", WEIGHTS]
    if pushed.server:
        pushed.server.forget()
    assert torch.equal(logits(load(pushed, "crt")), local_logits("crt"))
    if pushed.server:
        assert pushed.server.downloads() == ["heads/crt.safetensors"]
        pushed.server.forget()
    for head, options in (("tau_norm", {"tau": 0.5}), ("logit_adjusted", {}), ("lws", {})):
        assert torch.equal(logits(load(pushed, head, **options)), local_logits(head, **options))
    assert torch.equal(logits(load(pushed)), local_logits())
    if pushed.server:
        assert pushed.server.downloads() == []
    expected = [CONFIG, "heads/crt.safetensors", "heads/lws.safetensors", WEIGHTS]
    assert pushed.downloaded() == expected
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
    assert float(done.out) == pytest.approx(local_logits().double().sum().item(), rel=1e-6)
    assert pushed.on_the_wire() == [CONFIG, WEIGHTS]


OFFLINE = {
    "HF_HUB_OFFLINE is set": {"HF_HUB_OFFLINE": "1", "HF_TOKEN": ""},
    "http://127.0.0.1:9 cannot be reached": {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_ETAG_TIMEOUT": "1",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "reason",
    [reason if "OFF" in reason else pytest.param(reason, marks=pytest.mark.exhaustive)
     for reason in OFFLINE],
)  # fmt: skip
def test_without_a_network_the_cache_serves(pushed, reason):
    load(pushed, "lws")
    code = f"""
import time, types
from huggingface_hub.utils import _http
import timm_lt
import train_lt
images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
model = timm_lt.create_model("hf-hub:{pushed.repo_id}", head="lws", cache_dir=r"{pushed.cache}")
print(model.eval()(images).detach().double().sum().item())
_http.time = types.SimpleNamespace(**vars(time) | {{"sleep": lambda _: None}})
timm_lt.create_model("hf-hub:{pushed.repo_id}", head="crt", cache_dir=r"{pushed.cache}")
"""
    done = subprocess.run(
        [sys.executable, "-c", f"import torch\n{code}"],
        env={**os.environ, **OFFLINE[reason]},
        capture_output=True,
        text=True,
        check=False,
    )
    expected = local_logits("lws").double().sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-6), done.stderr
    assert done.returncode != 0
    assert f"crt.safetensors of {pushed.repo_id} is not in the cache, and {reason}" in done.stderr


def test_a_private_repo_needs_a_token(pushed, monkeypatch):
    token = os.environ["HF_TOKEN"]
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UsageError, match=r"or it is private; .*hf auth login"):
        load(pushed, "lws")
    assert pushed.downloaded() == []
    assert get_head(load(pushed, "lws", token=token)).kind == "lws"
    monkeypatch.setenv("HF_TOKEN", token)
    assert get_head(load(pushed, "crt")).kind == "crt"


def test_heads_are_listed_without_weights(pushed, capsys):
    heads = timm_lt.list_repo_heads(pushed.repo_id, cache_dir=pushed.cache)
    assert pushed.on_the_wire() == [CONFIG]
    metrics = json.loads((PACKAGED / "metrics.json").read_text())
    assert list(heads) == list(metrics["heads"])
    assert heads["tau_norm"].options["tau"] == metrics["selection"]["tau_norm"]["tau"]
    assert heads["crt"].metrics["few_shot"] == metrics["heads"]["crt"]["few_shot"]
    assert main(["list", pushed.repo_id]) == 0
    shown = capsys.readouterr().out
    assert main(["list", str(PACKAGED)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == shown.splitlines()[1:]
    (row,) = [line for line in shown.splitlines() if line.split()[:1] == ["crt"]]
    assert f"{100 * metrics['heads']['crt']['few_shot']:.1f}" in row


@pytest.fixture
def published(pushed, tmp_path, monkeypatch):
    """A file of ``hub_configs/`` that names the repo, registered as the shipped ones are."""
    path = tmp_path / "lt_test_resnet.birds.yaml"
    source = Path(timm_lt.__file__).parent.parent / "hub_configs" / "lt_test_resnet.glyph_lt.yaml"
    text = source.read_text()
    assert "  packaged: true\n" in text
    path.write_text(text.replace("  packaged: true\n", f"  hf_hub_id: {pushed.repo_id}\n"))
    config = timm.models.PretrainedCfg(**_cfg(read_published(path)), architecture="lt_test_resnet")
    monkeypatch.setitem(_registry._model_pretrained_cfgs, "lt_test_resnet.birds", config)
    return pushed


def test_a_published_name_resolves_through_its_repo(published):
    def create(head, **options):
        options |= {"pretrained": True, "cache_dir": published.cache}
        return timm.create_model("lt_test_resnet.birds", head=head, **options).eval()

    assert torch.equal(logits(create("lws")), local_logits("lws"))
    assert published.on_the_wire() == [CONFIG, "heads/lws.safetensors", WEIGHTS]
    assert torch.equal(logits(create("tau_norm", tau=0.3)), local_logits("tau_norm", tau=0.3))
    add_tau(published, "quarter")
    own = get_head(create("quarter", keep_bias=True))
    assert own.options() == {"tau": 0.25, "keep_bias": True}
    with pytest.raises(UsageError, match=r"unknown head of .*'cosine'"):
        create("cosine")


def test_a_repo_is_folded_and_listed_by_its_names(pushed, tmp_path, capsys):
    commit = HfApi().model_info(pushed.repo_id).sha
    for k, name in enumerate(
        [f"hf-hub:{pushed.repo_id}", pushed.repo_id, f"{pushed.repo_id}@main"]
    ):
        # All of one commit, whatever happens to the branch meanwhile.
        assert ModelSource.find(name).name == f"hf-hub:{pushed.repo_id}@{commit}"
        ship = tmp_path / str(k)
        assert main(["fold", name, str(ship), "--head", "crt"]) == 0
        plain = timm.create_model(f"local-dir:{ship}", pretrained=True).eval()
        torch.testing.assert_close(logits(plain), local_logits("crt"), rtol=1e-4, atol=1e-4)
        assert len(json.loads((ship / CONFIG).read_text())["label_names"]) == 100
        capsys.readouterr()
        assert main(["list", name]) == 0
        assert "logit_adjusted" in capsys.readouterr().out
    assert main(["fold", f"{pushed.repo_id}x", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: no folder {pushed.repo_id}x, and as a repo of the Hub")
    assert error.count("\n") == 1


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


def test_add_head_leaves_the_backbone_alone(pushed):
    model = load(pushed)
    head = fill(HEADS["lws"].from_classifier(model.fc))
    report = timm_lt.shot_accuracy([0] * 100, range(100), read_checkpoint(PACKAGED).class_counts)
    done = timm_lt.add_head(pushed.repo_id, "mine", head, metrics=report, cache_dir=pushed.cache)
    assert done.changed
    assert pushed.changed() == sorted([CARD, CONFIG, "heads/mine.safetensors"])
    if pushed.server:
        assert pushed.server.uploads() == sorted([CARD, CONFIG, "heads/mine.safetensors"])
    features = torch.randn(3, 96)
    assert torch.equal(get_head(load(pushed, "mine"))(features), head.eval()(features))
    heads = timm_lt.list_repo_heads(pushed.repo_id, cache_dir=pushed.cache)
    assert heads["mine"].metrics["all"] == 0.01
    assert "`mine`" in ModelCard.load(pushed.repo_id).text
    assert torch.equal(logits(load(pushed, "crt")), local_logits("crt"))


def test_a_head_without_a_file_can_replace_one(pushed):
    head = fill(HEADS["lws"].from_classifier(load(pushed).fc))
    timm_lt.add_head(pushed.repo_id, "mine", head, cache_dir=pushed.cache)
    with pytest.raises(UsageError, match="has a head 'mine' already"):
        add_tau(pushed, "mine")
    pushed.files()
    add_tau(pushed, "mine", overwrite=True)
    assert pushed.changed() == sorted([CARD, CONFIG, "heads/mine.safetensors"])
    assert "heads/mine.safetensors" not in pushed.files()
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
def test_the_main_job_pushes_what_it_wrote(hub, tmp_path, capsys):
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
    assert "tau_norm" in capsys.readouterr().out


def test_the_main_job_asks_the_hub_before_it_trains(loopback_hub, tmp_path, capsys, monkeypatch):
    run = [*RECIPE, "--output", str(tmp_path / "run")]
    cases = [
        (loopback_hub.READER, "me/birds", "the token may only read"),
        ("hf_nonsense", "me/birds", "the token is not valid"),
        (loopback_hub.WRITER, "birds", "expected 'namespace/name'"),
        (loopback_hub.WRITER, "me/birds@dev", "must be NAMESPACE/NAME"),
        (loopback_hub.WRITER, "you/birds", "you/birds: the token is for me"),
    ]
    for token, repo_id, message in cases:
        monkeypatch.setenv("HF_TOKEN", token)
        assert train_lt.main([*run, "--push_to_hub", repo_id]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert train_lt.main([*run, "--private"]) == 2
    assert "--push_to_hub NAMESPACE/NAME" in capsys.readouterr().err
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
