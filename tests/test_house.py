"""The house: what `import lowrank_jax` loads, which folder may know which, and how files look.

A folder imports only from folders above it in `ORDER`, be it at the top of a file, within a
function or for type checkers. Where the order is not that of the design, the reason is this:
`tuning` stands before `planning`, which asks a timer for budgets of latency and loads it only then.
`models` has layers of `modules`. `nnx` trains models of NNX by `training`, and loads it only then.
"""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowrank_jax

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lowrank_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
OTHERS = sorted(path for name in ("tests", "benchmarks") for path in (ROOT / name).rglob("*.py"))
LINES = {"lowrank_jax": 330, "benchmarks": 270, "tests": 530}
COLUMNS = 100
LATER = ("tuning", "training", "experiments", "report", "cli", "data", "models", "nnx")
ORDER = (
    "factorization",
    "program",
    "tree",
    "io",
    "calibration",
    "tuning",
    "planning",
    "compression",
    "training",
    "modules",
    "nnx",
    "models",
    "data",
    "experiments",
    "report",
    "cli",
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[str]:
    """The folders that a file of the package imports from, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "lowrank_jax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from folders([node.module])
        elif isinstance(node, ast.Import):
            yield from folders([alias.name for alias in node.names])


def folders(modules: list[str]) -> list[str]:
    parts = [module.split(".") for module in modules]
    return [part[1] for part in parts if part[0] == "lowrank_jax" and len(part) > 1]


def bound_names() -> set[str]:
    """The names that the package's `__init__` imports from itself."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    own = [node for node in found if (node.module or "").startswith("lowrank_jax")]
    return {alias.asname or alias.name for node in own for alias in node.names}


def modules() -> list[str]:
    walked = pkgutil.walk_packages(lowrank_jax.__path__, "lowrank_jax.")
    return [module.name for module in walked]


def public_functions() -> list[str]:
    return [name for name in lowrank_jax.__all__ if name.islower() and name not in ORDER]


def test_the_package_loads_no_more_than_its_verbs_need():
    code = (
        "import sys, lowrank_jax; print(*[m for m in sys.modules if m.startswith('lowrank_jax.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {module.split(".")[1] for module in done.stdout.split()}
    assert loaded and not loaded & set(LATER)


def test_every_folder_has_its_place_in_the_order():
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == set(
        ORDER
    )


@pytest.mark.parametrize("folder", ORDER)
def test_a_folder_imports_only_from_folders_above_it(folder):
    allowed = ORDER[: ORDER.index(folder) + 1]
    below = {
        name_of(path): set(imports(path)) - set(allowed)
        for path in (PACKAGE / folder).rglob("*.py")
    }
    assert {name: found for name, found in below.items() if found} == {}


def test_no_file_is_long():
    counts = {path: len(path.read_text().splitlines()) for path in (*FILES, *OTHERS)}
    limits = {path: LINES[path.relative_to(ROOT).parts[0]] for path in counts}
    assert {name_of(path): n for path, n in counts.items() if n > limits[path]} == {}


def test_no_line_is_long():
    lines = {path: path.read_text().splitlines() for path in (*FILES, *OTHERS)}
    long = {
        name_of(path): [
            n
            for n, line in enumerate(own, 1)
            if len(line.partition("  # type: ignore")[0].partition("  # noqa")[0]) > COLUMNS
            and "noqa" not in line
        ]
        for path, own in lines.items()
    }
    assert {name: numbers for name, numbers in long.items() if numbers} == {}


def test_no_file_is_named_like_a_public_function():
    stems = {path.stem: name_of(path) for path in FILES}
    assert {name: stems[name] for name in public_functions() if name in stems} == {}


@pytest.mark.parametrize("module", modules())
def test_nothing_hides_a_module(module):
    parent, _, name = module.rpartition(".")
    found = importlib.import_module(module)
    assert getattr(importlib.import_module(parent), name) is found


def test_all_names_every_public_object_and_no_other():
    assert lowrank_jax.__all__ == sorted(bound_names())
    assert all(getattr(lowrank_jax, name) is not None for name in lowrank_jax.__all__)
    assert set(lowrank_jax.__all__) <= set(dir(lowrank_jax))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lowrank_jax.nothing


@pytest.mark.parametrize("name", public_functions())
def test_a_public_function_says_what_it_does_with_an_example(name):
    text = inspect.getdoc(getattr(lowrank_jax, name)) or ""
    assert "Example:" in text and ">>>" in text
