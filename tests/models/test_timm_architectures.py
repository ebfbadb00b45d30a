"""Heads on every kind of classifier that timm's architectures have."""

import collections
import copy
import pickle  # noqa: TID251
import re

import numpy as np
import pytest
import timm
import torch
from timm.models.metaformer import MetaFormer
from timm.models.volo import _create_volo
from torch import nn

import timm_lt
from timm_lt.checkpoint import load_heads
from timm_lt.heads import HEADS, Head, find_classifiers
from timm_lt.utils.checks import UsageError

CLASSES, TAU = 5, 0.6
COUNTS = torch.tensor([90, 9, 1, 40, 2])
SHIFT = TAU * (COUNTS / COUNTS.sum()).log()
ADJUSTED = {"tau": TAU, "class_counts": COUNTS}


def caformer(num_classes=CLASSES):
    # The registered ones have 26 million parameters or more.
    arguments = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    return MetaFormer(use_mlp_head=True, num_classes=num_classes, **arguments)


def volo(num_classes=CLASSES):
    # The registered ones have 18 blocks or more.
    arguments = {"layers": (1, 1, 1, 1), "img_size": 64, "num_heads": (2, 2, 2, 2)}
    arguments |= {"embed_dims": (16, 32, 32, 32), "stem_hidden_dim": 8}
    return _create_volo("volo_d1_224", num_classes=num_classes, **arguments)


DEIT = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32}
LEVIT = {"num_heads": (2, 2, 2), "depth": (1, 1, 1), "key_dim": 8, "embed_dim": (32, 48, 64)}
CPUBONE = {"width_list": [8, 16, 16, 32, 32], "depth_list": [0, 1, 1, 1, 1]}
REPVIT = {"embed_dim": (8, 16, 24, 32), "depth": (1, 1, 1, 1)}
CROSSVIT = {"embed_dim": (16, 32), "depth": ((1, 1, 0),), "num_heads": (2, 2)}
VIM = {"embed_dim": (16, 24, 32), "depths": (1, 1, 1), "state_dim": (9, 9, 4)}
VIM_HEADS = " ".join(f"{name}.{i}" for name in ("heads", "heads_dist") for i in range(4))
DLA = {"levels": [1] * 6, "channels": [8, 8, 16, 16, 32, 32]}
RESNETV2 = {"layers": (1, 1, 1, 1), "channels": (16, 16, 16, 32)}
# Paths of the classifiers, number of pixels, and a small model that has them.
KINDS = {
    "linear": ("fc", 32, "test_resnet", {}),
    "in MlpHead": ("head.fc.fc2", 32, caformer, {}),
    "in NormLinear": ("head.linear head_dist.linear", 64, "levit_128s", {**LEVIT, "img_size": 64}),
    "in LinearLayer": ("head.classifier.linear", 32, "cpubone_b0_bfrobust", CPUBONE),
    "in RepVitClassifier": ("head.head.l head.head_dist.l", 32, "repvit_m0_9", REPVIT),
    "distilled": ("head head_dist", 32, "deit_tiny_distilled_patch16_224", DEIT),
    "two scales": ("head.0 head.1", 240, "crossvit_9_240", CROSSVIT),
    "four scales, distilled": (VIM_HEADS, 32, "efficientvim_m1_dist", VIM),
    "with an auxiliary one": ("aux_head head", 64, volo, {}),
    "convolution": ("fc", 32, "dla46_c", DLA),
    "convolution in a head": ("head.fc", 32, "resnetv2_18", RESNETV2),
}
PATHS = {kind: paths.split() for kind, (paths, *_) in KINDS.items()}
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind, seed=0):
    torch.manual_seed(seed)
    _, _, name, options = KINDS[kind]
    is_name = isinstance(name, str)
    model = timm.create_model(name, num_classes=CLASSES, **options) if is_name else name()
    for path in PATHS[kind]:
        # Some of timm's classifiers start at zero.
        nn.init.normal_(model.get_submodule(path).weight, std=0.3)
        nn.init.normal_(model.get_submodule(path).bias)
    return model.eval()


def images(kind):
    pixels = KINDS[kind][1]
    return torch.randn(2, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))


def tau_normalised(plain, paths):
    """The same by hand: a copy of the plain model with other numbers in timm's own modules."""
    model = copy.deepcopy(plain)
    for path in paths:
        module = model.get_submodule(path)
        weight = module.weight.detach().double().numpy()
        norms = np.sqrt((weight.reshape(CLASSES, -1) ** 2).sum(1)) ** TAU
        scaled = weight / norms.reshape(-1, *[1] * (weight.ndim - 1))
        module.weight.data = torch.from_numpy(scaled).float()
        module.bias.data.zero_()
    return model


