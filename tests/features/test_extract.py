"""Features are the classifier's input, for every architecture, loader and layout of batches."""

import multiprocessing
import subprocess
import sys
from collections import UserDict
from functools import partial
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, TensorDataset

import timm_lt
from timm_lt.data import create_loader
from timm_lt.features import Features, extract, extract_features
from timm_lt.heads import get_head
from timm_lt.utils.accelerator import create_accelerator
from timm_lt.utils.checks import UsageError

MODELS = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_nfnet"]
N = 11
IMAGES = torch.randn(N, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(N) % 4
DATA = TensorDataset(IMAGES, LABELS)


@pytest.fixture
def accelerators():
    """Makes accelerators of other settings in one process."""

    def make(create=create_accelerator, **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        return create(**options)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


def small_model(name="test_resnet", num_classes=5):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=num_classes)


def split(*sizes, images=IMAGES, labels=LABELS):
    """Returns batches of the first images."""
    number = sum(sizes)
    return list(zip(images[:number].split(sizes), labels[:number].split(sizes), strict=True))


# Features ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "targets", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), r"\(N, D\) matrix .* got a Tensor .* shape \(3,\)"),
        (torch.zeros(3, 2), torch.zeros(2).long(), r"shape \(3, 2\) with 2 targets"),
        (torch.zeros(3, 2), torch.tensor([0, -1, 0]), r"targets\[1\] = -1 is negative"),
        (torch.zeros(0, 2), torch.zeros(0).long(), "must not be empty"),
        (torch.tensor([[1.0, 0.0], [0.0, torch.nan]]), [0, 1], "row 1 has nan in column 1"),
        (None, [0], r"floating-point \(N, D\) matrix .* got a NoneType"),
        (np.eye(2), None, "targets must be a sequence or an array of integers"),
    ],
)
def test_wrong_features_are_refused(values, targets, message):
    with pytest.raises(UsageError, match=message):
        Features(values, targets)


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


def test_values_are_not_copied():
    values, array = torch.randn(4, 3).bfloat16(), np.eye(2)
    views = Features(values, torch.tensor([0, 1, 0, 1]), views=2)
    assert views.values is values
    assert views.first_views(1).values.data_ptr() == values.data_ptr()
    assert Features(array, [0, 1]).values.data_ptr() == array.ctypes.data
    # A row whose sum overflows its type is fine.
    assert len(Features(torch.full((2, 4), 6e4, dtype=torch.float16), torch.tensor([0, 1]))) == 2


def test_the_mean_of_the_columns_and_the_first_bad_row_are_found_across_blocks(monkeypatch):
    monkeypatch.setattr(extract, "BLOCK", 12)
    values = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)).half()
    features = Features(values, torch.zeros(10).long())
    expected = values.numpy().astype(np.float64).mean(0)
    np.testing.assert_allclose(features.feature_mean.numpy(), expected, rtol=1e-14)
    unread = Features.from_checked(values, torch.zeros(10).long())
    assert unread.feature_mean.equal(features.feature_mean)
    values[7, 2] = float("inf")
    with pytest.raises(UsageError, match="row 7 has inf in column 2"):
        Features(values, torch.zeros(10).long())


def test_views_are_rows_of_the_same_images():
    values, targets = torch.arange(12.0).view(6, 2), torch.tensor([4, 5, 4, 5, 4, 5])
    features = Features(values, targets, views=3)
    assert (len(features), features.num_images, features.views) == (6, 2, 3)
    first = features.first_views(2)
    assert (first.values.tolist(), first.targets.tolist()) == (values[:4].tolist(), [4, 5, 4, 5])
    assert (first.views, first.num_images) == (2, 2)
    with pytest.raises(UsageError, match=r"views must be .*3, got 4"):
        features.first_views(4)
    with pytest.raises(UsageError, match="6 feature rows are not 4 views of the same"):
        Features(values, targets, views=4)
    with pytest.raises(UsageError, match="6 feature rows are not 3 views of the same images in"):
        Features(values, torch.tensor([4, 5, 4, 9, 4, 5]), views=3)


