"""Processes and devices: calls of the library leave the state of the process unchanged."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import timm_lt
from timm_lt.utils.accelerator import (
    create_accelerator,
    default_device,
    fresh_accelerate,
    process_rank,
    set_cpu_threads,
    temporary_accelerator,
)

PAIRS = [(Image.new("RGB", (32, 32), (70 * c, 9 * i, 9)), c) for c in range(3) for i in range(6)]
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])


def small_model():
    torch.manual_seed(0)
    return timm.create_model("lt_test_resnet", num_classes=3)


def features(model):
    return timm_lt.extract_features(model, [(IMAGES, TARGETS)]).values


@pytest.fixture
def own_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


SNAPSHOTS = """
import logging, os, random, sys, threading, warnings
import matplotlib, numpy as np, timm, torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import ImageFile
import timm_lt
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, FOLDER)
from test_accelerator import IMAGES, PAIRS, TARGETS, small_model


def snapshot():
    # The threads of a queue that was closed end by themselves, a moment later.
    for thread in threading.enumerate():
        if thread.name == "QueueFeederThread":
            thread.join(30)
    loggers = [logging.getLogger(name) for name in (None, "timm_lt", "timm", "accelerate")]
    states = AcceleratorState, GradientState, PartialState
    return {
        "accelerate": [dict(kind._shared_state) for kind in states],
        "environment": (dict(os.environ), os.getcwd(), sys.path[:], sys.argv[:]),
        "threads": (torch.get_num_threads(), threading.enumerate()),
        "logging": [(log.level, log.handlers[:], log.propagate) for log in loggers],
        "warnings": (warnings.filters[:], ImageFile.LOAD_TRUNCATED_IMAGES),
        "matplotlib": {key: str(matplotlib.rcParams._get(key)) for key in matplotlib.rcParams},
        "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "types": (torch.get_default_dtype(), torch.get_default_device()),
        "kernels": (torch.are_deterministic_algorithms_enabled(), torch.backends.mkldnn.enabled),
        "modules": [(m.training, dict(m._forward_pre_hooks)) for m in model.modules()],
        "gradients": [weight.requires_grad for weight in model.parameters()],
        "weights": [value.tolist() for value in model.state_dict().values()],
    }


model = small_model().train()
model.layer1.eval().requires_grad_(False)
loader = DataLoader(TensorDataset(IMAGES, TARGETS), 4, num_workers=1)
features = timm_lt.Features(torch.randn(8, 5), TARGETS)
linear = torch.nn.Linear(5, 3)
cache, out = sys.argv[1] + "/cache", sys.argv[1] + "/out"
calls = {
    "extract": lambda: timm_lt.extract_features(model, loader),
    "extract into a cache": lambda: timm_lt.extract_features(model, loader, cache_dir=cache),
    "rebalance": lambda: timm_lt.rebalance(model, PAIRS, heads="ncm", output=out, workers=1),
    "rebalance anew": lambda: timm_lt.rebalance(
        model, PAIRS, heads=["crt", "lws"], fresh_classifier=True, workers=0
    ),
    "fit": lambda: timm_lt.fit_head("auto", features, classifier=linear, val=features),
}
random.seed(1), np.random.seed(2), torch.manual_seed(3)
torch.set_default_dtype(torch.float64)
warnings.simplefilter("ignore", ResourceWarning)
for call, act in calls.items():
    before = snapshot()
    act()
    after = snapshot()
    changed = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    assert not changed, (call, changed)
"""


def script(folder, content):
    """A file with a script that can import this module."""
    path = folder / "script.py"
    path.write_text(content.replace("FOLDER", repr(str(Path(__file__).parent))))
    return path


@pytest.mark.slow
def test_the_process_is_left_as_it_was(server, tmp_path):
    done = server.run(tmp_path, script=script(tmp_path, SNAPSHOTS))
    assert done.status == 0, done.err[-3000:]


def test_the_callers_accelerator_goes_on_as_before(own_accelerator):
    """Gradients of four batches make an update, before and after, in bfloat16."""
    model, own = small_model(), own_accelerator
    prepared = own.prepare(model)
    batches = own.prepare(DataLoader(TensorDataset(IMAGES, TARGETS), 1))
    synced = []
    for number, _ in enumerate(batches):
        with own.accumulate(prepared):
            synced.append(own.sync_gradients)
        if number == 2:
            # In the middle of an update.
            found = timm_lt.rebalance(model, PAIRS, heads="ncm", workers=0)
            assert features(model).dtype == torch.float32
    assert synced == [False, False, False, True] * 2
    assert own.mixed_precision == AcceleratorState().mixed_precision == "bf16"
    assert Accelerator().gradient_accumulation_steps == 1
    # The copy computes in full precision, with its own weights.
    assert "_original_forward" in vars(model)
    plain = timm_lt.set_head(small_model(), found.heads[found.head]).eval()
    assert torch.equal(found.model(IMAGES), plain(IMAGES))


def test_two_precisions_in_one_process():
    for precision in ("no", "bf16"):
        with fresh_accelerate():
            assert create_accelerator(mixed_precision=precision).mixed_precision == precision
    assert not AcceleratorState._shared_state


def fail_with(accelerator):
    assert (accelerator.mixed_precision, accelerator.gradient_accumulation_steps) == ("no", 1)
    raise timm_lt.UsageError("x")


def test_the_state_is_restored_after_an_error(own_accelerator):
    before = dict(AcceleratorState._shared_state), dict(GradientState._shared_state)
    with pytest.raises(timm_lt.UsageError), temporary_accelerator() as accelerator:
        fail_with(accelerator)
    assert before == (AcceleratorState._shared_state, GradientState._shared_state)


ON_TWO = """
import sys, torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import PartialState
import timm_lt

