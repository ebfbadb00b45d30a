"""``timm-lt convert``: weights of other projects become a decoupled checkpoint."""

import json

import pytest
import timm
import torch
from authors import authors_file, moved, random_state

import timm_lt
from timm_lt.checkpoint import read_checkpoint
from timm_lt.cli import main
from timm_lt.models.lt_resnet import ARCHITECTURES

SCALES = torch.linspace(0.5, 2, 10)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The three files of a published model: joint, re-trained, and with learned scales."""
    folder = tmp_path_factory.mktemp("files")
    joint = random_state("lt_resnet32", 10)
    classifier = {key: joint[key] for key in ("fc.weight", "fc.bias")}
    states = {"joint": joint, "crt": moved(joint, 1), "lws": {**moved(joint, 2), **classifier}}
    for name, state in states.items():
        content = authors_file(state, SCALES if name == "lws" else None, old=name != "lws")
        (folder / f"{name}.pth").write_bytes(content)
    return folder, states


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def logits(state, images, scales=None):
    """timm's plain model with these weights, as its own code computes them."""
    model = ARCHITECTURES["lt_resnet32"].build(num_classes=10).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        found = model(images)
    return found if scales is None else found * scales


def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def head_logits(folder, head, **options):
    return timm_lt.create_model(f"local-dir:{folder}", head=head, **options).eval()(images())


def test_joint_file_and_heads_with_their_statistics(files, tmp_path, capsys):
    folder, states = files
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps({str(label): label + 10 for label in range(10)}))
    arguments = [f"{folder}/joint.pth", str(tmp_path / "net"), "--class-counts", str(counts)]
    heads = ["--head", f"crt={folder}/crt.pth", "--head", f"lws={folder}/lws.pth"]
    assert main(["convert", *arguments, *heads]) == 0
    out = capsys.readouterr().out
    assert "lt_resnet32.cifar10_lt (by shape), 10 classes, heads linear, crt, lws" in out
    info = read_checkpoint(tmp_path / "net")
    assert info.class_counts == list(range(10, 20))
    own = {name for name, entry in info.heads.items() if entry.backbone_statistics}
    assert own == {"crt", "lws"}
    close = {"rtol": 1e-5, "atol": 1e-5}
    for name, state, scales in (
        (None, states["joint"], None),
        ("linear", states["joint"], None),
        ("crt", states["crt"], None),
        ("lws", states["lws"], SCALES),
    ):
        expected = logits(state, images(), scales)
        torch.testing.assert_close(head_logits(tmp_path / "net", name), expected, **close)
    prior = torch.arange(10, 20) / sum(range(10, 20))
    adjusted = logits(states["joint"], images()) - prior.log()
    torch.testing.assert_close(head_logits(tmp_path / "net", "logit_adjusted"), adjusted, **close)
    # Half precision keeps the statistics, and a folded head has them in the backbone.
    assert main(["pack", str(tmp_path / "net"), str(tmp_path / "half")]) == 0
    assert main(["fold", str(tmp_path / "net"), str(tmp_path / "ship"), "--head", "crt"]) == 0
    assert "import timm_lt before timm loads it" in capsys.readouterr().out
    plain = timm.create_model(f"local-dir:{tmp_path / 'ship'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(images()), logits(states["crt"], images()), **close)
    half = head_logits(tmp_path / "half", "crt")
    torch.testing.assert_close(half, logits(states["crt"], images()), rtol=0.02, atol=0.02)


def test_a_file_with_scales_alone_has_both_classifiers(files, tmp_path):
    folder, states = files
    assert main(["convert", f"{folder}/lws.pth", str(tmp_path / "net")]) == 0
    assert list(read_checkpoint(tmp_path / "net").heads) == ["linear", "lws"]
    for head, scales in (("linear", None), ("lws", SCALES)):
        expected = logits(states["lws"], images(), scales)
        found = head_logits(tmp_path / "net", head)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # Nobody said how many training images the classes have.
    with pytest.raises(timm_lt.UsageError, match="class_counts="):
        head_logits(tmp_path / "net", "logit_adjusted")
    counts = [1] * 10
    equal = head_logits(tmp_path / "net", "logit_adjusted", class_counts=counts)
    assert torch.equal(equal.argmax(1), head_logits(tmp_path / "net", None).argmax(1))


BIASED = {"fc.bias": torch.ones(10)}
FOREIGN = {
    "another conv1.weight than": lambda _: authors_file(random_state("lt_resnet32", 10, seed=9)),
    "is (100, 64), not (10, 64)": lambda _: authors_file(random_state("lt_resnet32", 100)),
    "another fc.bias than the checkpoint": lambda lws: authors_file({**lws, **BIASED}, SCALES),
    "scales is (5,), not (10,)": lambda lws: authors_file(lws, SCALES[:5]),
}


@pytest.mark.parametrize("message", FOREIGN)
def test_a_head_that_does_not_belong_is_refused(message, files, tmp_path, capsys):
    folder, states = files
    (tmp_path / "other.pth").write_bytes(FOREIGN[message](states["lws"]))
    arguments = [f"{folder}/joint.pth", str(tmp_path / "net")]
    assert main(["convert", *arguments, "--head", f"x={tmp_path / 'other.pth'}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other.pth"]


MISTAKES = [
    (["nothing.pth"], "nothing.pth cannot be read"),
    (["vit.pth"], "name its architecture with --model"),
    (["lt_resnet10.imagenet_lt"], "no files to convert"),
    (["joint.pth", "--model", "resnet50"], "does not fit resnet50"),
    (["joint.pth", "--model", "resnet5"], "unknown architecture 'resnet5'"),
    (["joint.pth", "--model", "lt_resnet32.cifar100_lt"], "with 100 classes"),
    (["joint.pth", "--head", "crt"], "NAME=URL_OR_FILE"),
    (["joint.pth", "--head", "lws=crt.pth"], "'lws' is the name of another kind"),
    (["joint.pth", "--head", "a/b=crt.pth"], "heads.a/b may have ASCII"),
    (["joint.pth", "--head", "a=crt.pth", "--head", "a=lws.pth"], "each NAME once"),
    (["joint.pth", "--class-counts", "joint.pth"], "cannot be read"),
    (["joint.pth", "--class-counts", "few.json"], "class_counts has 3 classes, expected 10"),
    (["ftp://host/x.pth"], "http"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_mistakes_are_one_line(arguments, words, files, tmp_path, capsys, monkeypatch):
    folder, _ = files
    monkeypatch.chdir(folder)
    torch.save(timm.create_model("test_vit").state_dict(), folder / "vit.pth")
    (folder / "few.json").write_text("[1, 2, 3]")
    source, *options = arguments
    assert main(["convert", source, str(tmp_path / "net"), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert words in error
    assert not (tmp_path / "net").exists()
