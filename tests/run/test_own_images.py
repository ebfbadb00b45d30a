"""From a folder of images to a pushed checkpoint, as the README says it."""

import json
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from odd_images import CLASSES, TRUNCATED, make_odd_images
from PIL import Image

import timm_lt
from timm_lt.cli import main

README = (Path(__file__).parents[2] / "README.md").read_text()


def commands():
    """The lines of the README's section, as lists of arguments of timm-lt."""
    section = README.partition("## Your own images")[2].partition("\n## ")[0]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)[1]
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert {line[0] for line in lines} == {"timm-lt"}
    return [line[1:] for line in lines]


@pytest.mark.slow
def test_the_lines_of_the_readme_go_from_a_folder_to_a_pushed_checkpoint(
    loopback_hub, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "my_images"
    readable = make_odd_images(root)
    inspect, train, push = commands()

    assert main(inspect) == 0
    shown = capsys.readouterr().out
    assert Path(TRUNCATED).name in shown

    # Without the last option, the truncated file stops the run.
    assert main(train[: train.index("--data.unreadable")]) == 2
    error = capsys.readouterr().err
    assert TRUNCATED in error
    assert "--data.unreadable skip" in error
    assert not (tmp_path / "birds").exists()

    assert main(train) == 0
    shown = capsys.readouterr()
    assert "auto" in shown.out
    metrics = json.loads((tmp_path / "birds" / "metrics.json").read_text())
    held = {"train": 0.64, "val": 0.16, "test": 0.2}
    total = sum(readable.values()) + 1  # the truncated file is listed, and skipped when it is read
    assert sum(metrics["class_counts"]) == pytest.approx(held["train"] * total, rel=0.05)
    # 12 classes that chance gets right in 8 %; what is learned in 20 epochs is far from that.
    assert metrics["heads"]["auto"]["all"] > 0.3

    assert main(push) == 0
    capsys.readouterr()
    model = timm_lt.create_model("hf-hub:me/birds", head="auto", cache_dir=tmp_path / "cache")
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    with Image.open(root / "ant" / "grey.png") as image:
        pixels = transform(image.convert("RGB"))[None]
    local = timm_lt.create_model(f"local-dir:{tmp_path / 'birds'}", head="auto")
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(pixels), local.eval()(pixels))
    config = json.loads((tmp_path / "birds" / "config.json").read_text())
    assert config["timm_lt"]["label_names"] == sorted(CLASSES)