@pytest.fixture(scope="module")
def pairs():
    """For each kind: the plain model, one with a head, and the logits that it should have."""
    built = {}
    for kind, paths in PATHS.items():
        plain = build(kind)
        model = timm_lt.set_head(copy.deepcopy(plain), "tau_norm", tau=TAU)
        with torch.no_grad():
            built[kind] = plain, model, tau_normalised(plain, paths)(images(kind))
    return built


@torch.no_grad()
def close(model, kind, expected):
    torch.testing.assert_close(model(images(kind)), expected, rtol=1e-4, atol=1e-5)


@every_kind
def test_every_classifier_is_replaced_and_the_logits_are_the_formulas(kind, pairs):
    plain, model, expected = pairs[kind]
    assert list(find_classifiers(model)) == PATHS[kind]
    assert {type(head) for head in find_classifiers(model).values()} == {HEADS["tau_norm"]}
    shapes = [{k: v.shape for k, v in part.state_dict().items()} for part in (model, plain)]
    assert shapes[0] == shapes[1]
    close(model, kind, expected)
    with torch.no_grad():
        logits = plain(images(kind))
    # A random classifier's logits are not all the same, and a head changes them.
    assert not torch.allclose(logits, expected, rtol=1e-2, atol=1e-2)
    close(timm_lt.set_head(copy.deepcopy(plain), "linear"), kind, logits)


@every_kind
def test_logit_adjustment_is_subtracted_once(kind, tmp_path):
    plain = build(kind)
    model = timm_lt.set_head(copy.deepcopy(plain), "logit_adjusted", **ADJUSTED)
    with torch.no_grad():
        expected = plain(images(kind)) - SHIFT
    for same in (model, pickle.loads(pickle.dumps(model)), timm_lt.fold_head(copy.deepcopy(model))):
        close(same, kind, expected)
    adjusted, classifiers = HEADS["logit_adjusted"], find_classifiers(plain)
    by_path = {path: adjusted.from_classifier(c, **ADJUSTED) for path, c in classifiers.items()}
    close(timm_lt.set_head(copy.deepcopy(plain), by_path), kind, expected)
    if len(by_path) > 1:
        timm_lt.save_checkpoint(tmp_path, plain, heads={"la": by_path}, class_counts=COUNTS)
        close(timm_lt.set_head(plain, load_heads(tmp_path, "la", plain)), kind, expected)


@pytest.mark.parametrize("kind", ["distilled", "in NormLinear", "in RepVitClassifier"])
def test_what_training_modes_return_is_adjusted_once(kind):
    plain, outputs = build(kind), []
    for network in (plain, timm_lt.set_head(copy.deepcopy(plain), "logit_adjusted", **ADJUSTED)):
        network.set_distilled_training(True)
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(network.train()(images(kind)))
    for before, after in zip(*outputs, strict=True):
        torch.testing.assert_close(after, before - SHIFT)


@every_kind
def test_copies_keep_the_logits_and_a_reset_the_head(kind, pairs):
    _, model, expected = pairs[kind]
    loaded = timm_lt.set_head(build(kind, seed=7), "tau_norm", tau=TAU)
    loaded.load_state_dict(model.state_dict())
    average, copied = timm.utils.ModelEmaV3(model).module, copy.deepcopy(model)
    for twin in (loaded, average, copied, pickle.loads(pickle.dumps(model))):
        assert not set(twin.parameters()) & set(model.parameters())
        close(twin, kind, expected)
    copied.reset_classifier(3)
    heads = find_classifiers(copied).values()
    assert {(h.kind, h.out_features, h.tau) for h in heads} == {("tau_norm", 3, TAU)}
    assert copied(images(kind)).shape == (2, 3)
    copied.reset_classifier(0)
    assert not any(isinstance(module, Head) for module in copied.modules())
    copied.reset_classifier(4)
    assert all(isinstance(head, HEADS["tau_norm"]) for head in find_classifiers(copied).values())


SAMPLE = ("linear", "distilled")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in SAMPLE else pytest.mark.exhaustive) for k in KINDS]
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_torch_script_compile_and_export(kind, pairs):
    _, model, expected = pairs[kind]
    # Every one of the plain models can be scripted.
    close(torch.jit.script(model), kind, expected)
    torch.compiler.reset()
    close(torch.compile(model, backend="eager"), kind, expected)
    with torch.no_grad():
        exported = torch.export.export(model, (images(kind),), strict=False)
    close(exported.module(), kind, expected)


