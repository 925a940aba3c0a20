"""Every notebook is its text, holds no outputs, and runs from top to bottom."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
PICTURES = {"compress_your_own": 1, "journey": 4, "reading_a_plan": 3}  # at least so many
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_each_notebook_has_a_text():
    texts = {path.stem for path in ROOT.glob("notebooks/*.py")}
    assert texts == set(PICTURES) == {path.stem for path in NOTEBOOKS}


@each_notebook
def test_a_notebook_is_its_text(path):
    text = jupytext.read(path.with_suffix(".py"), fmt="py:percent")
    assert cells(nbformat.read(path, as_version=4)) == cells(text)


@each_notebook
def test_a_notebook_holds_no_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.slow
@each_notebook
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # of jupyter_client and zmq while they start the kernel
def test_a_notebook_runs(path, monkeypatch):
    # They compute more than they compile.
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) >= PICTURES[path.stem]
