"""Features are what the classifier really gets, for every architecture, fitted or not."""

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from torch import nn

import timm_lt
from timm_lt.features import Features, extract_features
from timm_lt.features import values as values_module
from timm_lt.heads import get_head
from timm_lt.utils.checks import UsageError

MODELS = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_nfnet"]


def small_model(name="test_resnet", num_classes=5):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=num_classes)


def small_batches(sizes=(3, 3, 2), size=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(sum(sizes), 3, size, size, generator=generator)
    targets = torch.arange(sum(sizes)) % 5
    return list(zip(images.split(list(sizes)), targets.split(list(sizes)), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_the_classifier_on_the_features_gives_the_output_of_the_model(name):
    model = small_model(name).eval()
    size = model.pretrained_cfg["input_size"][1]
    loader = small_batches((2, 1), size=size)
    features = extract_features(model, loader)
    weight, bias = get_head(model).weight, get_head(model).bias
    assert features.values.shape == (3, model.num_features)
    with torch.no_grad():
        expected = torch.cat([model(images) for images, _ in loader])
        pre_logits = torch.cat(
            [
                model.forward_head(model.forward_features(images), pre_logits=True)
                for images, _ in loader
            ]
        )
        torch.testing.assert_close(features.values @ weight.T + bias, expected)
    torch.testing.assert_close(features.values, pre_logits)
    assert features.targets.tolist() == [0, 1, 2]


def test_the_features_are_the_classifier_input_where_pre_logits_are_not():
    """A model that changes its features after ``forward_head(pre_logits=True)``."""

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def get_classifier(self):
            return self.fc

        def forward(self, images):
            return self.fc(images.mean((2, 3)).repeat(1, 2)[:, :4] + 10)

    loader = [(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))]
    assert extract_features(Shifted(), loader).values.tolist() == [[10.0] * 4] * 2


def test_rows_do_not_depend_on_how_the_images_are_batched():
    model = small_model()
    whole = extract_features(model, small_batches((8,)))
    parts = extract_features(model, small_batches((5, 2, 1)))
    torch.testing.assert_close(whole.values, parts.values)
    assert whole.targets.equal(parts.targets)


def test_every_module_is_left_in_its_mode_and_without_a_hook():
    model = small_model().train()
    model.bn1.eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    extract_features(model, small_batches())
    assert [module.training for module in model.modules()] == modes
    assert not get_head(model)._forward_pre_hooks
    # In training mode batch norm would have moved its statistics.
    assert all(value.equal(state[key]) for key, value in model.state_dict().items())


def test_mode_and_hooks_are_restored_after_an_error():
    model = small_model().train()
    with pytest.raises(UsageError, match=r"fails on images of shape \(1, 7, 32, 32\) "):
        extract_features(model, [(torch.zeros(1, 7, 32, 32), torch.zeros(1, dtype=torch.long))])
    assert model.training
    assert not get_head(model)._forward_pre_hooks
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


def test_a_head_that_is_not_fitted_does_not_matter():
    model = small_model()
    expected = extract_features(model, small_batches())
    timm_lt.set_head(model, "ncm")
    with pytest.raises(UsageError, match="not fitted"):
        model.eval()(torch.zeros(1, 3, 32, 32))
    assert extract_features(model, small_batches()).values.equal(expected.values)


def test_features_are_ordinary_float32_tensors_that_can_be_trained_on():
    features = extract_features(small_model(), small_batches())
    assert features.values.dtype == torch.float32
    assert not features.values.is_inference()
    assert not features.values.requires_grad
    weight = torch.zeros(5, features.num_features, requires_grad=True)
    nn.functional.cross_entropy(features.values @ weight.T, features.targets).backward()
    assert weight.grad is not None


def test_an_empty_loader_is_refused():
    with pytest.raises(UsageError, match="no batches"):
        extract_features(small_model(), [])


def test_a_model_that_goes_round_its_classifier_is_refused():
    model = small_model()
    model.forward = lambda images: images.mean((2, 3))
    with pytest.raises(UsageError, match=r"ResNet .* without calling its classifier"):
        extract_features(model, small_batches())


def test_a_model_without_a_linear_classifier_is_refused():
    with pytest.raises(UsageError, match="classifier"):
        extract_features(small_model(num_classes=0), small_batches())


def test_a_feature_that_is_not_finite_is_named_across_batches():
    loader = small_batches((2, 2))
    loader[1][0][1] = float("nan")
    with pytest.raises(UsageError, match="feature row 3 has nan in column 0"):
        extract_features(small_model(), loader)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_row_and_column_of_a_value_that_is_not_finite_are_named(value):
    values = torch.ones(4, 3)
    values[2, 1] = value
    with pytest.raises(UsageError, match=f"row 2 has {value} in column 1"):
        Features(values, torch.zeros(4, dtype=torch.long))


def test_a_row_whose_sum_overflows_is_fine():
    assert len(Features(torch.full((2, 4), 6e4, dtype=torch.float16), torch.tensor([0, 1]))) == 2


@pytest.mark.parametrize(
    ("values", "targets", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), r"\(N, D\) matrix, got torch.float32 \(3,\)"),
        (torch.zeros(3, 2).long(), torch.zeros(3).long(), "floating-point"),
        (torch.zeros(3, 2), torch.zeros(2).long(), r"3 feature rows .* shape \(2,\)"),
        (torch.zeros(3, 2), torch.zeros(3, 1).long(), r"shape \(3, 1\)"),
        (torch.zeros(3, 2), torch.tensor([0, -1, 0]), r"targets\[1\] = -1 is negative"),
        (torch.zeros(2, 2), torch.tensor([0.0, 0.5]), r"targets\[1\] = 0.5 is not an integer"),
        (torch.zeros(0, 2), torch.zeros(0).long(), "must not be empty"),
    ],
)
def test_features_that_make_no_sense_are_refused(values, targets, message):
    with pytest.raises(UsageError, match=message):
        Features(values, targets)


