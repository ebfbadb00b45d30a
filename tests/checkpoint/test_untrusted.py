"""A checkpoint from anybody: it loads as what it says, or UsageError says what is wrong."""

import copy
import json
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
import timm
import torch
from conftest import HEAD_OPTIONS, fill
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import timm_lt
from timm_lt.heads import HEADS
from timm_lt.utils.checks import UsageError
from timm_lt.utils.files import sha256

COUNTS = [40, 10, 5, 2]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
MANY = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    torch.manual_seed(0)
    model = timm_lt.create_model("test_resnet", num_classes=4).eval()
    heads = {}
    for name, options in HEAD_OPTIONS.items():
        counts = {"class_counts": COUNTS} if name == "logit_adjusted" else {}
        head = HEADS[name].from_classifier(model.fc, **options, **counts)
        heads[name] = head if counts else fill(head)
    heads["crt"].backbone_statistics = {
        key: value + 0.5
        for key, value in model.state_dict().items()
        if key.endswith(("running_mean", "running_var"))
    }
    folder = tmp_path_factory.mktemp("original") / "run"
    return timm_lt.save_checkpoint(folder, model, heads=heads, class_counts=COUNTS)


def reference_logits(folder, head):
    """The logits that the folder describes: plain timm's features, and a head made by hand."""
    config = json.loads((folder / "config.json").read_text())
    entry = config.get("timm_lt", {"heads": {}})["heads"].get(head, {})
    own = load_file(folder / entry["file"]) if entry.get("file") else {}
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    for key, value in load_file(folder / "model.safetensors").items():
        # Else timm has dropped something, and what is there is random.
        kept = model.state_dict()[key]
        torch.testing.assert_close(kept, value.to(kept.dtype), rtol=0, atol=0, equal_nan=True)
    moved = {k.removeprefix("backbone."): v for k, v in own.items() if k.startswith("backbone.")}
    model.load_state_dict({**model.state_dict(), **moved})
    with torch.no_grad():
        x = model.forward_head(model.forward_features(IMAGES), pre_logits=True).double()
        if head is None:
            return model.fc.double()(x)
        counts = {"class_counts": config["timm_lt"]["class_counts"]} if "adjusted" in head else {}
        cls, options = HEADS[entry.get("kind", head)], entry.get("options", {})
        made = cls.from_classifier(model.fc, **options, **counts).double()
        for key in own.keys() - {f"backbone.{key}" for key in moved}:
            getattr(made, key).copy_(own[key])
        return made.eval()(x)


def check_loads_or_refuses(folder, head):
    """Returns whether it loaded; what it then computes must be what the folder describes."""
    try:
        model = timm_lt.create_model(f"local-dir:{folder}", head=head).eval()
    except UsageError:
        return False
    with torch.no_grad():
        logits = model(IMAGES).double()
    expected = reference_logits(folder, head)
    if expected.isfinite().all():
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    else:
        # A backbone may hold infinite weights; timm loads such too.
        assert not logits.isfinite().all()
    return True


@pytest.fixture
def copied(original):
    with tempfile.TemporaryDirectory() as scratch:

        def fresh():
            shutil.rmtree(Path(scratch) / "run", ignore_errors=True)
            return shutil.copytree(original, Path(scratch) / "run")

        yield fresh


@pytest.mark.parametrize("head", [None, *HEAD_OPTIONS])
def test_the_reference_agrees_with_an_untouched_folder(copied, head):
    assert check_loads_or_refuses(copied(), head)


NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 7, 0.5, 1e308, 10**9, 2**63, 2**70, -(10**12), 1e-320, 10**400]
)
WORDS = st.sampled_from(
    [*("", "a", "avg", "crt", "raw", "l2", "euclidean", "resnet18", "../../x", "/etc/passwd"),
     *("os.system", "heads/crt.safetensors", "heads/../model.safetensors", "\x00", "ü" * 50),
     *("{{ 7*7 }}", "timm_lt", "oltr", "false")]
)  # fmt: skip
LEAVES = st.none() | st.booleans() | NUMBERS | WORDS | st.integers() | st.floats(allow_nan=False)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=3)
)


def places(node, path=()):
    """Paths of all nodes below the top of a JSON tree, but for the long lists' later items."""
    items = node.items() if isinstance(node, dict) else enumerate(node[:2])
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def mutate(config, path, change, value):
    """Changes the node at a path; returns the text of the config."""
    node = config
    for key in path[:-1]:
        node = node[key]
    key = path[-1]
    if change == "delete":
        del node[key]
    elif change == "rename" and isinstance(node, dict):
        node[str(value)[:40]] = node.pop(key)
    elif change == "wrap":
        node[key] = [node[key]]
    elif change == "add" and isinstance(node[key], dict):
        node[key][str(value)[:40]] = value
    elif change == "twice" and isinstance(node, dict):
        text = json.dumps(config)
        return text.replace(f'"{key}":', f'"{key}": {json.dumps(value)}, "{key}":', 1)
    else:
        node[key] = value
    return json.dumps(config)


