"""Published names, their weights in the layout of Kang et al., the packaged ones, and URLs."""

import copy
import dataclasses
import io
import json
import os
import pickle  # noqa: TID251
import re
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torchvision
from authors import authors_file, moved, random_state
from loopback import FileServer
from safetensors import safe_open
from timm.models import _registry
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import timm_lt
from timm_lt.cli import main
from timm_lt.data import create_splits
from timm_lt.models.convert import convert_checkpoint
from timm_lt.models.lt_resnet import ARCHITECTURES, expected_state
from timm_lt.models.networks import CifarResNet
from timm_lt.models.pretrained import CHECKPOINTS, PUBLISHED, PublishedHead, cached_name, read_url
from timm_lt.utils.checks import UsageError

HOST = "https://dl.fbaipublicfiles.com/classifier-balancing"
# As the README of the authors' repository lists them.
IMAGENET, INAT = "ImageNet_LT/models", "iNaturalist18/models"
OFFICIAL = {
    "lt_resnext50.imagenet_lt": f"{IMAGENET}/resnext50_uniform_e90",
    "lt_resnext50.imagenet_lt_class_balanced": f"{IMAGENET}/resnext50_balance_e90",
    "lt_resnext50.imagenet_lt_square_root": f"{IMAGENET}/resnext50_square_e90",
    "lt_resnext50.imagenet_lt_progressively_balanced": f"{IMAGENET}/resnext50_shift_e90",
    **{
        f"lt_{name}.imagenet_lt": f"{IMAGENET}/{name}_uniform_e90"
        for name in ("resnet50", "resnet101", "resnet152", "resnext101", "resnext152")
    },
    **{
        f"lt_resnet{depth}.inat2018{tag}": f"{INAT}/resnet{depth}_uniform_e{epochs}"
        for depth in (50, 101, 152)
        for tag, epochs in (("_e90", 90), ("", 200))
    },
    "lt_resnet152.places_lt": "Places_LT/models/resnet152_uniform",
}
OFFICIAL_HEADS = {
    "lt_resnext50.imagenet_lt": "ImageNet_LT/clslearn/resnext50_{}_uni2bal",
    "lt_resnet152.inat2018": "iNaturalist18/clslearn/resnet152_{}_uni2bal",
    "lt_resnet152.places_lt": "Places_LT/clslearn/resnet152_{}_uni2bal",
}
WITHOUT_WEIGHTS = {
    *("lt_resnet10.imagenet_lt", "lt_resnet32.cifar10_lt", "lt_resnet32.cifar100_lt"),
    *("lt_oltr_resnet10.imagenet_lt", "lt_bbn_resnet32.cifar10_lt", "lt_bbn_resnet32.cifar100_lt"),
    *("lt_bbn_resnet50.inat2018", "lt_bbn_resnet50.inat2018_e90"),
}
PACKAGED = "lt_test_resnet.glyph_lt"


def test_every_published_file_has_a_name_and_a_cached_name_of_its_own():
    urls = {(name, "linear"): f"{HOST}/{path}.pth" for name, path in OFFICIAL.items()}
    for name, path in OFFICIAL_HEADS.items():
        urls |= {(name, head): f"{HOST}/{path.format(head)}.pth" for head in ("crt", "lws")}
    assert {
        (name, head): url for name, entry in PUBLISHED.items() for head, url in entry.urls.items()
    } == urls
    assert len({cached_name(url) for url in urls.values()}) == len(urls) == 22


def test_the_registry_has_what_hub_configs_states():
    assert set(PUBLISHED) == {*OFFICIAL, *WITHOUT_WEIGHTS, PACKAGED}
    assert set(timm.list_models("lt_*")) == set(ARCHITECTURES)
    assert set(timm.list_pretrained("lt_*")) == {*OFFICIAL, PACKAGED}
    for name, entry in PUBLISHED.items():
        config = timm.models.get_pretrained_cfg(name)
        assert config.url == entry.urls.get("linear")
        for key in ("num_classes", "input_size", "mean", "std", "crop_pct", "interpolation"):
            assert getattr(config, key) == getattr(entry, key), (name, key)
    assert timm.models.get_pretrained_cfg("lt_resnet152").tag == "imagenet_lt"
    inat = timm.models.get_pretrained_cfg("lt_resnet50.inat2018")
    assert (inat.num_classes, inat.mean) == (8142, (0.466, 0.471, 0.380))
    with pytest.raises(UsageError, match="imagenet_lt, inat2018, inat2018_e90"):
        timm_lt.create_model("lt_resnet50.inat")


