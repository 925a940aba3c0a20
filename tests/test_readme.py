"""What the README says is so: its examples run, its links lead somewhere, its names exist."""

import importlib
import re
from pathlib import Path

import pytest

import lowrank_jax

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.S)
SHAPES = [(8, 32, 32, 64), (1, 10), (16, 10), (16, 10), (16, 10)]  # of the logits
LINKS = sorted(set(re.findall(r"\]\(([^)#]+)", TEXT)))
NAMES = sorted(set(re.findall(r"lowrank_jax(?:\.\w+)+", TEXT)))
TABLE = TEXT.partition("## The public surface")[2].partition("##")[0]
ROWS = re.findall(r"^\| (.*?) \|", TABLE, re.M)[2:]
OWN = re.findall(r"`(\w+)(?=[(`])", " ".join(ROWS))


def examples():
    """The examples with their shapes; those that fit or measure take longer."""
    long = ("compress", "finetune")
    slow = [pytest.mark.slow if any(map(text.count, long)) else () for text in EXAMPLES]
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


def test_the_table_names_the_whole_public_surface():
    modules = {name.split(".")[1] for name in NAMES}
    said = {"KernelUse", "Trace", "Calibration", "Plan", "Budget", "Scheme"} & set(
        re.findall(r"\w+", TABLE)
    )
    assert set(lowrank_jax.__all__) == set(OWN) | modules & set(lowrank_jax.__all__) | said


def test_every_script_and_command_that_is_named_exists():
    scripts = re.findall(r"`(\w+\.py)\b", TEXT.partition("## Benchmarks")[2])
    assert scripts and all((ROOT / "benchmarks" / script).exists() for script in scripts)
