"""The notebooks run from top to bottom and reproduce their outputs."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def shown(cell):
    """The kinds of a cell's outputs, and its text; without warnings."""
    outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    kinds = [tuple(sorted(output.get("data", {"text": ""}))) for output in outputs]
    # What a cell prints may come in several parts.
    kinds = [kind for kind, _ in itertools.groupby(kinds)]
    return kinds, "".join(output.get("text", "") for output in outputs)


# In a process of its own, since the client leaves sockets open. The kernel is reached over sockets
# in the folder, not over ports that others could reach.
RUN = """
import sys, nbclient, nbformat
from jupyter_client import AsyncKernelManager
notebook = nbformat.read(sys.argv[1], as_version=4)
for cell in notebook.cells:
    if cell.cell_type == "code":
        cell.outputs = []
nbclient.NotebookClient(notebook, km=AsyncKernelManager(transport="ipc"), timeout=500).execute()
nbformat.write(notebook, "executed.ipynb")
"""


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_notebook_runs_and_reproduces_its_outputs(path, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    stored, run = (nbformat.read(p, as_version=4) for p in (path, tmp_path / "executed.ipynb"))
    nbformat.validate(stored)
    tables = 0
    for before, after in zip(stored.cells, run.cells, strict=True):
        if before.cell_type != "code":
            continue
        (kinds, old), (same, new) = shown(before), shown(after)
        assert kinds == same, before.source
        if old.startswith("head "):
            tables += 1
            assert NUMBER.sub("#", old) == NUMBER.sub("#", new)
            figures = [[float(n) for n in NUMBER.findall(text)] for text in (old, new)]
            # Other processors round differently, which moves a few test images.
            assert figures[1] == pytest.approx(figures[0], abs=1.5)
    assert tables == 1