def test_targets_of_any_integer_type_become_int64():
    features = Features(torch.eye(2), torch.tensor([0, 1], dtype=torch.uint8))
    assert features.targets.dtype == torch.int64
    assert (len(features), features.num_features) == (2, 2)


def test_the_mean_of_the_columns_and_the_first_bad_row_are_found_across_blocks(monkeypatch):
    monkeypatch.setattr(values_module, "BLOCK", 12)
    values = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)).half()
    features = Features(values, torch.zeros(10).long())
    expected = values.numpy().astype(np.float64).mean(0)
    np.testing.assert_allclose(features.feature_mean.numpy(), expected, rtol=1e-14)
    unread = Features.from_checked(values, torch.zeros(10).long())
    assert unread.feature_mean.equal(features.feature_mean)
    values[7, 2] = float("inf")
    with pytest.raises(UsageError, match="row 7 has inf in column 2"):
        Features(values, torch.zeros(10).long())


def test_values_are_not_copied():
    values = torch.randn(4, 3).bfloat16()
    features = Features(values, torch.arange(4))
    assert features.values is values
    views = Features(values, torch.tensor([0, 1, 0, 1]), views=2)
    assert views.first_views(1).values.data_ptr() == values.data_ptr()


def test_views_are_rows_of_the_same_images():
    values, targets = torch.arange(12.0).view(6, 2), torch.tensor([4, 5, 4, 5, 4, 5])
    features = Features(values, targets, views=3)
    assert (len(features), features.num_images, features.views) == (6, 2, 3)
    first = features.first_views(2)
    assert (first.values.tolist(), first.targets.tolist()) == (values[:4].tolist(), [4, 5, 4, 5])
    assert (first.views, first.num_images) == (2, 2)
    with pytest.raises(UsageError, match=r"views must be .*3, got 4"):
        features.first_views(4)
    with pytest.raises(UsageError, match="6 feature rows are not 4 views"):
        Features(values, targets, views=4)
    with pytest.raises(UsageError, match=r"target 9 of row 3 is not that .* view 0, 5"):
        Features(values, torch.tensor([4, 5, 4, 9, 4, 5]), views=3)


