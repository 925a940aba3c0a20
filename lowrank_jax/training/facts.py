"""The facts of a run: what the call that goes on must have again."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

START = "start"  # the magnitudes of the variables that a run began from
SETTINGS = r"\([^()]*\)"  # of the terms of a loss, which older versions did not write
CLOSE = {"rtol": 1e-3, "atol": 1e-5}  # a start that is computed anew has other last digits


def check_facts(folder: Path, own: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuses the folder of another run. What older versions did not write is not compared.

    Args:
        folder: of the run.
        own: the facts of this run.
        found: those of the checkpoint.

    Raises:
        ValueError: a fact differs.

    Example:
        >>> check_facts(Path("run"), {"seed": 0}, {"seed": 0, "rate": 0.1})
        >>> check_facts(Path("run"), {"seed": 0}, {"seed": 1})
        Traceback (most recent call last):
        ValueError: run holds a run with seed=1, not 0; give what the run had, or another folder.
    """
    for name, value in own.items():
        older = re.sub(SETTINGS, "", value) if name == "loss" else value
        if name != START and found.get(name, value) not in (value, older):
            raise ValueError(
                f"{folder} holds a run with {name}={found[name]!r}, not {value!r}; "
                "give what the run had, or another folder."
            )
    _check_start(folder, own.get(START, {}), found.get(START, {}))


def _check_start(folder: Path, own: Mapping[str, float], found: Mapping[str, float]) -> None:
    for leaf, value in own.items():
        before = found.get(leaf, value)
        if not np.isclose(before, value, equal_nan=True, **CLOSE):
            raise ValueError(
                f"{folder} holds a run that began from other variables: the absolute values of "
                f"{leaf} had the sum {before:.6g}, not {value:.6g}. Give the variables that the "
                "run began from, or another folder."
            )
