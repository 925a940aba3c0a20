"""Warnings that point at the line which called the library."""

import sys
import warnings

PACKAGES = (__name__.partition(".")[0], "jax", "contextlib")


def warn(message: str) -> None:
    """Warns at the nearest caller that is no part of this package or of those that run it."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in PACKAGES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
