"""``timm-lt``: what is installed works without a clone, and mistakes are one line."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file

import timm_lt
from timm_lt.cli import main
from timm_lt.published import CHECKPOINTS

PACKAGED = CHECKPOINTS / "lt_test_resnet.glyph_lt"


def test_list_names_every_part(capsys):
    assert main(["list"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for names in (timm_lt.list_heads(), timm_lt.list_samplers(), timm_lt.list_losses()):
        assert ", ".join(names) in shown
    assert "lt_test_resnet.glyph_lt_quick" in shown


def test_pack_halves_the_weights_and_keeps_heads_and_reports(tmp_path, capsys):
    assert main(["pack", str(PACKAGED), str(tmp_path / "wide"), "--dtype", "float32"]) == 0
    assert main(["pack", str(tmp_path / "wide"), str(tmp_path / "half")]) == 0
    wide, half, first = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "wide", tmp_path / "half", PACKAGED)
    )
    for key, tensor in first.items():
        assert torch.equal(half[key], tensor)
        assert torch.equal(wide[key], tensor.to(wide[key].dtype))
    assert wide["fc.weight"].dtype == torch.float32
    for name in ("recipe.yaml", "README.md", "heads/crt.safetensors"):
        assert (tmp_path / "half" / name).read_bytes() == (PACKAGED / name).read_bytes()
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config == json.loads((PACKAGED / "config.json").read_text())
    assert not (tmp_path / "half" / "state").exists()


def test_pack_refuses_to_replace_anything_but_a_checkpoint(tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("precious")
    for options in ([], ["--overwrite"]):
        assert main(["pack", str(PACKAGED), str(tmp_path / "thesis"), *options]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "precious"


def test_pack_onto_itself_is_refused_and_keeps_the_run(tmp_path, capsys):
    assert main(["pack", str(PACKAGED), str(tmp_path / "run")]) == 0
    files = sorted(tmp_path.rglob("*"))
    assert main(["pack", str(tmp_path / "run"), str(tmp_path / "run"), "--overwrite"]) == 2
    assert "same folder" in capsys.readouterr().err
    (tmp_path / "run" / "photo.jpg").write_bytes(b"precious")
    assert main(["pack", str(PACKAGED), str(tmp_path / "run"), "--overwrite"]) == 2
    assert "photo.jpg" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == sorted([*files, tmp_path / "run" / "photo.jpg"])


def test_pack_of_nothing_is_one_line(tmp_path, capsys):
    assert main(["pack", str(tmp_path / "nothing"), str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "nothing" in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("arguments", [["pak"], [], ["pack"]])
def test_a_wrong_command_exits_with_2_and_shows_the_right_ones(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: timm-lt" in capsys.readouterr().err


def test_train_takes_a_recipe_by_name(capsys):
    arguments = ["train", "lt_test_resnet.digits_lt", "--epochs", "3", "--print_config"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "name: digits_lt" in shown
    assert "epochs: 3" in shown
    assert main(["train", "no_such_recipe"]) == 2
    assert "lt_test_resnet.glyph_lt" in capsys.readouterr().err


@pytest.mark.slow
def test_the_installed_package_needs_no_clone(tmp_path):
    script = (
        "import importlib.util, sys; "
        "sys.exit('site-packages' not in importlib.util.find_spec('timm_lt').origin)"
    )
    isolated = [sys.executable, "-I"]
    if subprocess.run([*isolated, "-c", script], cwd=tmp_path, check=False).returncode:
        pytest.skip("timm_lt is installed in editable mode here; the wheel is tested in CI")
    arguments = ["train", "lt_test_resnet.digits_lt", "--epochs", "1", "--output", "run"]
    arguments += ["--heads", "{linear: {}, ncm: {}}"]
    subprocess.run([*isolated, "-m", "timm_lt", *arguments], cwd=tmp_path, check=True)
    assert (tmp_path / "run" / "metrics.json").is_file()
    # The registry's names are made from hub_configs/, which the wheel has.
    names = timm.list_pretrained("lt_*")
    arguments = ["fold", "lt_test_resnet.glyph_lt", "ship", "--head", "crt"]
    code = (
        "import timm, timm_lt; timm.create_model('lt_test_resnet.glyph_lt', pretrained=True); "
        f"assert timm.list_pretrained('lt_*') == {names!r}; "
        f"from timm_lt.cli import main; assert main({arguments!r}) == 0"
    )
    subprocess.run([*isolated, "-c", code], cwd=tmp_path, check=True)
