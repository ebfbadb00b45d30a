import pytest
import torch

from timm_lt.console import log
from timm_lt.heads import create_head

# Options that make a head usable without a fit, and differ from the defaults.
HEAD_OPTIONS = {
    "linear": {},
    "crt": {},
    "tau_norm": {"tau": 0.7, "keep_bias": True},
    "lws": {"scale_bias": False},
    "ncm": {"metric": "euclidean", "features": "centered_l2"},
    "cosine": {"scale": 5.5, "learn_scale": True},
    "logit_adjusted": {"tau": 0.8},
}


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


def fill(head, seed=0):
    """Gives random values to all that a fit would set."""
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
