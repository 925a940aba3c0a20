"""Objects of the user's own, by their import paths; the current folder is searched, too."""

import importlib
import sys
from pathlib import Path
from typing import Any


def imported(path: str, option: str) -> Any:
    """What "package.module:name" names; None where the module has no such name.

    Args:
        path: of the object.
        option: that names it, for the messages.

    Raises:
        ValueError: it is no such path, or the module cannot be imported.

    Example:
        >>> imported("math:pi", "--images")
        3.141592653589793
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(
            f"{option} {path!r} is no import path; give one such as package.module:Class."
        )
    return getattr(_import(module, option), name, None)


def _import(module: str, option: str) -> Any:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # of the user's own code
        raise ValueError(
            f"{option}: {module} cannot be imported; give a module that can: {line(error)}"
        ) from error


def line(error: BaseException) -> str:
    """The type of an error and the first line of its text."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:300]}"
