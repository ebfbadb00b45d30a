"""Folded models on disk: plain timm and onnxruntime load what ``timm-lt fold`` writes."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from conftest import fill
from torch import nn

import timm_lt
from timm_lt.checkpoint import find_entry, read_checkpoint
from timm_lt.cli import main
from timm_lt.heads import HEADS, find_classifiers, get_heads
from timm_lt.models.fold import write_folded
from timm_lt.models.pretrained import CHECKPOINTS
from timm_lt.utils.checks import UsageError

PACKAGED = CHECKPOINTS / "lt_test_resnet.glyph_lt"


def images(channels=3, pixels=32, number=5):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(number, channels, pixels, pixels, generator=generator)


def plain_timm(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def logits_elsewhere(server, script, path, x):
    """Logits of 1 and of all images, by a process without timm_lt; ``script`` makes ``model``."""
    script = (
        "import sys, numpy, torch\n"
        f"{script}\n"
        f"x = torch.from_numpy(numpy.load(r'{path}.x.npy'))\n"
        "y = [model(x[:number]).detach().numpy() for number in (1, len(x))]\n"
        f"numpy.savez(r'{path}.y.npz', *y)\n"
        "assert 'timm_lt' not in sys.modules\n"
    )
    np.save(f"{path}.x.npy", x.numpy())
    plain = server.python(script)
    assert plain.status == 0, plain.err
    return [torch.from_numpy(y) for y in np.load(f"{path}.y.npz").values()]


BY_TIMM = "import timm; model = timm.create_model('local-dir:{}', pretrained=True).eval()"
# timm cannot be imported.
BY_TORCH = """
for name in [name for name in sys.modules if name.split('.')[0] == 'timm'] + ['timm']:
    sys.modules[name] = None