def test_a_fit_takes_features_only():
    words = r"^features must be timm_lt.Features, got a ndarray: pass timm_lt.Features\("
    for call in (lambda x: timm_lt.fit_head("ncm", x), partial(timm_lt.tau_curve, nn.Linear(2, 2))):
        with pytest.raises(UsageError, match=words):
            call(np.eye(2))


# The backbone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_classifier_on_the_features_gives_the_output_of_the_model(name):
    model = small_model(name).eval()
    size = model.pretrained_cfg["input_size"][1]
    images = nn.functional.interpolate(IMAGES[:3], (size, size))
    features = extract_features(model, split(2, 1, images=images))
    weight, bias = get_head(model).weight, get_head(model).bias
    assert features.values.shape == (3, model.num_features)
    with torch.no_grad():
        torch.testing.assert_close(features.values @ weight.T + bias, model(images))
        pre_logits = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(features.values, pre_logits)
    assert features.targets.tolist() == [0, 1, 2]


def test_rows_do_not_depend_on_how_the_images_are_batched():
    model = small_model()
    whole = extract_features(model, split(8))
    # The length of a generator is unknown.
    for parts in (split(5, 2, 1), iter(split(2, 1, 2, 2, 1))):
        features = extract_features(model, parts)
        torch.testing.assert_close(features.values, whole.values)
        assert features.targets.equal(whole.targets)


def test_the_model_is_left_as_it_was():
    model = small_model().train()
    model.bn1.eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def late():
        yield IMAGES, LABELS
        yield IMAGES, LABELS.double() + 0.5

    expected = extract_features(model, split(3, 3)).values
    with pytest.raises(UsageError, match=r"fails on images of shape \(1, 7, 32, 32\) "):
        extract_features(model, [(torch.zeros(1, 7, 32, 32), torch.zeros(1, dtype=torch.long))])
    # The frames in which the batches are made live as long as the error.
    with pytest.raises(UsageError, match="is not an integer") as kept:
        extract_features(model, late())
    assert kept.value.__traceback__ is not None
    assert [module.training for module in model.modules()] == modes
    assert not get_head(model)._forward_pre_hooks
    # In training mode batch norm would have moved its statistics.
    assert all(value.equal(state[key]) for key, value in model.state_dict().items())
    # A head need not be fitted.
    assert extract_features(timm_lt.set_head(model, "ncm"), split(3, 3)).values.equal(expected)


def test_models_and_loaders_that_give_no_features_are_refused():
    around = small_model()
    around.forward = lambda images: images.mean((2, 3))
    vit = timm.create_model("test_vit", num_classes=4, img_size=64, dynamic_img_size=False)
    bad = split(2, 2)
    bad[1] = (bad[1][0].clone(), bad[1][1])
    bad[1][0][1] = float("nan")
    for model, loader, message in (
        (small_model(), [], "gave 0 images, "),
        (around, split(3), r"one vector per image .* but ResNet did not call it"),
        (small_model(num_classes=0), split(3), "classifier"),
        (vit, split(3), r"VisionTransformer fails .* shape \(3, 3, 32, 32\) \(.*height.*32"),
        (small_model(), bad, "feature row 3 has nan in column 0"),
    ):
        with pytest.raises(UsageError, match=message):
            extract_features(model, loader)


