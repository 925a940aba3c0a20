"""The lines of Python that load what a command wrote, and run it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_jax.cli.models import Model

INTRODUCTION = "In Python, from this folder, with images as the network takes them:\n"


def loading_lines(model: Model, kwargs: Mapping[str, Any], path: Path) -> str:
    """The lines that run a network from its checkpoint.

    Args:
        model: that the command was given.
        kwargs: of its call.
        path: of the checkpoint, dense or decomposed.
    """
    return _lines(model, kwargs, f"lr.load_weights({str(path)!r})")


def planning_lines(model: Model, kwargs: Mapping[str, Any], source: str, plan: Path) -> str:
    """The lines that decompose a checkpoint by a plan, and run it.

    Args:
        model: that the command was given.
        kwargs: of its call.
        source: Python that makes the dense variables; "" where that is long.
        plan: path of the file.
    """
    if not source:
        return f"lowrank-jax compress --plan {plan} writes the checkpoint that loads in Python."
    return _lines(model, kwargs, f"lr.decompose({source}, lr.Plan.load({str(plan)!r}))")


def _lines(model: Model, kwargs: Mapping[str, Any], variables: str) -> str:
    imports = ["import lowrank_jax as lr", model.imports]
    options = [f"{key}={value!r}" for key, value in kwargs.items()]
    if model.is_nnx:
        lines = [*imports, *_of_nnx(model.expression, variables, options)]
    else:
        given = ", ".join([variables, "images", *options])
        lines = [*imports, f"outputs = lr.lowrank({model.function})({given})"]
    return INTRODUCTION + "\n".join(f"  {line}" for line in lines)


def _of_nnx(expression: str, variables: str, options: list[str]) -> list[str]:
    return [
        "from flax import nnx",
        f"model = lr.nnx.rebuilt({expression}, {variables})",
        "model.eval()",
        f"outputs = model({', '.join(['images', *options])})",
    ]