model = torch.export.load(r'{}').module()
"""


@pytest.mark.slow
def test_the_command_writes_what_plain_timm_loads_and_onnxruntime(plain_server, tmp_path, capsys):
    ship = tmp_path / "ship"
    arguments = ["--head", "tau_norm", "--option", "tau=0.4", "--onnx", "--program"]
    assert main(["fold", str(PACKAGED), str(ship), *arguments]) == 0
    out = capsys.readouterr().out
    assert "tau_norm folded, the same logits" in out
    assert ", onnxruntime " in out
    assert ", torch.export " in out
    model = timm_lt.create_model(f"local-dir:{PACKAGED}", head="tau_norm", tau=0.4).eval()
    x = images()
    with torch.no_grad():
        expected = model(x)
    for script, path in ((BY_TIMM, ship), (BY_TORCH, ship / "model.pt2")):
        for logits in logits_elsewhere(plain_server, script.format(path), path, x):
            torch.testing.assert_close(logits, expected[: len(logits)], rtol=1e-4, atol=1e-5)
    session = onnxruntime.InferenceSession(ship / "model.onnx")
    for number in (1, 5):
        (logits,) = session.run(["logits"], {"images": x[:number].numpy()})
        np.testing.assert_allclose(logits, expected[:number].numpy(), rtol=1e-3, atol=1e-4)
    config = json.loads((tmp_path / "ship" / "config.json").read_text())
    assert "timm_lt" not in config
    assert len(config["label_names"]) == 100


@torch.no_grad()
def test_several_heads_get_a_folder_each(tmp_path, capsys):
    heads = ["crt", "lws", "ncm", "logit_adjusted"]
    assert main(["fold", "lt_test_resnet.glyph_lt", str(tmp_path), "--head", *heads]) == 0
    assert capsys.readouterr().out.count("\n") == 4
    for head in heads:
        plain = plain_timm(tmp_path / head)
        assert type(plain.fc) is nn.Linear
        logits = plain(images())
        expected = timm_lt.create_model(f"local-dir:{PACKAGED}", head=head).eval()(images())
        assert torch.equal(logits.argmax(1), expected.argmax(1))
        if head != "ncm":
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        UsageError, match=r"unknown head of x: 'nope'.*: linear, crt, tau_norm, lws"
    ):
        find_entry(read_checkpoint(PACKAGED), "nope", "x")


def test_a_folded_folder_is_folded_again(tmp_path, capsys):
    ship, again = str(tmp_path / "ship"), str(tmp_path / "again")
    assert main(["fold", str(PACKAGED), ship, "--head", "crt"]) == 0
    # It is a checkpoint of timm's own, from which heads that need no fit can be made.
    arguments = ["--head", "tau_norm", "--option", "tau=0.0"]
    assert main(["fold", f"local-dir:{ship}", again, *arguments]) == 0
    assert torch.equal(plain_timm(ship).fc.weight, plain_timm(again).fc.weight)
    names = [json.loads((Path(f) / "config.json").read_text()) for f in (ship, again)]
    assert names[0]["label_names"] == names[1]["label_names"]
    capsys.readouterr()
    assert main(["fold", ship, ship, "--overwrite"]) == 2
    assert "same folder" in capsys.readouterr().err


def test_a_background_that_a_folded_folder_does_not_record_is_logged(tmp_path, capsys):
    source = shutil.copytree(PACKAGED, tmp_path / "run")
    config = json.loads((source / "config.json").read_text())
    for background, said in (("#ffffff", False), ("#000000", True)):
        config["timm_lt"]["background"] = background
        (source / "config.json").write_text(json.dumps(config))
        assert main(["fold", str(source), str(tmp_path / "ship"), "--overwrite"]) == 0
        assert ("pass it to predict: --background '#000000'" in capsys.readouterr().out) == said


def test_several_heads_are_folded_into_folders_of_their_own(tmp_path):
    ship, heads = tmp_path / "ship", ["--head", "crt", "tau_norm"]
    arguments = ["fold", str(PACKAGED), str(ship)]
    assert main([*arguments, *heads]) == 0
    # All or nothing: the second replaces the first as a whole.
    assert main([*arguments, *heads]) == 2
    assert main([*arguments, "--overwrite"]) == 2
    assert main([*arguments, *heads, "--overwrite"]) == 0
    assert sorted(path.name for path in ship.iterdir()) == ["crt", "tau_norm"]


DEIT = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32}
CLASSIFIERS = [
    ("deit_tiny_distilled_patch16_224", DEIT),
    ("repvit_m0_9", {"embed_dim": (8, 16, 24, 32), "depth": (1, 1, 1, 1)}),
    ("resnetv2_18", {"layers": (1, 1, 1, 1), "channels": (16, 16, 16, 32)}),
    ("test_resnet", {"in_chans": 1}),
]


@pytest.mark.parametrize(("name", "arguments"), CLASSIFIERS)
@pytest.mark.parametrize("head", ["lws", "ncm"])
@torch.no_grad()
def test_every_kind_of_classifier_goes_through_checkpoint_and_fold(
    name, arguments, head, tmp_path, capsys
):
    torch.manual_seed(0)
    model, cls = timm.create_model(name, num_classes=6, **arguments).eval(), HEADS[head]
    for classifier in find_classifiers(model).values():
        classifier.reset_parameters()
    fitted = {path: fill(cls.from_classifier(joint)) for path, joint in get_heads(model).items()}
    only = next(iter(fitted.values())) if len(fitted) == 1 else fitted
    run, ship = tmp_path / "run", tmp_path / "ship"
    timm_lt.save_checkpoint(run, model, heads={"x": only}, class_counts=[5] * 6)
    pixels = arguments.get("img_size", model.pretrained_cfg["input_size"][-1])
    x = images(arguments.get("in_chans", 3), pixels, number=2)
    expected = timm_lt.set_head(model, fitted)(x)
    assert torch.equal(timm_lt.create_model(f"local-dir:{run}", head="x").eval()(x), expected)
    assert main(["fold", str(run), str(ship), "--head", "x"]) == 0
    if head == "ncm":
        assert "the same predictions" in capsys.readouterr().out
        # Cosines of two classifiers are not weighted as their folded logits are.
        assert len(fitted) > 1 or torch.equal(plain_timm(ship)(x).argmax(1), expected.argmax(1))
    else:
        torch.testing.assert_close(plain_timm(ship)(x), expected, rtol=1e-4, atol=1e-4)


def reversed_classes(self, fold):
    plain = fold(self)
    plain.weight.data = plain.weight.data.roll(1, 0)
    return plain


@pytest.mark.parametrize(("head", "noun"), [("lws", "logits"), ("ncm", "predictions")])
def test_a_difference_is_an_error_and_leaves_nothing(head, noun, tmp_path, capsys, monkeypatch):
    """Breaks the fold on purpose: the command must notice by itself."""
    fold = HEADS[head].fold
    monkeypatch.setattr(HEADS[head], "fold", lambda self: reversed_classes(self, fold))
    assert main(["fold", str(PACKAGED), str(tmp_path / "ship"), "--head", head]) == 2
    assert f"gives other {noun} than the model with the head" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_folded_says_so(tmp_path):
    model = timm_lt.create_model("test_resnet", num_classes=4)
    head = fill(timm_lt.create_head("ncm", 96, 4, metric="euclidean", features="l2"))
    with pytest.raises(UsageError, match="not linear in the features"):
        write_folded(tmp_path, timm_lt.set_head(model, head))
    with pytest.raises(UsageError, match="not fitted yet"):
        write_folded(tmp_path, timm_lt.create_model("test_resnet", num_classes=4, head="lws"))
    # A classifier without a bias cannot hold the adjustment, and timm would not load one.
    bare = timm.create_model("test_resnet", num_classes=4)
    bare.fc = nn.Linear(96, 4, bias=False)
    timm_lt.set_head(bare, "logit_adjusted", class_counts=[1, 2, 3, 4])
    with pytest.raises(UsageError, match="needs a bias, but the classifier 'fc' of timm's ResNet"):
        write_folded(tmp_path, bare)
    assert list(tmp_path.iterdir()) == []


def test_exports_that_are_not_possible_are_one_line(tmp_path, monkeypatch):
    class Odd(type(timm.create_model("test_resnet"))):
        def forward(self, x):
            logits = super().forward(x)
            return logits + float(logits.sum()) * 0  # needs a number, not a symbol

    model = timm.create_model("test_resnet", num_classes=4).eval()
    monkeypatch.setattr("timm_lt.models.fold.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'timm_lt\[onnx\]'"):
        write_folded(tmp_path, model, onnx=True)
    assert list(tmp_path.iterdir()) == []
    model.__class__ = Odd
    with pytest.raises(UsageError, match=r"^torch cannot export Odd to model.pt2: "):
        write_folded(tmp_path, model, program=True)


MISTAKES = [
    ([str(PACKAGED), "x", "--head", "crt", "--option", "tau=1"], "no option 'tau'"),
    ([str(PACKAGED), "x" * 300], "cannot be written"),
    (["nowhere", "x"], "no such folder"),
    (["lt_resnet10", "x"], "unknown checkpoint"),
    ([str(PACKAGED), "x", "--head", "nc"], "did you mean 'ncm'"),
    ([str(PACKAGED), "thesis", "--overwrite"], "holds more than a checkpoint"),
]


@pytest.mark.parametrize(("arguments", "word"), MISTAKES)
def test_mistakes_are_one_line(arguments, word, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("precious")
    assert main(["fold", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert word in error
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "a.tex"]