class Channels(nn.Module):
    """Its features are the means of the channels, times 1000."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def get_classifier(self):
        return self.fc

    def forward(self, images):
        return self.fc(1000 * images.mean((2, 3)))


def channels(*values):
    images = torch.tensor(values)[:, :, None, None].repeat(1, 3, 2, 2)
    return [(images[:1], torch.tensor([0])), (images[1:], torch.zeros(len(images) - 1).long())]


@pytest.mark.parametrize("cached", [False, True])
def test_a_feature_beyond_float16_is_an_error_that_names_it(cached, tmp_path):
    options = {"cache_dir": tmp_path, "key": "a"} if cached else {}
    loader = channels([1.0], [2.0], [65.5], [65.6])
    message = r"row 3 has 65600.0 in column 0, beyond the largest float16, 65504"
    with pytest.raises(UsageError, match=message):
        extract_features(Channels(), loader, dtype="float16", **options)
    assert not list(tmp_path.glob("*.safetensors"))
    kept = extract_features(Channels(), loader[:1], dtype="float16")
    assert kept.values.tolist() == [[1000.0] * 3]
    for dtype in ("float32", "bfloat16"):
        features = extract_features(Channels(), loader, dtype=dtype, **options)
        expected = torch.tensor([1000.0, 2000.0, 65500.0, 65600.0]).to(features.values.dtype)
        torch.testing.assert_close(features.values[:, 0], expected)
    loader[1][0][0] = float("nan")
    with pytest.raises(UsageError, match="row 1 has nan in column 0"):
        extract_features(Channels(), loader, dtype="float16", **options | {"key": "b"})


def test_a_bad_label_is_named_as_the_row_it_is_in(tmp_path):
    loader = channels([1.0], [2.0], [3.0])
    loader[1][1][1] = -2
    with pytest.raises(UsageError, match=r"targets\[1:\]\[1\] = -2 is negative"):
        extract_features(Channels(), loader, cache_dir=tmp_path, key="a")


def test_bfloat16_is_close_and_leaves_the_model_as_it_was():
    model = small_model("resnet18")
    generator = torch.Generator().manual_seed(1)
    # Smooth, as photographs are.
    coarse = torch.randn(24, 3, 8, 8, generator=generator)
    images = nn.functional.interpolate(coarse, (64, 64), mode="bicubic")
    loader = [(images[16:], torch.arange(8))]
    model.train()
    with torch.no_grad():
        # Statistics of images: with those of a new model, features would explode.
        for _ in range(6):
            model(images[:16])
    weights = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    strides = {name: weight.stride() for name, weight in model.named_parameters()}
    exact = extract_features(model, loader).values
    low = extract_features(model, loader, compute_dtype="bfloat16").values
    assert low.dtype == torch.float32
    assert not low.equal(exact)
    assert float(((low - exact).norm(dim=1) / exact.norm(dim=1)).median()) < 0.005
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == weights
    assert {name: weight.stride() for name, weight in model.named_parameters()} == strides
    assert all(module.training for module in model.modules())
    assert extract_features(model, loader).values.equal(exact)


def test_float32_is_float32_within_autocast():
    model, loader = small_model(), small_batches()
    expected = extract_features(model, loader).values
    with torch.autocast("cpu", torch.bfloat16):
        assert extract_features(model, loader).values.equal(expected)


def test_a_loader_of_unknown_length_is_read_whole():
    model = small_model()
    expected = extract_features(model, small_batches((8,)))
    features = extract_features(model, iter(small_batches((2, 1, 2, 2, 1))))
    torch.testing.assert_close(features.values, expected.values)
    assert features.targets.equal(expected.targets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, r"dtype of extract_features: .*float64.*float16"),
        ({"compute_dtype": "float16"}, r"compute_dtype of extract_features: .*bfloat16"),
        ({"views": 0}, "views must be"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        extract_features(small_model(), small_batches(), **options)


@pytest.mark.parametrize(
    ("values", "targets"),
    [
        (np.eye(3, dtype=np.float32), np.array([2, 0, 1], np.uint8)),
        (np.broadcast_to(np.float64(1), (3, 2)), [2, 0, 1]),
        ([[0.5, 1.5], [0.0, 2.0], [1.0, 1.0]], (torch.tensor(2), torch.tensor(0), torch.tensor(1))),
        (pd.DataFrame(np.eye(3, 2)), pd.Series([2, 0, 1], index=[7, 8, 9])),
        (torch.eye(3).half(), [np.int32(2), np.int64(0), 1]),
    ],
)
def test_arrays_are_features_too(values, targets):
    features = Features(values, targets)
    assert features.values.dtype in (torch.float16, torch.float32, torch.float64)
    assert features.values.tolist() == np.asarray(values).tolist()
    assert (features.targets.dtype, features.targets.tolist()) == (torch.int64, [2, 0, 1])


def test_an_array_that_is_not_copied_is_that_of_the_caller():
    array = np.eye(2)
    features = Features(array, [0, 1])
    array[0, 0] = 5
    assert features.values[0, 0] == 5


@pytest.mark.parametrize(
    ("values", "targets", "words"),
    [
        (None, [0], r"floating-point \(N, D\) matrix, got a NoneType"),
        ([["a"]], [0], "got a list"),
        ([[1.0], [1.0, 2.0]], [0, 1], "got a list"),
        (np.eye(2, dtype=int), [0, 1], r"got torch.int64 \(2, 2\)"),
        (np.eye(2), ["ant", "bee"], r"targets\[0\] = 'ant' is not an integer"),
        (np.eye(2), None, "targets must be a sequence of integers, got None"),
    ],
)
def test_what_is_not_a_matrix_or_a_label_is_refused(values, targets, words):
    with pytest.raises(UsageError, match=words):
        Features(values, targets)


@pytest.mark.parametrize("given", [(torch.eye(2), torch.tensor([0, 1])), np.eye(2), None])
def test_a_fit_takes_features_only(given):
    features = Features(np.eye(2), [0, 1])
    linear = nn.Linear(2, 2)
    words = rf"must be timm_lt.Features, got a {type(given).__name__}: pass timm_lt.Features\("
    with pytest.raises(UsageError, match=f"^features {words}"):
        timm_lt.fit_head("ncm", given)
    with pytest.raises(UsageError, match=f"^features {words}"):
        timm_lt.tau_curve(linear, given)
    if given is not None:
        with pytest.raises(UsageError, match=f"^val {words}"):
            timm_lt.fit_head("tau_norm", features, classifier=linear, val=given)
