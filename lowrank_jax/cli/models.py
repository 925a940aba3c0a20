"""The model of the user's own that ``--model`` names."""

import functools
import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn


def load_model(path: str, attributes: Mapping[str, Any]) -> nn.Module:
    """A Linen module by "package.module:Class"; the current folder is searched, too.

    Raises:
        ValueError: there is no such module, or it is made otherwise.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(
            f"--model {path!r} is no import path; give one such as package.module:Class."
        )
    found = getattr(_import(module), name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(
            f"--model {path!r}: {module} has no class {name!r} of Linen modules; give one that is."
        )
    try:
        return found(**attributes)
    except Exception as error:  # of the user's own code
        given = json.dumps(attributes)
        raise ValueError(
            f"--model {path} cannot be made; give --model-args that it takes, not {given}: "
            f"{_line(error)}"
        ) from error


def check_model(path: str, model: nn.Module, image: np.ndarray, kwargs: Mapping[str, Any]) -> Any:
    """The shapes of the variables that a model makes for an image.

    Raises:
        ValueError: the model does not run, or its output is not one array.
    """
    call = functools.partial(model.init_with_output, jax.random.key(0), **kwargs)
    try:
        output, variables = jax.eval_shape(call, image)
    except Exception as error:  # of the user's own code
        raise ValueError(
            f"--model {path} does not run on images {image.shape[1:]} with --model-kwargs "
            f"{json.dumps(kwargs)}; give what its call takes: {_line(error)}"
        ) from error
    if not isinstance(output, jax.ShapeDtypeStruct):
        raise ValueError(
            f"--model {path} gives a {type(output).__name__}; give a module whose output is one "
            "array, such as the logits."
        )
    return variables


def _import(module: str) -> Any:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # of the user's own code
        raise ValueError(
            f"--model: {module} cannot be imported; give a module that can: {_line(error)}"
        ) from error


def _line(error: BaseException) -> str:
    """The type of an error and the first line of its text."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:300]}"