@every_kind
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_folded_model_loads_strictly_into_timms(kind, bias):
    model, plain, cosine = build(kind), build(kind, seed=7), HEADS["cosine"]
    # Fitted elsewhere, with a bias or without one.
    classifiers = find_classifiers(model)
    fitted = {k: cosine(c.weight.shape[1], CLASSES, bias) for k, c in classifiers.items()}
    predicted = timm_lt.set_head(model, fitted)(images(kind)).argmax(1)
    folded = timm_lt.fold_head(model)
    plain.load_state_dict(folded.state_dict())
    types = [{k: type(c) for k, c in find_classifiers(part).items()} for part in (plain, folded)]
    assert types[0] == types[1]
    assert not any(plain.get_submodule(path).bias.any() for path in PATHS[kind])
    preds = folded(images(kind)).argmax(1)
    assert plain(images(kind)).argmax(1).equal(preds)
    assert len(fitted) > 1 or predicted.equal(preds)


@pytest.mark.parametrize("kind", ["distilled", "convolution", "in MlpHead", "two scales"])
def test_features_are_what_the_classifier_sees(kind, pairs):
    plain, seen = pairs[kind][0], {}
    for name, classifier in find_classifiers(plain).items():
        hook = lambda _, inputs, name=name: seen.update({name: inputs[0].flatten(1)})  # noqa: E731
        classifier.register_forward_pre_hook(hook)
    with torch.no_grad():
        plain(images(kind))
    for name, expected in dict(seen).items():
        loader = [(images(kind), torch.tensor([0, 1]))]
        features = timm_lt.extract_features(plain, loader, classifier=name)
        assert torch.equal(features.values, expected)


def forms(model):
    plain = {k: v for k, v in find_classifiers(model).items() if not isinstance(v, Head)}
    return {k: nn.Conv2d if isinstance(v, nn.Conv2d) else nn.Linear for k, v in plain.items()}


# A number that no layer of timm's has by chance.
ODD_CLASSES = 13


def form_of_classifier(name):
    """Has an architecture take a head, keep it through a reset, and fold to what it was."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=ODD_CLASSES)
        if not hasattr(model, "get_classifier"):
            with pytest.raises(UsageError, match="has no classifier"):
                timm_lt.set_head(model, "tau_norm")
            return "none"
        plain = {k: v.shape for k, v in model.state_dict().items()}
        classifier, before = model.get_classifier(), forms(model)
        several = isinstance(classifier, tuple | nn.ModuleList)
        bare = isinstance(classifier, nn.Linear | nn.Conv2d)
        timm_lt.set_head(model, "tau_norm", tau=TAU)
        assert {k: v.shape for k, v in model.state_dict().items()} == plain, name
        # None is left.
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        left = [m for m in linear if m.out_features == ODD_CLASSES]
        assert left == list(find_classifiers(model).values()), name
        assert all(isinstance(head, Head) for head in left), name
        model.reset_classifier(3)
        heads = find_classifiers(model).values()
        assert {(h.kind, h.tau, h.out_features) for h in heads} == {("tau_norm", TAU, 3)}, name
        timm_lt.fold_head(model)
        # Some models of timm drop the distilled classifier when they are reset.
        assert forms(model).items() <= before.items(), name
    return "several" if several else type(classifier).__name__ if bare else "wrapped"


def names_of_timm(module=""):
    return [name for name in timm.list_models(module=module) if not name.startswith("lt_")]


def counts_of(names):
    counts = collections.Counter(form_of_classifier(name) for name in sorted(names))
    assert sum(counts.values()) == len(names)
    return counts


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_one_of_each_module_of_timm():
    """The first name that says it is small, or the first of all; and all without a classifier."""
    small = re.compile("atto|femto|pico|nano|tiny|xxs|small")
    families = [names_of_timm(module) for module in timm.list_modules()]
    names = {next(filter(small.search, names), names[0]) for names in families if names}
    names |= {name for name in names_of_timm() if name.endswith("_enc")}
    assert {"Linear", "wrapped", "several", "Conv2d", "none"} == set(counts_of(names))


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
def test_all_of_timm():
    counts = counts_of(names_of_timm())
    # Counted at timm 1.0.31; another version may have more, and none may be refused there either.
    expected = {"Linear": 1226, "wrapped": 49, "several": 50, "Conv2d": 39, "none": 7}
    assert counts == expected or timm.__version__ != "1.0.31"
    assert counts["none"] <= expected["none"]