class Channels(nn.Module):
    """Its features are the means of the channels, times 1000; it has no ``forward_head``."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.get_classifier = lambda: self.fc

    def forward(self, images):
        return self.fc(1000 * images.mean((2, 3)))


def channels(*values):
    images = torch.tensor(values)[:, :, None, None].repeat(1, 3, 2, 2)
    return [(images[:1], torch.tensor([0])), (images[1:], torch.zeros(len(images) - 1).long())]


@pytest.mark.parametrize("cached", [False, True])
def test_a_value_or_label_out_of_range_is_named_by_its_row(cached, tmp_path):
    options = {"cache_dir": tmp_path, "key": "a"} if cached else {}
    loader = channels([1.0], [2.0], [65.5], [65.6])
    message = r"row 3 has 65600.0 in column 0, beyond the largest float16, 65504"
    with pytest.raises(UsageError, match=message):
        extract_features(Channels(), loader, dtype="float16", **options)
    kept = extract_features(Channels(), loader[:1], dtype="float16")
    assert kept.values.tolist() == [[1000.0] * 3]
    for dtype in ("float32", "bfloat16"):
        features = extract_features(Channels(), loader, dtype=dtype, **options)
        expected = torch.tensor([1000.0, 2000.0, 65500.0, 65600.0]).to(features.values.dtype)
        torch.testing.assert_close(features.values[:, 0], expected)
    loader[1][0][0] = float("nan")
    with pytest.raises(UsageError, match="row 1 has nan in column 0"):
        extract_features(Channels(), loader, dtype="float16", **options | {"key": "b"})
    loader[1][0][0], loader[1][1][1] = 0.0, -2
    with pytest.raises(UsageError, match=r"targets\[1:\]\[1\] = -2 is negative"):
        extract_features(Channels(), loader, **options | {"key": "b"})


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

    def layout():
        return [(weight.data_ptr(), weight.stride()) for weight in model.parameters()]

    before = layout()
    exact = extract_features(model, loader).values
    low = extract_features(model, loader, compute_dtype="bfloat16").values
    assert low.dtype == torch.float32
    assert not low.equal(exact)
    assert float(((low - exact).norm(dim=1) / exact.norm(dim=1)).median()) < 0.005
    assert layout() == before
    assert all(module.training for module in model.modules())
    assert extract_features(model, loader).values.equal(exact)


def test_the_mixed_precision_of_accelerate_is_off_in_float32(accelerators):
    loader = DataLoader(DATA, 4)
    expected = extract_features(small_model(), loader).values
    model = accelerators(Accelerator, cpu=True, mixed_precision="bf16").prepare(small_model())
    forward = model.forward
    assert extract_features(model, loader).values.equal(expected)
    assert model.forward == forward
    with torch.autocast("cpu", torch.bfloat16):
        assert extract_features(small_model(), loader).values.equal(expected)
    low = extract_features(model, loader, compute_dtype="bfloat16").values
    assert 1e-4 < float((low - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.1)]
)
def test_a_model_computes_in_the_type_of_its_weights(dtype, tolerance):
    expected = extract_features(small_model(), DataLoader(DATA, 4)).values
    model = small_model().to(dtype)
    values = extract_features(model, DataLoader(DATA, 4)).values
    assert values.dtype == torch.float32
    assert float((values - expected).norm() / expected.norm()) < tolerance
    low = extract_features(model, DataLoader(DATA, 4), compute_dtype="bfloat16").values
    assert low.equal(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "unknown dtype 'float64'.*float16"),
        ({"compute_dtype": "float16"}, "unknown compute_dtype 'float16'.*bfloat16"),
        ({"views": 0}, "views must be"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        extract_features(small_model(), split(3), **options)


# Loaders ---------------------------------------------------------------------------------------


def test_several_processes_need_a_prepared_loader(accelerators):
    two, plain = SimpleNamespace(num_processes=2), DataLoader(DATA, 4)
    for loader in (plain, [(IMAGES, LABELS)], create_loader(DATA, 32, 4)):
        with pytest.raises(UsageError, match=r"runs 2 processes, .* prepare it"):
            extract_features(small_model(), loader, accelerator=two)
    accelerator = accelerators(mixed_precision="no")
    options = {"accelerator": accelerator, "use_prefetcher": False}
    for loader in (accelerator.prepare(plain), create_loader(DATA, 32, 4, **options)):
        # Behind the check, there is no such device.
        with pytest.raises(AttributeError, match="gather_for_metrics"):
            extract_features(small_model(), loader, accelerator=two)


def test_a_users_mistake_in_the_main_process_reaches_the_others(monkeypatch):
    def fail():
        raise UsageError("no room")

    sent = []
    # The second process gets what the first has sent.
    monkeypatch.setattr(
        extract, "broadcast_object_list", lambda own: sent or sent.extend(own) or own
    )
    for is_main in (True, False):
        accelerator = SimpleNamespace(num_processes=2, is_main_process=is_main)
        with pytest.raises(UsageError, match="no room"):
            extract._Extraction._on_main(SimpleNamespace(accelerator=accelerator), fail)
    assert sent == [None, "no room"]


def failing(error):
    """What torch's loader raises when a worker does, without the seconds that a process takes."""
    try:
        raise error
    except type(error):
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    wrapped.reraise()
    yield


