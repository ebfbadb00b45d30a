import os
import time
import types

import forks
import hub_server
import pytest
import torch

# Also for the processes that tests start: threads that wait for each other would crawl.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before timm_lt imports huggingface_hub, which reads the environment once.
LOOPBACK = hub_server.set_environment()

from timm_lt.heads import create_head  # noqa: E402
from timm_lt.utils.console import log  # noqa: E402

# It registers a device with torch, for the whole process: never where other tests run.
collect_ignore = ["simulated_device.py"]

# Options that make a head usable without a fit, and differ from the defaults.
HEAD_OPTIONS = {
    "linear": {},
    "crt": {},
    "tau_norm": {"tau": 0.7, "keep_bias": True},
    "lws": {"scale_bias": False},
    "ncm": {"metric": "euclidean", "features": "centered_l2"},
    "cosine": {"scale": 5.5, "learn_scale": True},
    "logit_adjusted": {"tau": 0.8},
    "oltr": {"scale": 9.0, "reach": 10.0, "squash": "linear"},
    "fslwf": {},
}


def pytest_configure(config):
    # huggingface_hub uploads LFS files with an argument that httpx2 would have another name for.
    config.addinivalue_line("filterwarnings", "ignore:Use 'content=:DeprecationWarning")


def pytest_collection_modifyitems(config, items):
    if "exhaustive" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    # With the work shared among processes, what takes longest must not come last.
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # Small tensors, and results that do not depend on the machine's number of cores.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_log():
    # A command sets up the log; its handler would outlive the output that a test captures.
    kept = log.handlers, log.propagate, log.level
    yield
    log.handlers, log.propagate = kept[:2]
    log.setLevel(kept[2])


@pytest.fixture(scope="session")
def server():
    """Runs the main job, and scripts, in forks of a process that has imported everything."""
    server = forks.Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def plain_server():
    """Runs scripts in forks of a process that has imported timm, but not timm_lt."""
    server = forks.Server(plain=True)
    yield server
    server.close()


@pytest.fixture(scope="session")
def _loopback():
    from huggingface_hub import close_session

    LOOPBACK.start()
    yield LOOPBACK
    close_session()
    LOOPBACK.close()


@pytest.fixture
def loopback_hub(request, monkeypatch):
    """An empty hub on 127.0.0.1; HF_TOKEN is a writer's of the namespace "me"."""
    if LOOPBACK is None:
        pytest.skip("this run is on the real Hub")
    server = request.getfixturevalue("_loopback")
    server.reset()
    monkeypatch.setenv("HF_TOKEN", server.WRITER)
    yield server
    if server.errors:
        raise server.errors[0]


@pytest.fixture(params=["loopback", pytest.param("real", marks=pytest.mark.hub)])
def hub(request, tmp_path):
    """A new repo id, no repo yet, and an empty cache: on the loopback hub, and on the real one."""
    cache = tmp_path / "hub_cache"
    if request.param == "loopback":
        yield hub_server.Hub("me", cache, request.getfixturevalue("loopback_hub"))
        return
    if LOOPBACK is not None:
        pytest.skip("needs the real Hub: HF_TOKEN=... pytest -m hub")
    from huggingface_hub import HfApi

    api = HfApi()
    hub = hub_server.Hub(api.whoami()["name"], cache)
    yield hub
    api.delete_repo(hub.repo_id, missing_ok=True)


@pytest.fixture
def no_waiting(monkeypatch):
    """Skips huggingface_hub's waits between tries; has the seconds of each."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    waits = []
    clock = types.SimpleNamespace(**vars(time) | {"sleep": waits.append})
    monkeypatch.setattr(file_download, "time", clock)
    monkeypatch.setattr(_http, "time", clock)
    return waits


def fill(head, seed=0):
    """Gives random values to the state that a fit would set."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in head.fitted_state:
            state = getattr(head, name)
            state.copy_(torch.rand(state.shape, generator=generator) + 0.5)
            if name == "log_prior":
                state.copy_((state / state.sum()).log())
    return head


def usable_head(name, in_features=6, num_classes=4, *, seed=0, **options):
    """Creates a head with random weights and, where it needs one, a random fitted state."""
    torch.manual_seed(seed)
    return fill(create_head(name, in_features, num_classes, **options), seed).eval()
