"""The notebook runs: each cell in turn, as a kernel would run it."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

pytestmark = [pytest.mark.project, pytest.mark.slow]

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"


def run(source, namespace):
    """Runs a cell; returns the value of its last line, if that is an expression."""
    if source.startswith("!"):
        words = source[1:].replace("reg-diffusers", f"{sys.executable} -m reg_diffusers", 1)
        return subprocess.run(words, shell=True, check=True, capture_output=True, text=True).stdout
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), namespace)
    return last and eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(NOTEBOOK.parents[1]), *sys.path]))
    monkeypatch.syspath_prepend(str(NOTEBOOK.parents[1]))
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    namespace, shown, left_out = {"__name__": "__main__"}, [], []
    threads = torch.get_num_threads()
    for cell in cells:
        source = "".join(cell["source"])
        if "not-run" in cell["metadata"].get("tags", ()):
            left_out.append(source)
        else:
            shown.append(run(source, namespace))
    torch.set_num_threads(threads)
    assert left_out == ['pipeline.push_to_hub("you/quickstart")'] and callable(namespace["pipeline"].push_to_hub)
    verdict, _, picture, _, scores = shown
    assert "Verdict: total_variation " in verdict
    assert picture.width > 300 and scores.shape == (4,) and scores.isfinite().all()
    assert "with total_variation" in capsys.readouterr().out
