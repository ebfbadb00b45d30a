"""Features are what the classifier really gets, for every architecture, fitted or not."""

import pytest
import timm
import torch
from torch import nn

import timm_lt
from timm_lt.features import Features, extract_features
from timm_lt.heads import get_head
from timm_lt.registry import UsageError

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
    with pytest.raises(RuntimeError):
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