def dying(words):
    raise RuntimeError(words)
    yield


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (failing(LookupError("no such row")), "failed: .*no such row; fix it and extract "),
        # A RuntimeError, too, is one of a worker that lives.
        (failing(RuntimeError("no such row")), "failed: .*no such row; fix it and extract "),
        (
            dying("DataLoader worker (pid 7) is killed by signal: Killed. "),
            r"killed by signal 9, often .* too little memory; fewer workers need less\); extract",
        ),
        (
            dying("DataLoader worker (pid 7) exited unexpectedly with exit code 3."),
            r"died \(DataLoader worker \(pid 7\) exited unexpectedly with exit code 3\); extract",
        ),
    ],
)
def test_a_failed_or_dead_worker_says_what_to_do(loader, words, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda **_: "fork")
    with pytest.raises(UsageError, match=words):
        extract_features(small_model(), loader)


@pytest.mark.exhaustive
def test_a_script_without_its_guard_is_told_so(tmp_path):
    (tmp_path / "script.py").write_text(
        "import multiprocessing\n"
        "if multiprocessing.current_process().name == 'MainProcess':\n"
        "    multiprocessing.set_start_method('spawn')\n"
        "from torch.utils.data import DataLoader\n"
        "from timm_lt.data.loader import loaded\n"
        "list(loaded(DataLoader([1, 2], num_workers=1)))\n"
    )
    command = [sys.executable, str(tmp_path / "script.py")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    end = run.stderr.splitlines()[-1]
    assert "UsageError: a data worker died (DataLoader worker" in end
    assert end.endswith("""below `if __name__ == "__main__":`""")
    assert "memory" not in end


FILES = ("a", "b", "c")
LAYOUTS = {
    "three parts": lambda x, y: (x, y, torch.arange(len(y))),
    "mapping": lambda x, y: {"label": y, "image": x, "file": FILES},
    "other keys": lambda x, y: UserDict({"targets": y, "pixel_values": x, "image": FILES}),
    "arrays": lambda x, y: (x.numpy(), y.numpy().astype(np.uint8)),
    "read-only arrays": lambda x, y: (np.broadcast_to(x.numpy(), x.shape), y.numpy()[::-1][::-1]),
    "labels in a list": lambda x, y: (x, list(y.numpy())),
    "images in a list of arrays": lambda x, y: (list(x.numpy()), y),
    "float64": lambda x, y: (x.double(), y.int()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_of_any_layout_give_the_same_features(layout):
    parts = [(IMAGES[:3], LABELS[:3]), (IMAGES[3:], LABELS[3:])]
    features = extract_features(small_model(), [LAYOUTS[layout](x, y) for x, y in parts])
    torch.testing.assert_close(features.values, extract_features(small_model(), parts).values)
    assert features.targets.equal(LABELS)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (IMAGES, r"batch 0 of the loader is a Tensor .*expected an image and its label"),
        ({"image": IMAGES, "box": 0}, "is a dict with the keys image, box; expected an image and"),
        ((IMAGES[0], LABELS[0]), r"shape \(3, 32, 32\), .*expected .* of shape \(batch, channels"),
        ((IMAGES[:, :1], LABELS), r"fails on images of shape \(11, 1, 32, 32\) \("),
        ((IMAGES.byte(), LABELS), r"torch.uint8, .*expected .*floating-point .*normalized"),
        (
            (IMAGES, LABELS[1:]),
            r"labels a Tensor of shape \(10,\), .*expected one integer for each",
        ),
        ((IMAGES, LABELS / 2), r"batch 0 of the loader: labels\[0\] = 0.0 is not an integer"),
    ],
)
def test_what_is_wrong_with_a_batch_is_said(batch, words):
    with pytest.raises(UsageError, match=words):
        extract_features(small_model(), [batch])


@pytest.mark.parametrize("loader", [DATA, IMAGES, 5, datasets.Dataset.from_dict({"label": [0]})])
def test_only_loaders_are_loaders(loader):
    with pytest.raises(UsageError, match=r"is not a loader.* timm_lt.create_loader"):
        extract_features(small_model(), loader)
