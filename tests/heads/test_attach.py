"""Heads on timm models: found, put on, kept through resets, and folded."""

import copy
import io

import pytest
import timm
import torch
from conftest import HEAD_OPTIONS, fill, usable_head
from torch import nn

from timm_lt.heads import (
    HEADS,
    as_joint,
    classifier_name,
    create_head,
    fold_head,
    get_head,
    list_heads,
    set_head,
)
from timm_lt.heads.attach import statistics_of
from timm_lt.utils.checks import UsageError

every_head = pytest.mark.parametrize("name", list_heads())


def small_model(num_classes=4):
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=num_classes).eval()


@every_head
def test_set_head_keeps_the_kind_through_reset_copy_and_pickle(name):
    model = set_head(small_model(), name, **HEAD_OPTIONS[name])
    first = get_head(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)  # noqa: TID251
    ema = timm.utils.ModelEmaV3(model).module
    for twin in (copy.deepcopy(model), loaded, ema, model):
        assert get_head(model) is first
        twin.reset_classifier(7)
        head = get_head(twin)
        assert type(head) is HEADS[name]
        assert head.options() == HEAD_OPTIONS[name]
        assert head.weight.shape == (7, 96)
        assert twin.num_classes == 7
        if head.is_fitted():
            assert twin(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    # From no classifier to one again.
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(3)
    assert type(get_head(model)) is HEADS[name]


def test_a_folded_model_is_reset_as_in_timm():
    model = fold_head(set_head(small_model(), "tau_norm", tau=0.5))
    assert type(get_head(model)) is nn.Linear
    model.reset_classifier(5)
    assert type(get_head(model)) is nn.Linear
    plain = small_model()
    assert get_head(fold_head(plain)) is get_head(plain)


@pytest.mark.parametrize("name", [name for name in list_heads() if name != "oltr"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_model_has_the_keys_of_timm(name, bias):
    options = {"metric": "euclidean"} if name == "ncm" else {}
    model = set_head(small_model(), fill(create_head(name, 96, 4, bias=bias, **options)))
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        plain = small_model()
        plain.load_state_dict(fold_head(model).state_dict())
        if name in ("cosine", "fslwf"):
            assert plain(images).argmax(1).equal(before.argmax(1))
        else:
            torch.testing.assert_close(plain(images), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["tau_norm", "crt"])
def test_a_folded_model_has_no_bias_where_timms_has_none(name):
    bare = small_model()
    bare.fc = nn.Linear(96, 4, bias=False)
    head = create_head(name, 96, 4)
    nn.init.zeros_(head.bias)
    keys = set(bare.state_dict())
    assert set(fold_head(set_head(bare, head)).state_dict()) == keys


def test_a_head_that_cannot_be_folded_stays():
    model = set_head(small_model(), usable_head("ncm", 96, 4, metric="euclidean", features="l2"))
    with pytest.raises(UsageError, match="cannot be folded"):
        fold_head(model)
    assert get_head(model).kind == "ncm"
    with pytest.raises(UsageError, match="'ncm' is not fitted"):
        set_head(small_model(), "ncm")(torch.zeros(1, 3, 32, 32))


def test_set_head_takes_a_fitted_module_in_the_models_type_and_mode():
    model = small_model().to(torch.bfloat16).train()
    head = usable_head("ncm", 96, 4)
    assert get_head(set_head(model, head)) is head
    assert head.weight.dtype is torch.bfloat16
    assert head.training
    assert model(torch.zeros(2, 3, 32, 32, dtype=torch.bfloat16)).shape == (2, 4)


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        (nn.Linear(96, 5), {}, r"the head is \(5, 96\).*classifier 'fc' is \(4, 96\)"),
        (nn.Linear(96, 4), {"tau": 1}, r"options \['tau'\] belong to a head given by name"),
        ({"head": nn.Linear(96, 4)}, {}, "has the classifiers fc, got heads for head"),
        ("tau_norm", {"gamma": 1}, "has no option 'gamma'"),
        (None, {}, "a head is a name or an nn.Linear, got NoneType"),
    ],
)
def test_set_head_refuses(head, options, message):
    model = small_model()
    before = get_head(model)
    with pytest.raises(UsageError, match=message):
        set_head(model, head, **options)
    assert get_head(model) is before


def test_a_head_does_not_start_from_class_means():
    model = set_head(small_model(), usable_head("ncm", 96, 4))
    with pytest.raises(UsageError, match="fitted 'ncm' head is not a classifier"):
        set_head(model, "tau_norm")
    # Before it is fitted, it still has the weight of the classifier.
    assert get_head(set_head(set_head(small_model(), "ncm"), "tau_norm")).kind == "tau_norm"


def test_a_model_without_a_linear_classifier_is_refused():
    with pytest.raises(UsageError, match=r"Sequential has no classifier that .*no get_classifier"):
        get_head(nn.Sequential(nn.Linear(3, 2)))
    headless = timm.create_model("test_resnet", num_classes=0)
    with pytest.raises(UsageError, match=r"found Identity.*num_classes >= 1"):
        classifier_name(headless)


@pytest.mark.parametrize("wrong", ["fc", None, 3, nn.Linear])
def test_a_classifier_that_is_not_a_module_is_refused(wrong):
    with pytest.raises(UsageError, match=r"one linear classifier, such as model\.get_classifier"):
        as_joint(wrong)

    class Model(nn.Module):
        def get_classifier(self):
            return wrong

    with pytest.raises(UsageError, match="Model has no classifier that a head can replace: found "):
        get_head(Model())


def test_the_classifier_in_a_list_is_found():
    linear = nn.Linear(6, 4)
    for listed in ((linear,), nn.ModuleList([linear]), [[nn.Sequential(linear)]]):
        assert as_joint(listed) is linear


def test_heads_with_different_statistics_do_not_go_on_one_model():
    model = small_model()
    heads = [usable_head("crt", 96, 4), usable_head("crt", 96, 4), usable_head("ncm", 96, 4)]
    moved = {"bn1.running_mean": torch.arange(32.0), "bn1.running_var": torch.ones(32)}
    for head in heads[:2]:
        head.backbone_statistics = {key: value.clone() for key, value in moved.items()}
    found = statistics_of(heads, model)
    assert list(found) == list(moved)
    assert all(torch.equal(found[key], value) for key, value in moved.items())
    heads[1].backbone_statistics["bn1.running_var"][-1] = 2.0
    with pytest.raises(UsageError, match=r"different batch-norm.*instance bn1\.running_var"):
        statistics_of(heads, model)
    set_head(model, heads[0])
    assert torch.equal(model.bn1.running_mean, moved["bn1.running_mean"])
    with pytest.raises(UsageError, match=r"those of its crt head.*create the model again"):
        set_head(model, usable_head("ncm", 96, 4))
