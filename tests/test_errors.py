"""Every error of the package names what was given and what to do."""

import ast
import re
from pathlib import Path

import pytest

import lowrank_jax

ROOT = Path(lowrank_jax.__file__).parent
KINDS = ("ValueError", "TypeError", "FileExistsError", "FileNotFoundError", "ImportError")
# Reasons that a reader of files gives: the function that reads the file adds its path and the
# remedy, which the tests of damaged files see.
READERS = (
    "calibration/storing.py",
    "io/formats.py",
    "io/names.py",
    "io/npz.py",
    "io/orbax.py",
    "io/safetensors.py",
    "planning/plans.py",
    "tuning/result_file.py",
    "tuning/timer_file.py",
)
# What is absent has no value.
ABSENT = r"^(No |There (is|are) no |The \w+( of \w+)* (has|have|is|are|needs?|takes?|updates) )"
ABSENT += r"|needs |takes a budget|differs with|is a candidate|=None is not"
REMEDY = r"(give|name|write|call|leave|save|convert|raise|rename|choose|use|move|repair|decompose"
REMEDY += r"|reorder|multiply|add|measure|compute|install|calibrate|check|make|load|go on"
REMEDY += r"|needs|must|allowed|pip)\b"


def text_of(node):
    """The text of an error, with {} for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    return "{}"


def raises():
    for path in sorted(ROOT.glob("**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = ast.unparse(node.exc.func).split(".")[-1]
                where = path.relative_to(ROOT).as_posix()
                if name in (*KINDS, "ArgumentTypeError"):
                    text = text_of(node.exc.args[0]) if node.exc.args else ""
                    yield pytest.param(where, text, id=f"{where}:{node.lineno}")


@pytest.mark.parametrize("where, text", list(raises()))
def test_an_error_names_what_was_given_and_the_remedy(where, text):
    assert text, "no text"
    if where not in READERS:
        assert "{}" in text or re.search(ABSENT, text), "names no value"
        handed_on = text.rstrip(".").endswith("{}")  # the advice is a text of its own
        assert handed_on or re.search(REMEDY, text, re.IGNORECASE), "names no remedy"


def test_there_are_errors_to_read():
    assert len(list(raises())) > 150