def reference(name):
    """torchvision's model of the same paper, whose keys are the published files'."""
    own = {
        "lt_resnet10": lambda: ResNet(BasicBlock, [1, 1, 1, 1]),
        "lt_resnext101": lambda: ResNet(Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4),
        "lt_resnext152": lambda: ResNet(Bottleneck, [3, 8, 36, 3], groups=32, width_per_group=4),
        "lt_resnext50": torchvision.models.resnext50_32x4d,
    }
    return own.get(name) or getattr(torchvision.models, name.removeprefix("lt_"))


OURS = {name for name, entry in ARCHITECTURES.items() if entry.make is not None}


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - OURS - {"lt_test_resnet"}))
def test_architectures_are_torchvisions(name):
    with torch.device("meta"):
        expected = {k: tuple(v.shape) for k, v in reference(name)().state_dict().items()}
    assert {k: tuple(v.shape) for k, v in expected_state(name, 1000).items()} == expected


def publish(monkeypatch, name, urls):
    """Lets a published name point to other URLs, in hub_configs' mirror and timm's registry."""
    heads = PUBLISHED[name].heads | {head: PublishedHead(url) for head, url in urls.items()}
    monkeypatch.setitem(PUBLISHED, name, dataclasses.replace(PUBLISHED[name], heads=heads))
    config = dataclasses.replace(_registry._model_pretrained_cfgs[name], url=urls["linear"])
    monkeypatch.setitem(_registry._model_pretrained_cfgs, name, config)


NAME = "lt_resnet32.cifar10_lt"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints" / "timm_lt"


@pytest.fixture
def small(monkeypatch, cache):
    """The smallest architecture, published in the authors' layout by a server on loopback."""
    state = random_state("lt_resnet32", 10)
    scales = torch.linspace(0.5, 2, 10)
    lws = {**moved(state, 2), "fc.weight": state["fc.weight"], "fc.bias": state["fc.bias"]}
    states = {"linear": state, "crt": moved(state, 1), "lws": lws}
    files = {
        "/a/models/net.pth": authors_file(state, old=True),
        "/a/clslearn/crt/net.pth": authors_file(states["crt"], old=True),
        "/a/clslearn/lws/net.pth": authors_file(lws, scales),
    }
    with FileServer(files) as server:
        paths = dict(zip(states, files, strict=True))
        publish(monkeypatch, NAME, {head: server.url(path) for head, path in paths.items()})
        yield server, states, scales, paths


def logits(network, state, images, head, scales=None):
    """Logits by a plain network with these weights, and by the formulas of the papers."""
    network = copy.deepcopy(network)
    network.load_state_dict(state)
    weight, bias = state["fc.weight"], state["fc.bias"]
    network.fc = torch.nn.Identity()
    with torch.no_grad():
        features = network.eval()(images)
    if head == "tau_norm":
        return features @ (weight / weight.norm(dim=1, keepdim=True) ** 0.7).T
    found = features @ weight.T + bias
    return found * scales if head == "lws" else found