sys.path.insert(0, FOLDER)
from test_accelerator import PAIRS, small_model

model = small_model()
own = Accelerator(cpu=True, mixed_precision="bf16") if sys.argv[1] == "own" else None
found = timm_lt.rebalance(own.prepare(model) if own else model, PAIRS, heads="ncm", workers=0)
assert found.reports["ncm"].test_images.tolist() == [1, 1, 1]
assert type(found.model) is type(model)
assert dist.is_initialized() == (own is not None) == bool(PartialState._shared_state)
if own:
    assert (own.mixed_precision, own.num_processes) == ("bf16", 2)
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("accelerator", ["own", "none"])
def test_two_processes_share_the_images(server, tmp_path, accelerator):
    for rank in server.on_ranks(2, accelerator, script=script(tmp_path, ON_TWO)):
        assert rank.status == 0, rank.err


NOTEBOOK = """
import asyncio, sys, threading, torch
import timm_lt

sys.path.insert(0, FOLDER)
from test_accelerator import PAIRS, small_model

ended, matrix = threading.Event(), torch.randn(500, 500)

def compute():
    while not ended.is_set():
        matrix @ matrix

async def cells():
    act = lambda: timm_lt.rebalance(small_model(), PAIRS, heads="ncm", workers=2).head
    return act(), await asyncio.get_running_loop().run_in_executor(None, act)

threading.Thread(target=compute).start()
try:
    first, second = asyncio.run(cells())
    assert first == second
finally:
    ended.set()
"""


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_workers_start_beside_threads_and_an_event_loop(server, tmp_path):
    done = server.run(script=script(tmp_path, NOTEBOOK))
    assert done.status == 0, done.err


def test_wrapped_models():
    model, wrapped, compiled = small_model().eval(), small_model().eval(), small_model().eval()
    compiled.compile(backend="eager")
    wrapped = torch.compile(torch.nn.DataParallel(wrapped), backend="eager")
    expected = timm_lt.rebalance(model, PAIRS, heads="ncm", workers=0).model(IMAGES)
    for given in (wrapped, compiled):
        given(IMAGES)
        assert torch.equal(features(given), features(model))
        found = timm_lt.rebalance(given, PAIRS, heads="ncm", workers=0).model
        assert type(found) is type(model)
        assert torch.equal(found(IMAGES), expected)


@contextmanager
def double_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


MODES = {
    "inference": torch.inference_mode(),
    "float64": double_by_default(),
    "meta device": torch.device("meta"),
    "autocast": torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_callers_modes_do_not_matter(mode):
    model = small_model()
    expected = timm_lt.rebalance(model, PAIRS, heads="crt", workers=0)
    with MODES[mode]:
        found = timm_lt.rebalance(model, PAIRS, heads="crt", workers=0)
    assert torch.equal(found.heads["crt"].weight, expected.heads["crt"].weight)
    # Neither weights nor caches are tensors of inference mode.
    images = IMAGES.clone().requires_grad_()
    found.model(images).sum().backward()
    assert images.grad.isfinite().all()


def test_calls_in_several_threads():
    AcceleratorState._reset_state(reset_partial_state=True)
    model = small_model()

    def weight(_=None):
        return timm_lt.rebalance(model, PAIRS, heads="ncm", workers=0).heads["ncm"].weight

    expected = weight()
    with ThreadPoolExecutor(3) as threads:
        assert all(torch.equal(found, expected) for found in threads.map(weight, range(6)))
    assert not AcceleratorState._shared_state
    # Nothing is left of them: an accelerator with other settings can be created.
    assert Accelerator(cpu=True, gradient_accumulation_steps=4).gradient_accumulation_steps == 4
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_the_device_is_accelerates(monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    found = torch.accelerator.current_accelerator(check_available=True)
    assert default_device() == (found or torch.device("cpu"))
    assert not AcceleratorState._shared_state
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    assert default_device() == torch.device("meta")
    with temporary_accelerator() as accelerator:
        assert accelerator.device == default_device() == torch.device("meta")
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert default_device() == torch.device("cpu")


def test_threads_and_ranks_are_those_of_the_launcher(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    try:
        assert set_cpu_threads(2) == torch.get_num_threads() == set_cpu_threads() == 2
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
        assert set_cpu_threads() == 1
        with pytest.raises(timm_lt.UsageError, match="threads"):
            set_cpu_threads(0)
    finally:
        torch.set_num_threads(before)
    assert process_rank() == 0
    monkeypatch.setenv("RANK", "3")
    assert process_rank() == 3
