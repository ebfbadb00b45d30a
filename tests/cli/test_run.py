"""``timm-lt run SCRIPT --sampler``, with scripts that import as timm's train.py does."""

import collections
import json

import pytest
import timm.data
from PIL import Image

from timm_lt.cli import main
from timm_lt.cli.run import EpochsInTurn
from timm_lt.samplers import create_sampler

COUNTS = (15, 6, 3)
LABELS = [label for label, count in enumerate(COUNTS) for _ in range(count)]

# Image i is of one colour, (i, label, 0): what is shown is read off the pixels.
SCRIPT = """
import json, sys
import torch
from timm.data import create_dataset, create_loader
from timm import utils
import argparse


def epochs(loader, distributed, data=None, first=0):
    found = []
    for epoch in range(first, first + 3):
        # As train.py does, whatever the number of processes.
        if hasattr(data, "set_epoch"):
            data.set_epoch(epoch)
        elif distributed and hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        found.append([])
        for images, targets in loader:
            assert images[:, 1, 0, 0].tolist() == targets.tolist()
            found[-1] += [int(pixel) for pixel in images[:, 0, 0, 0].tolist()]
    return found


def main():
    args = argparse.Namespace(device="cpu")
    device = utils.init_distributed_device(args)
    options = dict(
        input_size=(3, 8, 8), batch_size=4, mean=(0, 0, 0), std=(1 / 255,) * 3, device=device,
        distributed=args.distributed, color_jitter=0.0,
    )
    data = create_dataset("", root=sys.argv[1], split="train", is_training=True)
    evaluation = create_loader(data, is_training=False, num_workers=0, **options)
    training = [
        create_loader(data, is_training=True, **options, **own) for own in json.loads(sys.argv[2])
    ]
    result = dict(
        rank=args.rank,
        kinds=[type(loader).__name__ for loader in training],
        evaluation=epochs(evaluation, False)[0],
        training=[epochs(loader, args.distributed) for loader in training],
        resumed=epochs(training[0], args.distributed, data, first=7)[:2],
    )
    with open(f"{sys.argv[1]}/../rank_{args.rank}.json", "w") as file:
        json.dump(result, file)
    if args.distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def folder(tmp_path):
    index = 0
    for label, count in enumerate(COUNTS):
        root = tmp_path / "images" / "train" / f"class_{label}"
        root.mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (index, label, 0)).save(root / f"{i:02d}.png")
            index += 1
    return tmp_path / "images"


WORKERS = (
    {"num_workers": 0},
    {"num_workers": 1, "persistent_workers": True},
    {"num_workers": 1, "persistent_workers": False},
    {"num_workers": 0, "use_multi_epochs_loader": True},
    {"num_workers": 1, "use_multi_epochs_loader": True},
)
COMMAND = "import sys; from timm_lt.cli import main; sys.exit(main(sys.argv[1:]))"


def results(server, folder, sampler, processes=1, loaders=WORKERS):
    """Runs the script by the command, on several processes; returns what each has drawn."""
    script, command = folder.parent / "train.py", folder.parent / "command.py"
    script.write_text(SCRIPT)
    command.write_text(COMMAND)
    arguments = ("run", script, "--sampler", sampler, folder, json.dumps(loaders))
    if processes == 1:
        done = [server.run(*arguments, script=command)]
    else:
        done = server.on_ranks(processes, *arguments, script=command)
    assert all(rank.status == 0 for rank in done), done[0].err
    ranks = [folder.parent / f"rank_{rank}.json" for rank in range(processes)]
    return [json.loads(rank.read_text()) for rank in ranks]


@pytest.mark.slow
def test_train_py_draws_from_the_sampler(server, folder):
    (found,) = results(server, folder, "class_balanced")
    assert set(found["kinds"]) == {"PrefetchLoader"}
    assert found["evaluation"] == list(range(24))
    expected = create_sampler("class_balanced", LABELS)
    # The script does not set the epoch: each goes on to the next.
    for training in found["training"]:
        assert training == [expected.epoch_indices(epoch).tolist() for epoch in range(3)]
    # With a data set that has epochs, a restarted script goes on where it was.
    assert found["resumed"] == [expected.epoch_indices(epoch).tolist() for epoch in (7, 8)]
    seen = collections.Counter(LABELS[i] for i in found["training"][0][1])
    assert seen == {0: 8, 1: 8, 2: 8}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_share_each_epoch(server, folder):
    variable = "{name: power, q: 0.5, seed: 3, num_samples: 40}"
    ranks = results(server, folder, variable, processes=2, loaders=WORKERS[:2])
    assert [rank["rank"] for rank in ranks] == [0, 1]
    expected = create_sampler("power", LABELS, q=0.5, seed=3, num_samples=40)
    for loader in range(2):
        for epoch in range(3):
            drawn = expected.epoch_indices(epoch).tolist()
            shown = [rank["training"][loader][epoch] for rank in ranks]
            assert shown == [drawn[0::2], drawn[1::2]]
    drawn = expected.epoch_indices(7).tolist()
    assert [rank["resumed"][0] for rank in ranks] == [drawn[0::2], drawn[1::2]]
    assert [rank["evaluation"] for rank in ranks] == [list(range(r, 24, 2)) for r in (0, 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["balanced"], "--sampler: unknown sampler 'balanced'"),
        (["{name: power, p: 1}"], "--sampler: sampler 'power' has no option 'p'"),
        (["bilateral"], "--sampler: sampler 'bilateral' draws pairs"),
        (["{q: 0.5}"], "must be the name of a sampler, or YAML"),
        (["class_balanced"], "created no training loader with timm.data.create_loader"),
    ],
)
def test_wrong_values_are_named(tmp_path, capsys, options, message):
    script = tmp_path / "script.py"
    script.write_text("from timm.data import create_loader")
    assert main(["run", str(script), "--sampler", *options]) == 2
    assert message in capsys.readouterr().err


SHUFFLED = """
import json, sys
from timm.data import create_loader
from torchvision.datasets import ImageFolder
data = ImageFolder(sys.argv[1] + "/train")
loader = create_loader(data, (3, 8, 8), 4, is_training=True, use_prefetcher=False, num_workers=0)
with open(sys.argv[2], "w") as file:
    json.dump([label for _, targets in loader for label in targets.tolist()], file)
