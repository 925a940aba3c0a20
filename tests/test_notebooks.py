"""Every notebook and the README's examples run from top to bottom."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # of jupyter_client and zmq while they start the kernel
def test_the_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    pictures = [
        out
        for cell in notebook.cells
        for out in cell.get("outputs", [])
        if "image/png" in out.get("data", {})
    ]
    assert len(pictures) >= 4


EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
SHAPES = [(8, 32, 32, 64), (1, 10), (16, 10), (16, 10)]  # of the logits


def examples():
    """The README's examples with their shapes; those that measure take longer."""
    pairs = zip(EXAMPLES, SHAPES, strict=True)
    return [
        pytest.param(*pair, marks=pytest.mark.slow if "Timer" in pair[0] else ()) for pair in pairs
    ]


@pytest.mark.parametrize("example, shape", examples())
def test_the_readmes_examples_run(example, shape, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one writes a file
    scope: dict = {}
    exec(example, scope)
    assert scope["logits"].shape == shape