@pytest.mark.parametrize("head", [None, "linear", "tau_norm", "crt", "lws"])
def test_a_published_head_computes_what_the_authors_files_say(head, small, cache):
    server, states, scales, paths = small
    options = {"tau": 0.7} if head == "tau_norm" else {}
    own, images = head if head in paths else "linear", torch.randn(4, 3, 32, 32)
    first, again = (
        timm.create_model(NAME, pretrained=True, head=head, **options).eval() for _ in range(2)
    )
    expected = logits(CifarResNet(), states[own], images, head, scales)
    with torch.no_grad():
        torch.testing.assert_close(first(images), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(again(images), first(images))
    # Exactly one file went over the wire, once.
    assert server.requests == [paths[own]]
    assert [p.name for p in cache.glob("*.pth")] == [cached_name(server.url(paths[own]))]
    assert "state_dict" not in first.pretrained_cfg


@torch.no_grad()
def test_a_head_with_its_own_statistics_is_not_swapped_for_another(small):
    crt, lws = (timm.create_model(NAME, pretrained=True, head=head) for head in ("crt", "lws"))
    for model, other in ((crt, timm_lt.create_head("linear", 64, 10)), (lws, "tau_norm")):
        with pytest.raises(UsageError, match=r"those of its \w+ head.*create the model again"):
            timm_lt.set_head(model, other)
    joint, images = timm.create_model(NAME, pretrained=True), torch.randn(2, 3, 32, 32)
    timm_lt.set_head(joint, crt.get_classifier())
    assert torch.equal(joint.eval()(images), crt.eval()(images))


def test_other_uses_of_a_published_name(small):
    _, states, _, _ = small
    features = timm.create_model(NAME, pretrained=True, features_only=True, head="lws")
    mean = features.state_dict()["bn1.running_mean"]
    assert torch.equal(mean, states["lws"]["bn1.running_mean"])
    headless = timm.create_model(NAME, pretrained=True, num_classes=0)
    assert torch.equal(headless.conv1.weight, states["linear"]["conv1.weight"])
    grey = timm.create_model(NAME, pretrained=True, in_chans=1, head="tau_norm")
    expected = states["linear"]["conv1.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(grey.conv1.weight, expected)
    seven = timm.create_model(NAME, pretrained=True, num_classes=7, head="lws")
    assert seven.get_classifier().weight.shape == (7, 64)


def test_a_mistake_shows_before_anything_is_downloaded(small, monkeypatch):
    server, _, _, _ = small
    for options, message in (
        ({"head": "tau"}, "unknown head 'tau'"),
        ({"head": "tau_norm", "tau": -1}, "tau must be"),
        ({"head": "lws", "scale_bias": False}, "published lws head .* scale_bias=True"),
        ({"colour": 1}, "'colour'"),
    ):
        with pytest.raises(UsageError, match=message):
            timm_lt.create_model(NAME, True, **options)
    publish(monkeypatch, "lt_resnet32.cifar100_lt", {"linear": server.url("/a/models/net.pth")})
    with pytest.raises(UsageError, match=r"no published crt head \(published: linear\)"):
        timm.create_model("lt_resnet32.cifar100_lt", pretrained=True, head="crt")
    assert server.requests == []


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["TIMM_LT_EVIL"],)


STATE = random_state("lt_resnet32", 10)
GOOD = authors_file(STATE)


def changed(name, value):
    return authors_file({**STATE, name: value})


def tampered():
    """A zip archive whose stored tensor was changed after it was written."""
    with zipfile.ZipFile(io.BytesIO(GOOD)) as archive:
        entry = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(GOOD)
    content[entry.header_offset + 200 : entry.header_offset + 204] = b"\xff\xff\xff\x7f"
    return bytes(content)


# Mistakes in the names of tensors are in test_weights_file.py.
BAD_FILES = {
    "truncated": (lambda: authors_file(STATE, old=True)[:50_000], "truncated|no whole checkpoint"),
    "truncated zip": (lambda: GOOD[: len(GOOD) // 2], "truncated"),
    "tampered zip": (tampered, "not finite|no whole checkpoint"),
    "a class": (lambda: authors_file(STATE, best_acc=Evil()), "asks for .*mkdir"),
    "a class, old": (lambda: authors_file(STATE, best_acc=Evil(), old=True), "asks for .*mkdir"),
    "bare pickle": (lambda: pickle.dumps({"state_dict_best": Evil()}), "asks for .*mkdir|only"),
    "width": (lambda: changed("fc.weight", torch.zeros(10, 65)), r"\(10, 65\), not \(10, 64\)"),
    "type": (lambda: changed("fc.weight", torch.zeros(10, 64).long()), "int64, not torch.float32"),
    "complex": (lambda: changed("fc.bias", torch.ones(10) * 1j), "a torch.complex64 tensor"),
    "sparse": (lambda: changed("fc.bias", torch.ones(10).to_sparse()), "a .*sparse"),
    "infinite": (lambda: changed("fc.bias", torch.full((10,), torch.inf)), "fc.bias has values"),
    "text": (lambda: changed("conv1.weight", "much"), "conv1.weight is a str, not a tensor"),
}


@pytest.mark.parametrize("how", BAD_FILES)
def test_a_bad_file_is_one_clear_error(how, tmp_path, monkeypatch):
    monkeypatch.setenv("TIMM_LT_EVIL", str(tmp_path / "evil"))
    path, (content, message) = tmp_path / "net.pth", BAD_FILES[how]
    path.write_bytes(content())
    overlay = {"file": str(path)}
    with pytest.raises(UsageError, match=message) as caught:
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("how", ["truncated", "a class, old", "width"])
def test_a_bad_file_by_url_is_not_kept(how, small, cache, tmp_path, monkeypatch):
    server, states, _, paths = small
    monkeypatch.setenv("TIMM_LT_EVIL", str(tmp_path / "evil"))
    content, message = BAD_FILES[how]
    server.files[paths["linear"]] = server.files[paths["crt"]] = content()
    with pytest.raises(UsageError, match=message) as caught:
        timm.create_model(NAME, pretrained=True, head="tau_norm")
    assert server.url(paths["linear"]) in str(caught.value)
    assert not (tmp_path / "evil").exists()
    assert not [p for p in cache.iterdir() if p.suffix != ".lock"]
    # The right file is taken as soon as it is there, and the file of a head is not kept either.
    server.files[paths["linear"]] = authors_file(states["linear"])
    with pytest.raises(UsageError, match=message):
        convert_checkpoint(NAME, tmp_path / "net")
    assert cached_name(server.url(paths["crt"])) not in [path.name for path in cache.iterdir()]
    assert not (tmp_path / "net").exists()


def test_a_published_name_is_converted_with_all_of_its_heads(small, tmp_path, capsys):
    server, states, scales, paths = small
    assert main(["convert", NAME, str(tmp_path / "net")]) == 0
    assert "heads linear, crt, lws" in capsys.readouterr().out
    assert sorted(server.requests) == sorted(paths.values())
    model = timm_lt.create_model(f"local-dir:{tmp_path / 'net'}", head="lws")
    assert torch.equal(model.bn1.running_mean, states["lws"]["bn1.running_mean"])
    assert torch.equal(model.fc.scale, scales)
    # The re-trained classifier is not a joint one.
    assert main(["convert", server.url(paths["crt"]), str(tmp_path / "crt")]) == 2
    assert f"is the crt head of {NAME}" in capsys.readouterr().err


def test_the_scales_of_a_local_file_need_the_lws_head(tmp_path):
    (tmp_path / "lws.pth").write_bytes(authors_file(STATE, torch.ones(10)))
    overlay = {"file": str(tmp_path / "lws.pth")}
    for head in (None, "tau_norm", "crt"):
        with pytest.raises(UsageError, match="learned scales of an lws head; pass head='lws'"):
            timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, head=head)
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, head="lws")
    assert torch.equal(model.fc.scale, torch.ones(10))


FOLDER = CHECKPOINTS / PACKAGED
METRICS = json.loads((FOLDER / "metrics.json").read_text())


@pytest.fixture(scope="module")
def test_split():
    splits = create_splits("glyph_lt")
    images = splits.images("test", size=None, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return images.__getitems__(list(range(len(images))))


@pytest.mark.slow
@pytest.mark.parametrize("head", METRICS["heads"])
def test_its_table_still_holds(test_split, head):
    images, targets = test_split
    model = timm.create_model(PACKAGED, pretrained=True, head=head).eval()
    with torch.inference_mode():
        preds = torch.cat([model(part).argmax(1) for part in images.split(500)])
    right = (preds == targets).double()
    counts = torch.tensor(METRICS["class_counts"])[targets]
    figures = METRICS["heads"][head]
    # fp16 weights may tip a few of the 5,000 images; the test split is balanced.
    assert right.mean().item() == pytest.approx(figures["all"], abs=0.004)
    assert right[counts > 100].mean().item() == pytest.approx(figures["many_shot"], abs=0.006)
    assert right[counts < 20].mean().item() == pytest.approx(figures["few_shot"], abs=0.006)


def test_it_is_a_small_decoupled_checkpoint_in_fp16():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_500_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".yaml", ".md", ".png"}
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert file.get_tensor("fc.weight").dtype == torch.float16
    assert timm_lt.create_model(f"local-dir:{FOLDER}", head="crt").get_classifier().kind == "crt"


def test_stored_tau_is_the_default_and_other_classes_get_a_fresh_head():
    stored = METRICS["selection"]["tau_norm"]["tau"]
    for options, tau in (({}, stored), ({"tau": 0.3}, 0.3)):
        model = timm.create_model(PACKAGED, pretrained=True, head="tau_norm", **options)
        assert model.get_classifier().tau == tau
    seven = timm.create_model("lt_test_resnet", pretrained=True, num_classes=7, head="lws")
    assert torch.equal(seven.layer4[0].conv1.weight, model.layer4[0].conv1.weight)
    with pytest.raises(UsageError, match="fit_head"):
        seven.eval()(torch.zeros(1, 3, 32, 32))


URLS = (
    *("https://a.org/m/x.pth", "http://a.org/m/x.pth", "https://a.org/M/x.pth", "https://a.org/"),
    *("https://a.org/m/x.pth?v=1", "https://a.org/m/" + "a" * 300 + ".pth"),
    *("https://a.org/../../../etc/passwd", "https://a.org/x.a%2F..%2F..%2Fetc"),
    *("https://a.org/é ü:*?.pth", "https://a.org/%00%0a.pth"),
)


def test_cached_names_are_unique_and_valid_file_names():
    names = [cached_name(url) for url in URLS]
    # Some file systems do not tell capitals from small letters.
    assert len({name.lower() for name in names}) == len(URLS)
    for name in names:
        assert re.fullmatch(r"[0-9a-f]{16}-[A-Za-z0-9._-]{0,100}", name)


PATH, CONTENT = "/models/x.pth", bytes(range(256)) * 1000


@pytest.fixture
def files():
    with FileServer({PATH: CONTENT}) as running:
        yield running


def read(path):
    """Reads the file; anything but its content is refused."""
    if path.read_bytes() != CONTENT:
        raise UsageError("it is damaged")
    return path.read_bytes()


def cached(folder):
    return [path.name for path in folder.glob("timm_lt/*") if path.suffix != ".lock"]


def test_a_url_is_downloaded_once_by_two_processes(files, tmp_path, monkeypatch):
    url, barrier = files.url(PATH), threading.Barrier(2)

    def call(_):
        barrier.wait()
        return read_url(url, read, tmp_path)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(call, range(2))) == [CONTENT] * 2
    assert files.requests == [PATH]
    assert cached(tmp_path) == [cached_name(url)]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    assert read_url(url, read) == CONTENT
    assert (tmp_path / "home/hub/checkpoints/timm_lt" / cached_name(url)).is_file()