"""


@pytest.mark.parametrize(
    "words",
    [
        ["--sampler", "class_balanced", "SCRIPT"],
        ["SCRIPT", "--sampler", "class_balanced"],
        ["SCRIPT", "--sampler=class_balanced"],
    ],
)
def test_the_option_may_be_before_or_behind_the_script(folder, tmp_path, words):
    script, drawn, original = tmp_path / "s.py", tmp_path / "drawn", timm.data.create_loader
    script.write_text(SHUFFLED)
    words = [str(script) if word == "SCRIPT" else word for word in words]
    assert main(["run", *words, str(folder), str(drawn)]) == 0
    expected = create_sampler("class_balanced", LABELS).epoch_indices(0).tolist()
    assert json.loads(drawn.read_text()) == [LABELS[image] for image in expected]
    assert timm.data.create_loader is timm.data.loader.create_loader is original


def test_epochs_in_turn():
    sampler = create_sampler("class_balanced", LABELS)
    turns = EpochsInTurn(sampler)
    stream = [sampler.epoch_indices(epoch).tolist() for epoch in range(6)]
    assert len(turns) == 24
    assert [list(turns), list(turns)] == stream[:2]
    turns.set_epoch(4)
    iter(turns)
    assert [list(turns), list(turns)] == stream[4:]
    turns.set_epoch(1)
    turns.set_epoch(1)
    assert list(turns) == stream[1]