@pytest.mark.slow
@MANY
@given(data=st.data())
def test_a_mutated_config_loads_as_it_says_or_is_refused(original, copied, data):
    config = json.loads((original / "config.json").read_text())
    head = data.draw(st.sampled_from([None, *HEAD_OPTIONS]))
    inside = [path for path in places(config) if path[:2] == ("timm_lt", "heads")]
    mine = [path for path in inside if path[2:3] == (head,)]
    others = [path for path in places(config) if path not in inside]
    folder = copied()
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(mine or inside) | st.sampled_from(others))
        change = data.draw(
            st.sampled_from(["replace", "replace", "delete", "rename", "wrap", "add", "twice"])
        )
        value = data.draw(VALUES)
        try:
            text = mutate(copy.deepcopy(config), path, change, value)
            config = json.loads(text)
        except (KeyError, IndexError, TypeError):
            assume(False)
    (folder / "config.json").write_text(text)
    check_loads_or_refuses(folder, head)


@settings(MANY, max_examples=60)
@given(content=st.binary(max_size=200) | VALUES.map(lambda v: json.dumps(v).encode()))
def test_any_other_content_is_refused(copied, content):
    folder = copied()
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UsageError):
        timm_lt.create_model(f"local-dir:{folder}", head="tau_norm")


def sign(folder, file):
    """Writes the digest of a changed file into the config, as an attacker would."""
    config = json.loads((folder / "config.json").read_text())
    digest = sha256((folder / file).read_bytes())
    if file == "model.safetensors":
        config["timm_lt"]["weights_sha256"] = digest
    for entry in config["timm_lt"]["heads"].values():
        if entry["file"] == file:
            entry["sha256"] = digest
    (folder / "config.json").write_text(json.dumps(config))


DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.int64]
TENSOR_CHANGES = {
    "drop": lambda t: None,
    "nan": lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t,
    "infinite": lambda t: torch.full_like(t, float("inf")) if t.is_floating_point() else t,
    "transpose": lambda t: t.transpose(0, -1).contiguous() if t.ndim else t[None],
    "flatten": lambda t: t.flatten(),
    "longer": lambda t: torch.cat([t, t]) if t.ndim else t,
    "shorter": lambda t: t[:-1].contiguous() if t.ndim else t,
    "empty": lambda t: t[:0].contiguous() if t.ndim else t[None][:0],
    **{str(dtype): lambda t, dtype=dtype: t.to(dtype) for dtype in DTYPES},
}
FITTED = ("crt", "lws", "ncm", "cosine", "fslwf", "oltr")
FILES = {name: f"heads/{name}.safetensors" for name in FITTED}


@pytest.mark.slow
@MANY
@given(data=st.data())
def test_changed_tensors_load_as_they_are_or_are_refused(copied, data):
    folder = copied()
    head = data.draw(st.sampled_from(list(FILES)))
    file = data.draw(st.sampled_from([FILES[head], FILES[head], "model.safetensors"]))
    tensors = load_file(folder / file)
    key = data.draw(st.sampled_from(sorted(tensors)))
    change = data.draw(st.sampled_from([*TENSOR_CHANGES, "rename", "extra"]))
    tensor = tensors.pop(key)
    if change == "rename":
        tensors[data.draw(st.sampled_from(["x", "", "../x", "fc.weight", "backbone.x"]))] = tensor
    elif change == "extra":
        tensors |= {key: tensor, data.draw(WORDS) or "more": torch.zeros(3)}
    else:
        new = TENSOR_CHANGES[change](tensor)
        tensors |= {} if new is None else {key: new}
    before = (folder / file).read_bytes()
    save_file(tensors, folder / file)
    signed = data.draw(st.booleans())
    if signed:
        sign(folder, file)
    loaded = check_loads_or_refuses(folder, head)
    assert not loaded or signed or (folder / file).read_bytes() == before


@settings(MANY, max_examples=60)
@given(data=st.data())
def test_damaged_bytes_are_refused(copied, data):
    folder = copied()
    head = data.draw(st.sampled_from(list(FILES)))
    file = data.draw(st.sampled_from([FILES[head], "model.safetensors"]))
    content = bytearray((folder / file).read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (folder / file).write_bytes(content)
    with pytest.raises(UsageError, match="SHA-256 differs"):
        timm_lt.create_model(f"local-dir:{folder}", head=head)


def lie(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


SCALE = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
LIES = {
    "length beyond the file": struct.pack("<Q", 2**60) + b"{}",
    "header no JSON": lie(b"\xff" * 16),
    "shape of 2^60": lie({"scale": {**SCALE, "shape": [2**60]}}),
    "offsets beyond": lie({"scale": {**SCALE, "data_offsets": [0, 2**40]}}),
    "offsets backwards": lie({"scale": {**SCALE, "data_offsets": [16, 0]}}, bytes(16)),
    "unknown type": lie({"scale": {**SCALE, "dtype": "PKL", "data_offsets": [0, 4]}}, b"abcd"),
    "a pickle": b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system",
    "nothing": b"",
}


@pytest.mark.parametrize("content", LIES.values(), ids=LIES)
@pytest.mark.parametrize("file", ["heads/lws.safetensors", "model.safetensors"])
def test_a_header_that_lies_is_refused(copied, file, content):
    folder = copied()
    (folder / file).write_bytes(content)
    sign(folder, file)
    with pytest.raises(UsageError, match="safetensors"):
        timm_lt.create_model(f"local-dir:{folder}", head="lws")