@pytest.mark.parametrize("fault", [{"cut": 1000}, {"status": 404}, {"status": 503}, {"files": {}}])
def test_only_a_whole_file_is_kept(files, tmp_path, fault):
    before = {key: getattr(files, key) for key in fault}
    vars(files).update(fault)
    with pytest.raises(UsageError) as caught:
        read_url(files.url(PATH), read, tmp_path)
    assert "\n" not in str(caught.value)
    assert cached(tmp_path) == []
    vars(files).update(before)
    assert read_url(files.url(PATH), read, tmp_path) == CONTENT


def test_messages_name_the_file_in_the_cache(tmp_path):
    with FileServer({PATH: CONTENT}) as files:
        url = files.url(PATH)
        path = tmp_path / "timm_lt" / cached_name(url)
        read_url(url, read, tmp_path)
        path.write_bytes(b"")
        with pytest.raises(UsageError, match=f"it is damaged; delete {path} to download it again"):
            read_url(url, read, tmp_path)
    path.unlink()
    with pytest.raises(UsageError, match=f"{url} cannot .*refused.*, or put the file at {path}$"):
        read_url(url, read, tmp_path)
    path.write_bytes(CONTENT)
    assert read_url(url, read, tmp_path) == CONTENT
    for url in ("file:///etc/passwd", "/models/x.pth", "data:,x", ""):
        with pytest.raises(UsageError, match="is not an http:// or https:// URL"):
            read_url(url, read, tmp_path)
