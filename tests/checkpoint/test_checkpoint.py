"""The decoupled checkpoint: what is written comes back, and what is wrong is refused."""

import copy
import json

import numpy as np
import pytest
import timm
import torch
from conftest import HEAD_OPTIONS, fill
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn

import timm_lt
from timm_lt.checkpoint import load_head, load_heads, read_checkpoint, save_checkpoint
from timm_lt.heads import HEADS, create_head, get_head, set_head
from timm_lt.utils.checks import UsageError
from timm_lt.utils.files import sha256

COUNTS = [40, 10, 5, 2]
NAMES = ["ant", "bee", "cat", "dog"]
KEEP_JOINT = {"linear", "tau_norm", "logit_adjusted"}


def joint_model(seed=0, name="lt_test_resnet", **options):
    torch.manual_seed(seed)
    model = timm_lt.create_model(name, num_classes=4, **options)
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_()
    return model.eval()


def fitted_heads(model, seed=1):
    """One head of each kind, with random values where a fit would put its own."""
    torch.manual_seed(seed)
    joint, heads = get_head(model), {}
    for name, options in HEAD_OPTIONS.items():
        given = {"class_counts": COUNTS} if name == "logit_adjusted" else {}
        head = HEADS[name].from_classifier(joint, **options, **given)
        for key in head.own_state:
            torch.nn.init.normal_(getattr(head, key))
        heads[name] = head if name == "logit_adjusted" else fill(head)
        heads[name].eval()
    return heads


@pytest.fixture(scope="module")
def model():
    return joint_model()


@pytest.fixture(scope="module")
def heads(model):
    return fitted_heads(model)


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def features():
    return torch.randn(5, 96, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def folder(tmp_path, model, heads):
    more = {"metrics": {"crt": {"all": 0.5, "few_shot": None}}, "label_names": NAMES}
    counts = torch.tensor(COUNTS)
    return save_checkpoint(tmp_path / "run", model, heads=heads, class_counts=counts, **more)


def edit_config(folder, *path, **values):
    """Sets values in config.json, in the object at a path below timm_lt."""
    edit_file(folder, "timm_lt", *path, **values)


def edit_file(folder, *path, **values):
    config = part = json.loads((folder / "config.json").read_text())
    for key in path:
        part = part.setdefault(key, {})
    part.update(values)
    (folder / "config.json").write_text(json.dumps(config))


def load(folder, head=None, **options):
    return timm_lt.create_model(f"local-dir:{folder}", head=head, **options).eval()


@pytest.mark.parametrize("name", HEAD_OPTIONS)
def test_round_trip_is_bit_for_bit(folder, model, heads, images, features, name):
    loaded = load(folder, name)
    head = get_head(loaded)
    assert type(head) is type(heads[name])
    assert head.options() == heads[name].options()
    assert torch.equal(head(features), heads[name](features))
    reference = set_head(copy.deepcopy(model), copy.deepcopy(heads[name])).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), reference(images))
    assert torch.equal(load_head(folder, name, get_head(model))(features), head(features))


def test_files_of_a_folder(folder, heads):
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    own = {f"heads/{name}.safetensors" for name in heads if name not in KEEP_JOINT}
    assert files == {"config.json", "model.safetensors", *own}
    memory = {"memory_weight", "memory_bias", "selector_weight", "selector_bias"}
    assert {path: set(load_file(folder / path)) for path in sorted(own)} == {
        "heads/cosine.safetensors": {"weight"},
        "heads/crt.safetensors": {"weight", "bias"},
        "heads/fslwf.safetensors": {"weight", "scale"},
        "heads/lws.safetensors": {"scale"},
        "heads/ncm.safetensors": {"weight", "feature_mean"},
        "heads/oltr.safetensors": {"weight", "centroids", *memory},
    }
    assert (folder / "heads/lws.safetensors").stat().st_size < 200
    plain = timm.create_model("test_resnet", num_classes=4)
    assert set(load_file(folder / "model.safetensors")) == set(plain.state_dict())


