"""``timm-lt``: what is installed works without a clone, and mistakes are one line."""

import ast
import contextlib
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
from timm_lt.cli import create_parser, main
from timm_lt.cli.common import COMMANDS
from timm_lt.cli.listing import subparsers
from timm_lt.models.pretrained import CHECKPOINTS
from timm_lt.run.parse import parse_command_line

PACKAGED = CHECKPOINTS / "lt_test_resnet.glyph_lt"


def python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        **options,
    )


# ---- imports -------------------------------------------------------------------------------------


def test_help_imports_neither_torch_nor_timm(tmp_path):
    code = (
        "import sys; sys.argv[0] = 'bin/timm-lt'\n"
        "from timm_lt.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert not {'torch', 'timm', 'datasets', 'PIL'} & set(sys.modules)"
    )
    for arguments, status in ((["--help"], 0), (["--version"], 0), (["lsit"], 2)):
        done = python("-c", code, *arguments, stdout=subprocess.DEVNULL)
        assert done.returncode == status
        assert "Traceback" not in done.stderr
    # A script of the command has the architectures all the same.
    (tmp_path / "script.py").write_text("import timm; print(timm.is_model('lt_resnext50'))")
    done = python("-m", "timm_lt", "run", tmp_path / "script.py", stdout=subprocess.PIPE)
    assert done.stdout == "True\n"


