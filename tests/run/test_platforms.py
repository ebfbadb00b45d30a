"""Runs without what some systems lack: macOS has no posix_fallocate, Windows few signals."""

import pytest

# Without these of Linux's, and with Windows's refusals.
OTHER_SYSTEM = """
import os, shutil, signal, sys
from torch.utils.data._utils import signal_handling

for name in ("posix_fallocate", "sched_getaffinity", "O_DIRECTORY"):
    delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGCHLD"):
    delattr(signal, name)
sys.modules["resource"] = sys.modules["ctypes.util"] = None

def refuse_folders(path, flags, *rest, _open=os.open, **named):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return _open(path, flags, *rest, **named)

def refuse_to_flush_what_is_read(file, _fsync=os.fsync):
    import fcntl
    number = file if isinstance(file, int) else file.fileno()
    if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    _fsync(file)

os.open, os.fsync = refuse_folders, refuse_to_flush_what_is_read
# As Python and torch have it there.
shutil._use_fd_functions, signal_handling.IS_WINDOWS = False, True
"""

COMMANDS = """
import train_lt
from timm_lt.cli import main

run = ["lt_test_resnet.digits_lt", "--output", "run", "--seed", "1"]
assert train_lt.main([*run, "--epochs", "2"]) == 0
assert sorted(os.listdir("run/state")) == ["epoch_0001", "epoch_0002", "images.json"]
names = [name for _, _, names in os.walk("run") for name in names]
assert not [name for name in names if set(name) & set(':*?"<>|')]
assert main(["evaluate", "run", "digits_lt", "--quiet"]) == 0
"""


@pytest.mark.slow
def test_a_run_on_another_system(server, tmp_path):
    done = server.python(f"import os; os.chdir({str(tmp_path)!r})\n{OTHER_SYSTEM}\n{COMMANDS}")
    assert done.status == 0, done.err


SPAWNED = """
import multiprocessing, sys
from pathlib import Path

import timm
from PIL import Image

import timm_lt

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    root = Path(sys.argv[1])
    for label in range(3):
        (root / str(label)).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (16, 16), (80 * label, 9 * i, 9)).save(root / str(label) / f"{i}.png")
    model = timm.create_model("lt_test_resnet", num_classes=3)
    found = [timm_lt.rebalance(model, root, heads="ncm", workers=number) for number in (1, 0)]
    first, second = ([report.to_dict() for report in one.reports.values()] for one in found)
    assert first == second
    dataset = timm.data.ImageDataset(str(root))
    sampler = timm_lt.create_sampler("class_balanced", timm_lt.dataset_labels(dataset))
    options = {"sampler": sampler, "is_training": True, "num_workers": 1, "device": "cpu"}
    batches = timm_lt.create_loader(dataset, (3, 16, 16), 3, **options)
    targets = [label for _, labels in batches for label in labels.tolist()]
    assert targets == [index // 6 for index in sampler.epoch_indices(0).tolist()]
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_workers_can_be_spawned(server, tmp_path):
    (tmp_path / "script.py").write_text(SPAWNED)
    done = server.run(tmp_path / "photos", script=tmp_path / "script.py")
    assert done.status == 0, done.err