def test_config_is_timms_with_one_block_more(folder):
    config, info = json.loads((folder / "config.json").read_text()), read_checkpoint(str(folder))
    assert (config["architecture"], config["num_classes"]) == ("test_resnet", 4)
    assert (config["label_names"], config["timm_lt"]["version"]) == (NAMES, 1)
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]
    assert (info.folder, info.class_counts, info.label_names) == (folder, COUNTS, NAMES)
    assert list(info.heads) == list(HEAD_OPTIONS)
    assert info.heads["crt"].metrics == {"all": 0.5, "few_shot": None}
    assert info.heads["crt"].sha256 == sha256((folder / "heads/crt.safetensors").read_bytes())
    assert info.heads["lws"].options == {"scale_bias": False}


PLAIN = """
import sys
import numpy as np, timm, torch
torch.set_num_threads(1)
model = timm.create_model("local-dir:{0}", pretrained=True).eval()
with torch.no_grad():
    np.save(r"{0}/logits.npy", model(torch.from_numpy(np.load(r"{0}/images.npy"))).numpy())
assert "timm_lt" not in sys.modules
"""


def test_plain_timm_loads_the_folder_without_timm_lt(plain_server, folder, model, images):
    np.save(folder / "images.npy", images.numpy())
    plain = plain_server.python(PLAIN.format(folder))
    assert plain.status == 0, plain.err
    with torch.no_grad():
        assert (np.load(folder / "logits.npy") == model(images).numpy()).all()


ARGUMENTS = [
    ("lt_test_resnet", {"layers": [1, 1, 1, 1], "in_chans": 1}, "test_resnet"),
    ("lt_resnet10", {"in_chans": 1, "drop_rate": 0.2}, "resnet18"),
    ("test_vit", {"drop_rate": 0.1}, "test_vit"),
]