def test_the_package_has_the_names_that_type_checkers_see():
    tree = ast.parse(Path(timm_lt.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = {a.name: i.module for i in imports if i.module.startswith("timm_lt.") for a in i.names}
    assert set(timm_lt._MODULES) == set(names)
    for name, module in names.items():
        assert getattr(timm_lt, name) is getattr(sys.modules[module], name)
        assert name in dir(timm_lt)
    assert timm_lt.training.__name__ == "timm_lt.training"
    with pytest.raises(AttributeError, match="no attribute 'create_modle'"):
        timm_lt.create_modle  # noqa: B018


def test_importing_the_package_registers_architectures():
    for code in ("import timm, timm_lt", "import timm_lt, timm"):
        assert python("-c", f"{code}; assert timm.is_model('lt_resnext50')").returncode == 0


# ---- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_argument_and_its_examples_parse(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = capsys.readouterr().out
    (block,) = re.findall(r"^examples:\n(.*?)\n\n", text, re.M | re.S)
    # A shell may take the output, or what follows be a comment.
    examples = re.findall(r"\b(timm-lt .*?)(?:\)\"| >.*| +#.*)?$", block, re.M)
    assert len(examples) == block.count("\n") + 1
    for example in examples:
        name, *rest = shlex.split(example)[1:]
        assert name == command
        if command == "train":
            with contextlib.suppress(SystemExit):  # after --print_config
                parse_command_line("timm-lt train", rest)
        elif command == "compare":
            _, recipe = create_parser([name]).parse_known_args([name, *rest])
            parse_command_line("timm-lt compare", recipe)
        else:
            create_parser([name]).parse_args([name, *rest])
    if command != "train":
        for action in subparsers(create_parser([command]))[command]._actions:
            assert action.help or action.choices, action
    # A script of timm's has its own; the other prints a script.
    options = [option in text for option in ("--quiet", "--verbose", "--json")]
    assert options == 3 * [command not in {"run", "completion"}]


@pytest.mark.parametrize("arguments", [["pak"], [], ["pack"], ["list", "--quiet", "--verbose"]])
def test_a_wrong_command_line_exits_with_2_and_shows_the_right_one(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: timm-lt" in capsys.readouterr().err


@pytest.mark.slow
def test_the_installed_package_needs_no_clone(tmp_path):
    script = (
        "import importlib.util, sys; "
        "sys.exit('site-packages' not in importlib.util.find_spec('timm_lt').origin)"
    )
    if python("-I", "-c", script, cwd=tmp_path).returncode:
        pytest.skip("timm_lt is installed in editable mode here; the wheel is tested in CI")
    arguments = ["train", "lt_test_resnet.digits_lt", "--epochs", "1", "--output", "run"]
    arguments += ["--heads", "{linear: {}, ncm: {}}"]
    assert python("-I", "-m", "timm_lt", *arguments, cwd=tmp_path).returncode == 0
    assert (tmp_path / "run" / "metrics.json").is_file()
    # The registry's names are made from hub_configs/, which the wheel has.
    names = timm.list_pretrained("lt_*")
    code = f"import timm, timm_lt; assert timm.list_pretrained('lt_*') == {names!r}"
    assert python("-I", "-c", code, cwd=tmp_path).returncode == 0


# ---- output --------------------------------------------------------------------------------------


def test_list_names_every_part_and_the_heads_of_a_checkpoint(tmp_path, capsys):
    assert main(["list"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for names in (timm_lt.list_heads(), timm_lt.list_samplers(), timm_lt.list_losses()):
        assert ", ".join(names) in shown
    assert "lt_test_resnet.glyph_lt_quick" in shown
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data_sets"] == timm_lt.list_datasets()
    tables, file = [], tmp_path / "heads.json"
    for name in (str(PACKAGED), f"local-dir:{PACKAGED}", "lt_test_resnet.glyph_lt"):
        assert main(["list", name, "--json", str(file)]) == 0
        tables.append(capsys.readouterr().out)
    assert "crt" in tables[0] == tables[1] == tables[2]
    found = json.loads(file.read_text())["heads"]
    config = json.loads((PACKAGED / "config.json").read_text())["timm_lt"]["heads"]
    assert {n: head["metrics"] for n, head in found.items()} == {
        n: head["metrics"] for n, head in config.items()
    }


def test_json_never_takes_another_argument_for_its_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PACKAGED, "run")
    for arguments, message in (
        (["--json", "run"], "put --json after the other arguments"),
        (["run", "--json", "run/config.json/x.json"], "--json: run/config.json is not a folder"),
        (["--json", "/proc/none/x.json"], "error: /proc/none"),
    ):
        assert main(["list", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_verbose_says_where_an_error_arose_and_quiet_nothing_more(capsys):
    assert main(["compare", "kang_table2", "--only", "x", "--quiet"]) == 2
    quiet = capsys.readouterr().err
    assert main(["compare", "kang_table2", "--only", "x", "--verbose"]) == 2
    loud = capsys.readouterr().err
    assert quiet.count("\n") == 1
    assert loud.endswith(quiet)
    assert "Traceback" in loud


def test_texts_of_a_repo_are_escaped(tmp_path, capsys):
    shutil.copytree(PACKAGED, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["timm_lt"]["dataset"] = "x\ud800\u009b2J"
    path.write_text(json.dumps(config))
    assert main(["list", str(tmp_path / "run"), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out)["dataset"] == "x\ud800\u009b2J"


def test_a_full_disk_is_one_line_and_a_reader_that_has_enough_no_error():
    with Path("/dev/full").open("w") as full:
        done = python("-m", "timm_lt", "list", "--json", stdout=full)
    line = "error: standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, line)
    command = [sys.executable, "-m", "timm_lt", "train", "--print_config"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        program.stdout.close()
        assert (program.stderr.read(), program.wait()) == (b"", 141)


# ---- pack ----------------------------------------------------------------------------------------


def test_pack_halves_the_weights_and_keeps_heads_and_reports(tmp_path):
    wide, half = tmp_path / "wide", tmp_path / "half"
    assert main(["pack", str(PACKAGED), str(wide), "--dtype", "float32"]) == 0
    assert main(["pack", str(wide), str(half)]) == 0
    large, small, first = (load_file(f / "model.safetensors") for f in (wide, half, PACKAGED))
    assert large["fc.weight"].dtype == torch.float32
    for key, tensor in first.items():
        assert torch.equal(small[key], tensor)
        assert torch.equal(large[key], tensor.to(large[key].dtype))
    for name in ("recipe.yaml", "README.md", "heads/crt.safetensors"):
        assert (half / name).read_bytes() == (PACKAGED / name).read_bytes()
    config, expected = (json.loads((f / "config.json").read_text()) for f in (half, PACKAGED))
    assert config == expected


def test_pack_replaces_nothing_but_a_checkpoint(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["pack", str(PACKAGED), str(run)]) == 0
    assert main(["pack", str(run), str(run), "--overwrite"]) == 2
    assert "same folder" in capsys.readouterr().err
    (run / "photo.jpg").write_bytes(b"precious")
    before = sorted(tmp_path.rglob("*"))
    for options in ([], ["--overwrite"]):
        assert main(["pack", str(PACKAGED), str(run), *options]) == 2
    assert "photo.jpg" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


# ---- completion ----------------------------------------------------------------------------------


def completed(script, words):
    """What bash offers for the last of some words."""
    (function,) = re.findall(r"complete .*-F (\S+) timm-lt", script)
    quoted = " ".join(map(shlex.quote, words))
    asked = (
        f"{script}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; COMP_LINE={quoted!r}\n"
        f'{function} timm-lt; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    return subprocess.check_output(["bash", "--norc"], input=asked, text=True).split()


def test_bash_completes_commands_options_choices_and_files(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert main(["completion", "fish"]) == 0
    assert "fresh-classifier" in capsys.readouterr().out
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    for words, offered in (
        ("co", ["compare", "convert", "completion"]),
        ("evaluate --per", ["--per-class"]),
        ("evaluate --shot-rule ''", ["fb", "oltr"]),
        ("compare kang_t", ["kang_table1", "kang_table2"]),
        ("train --protocol ''", ["standard", "paper"]),
        ("train --data.root pho", ["photos"]),
        ("list pho", ["photos"]),
        ("heads photos --heads crt tau", ["tau_norm"]),
        ("fold --head l", ["linear", "logit_adjusted", "lws"]),
    ):
        assert completed(script, ["timm-lt", *shlex.split(words)]) == offered
    assert "--optimizer.weight_decay" in completed(script, ["timm-lt", "train", "--optimizer.w"])
    recipes = completed(script, ["timm-lt", "compare", "--recipe", "lt_test"])
    assert "lt_test_resnet.glyph_lt_quick" in recipes
