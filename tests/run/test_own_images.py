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
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines()]


@pytest.mark.slow
def test_the_lines_of_the_readme_go_from_a_folder_to_a_pushed_checkpoint(
    loopback_hub, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    root, run = tmp_path / "my_images", tmp_path / "birds"
    readable = make_odd_images(root)
    inspect, train, push = commands()
    assert main(inspect) == 0
    assert Path(TRUNCATED).name in capsys.readouterr().out
    # Without the last option, the truncated file stops the run.
    assert main(train[: train.index("--data.unreadable")]) == 2
    error = capsys.readouterr().err
    assert TRUNCATED in error
    assert "--data.unreadable skip" in error
    assert not run.exists()
    assert main(train) == 0
    assert "auto" in capsys.readouterr().out
    metrics = json.loads((run / "metrics.json").read_text())
    total = sum(readable.values()) + 1  # the truncated file is listed, and skipped when it is read
    assert sum(metrics["class_counts"]) == pytest.approx(0.64 * total, rel=0.05)
    # 12 classes that chance gets right in 8 %; what is learned in 20 epochs is far from that.
    assert metrics["heads"]["auto"]["all"] > 0.3
    assert main(push) == 0
    model = timm_lt.create_model("hf-hub:me/birds", head="auto", cache_dir=tmp_path / "cache")
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    with Image.open(root / "ant" / "grey.png") as image:
        pixels = transform(image.convert("RGB"))[None]
    local = timm_lt.create_model(f"local-dir:{run}", head="auto")
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(pixels), local.eval()(pixels))
    config = json.loads((run / "config.json").read_text())
    assert config["timm_lt"]["label_names"] == sorted(CLASSES)
