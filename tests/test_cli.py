"""``timm-lt``: what is installed works without a clone, and mistakes are one line."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import timm_lt
from timm_lt.cli import compare, create_parser, main
from timm_lt.cli.completion import subparsers
from timm_lt.models.published import CHECKPOINTS
from timm_lt.run.parse import parse_command_line

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


COMMANDS = sorted(subparsers(create_parser()))
OWN_PARSER = {"train", "compare"}


def shown_help(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_argument_and_its_examples_parse(command, capsys, monkeypatch):
    text = shown_help(command, capsys, monkeypatch)
    (block,) = re.findall(r"^examples:\n(.*?)\n\n", text, re.M | re.S)
    # A shell may take the output, or what follows be a comment.
    examples = re.findall(r"\b(timm-lt .*?)(?:\)\"| >.*| +#.*)?$", block, re.M)
    assert len(examples) == block.count("\n") + 1
    for example in examples:
        name, *rest = shlex.split(example)[1:]
        assert name == command
        if command == "train":
            parse_command_line("timm-lt train", rest)
        elif command == "compare":
            named = bool(rest) and not rest[0].startswith("-")
            _, recipe = compare.create_parser().parse_known_args(rest[named:])
            parse_command_line("timm-lt compare", recipe)
        else:
            create_parser().parse_args([name, *rest])
    if command not in OWN_PARSER:
        for action in subparsers(create_parser())[command]._actions:
            assert action.help or action.choices, action


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_quiet_or_verbose_and_speaks_json(command, capsys, monkeypatch):
    text = shown_help(command, capsys, monkeypatch)
    options = [option in text for option in ("--quiet", "--verbose", "--json")]
    # A script of timm's has its own; the other prints a script.
    assert options == 3 * [command not in {"run", "completion"}]


def test_json_goes_to_standard_output_alone_or_to_a_file(tmp_path, capsys):
    assert main(["list", "--json"]) == 0
    names = json.loads(capsys.readouterr().out)
    assert names["heads"] == timm_lt.list_heads()
    assert names["data_sets"] == timm_lt.list_datasets()
    assert main(["list", str(PACKAGED), "--json", str(tmp_path / "heads.json")]) == 0
    assert "crt" in capsys.readouterr().out
    found = json.loads((tmp_path / "heads.json").read_text())["heads"]
    config = json.loads((PACKAGED / "config.json").read_text())["timm_lt"]["heads"]
    assert {name: head["metrics"] for name, head in found.items()} == {
        name: head["metrics"] for name, head in config.items()
    }
    assert main(["fold", str(PACKAGED), str(tmp_path / "ship"), "--head", "crt", "--json"]) == 0
    (written,) = json.loads(capsys.readouterr().out)
    assert written["folder"] == str(tmp_path / "ship")
    assert (written["head"], written["exact"], written["difference"]) == ("crt", True, 0.0)


@pytest.mark.parametrize("name", [f"local-dir:{PACKAGED}", "lt_test_resnet.glyph_lt"])
def test_list_takes_the_names_that_other_commands_take(name, capsys):
    assert main(["list", str(PACKAGED)]) == 0
    shown = capsys.readouterr().out
    assert main(["list", name]) == 0
    assert capsys.readouterr().out == shown


def test_json_never_takes_another_argument_for_its_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PACKAGED, "run")
    assert main(["list", "--json", "run"]) == 2
    assert "put --json behind the other arguments" in capsys.readouterr().err
    assert main(["list", "run", "--json", "run/config.json/x.json"]) == 2
    assert "--json: run/config.json is no folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["fold", str(PACKAGED), "nowhere", "--head", "nosuch"],
        ["train", "nosuch"],
        ["compare", "kang_table2", "--seeds", "x"],
    ],
)
def test_verbose_says_where_an_error_arose_and_quiet_nothing_more(arguments, capsys):
    assert main([*arguments, "--quiet"]) == 2
    quiet = capsys.readouterr().err
    assert main([*arguments, "--verbose"]) == 2
    loud = capsys.readouterr().err
    assert quiet.count("\n") == 1
    assert loud.endswith(quiet)
    assert "Traceback" in loud


def test_quiet_and_verbose_exclude_each_other(capsys):
    assert main(["train", "--quiet", "--verbose"]) == 2
    assert "not allowed with" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["list", "--quiet", "--verbose"])
    assert "not allowed with" in capsys.readouterr().err


def test_what_a_repo_says_is_escaped(tmp_path, capsys):
    shutil.copytree(PACKAGED, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["timm_lt"]["dataset"] = "x\ud800\u009b2J"
    path.write_text(json.dumps(config))
    assert main(["list", str(tmp_path / "run"), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out)["dataset"] == "x\ud800\u009b2J"


def test_a_full_disk_is_one_line():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "timm_lt", "list", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (
        2,
        "error: standard output: No space left on device\n",
    )


def test_a_place_that_cannot_be_written_is_one_line(capsys):
    assert main(["list", "--json", "/proc/none/x.json"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: /proc/none")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["list", "--json"], ["train", "--print_config"], ["compare"]]
)
def test_a_reader_that_has_enough_is_no_error(arguments):
    command = [sys.executable, "-m", "timm_lt", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        program.stdout.close()
        assert (program.stderr.read(), program.wait()) == (b"", 141)


def completed(script, words):
    """What bash offers for the last of some words."""
    quoted = " ".join(map(shlex.quote, words))
    (function,) = re.findall(r"complete .*-F (\S+) timm-lt", script)
    asked = (
        f"{script}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; COMP_LINE={quoted!r}\n"
        f'{function} timm-lt; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(
        ["bash", "--norc"], input=asked, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_bash_completes_commands_options_and_choices(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert completed(script, ["timm-lt", "co"]) == ["compare", "convert", "completion"]
    assert completed(script, ["timm-lt", "evaluate", "--per"]) == ["--per-class"]
    assert completed(script, ["timm-lt", "evaluate", "--shot-rule", ""]) == ["fb", "oltr"]
    assert completed(script, ["timm-lt", "compare", "kang_t"]) == ["kang_table1", "kang_table2"]
    assert "--optimizer.weight_decay" in completed(script, ["timm-lt", "train", "--optimizer.w"])
    assert "--only" in completed(script, ["timm-lt", "compare", "--o"])


def test_bash_completes_choices_of_a_recipe_and_files(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert completed(script, ["timm-lt", "train", "--protocol", ""]) == ["standard", "paper"]
    assert completed(script, ["timm-lt", "train", "--data.root", "pho"]) == ["photos"]
    assert completed(script, ["timm-lt", "list", "pho"]) == ["photos"]
    many = ["timm-lt", "heads", "photos", "--heads", "crt", "tau"]
    assert completed(script, many) == ["tau_norm"]
    for command in ("evaluate", "predict", "fold"):
        assert completed(script, ["timm-lt", command, "--head", "l"]) == [
            "linear",
            "logit_adjusted",
            "lws",
        ]
    assert "lt_test_resnet.glyph_lt_quick" in completed(
        script, ["timm-lt", "compare", "--recipe", "lt_test"]
    )


@pytest.mark.parametrize("shell", ["zsh", "tcsh", "fish"])
def test_other_shells_have_a_script(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in COMMANDS)
