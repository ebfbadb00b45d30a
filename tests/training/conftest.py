import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def _own_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
