"""What the README says is so: its examples run, its links lead somewhere, its names exist."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import lowrank_jax
from lowrank_jax.cli.main import build_parser

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.S)
SHAPES = [(16, 10), (16, 8, 8, 32), (16, 10)]  # of the logits
LINKS = sorted(set(re.findall(r"\]\(([^)#]+)", TEXT)))
NAMES = sorted(set(re.findall(r"lowrank_jax(?:\.\w+)+", TEXT)))
COMMANDS = re.findall(r"^(lowrank-jax .*)$", TEXT, re.M)


def examples():
    """The examples with their shapes; one that tunes and measures takes longer."""
    slow = [pytest.mark.slow if "finetune" in text else () for text in EXAMPLES]
    rows = zip(EXAMPLES, SHAPES, slow, strict=True)
    return [pytest.param(example, shape, marks=marks) for example, shape, marks in rows]


def resolve(name):
    """The module or attribute of a dotted name."""
    parts = name.split(".")
    found = lowrank_jax
    for index, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:index]))
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("example, shape", examples())
def test_an_example_runs(example, shape, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one writes files
    scope: dict = {}
    exec(example, scope)
    assert scope["logits"].shape == shape


@pytest.mark.parametrize("link", [link for link in LINKS if "://" not in link])
def test_a_link_leads_to_a_file(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_exists(name):
    assert resolve(name) is not None


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses(command):
    assert build_parser().parse_args(shlex.split(command)[1:]).run


def test_the_readme_is_short():
    assert len(TEXT.splitlines()) <= 120
