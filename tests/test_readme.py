"""The README is short, and its examples run; `test_docs` looks at its links and its names."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.S)
SHAPES = [(16, 10), (16, 8, 8, 32), (16, 10)]  # of the logits


def examples():
    """The examples with their shapes; one that tunes and measures takes longer."""
    slow = [pytest.mark.slow if "finetune" in text else () for text in EXAMPLES]
    rows = zip(EXAMPLES, SHAPES, slow, strict=True)
    return [pytest.param(example, shape, marks=marks) for example, shape, marks in rows]


@pytest.mark.parametrize("example, shape", examples())
def test_an_example_runs(example, shape, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one writes files
    scope: dict = {}
    exec(example, scope)
    assert scope["logits"].shape == shape


def test_the_readme_is_short():
    assert len(TEXT.splitlines()) <= 120
