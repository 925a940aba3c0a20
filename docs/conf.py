"""The site: guides that run as it is built, and a reference made of the docstrings.

``sphinx-build -W -b html docs site`` builds it. A warning is an error, and so is a cell that fails.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import lowrank_jax

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from drawings import engine  # noqa: E402

# The same output on every machine, and programs that are compiled once and run once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

project, author = "lowrank_jax", "the authors of lowrank_jax"
version = release = lowrank_jax.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.apidoc"]
exclude_patterns = ["api/modules.rst"]
html_theme, html_title = "furo", f"lowrank_jax {release}"

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_in_temp = True  # pages write files
nb_execution_timeout = 240
nb_merge_streams = True

# One page a folder, written anew by each build, so that the reference cannot lag behind.
apidoc_modules = [
    {
        "path": "../lowrank_jax",
        "destination": "api",
        "module_first": True,
        "automodule_options": {"members", "show-inheritance"},
    }
]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 90
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True  # fields of dataclasses stand in the list of attributes alone
napoleon_attr_annotations = False  # types stand in the signature
default_role = "code"  # docstrings have code between single backticks
suppress_warnings = ["ref.python"]  # a type in a signature that several classes have a name for


def setup(app: Sphinx) -> None:
    """Draws the pictures first, and checks the reference last."""
    app.connect("builder-inited", draw)
    app.connect("autodoc-process-docstring", escape, priority=400)  # before napoleon reads it
    app.connect("env-check-consistency", check_names)


def draw(app: Sphinx) -> None:
    """Writes the pictures of the pages."""
    folder = HERE / "pictures"
    folder.mkdir(exist_ok=True)
    engine.draw().savefig(folder / "engine.svg")


def escape(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Stars and bars outside code are themselves, as in *args; examples stay as they are."""
    text, example, rest = "\n".join(lines).partition("\nExample:")
    escaped = re.sub(r"(`+[^`]*`+)|[*|]", lambda found: found[1] or "\\" + found[0], text)
    lines[:] = (escaped + example + rest).split("\n")


def check_names(app: Sphinx, env: BuildEnvironment) -> None:
    """Raises unless every public name is described on a page."""
    objects = env.domains["py"].objects
    missing = [name for name in lowrank_jax.__all__ if f"lowrank_jax.{name}" not in objects]
    if missing:
        raise LookupError(f"No page of the reference describes {missing}; give them docstrings.")
