"""The memory of a process; the rest of the module is tested where it is used."""

import subprocess
import sys

import pytest

from timm_lt.accelerator import keep_freed_memory

SCRIPT = """
import resource, torch
from timm_lt.accelerator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**22)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before, kept = faults(), keep_freed_memory()
faults()
print(before, faults(), kept)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is the C library of Linux")
def test_freed_memory_is_used_again_without_asking_the_system():
    run = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    before, after, kept = run.stdout.split()
    if kept == "False":
        pytest.skip("the C library is not glibc")
    # Twenty tensors of 16 MiB: without it, all of their pages (of 2 MiB at most) are mapped anew.
    assert int(before) >= 20 * 8
    assert int(after) < 20


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