@pytest.mark.parametrize(("name", "options", "timms"), ARGUMENTS)
def test_model_arguments_come_back(tmp_path, name, options, timms):
    model = joint_model(name=name, **options)
    head = HEADS["tau_norm"].from_classifier(get_head(model), tau=0.5)
    folder = save_checkpoint(tmp_path, model, heads={"half": head}, class_counts=COUNTS)
    again, state = load(folder, "half"), model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    x = torch.randn(2, options.get("in_chans", 3), 160, 160)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(again(x), set_head(copy.deepcopy(model), head)(x))
        plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert torch.equal(plain(x), expected)
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == timms
    assert config["model_args"].get("layers") == (None if name == "test_vit" else [1, 1, 1, 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, model, heads, features, dtype):
    folder = save_checkpoint(tmp_path, model, heads=heads, class_counts=COUNTS, dtype=dtype)
    tensors = load_file(folder / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {dtype, torch.int64}
    # As if every stored tensor had been rounded once, and nothing else.
    joint = load(folder)
    assert torch.equal(joint.fc.weight, model.fc.weight.to(dtype).float())
    for name, head in heads.items():
        rounded = copy.deepcopy(head).to(dtype).float()
        for key in head.fitted_state:
            if key not in head.own_state:
                getattr(rounded, key).copy_(getattr(head, key))
        loaded = get_head(load(folder, name))
        assert torch.equal(loaded(features), rounded(features)), name


def test_options_take_the_place_of_stored_ones(folder, model, features):
    head = load_head(folder, "tau_norm", get_head(model), tau=0.0, keep_bias=False)
    assert torch.equal(head(features), features @ model.fc.weight.T)
    assert get_head(load(folder, "ncm", metric="cosine")).metric == "cosine"
    selection = {"tau": 0.7, "split": "val"}
    edit_config(folder, "heads", "tau_norm", selection=selection)
    for tau, kept in ((0.7, selection), (0.9, {})):
        head = load_head(folder, "tau_norm", get_head(model), tau=tau)
        assert (head.tau, head.selection) == (tau, kept)


def test_heads_can_be_exchanged_while_the_joint_weight_is_there(folder, heads, features):
    model = load(folder, "lws")
    set_head(model, load_heads(folder, "crt", model))
    assert torch.equal(get_head(model)(features), heads["crt"](features))
    with pytest.raises(UsageError, match=r"from the joint classifier .* has CRTHead"):
        load_heads(folder, "tau_norm", model)


def crt_with_bias(model, value):
    head = HEADS["crt"].from_classifier(get_head(model))
    torch.nn.init.constant_(head.bias, value)
    return {"heads": {"crt": head}}


def made(kind, model, **options):
    return {"heads": {"a": HEADS[kind].from_classifier(model.fc, **options)}}


OTHER_COUNTS = {"class_counts": [9, 9, 9, 9]}
REFUSED = {
    "unfitted": (lambda m: made("lws", m), "not fitted"),
    "nan": (lambda m: crt_with_bias(m, np.nan), "bias of head 'crt' has values .*not finite"),
    "not a head": (
        lambda m: {"heads": {"a": nn.Linear(96, 4)}},
        "must have a timm_lt head for fc, .*; got fc: Linear",
    ),
    "a head of its own": (
        lambda m: {"model": set_head(copy.deepcopy(m), "tau_norm")},
        "carries a 'tau_norm' head",
    ),
    "shape": (lambda m: {"heads": {"a": create_head("crt", 96, 5)}}, r"\(5, 96\).*\(4, 96\)"),
    "other backbone": (
        lambda m: made("tau_norm", joint_model(9)),
        "head 'a' has another weight than the joint classifier",
    ),
    "other counts": (
        lambda m: made("logit_adjusted", m, **OTHER_COUNTS),
        "head 'a' has another log_prior than the class counts",
    ),
    "bias": (
        lambda m: {"heads": {"a": HEADS["crt"](96, 4, bias=False)}},
        r"another bias than the joint .* \(shapes \(0,\) and \(4,\)\)",
    ),
    "escaping name": (lambda m: {"heads": {"../a": create_head("crt", 96, 4)}}, "ASCII letters"),
    "fp16 range": (
        lambda m: {**crt_with_bias(m, 1e5), "dtype": torch.float16},
        "bias of head 'crt' has values that are not finite in torch.float16",
    ),
    "integer type": (lambda m: {"dtype": torch.int8}, "dtype must be a floating-point type"),
    "counts": (lambda m: {"class_counts": [1, 2]}, "class_counts has 2 classes, expected 4"),
    "metrics": (lambda m: {"metrics": {"ctr": {"all": 1.0}}}, "unknown head in metrics: 'ctr'"),
    "nan metrics": (
        lambda m: {**made("crt", m), "metrics": {"a": {"b": np.nan}}},
        "cannot be JSON",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_save_refuses_and_writes_nothing(tmp_path, model, case):
    arguments, message = REFUSED[case]
    call = {"model": model, "heads": {}, "class_counts": COUNTS} | arguments(model)
    with pytest.raises(UsageError, match=message):
        save_checkpoint(tmp_path, **call)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_save_leaves_no_config(folder, model, heads, monkeypatch):
    def fail(path, content):
        raise OSError("disk full")

    monkeypatch.setattr("timm_lt.checkpoint.save.write_atomic", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(folder, model, heads=heads, class_counts=COUNTS)
    with pytest.raises(UsageError, match=r"config\.json does not exist"):
        load(folder)


# ---- loading refuses -----------------------------------------------------------------------------

BLOCK = ("timm_lt",)
CRT, TAU = (*BLOCK, "heads", "crt"), (*BLOCK, "heads", "tau_norm")
BAD_BLOCKS = [
    (BLOCK, {"version": 2}, r"timm_lt\.version must be 1 for this timm_lt, found 2"),
    (BLOCK, {"class_counts": "many"}, "class_counts must be null or 4 integers >= 0"),
    (BLOCK, {"class_counts": [1, 2, 3, -4]}, "class_counts must be"),
    (BLOCK, {"label_names": [1, 2, 3, 4]}, "label_names must be null or 4 strings"),
    (BLOCK, {"weights_sha256": "0" * 63}, "weights_sha256 must be the 64 hexadecimal digits"),
    (BLOCK, {"seed": -1}, "seed must be null or an integer >= 0"),
    (BLOCK, {"shot_rule": "few"}, "shot_rule must be null or one of "),
    (BLOCK, {"background": "white"}, "background must be a colour '#rrggbb'"),
    (BLOCK, {"heads": []}, "heads must be an object"),
    (BLOCK, {"heads": {"crt": 5}}, r"heads\.crt must be an object"),
    (BLOCK, {"heads": {"../../evil": {"kind": "crt"}}}, "ASCII letters"),
    (CRT, {"kind": "os.system"}, r"heads\.crt\.kind must be one of .*, found 'os.system'"),
    (CRT, {"options": [1]}, r"heads\.crt\.options must be an object"),
    (CRT, {"metrics": {"all": "high"}}, r"metrics\.all must be a number or null"),
    (CRT, {"backbone_statistics": "yes"}, "backbone_statistics must be true or false"),
    (CRT, {"sha256": 5}, r"heads\.crt\.sha256 must be the 64"),
    (CRT, {"file": None}, r"file must be \"heads/crt.safetensors\", found None"),
    (CRT, {"file": "../crt.safetensors"}, r'heads\.crt\.file must be "heads/crt'),
    (TAU, {"file": "heads/tau_norm.safetensors"}, "file must be null, found"),
    (TAU, {"options": {"tau": "big"}}, "tau must be a number"),
    (TAU, {"options": {"taux": 1}}, "has no option 'taux'.*valid options: tau"),
    (TAU, {"options": {"tau": 10**400}}, "tau must be a number"),
    (TAU, {"options": {"class_counts": [1]}}, "class_counts must be absent"),
]


def test_a_checkpoint_of_the_first_version_loads(folder, heads, features):
    """Without the fields that later versions record."""
    config = json.loads((folder / "config.json").read_text())
    block = config["timm_lt"]
    for key in block.keys() - {"version", "weights_sha256", "class_counts", "heads"}:
        del block[key]
    for entry in block["heads"].values():
        for key in ("selection", "metrics", "backbone_statistics"):
            del entry[key]
    (folder / "config.json").write_text(json.dumps(config))
    info = read_checkpoint(folder)
    assert (info.background, info.label_names, info.protocol, info.seed) == ("#ffffff", *[None] * 3)
    assert torch.equal(get_head(load(folder, "crt"))(features), heads["crt"](features))


HOSTILE = [
    ((), {"model_args": {"num_classes": 9}}, r"model_args\.num_classes must be 4 .* found 9"),
    ((), {"model_args": ["x"]}, "model_args must be an object"),
    ((), {"model_args": {"pretrained_cfg_overlay": {"file": "x"}}}, r"_cfg_overlay must be absent"),
    ((), {"architecture": 7}, "architecture must be a string"),
    ((), {"architecture": "os.system"}, "cannot be loaded"),
    ((), {"pretrained_cfg": {"num_classes": 5}}, r"pretrained_cfg\.num_classes must be 4"),
    ((), {"pretrained_cfg": {"url": "http://127.0.0.1/x"}}, r"pretrained_cfg\.url must be absent"),
    ((), {"pretrained_cfg": {"label_offset": 1}}, "label_offset must be absent"),
    ((), {"pretrained_cfg": {"classifier": [1]}}, "classifier must be a string or a list"),
    ((), {"num_classes": 3}, r"num_classes must be 3|class_counts must be null or 3 integers"),
    ((), {"model_args": {"layers": [10**7, 1, 1, 1]}}, r"layers is 10000003, far beyond"),
    ((), {"model_args": {"layers": [60000, 1, 1, 1]}}, "has far more layers than model"),
    ((), {"model_args": {"stem_width": 3000}}, r"has [\d,]+ numbers, more than the [\d,]+ that"),
    (
        (),
        {"model_args": {"stem_width": 30}},
        r"config.json has \(.*\) for conv1.*, model.safeten.* \(",
    ),
    ((), {"model_args": {"x": json.loads("[" * 700 + "]" * 700)}}, "model_args is nested too deep"),
    ((), {"padding": "x" * (5 * 2**20)}, r"has 5,2\d\d,\d\d\d bytes, more than 4,194,304"),
]


@pytest.mark.parametrize(("path", "values", "message"), [*BAD_BLOCKS, *HOSTILE])
def test_a_bad_or_hostile_config_is_one_clear_error(folder, path, values, message):
    edit_file(folder, *path, **values)
    with pytest.raises(UsageError, match=message) as caught:
        load(folder, "tau_norm")
    assert str(folder / "config.json") in str(caught.value) or "os.system" in str(values)
    assert "\n" not in str(caught.value)


def test_plain_timm_checkpoint_and_missing_folder(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    del config["timm_lt"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="plain timm checkpoint without heads"):
        read_checkpoint(folder)
    # It has the heads that need no fit, like every other timm model.
    head = get_head(load(folder, "tau_norm", tau=0.5))
    assert torch.equal(head.weight, load(folder).fc.weight)
    counted = get_head(load(folder, "logit_adjusted", class_counts=COUNTS))
    assert counted.log_prior.argmax() == 0
    with pytest.raises(UsageError, match="'lws'; choose one of: linear, logit_adjusted, tau_norm"):
        load(folder, "lws")
    with pytest.raises(UsageError, match="pass class_counts="):
        load(folder, "logit_adjusted")
    with pytest.raises(UsageError, match=r"no/config\.json does not exist"):
        load(tmp_path / "no", "tau_norm")


def test_weights_of_another_run_are_refused(folder, tmp_path, heads):
    other = save_checkpoint(tmp_path / "other", joint_model(5), heads={}, class_counts=COUNTS)
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(UsageError, match=r"is not the file that config\.json describes"):
        load(folder, "lws")


BAD_HEADS = [
    ("crt", {"weight": torch.zeros(4, 96)}, r"a 'crt' head here needs \{'weight': \(4, 96\)"),
    ("crt", {"weight": torch.zeros(4, 95), "bias": torch.zeros(4)}, r"has .*\(4, 95\)"),
    ("lws", {"scale": torch.ones(4), "more": torch.zeros(4)}, "'more'.* a 'lws' head here"),
    ("lws", {"scale": torch.full((4,), float("nan"))}, "'lws' is not fitted yet"),
    ("lws", {"scale": torch.tensor([1, 2, float("inf"), 3])}, "scale .* are not finite"),
]


@pytest.mark.parametrize(("head", "tensors", "message"), BAD_HEADS)
def test_head_file_with_other_tensors_is_refused(folder, head, tensors, message):
    path = folder / f"heads/{head}.safetensors"
    save_file(tensors, path)
    edit_config(folder, "heads", head, sha256=sha256(path.read_bytes()))
    with pytest.raises(UsageError, match=message):
        load(folder, head)
    path.unlink()
    with pytest.raises(UsageError, match="is not a readable safetensors file"):
        load(folder, head)


def test_fixed_options_cannot_change(folder, model):
    with pytest.raises(UsageError, match="fitted with scale_bias=False, which cannot change"):
        load(folder, "lws", scale_bias=True)
    with pytest.raises(UsageError, match="fitted with features='centered_l2', which cannot"):
        load_head(folder, "ncm", get_head(model), features="raw")


def test_other_classes_or_no_weights_go_with_no_head(folder):
    with pytest.raises(UsageError, match=r"of 4 classes, but the model has Linear\(.*=7"):
        load(folder, "tau_norm", num_classes=7)
    with pytest.raises(UsageError, match="needs its backbone"):
        load(folder, "tau_norm", pretrained=False)
    assert load(folder, num_classes=7).num_classes == 7
    assert load(folder, pretrained=False).num_classes == 4


def test_without_weights_sizes_are_bounded_too(folder):
    for change, message in (
        ({"layers": [60000, 1, 1, 1]}, "far more layers"),
        ({"layers": [10**6, 1, 1, 1]}, r"model_args\.layers is 1000003"),
        ({"stem_width": 20000, "layers": [1, 1, 1, 1]}, "numbers, more than the 1,073,741,824"),
    ):
        edit_file(folder, "model_args", **change)
        with pytest.raises(UsageError, match=message):
            load(folder, pretrained=False)


def test_a_tensor_without_elements_lifts_no_limit(folder):
    path = folder / "model.safetensors"
    save_file({**load_file(path), "huge": torch.zeros(10**12, 0)}, path)
    edit_config(folder, weights_sha256=sha256(path.read_bytes()))
    edit_file(folder, "model_args", layers=[10**6, 1, 1, 1])
    with pytest.raises(UsageError, match=r"model_args\.layers is 1000003, far beyond"):
        load(folder)


def test_an_architecture_of_ones_own_may_read_its_tensors(folder, images, monkeypatch):
    def own_resnet(pretrained=False, **options):
        assert torch.linspace(0, 1, 2)[1].item() == 1
        return timm.models.model_entrypoint("test_resnet")(pretrained, **options)

    entrypoints = timm.models._registry._model_entrypoints
    monkeypatch.setitem(entrypoints, "own_resnet", own_resnet)
    expected = load(folder, "lws")(images)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"test_resnet"', '"own_resnet"'))
    with torch.no_grad():
        assert torch.equal(load(folder, "lws")(images), expected)
    # timm's own are built without memory, whatever the error.
    own_resnet.__module__ = "timm.models.resnet"
    with pytest.raises(UsageError, match="cannot be loaded"):
        load(folder, "lws")


def test_buffers_that_are_not_stored_are_bounded(tmp_path):
    sizes = {"depths": (1, 1), "embed_dim": 8, "num_heads": (1, 1), "img_size": 32}
    name = "swin_tiny_patch4_window7_224"
    model = timm.create_model(name, num_classes=4, window_size=4, **sizes)
    save_checkpoint(tmp_path, model, heads={}, class_counts=COUNTS)
    assert load(tmp_path).num_classes == 4
    edit_file(tmp_path, "model_args", window_size=150, img_size=1200)
    with pytest.raises(UsageError, match=r"has [\d,]+ numbers, more than the"):
        load(tmp_path)


def test_a_plain_model_far_larger_than_its_weights_is_refused(tmp_path):
    save_for_hf(timm.create_model("test_resnet", num_classes=4), tmp_path, safe_serialization=True)
    # 16 times the weights, and below the limit of buffers.
    edit_file(tmp_path, "model_args", channels=[96, 192, 192, 384])
    with pytest.raises(UsageError, match=r"has 5,5\d+,\d+ numbers, model.safetensors 37\d,"):
        load(tmp_path)


def moved_statistics(model):
    return {
        key: value + 1
        for key, value in model.state_dict().items()
        if key.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }


@pytest.mark.parametrize("kind", ["crt", "lws", "tau_norm"])
def test_a_heads_statistics_go_into_the_backbone_and_nowhere_else(model, images, tmp_path, kind):
    head = HEADS[kind].from_classifier(get_head(model))
    if kind == "lws":
        torch.nn.init.constant_(head.scale, 2.0)
    head.backbone_statistics = moved_statistics(model)
    heads = {"moved": head, "linear": HEADS["linear"].from_classifier(get_head(model))}
    timm_lt.save_checkpoint(tmp_path, model, heads=heads, class_counts=COUNTS)
    # By hand: another copy of the backbone with these buffers.
    other = copy.deepcopy(model)
    other.load_state_dict({**other.state_dict(), **moved_statistics(model)})
    loaded = load(tmp_path, "moved")
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), timm_lt.set_head(other, head)(images))
        assert not torch.allclose(loaded.bn1.running_mean, model.bn1.running_mean)
        for name in ("linear", None):
            assert torch.equal(load(tmp_path, name)(images), model(images))


OTHER_STATISTICS = [
    (lambda t: {k: v for k, v in t.items() if "backbone" not in k}, "and 0 batch-norm stat"),
    (lambda t: {**t, "backbone.fc.weight": torch.zeros(4, 96)}, "'backbone.fc.weight'"),
    (lambda t: {**t, "backbone.bn9.running_var": torch.ones(3)}, "no bn9.running_var of shape"),
    (
        lambda t: {**t, "backbone.bn1.running_mean": torch.ones(3)},
        r"no bn1.running_mean of shape \(3,",
    ),
    (lambda t: {**t, "stray": torch.ones(3)}, "stray"),
]


@pytest.mark.parametrize(("change", "message"), OTHER_STATISTICS)
def test_statistics_that_are_not_the_models_are_refused(model, tmp_path, change, message):
    head = HEADS["crt"].from_classifier(get_head(model))
    head.backbone_statistics = moved_statistics(model)
    timm_lt.save_checkpoint(tmp_path, model, heads={"crt": head}, class_counts=COUNTS)
    path = tmp_path / "heads/crt.safetensors"
    save_file(change(load_file(path)), path)
    edit_config(tmp_path, "heads", "crt", sha256=sha256(path.read_bytes()))
    with pytest.raises(UsageError, match=message):
        load(tmp_path, "crt")
