"""What a release needs: one version, a small package, dependencies that are in use.

`.ci/run` builds the wheel and runs the demo from it, in an environment of its own.
"""

import re
import tomllib
from pathlib import Path

import pytest

import lowrank_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {"orbax-checkpoint": "orbax"}  # where a package is not named like its module
MOST = 12 * 2**20  # bytes


def names(requirements):
    return [re.match(r"[\w-]+", each).group() for each in requirements]


def test_the_version_stands_in_one_place():
    assert lowrank_jax.__version__ == PROJECT["version"]
    assert f"version: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", names(PROJECT["dependencies"]))
def test_a_dependency_of_the_core_is_imported(name):
    module = MODULES.get(name, name)
    texts = [path.read_text() for path in (ROOT / "lowrank_jax").rglob("*.py")]
    assert any(re.search(rf"^\s*(import|from) {module}\b", text, re.M) for text in texts)


def test_the_package_is_small_enough_for_its_wheel():
    files = [path for path in (ROOT / "lowrank_jax").rglob("*") if path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files if path.is_file()) < MOST
