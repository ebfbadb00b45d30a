"""The packaged checkpoint: offline, small, as good as its table; and files read by URL."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from loopback import FileServer
from safetensors import safe_open

import timm_lt
from timm_lt.data import create_splits
from timm_lt.models.pretrained import cached_name, read_url
from timm_lt.models.published import CHECKPOINTS
from timm_lt.utils.checks import UsageError

NAME = "lt_test_resnet.glyph_lt"
FOLDER = CHECKPOINTS / NAME
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
    model = timm.create_model(NAME, pretrained=True, head=head).eval()
    with torch.inference_mode():
        preds = torch.cat([model(part).argmax(1) for part in images.split(500)])
    right = (preds == targets).double()
    counts = torch.tensor(METRICS["class_counts"])[targets]
    figures = METRICS["heads"][head]
    # fp16 weights may tip a few of the 5,000 images; the test split is balanced.
    assert right.mean().item() == pytest.approx(figures["all"], abs=0.004)
    assert right[counts > 100].mean().item() == pytest.approx(figures["many_shot"], abs=0.006)
    assert right[counts < 20].mean().item() == pytest.approx(figures["few_shot"], abs=0.006)


def test_its_heads_are_better_than_the_joint_classifier():
    joint = METRICS["heads"]["linear"]
    for name in ("crt", "tau_norm", "lws", "ncm", "logit_adjusted"):
        assert METRICS["heads"][name]["all"] >= joint["all"] + 0.06
        assert METRICS["heads"][name]["few_shot"] >= joint["few_shot"] + 0.20


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
        model = timm.create_model(NAME, pretrained=True, head="tau_norm", **options)
        assert model.get_classifier().tau == tau
    seven = timm.create_model("lt_test_resnet", pretrained=True, num_classes=7, head="lws")
    assert torch.equal(seven.layer4[0].conv1.weight, model.layer4[0].conv1.weight)
    with pytest.raises(UsageError, match="fit_head"):
        seven.eval()(torch.zeros(1, 3, 32, 32))


# ---- files by URL -------------------------------------------------------------------------------

URLS = (
    "https://a.org/m/x.pth",
    "http://a.org/m/x.pth",
    "https://a.org/M/x.pth",
    "https://a.org/m/x.pth?v=1",
    "https://a.org/m/" + "a" * 300 + ".pth",
    "https://a.org/../../../etc/passwd",
    "https://a.org/x.a%2F..%2F..%2Fetc",
    "https://a.org/é ü:*?.pth",
    "https://a.org/%00%0a.pth",
    "https://a.org/",
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
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=f"cannot be downloaded: .*{tmp_path}"):
        read_url(url, read, tmp_path / "file")
    for url in ("file:///etc/passwd", "/models/x.pth", "data:,x", ""):
        with pytest.raises(UsageError, match="is not an http:// or https:// URL"):
            read_url(url, read, tmp_path)
