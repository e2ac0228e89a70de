"""The examples of using megamm from Python run unchanged: the training loop and the notebook's cells."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documented_workshop import environment
from tiny_run import ROOT

from megamm import checkpoint

LOOP = ROOT / "examples" / "train_loop.py"
NOTEBOOK = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def run(file: Path, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, file], cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_loop_learns_and_its_checkpoint_is_valid(tmp_path):
    assert len(LOOP.read_text().splitlines()) <= 80
    said = run(LOOP, tmp_path)
    losses = [float(value) for value in re.findall(r"^step \d+: loss ([\d.]+)$", said, re.MULTILINE)]
    assert len(losses) == 6 and losses[-1] < 0.5 * losses[0], losses
    folder = tmp_path / "train_loop" / "run" / "checkpoints" / "step_00000060"
    assert not checkpoint.verify(folder)
    assert checkpoint.read_state(folder).consumed_rows == 240


@pytest.mark.everything
def test_the_notebook_runs(tmp_path):
    """Run its code cells in order in a separate process; an extra last cell checks the results."""
    look = """
losses = [line["loss/text"] for line in steps]
assert losses[-1] < 0.5 * losses[0], losses
assert Image.open(work / "ball.png").size == (32, 32)
import shutil
shutil.rmtree(work)
"""
    (tmp_path / "cells.py").write_text("\n\n".join(["import matplotlib; matplotlib.use('agg')", *CODE, look]))
    run(tmp_path / "cells.py", tmp_path)


def test_the_notebook_is_executed_and_small():
    """Outputs of all cells are stored, in order, without errors and without paths of the machine that ran it."""
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    kinds = {output["output_type"] for output in outputs}
    assert kinds >= {"stream", "display_data"} and "error" not in kinds
    assert not [output for output in outputs if output.get("name") == "stderr"]
    text = json.dumps([o.get("text", "") for o in outputs] + [list(o.get("data", {}).values()) for o in outputs])
    assert not re.findall(r"/(?:tmp|home|root|work|usr)/[\w-]+", text)
    assert len(json.dumps(NOTEBOOK)) < 200_000
