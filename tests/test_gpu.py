"""Every entry point on a device other than the CPU: a GPU, and one that is simulated."""

import subprocess
import sys
from pathlib import Path

import device_checks
import pytest
import torch

SCRIPT = Path(device_checks.__file__)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("check", device_checks.CHECKS)
def test_on_a_gpu(check, tmp_path):
    subprocess.run([sys.executable, SCRIPT, check, "cuda", tmp_path], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("check", device_checks.CHECKS)
def test_on_a_simulated_device(check, server, tmp_path):
    """On which an operation fails that mixes it with the CPU."""
    done = server.run(check, "sim", tmp_path, script=SCRIPT)
    assert done.status == 0, done.err
