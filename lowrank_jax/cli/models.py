"""The model of the user's own that ``--model`` names: a module of Linen or NNX, or a function."""

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

from lowrank_jax.cli.imports import imported, line
from lowrank_jax.modules.nnx import raw_value, variables_of
from lowrank_jax.modules.surgery import rebuilt
from lowrank_jax.nnx.forms import functional
from lowrank_jax.program.transform import lowrank

MODULES = (nn.Module, nnx.Module)
WANTED = (
    "a class or a function that makes a module of Linen or NNX, or a function of (variables, "
    "images)"
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Model:
    """A network whose variables are in a checkpoint.

    Attributes:
        path: its import path.
        expression: Python that makes it, once its name is imported.
        apply: function of (variables, images, **kwargs).
        module: of Linen or NNX; None for a function.
    """

    path: str
    expression: str
    apply: Callable
    module: nn.Module | nnx.Module | None

    def shapes(self, image: np.ndarray, kwargs: Mapping[str, Any]) -> Any:
        """The shapes of its variables; None for a function, which does not tell them.

        Args:
            image: a batch of one.
            kwargs: of its call.

        Raises:
            ValueError: a module of Linen does not run, or its output is not one array.
        """
        if isinstance(self.module, nn.Module):
            init = functools.partial(self.module.init_with_output, jax.random.key(0))
            output, variables = self._traced(init, (image,), kwargs)
            self._check_array(output)
            return nn.meta.unbox(variables)
        return jax.tree.map(_shape, variables_of(self.module)) if self.is_nnx else None

    def filled(self, variables: Any) -> nnx.Module:
        """The module of NNX with other variables; those that it lacks stay."""
        assert isinstance(self.module, nnx.Module)
        return rebuilt(self.module, variables)

    def weights(self, variables: Any) -> Any:
        """The variables that a checkpoint keeps: of NNX without the state of random numbers."""
        return picked(variables, weights_of(self.module)) if self.is_nnx else variables

    @property
    def optional(self) -> set[str]:
        """Names of the leaves that a checkpoint may lack: the state of random numbers of NNX."""
        if not self.is_nnx:
            return set()
        every, kept = (flatten_dict(own(self.module)) for own in (variables_of, weights_of))
        return {"/".join(map(str, path)) for path in every if path not in kept}

    @property
    def imports(self) -> str:
        """The line of Python that imports it."""
        module, _, name = self.path.partition(":")
        return f"from {module} import {name}"

    @property
    def function(self) -> str:
        """Python of its function of (variables, images); "" of a module of NNX."""
        if self.is_nnx:
            return ""
        return self.expression if self.module is None else f"{self.expression}.apply"

    @property
    def is_nnx(self) -> bool:
        """Whether it is a module of NNX."""
        return isinstance(self.module, nnx.Module)

    def check_output(
        self, apply: Callable, variables: Any, image: np.ndarray, kwargs: Mapping[str, Any]
    ) -> None:
        """Raises unless the output of the model's function for an image is one array."""
        self._check_array(self._traced(lowrank(apply), (variables, image), kwargs))

    def _check_array(self, output: Any) -> None:
        if not isinstance(output, jax.ShapeDtypeStruct):
            raise ValueError(
                f"--model {self.path} gives a {type(output).__name__}; give a module whose output "
                "is one array, such as the logits."
            )

    def _traced(self, call: Callable, given: tuple, kwargs: Mapping[str, Any]) -> Any:
        try:
            return jax.eval_shape(functools.partial(call, **kwargs), *given)
        except Exception as error:  # of the user's own code
            raise ValueError(
                f"--model {self.path} does not run on images {given[-1].shape[1:]} with "
                f"--model-kwargs {json.dumps(dict(kwargs))}; give what its call takes: "
                f"{line(error)}"
            ) from error


def weights_of(module: Any) -> dict[Any, Any]:
    """The variables of a module of NNX without the state of random numbers."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState)), raw_value)


def picked(tree: Any, wanted: Any) -> Any:
    """The parts of a tree that another one has, too.

    Example:
        >>> picked({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 0}})
        {'a': {'b': 1}}
    """
    if not isinstance(wanted, Mapping):
        return tree
    return {key: picked(tree[key], own) for key, own in wanted.items() if key in tree}


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def load_model(path: str, arguments: Mapping[str, Any]) -> Model:
    """A model by "package.module:name"; the current folder is searched, too.

    Args:
        path: of a class of modules, of a function that makes a module, of a module, or of a
            function of (variables, images, **kwargs).
        arguments: of the class or of the function that makes it. A class or a function of NNX
            gets ``rngs`` if its arguments have the name.

    Raises:
        ValueError: there is no such object, or it is made otherwise.
    """
    found = imported(path, "--model")
    module, _, name = path.partition(":")
    if isinstance(found, MODULES):
        return _of_module(path, name, found)
    is_class = inspect.isclass(found)
    if not callable(found) or (is_class and not issubclass(found, MODULES)):
        raise ValueError(f"--model {path!r}: {module} has no model {name!r}; give {WANTED}.")
    if not is_class and _takes_variables(found, arguments):
        return Model(path=path, expression=name, apply=found, module=None)
    rngs = _takes_rngs(found, arguments)
    made = _made(path, found, arguments, {"rngs": nnx.Rngs(0)} if rngs else {})
    given = [f"{key}={value!r}" for key, value in arguments.items()] + ["rngs=nnx.Rngs(0)"] * rngs
    return _of_module(path, f"{name}({', '.join(given)})", made)


def _of_module(path: str, expression: str, module: Any) -> Model:
    apply = module.apply if isinstance(module, nn.Module) else functional(module)[0]
    return Model(path=path, expression=expression, apply=apply, module=module)


def _takes_variables(function: Callable, arguments: Mapping[str, Any]) -> bool:
    """Whether a function is the network itself, and does not make one."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # a built-in may tell none
        return False
    return not arguments and not _binds(signature.bind) and _binds(signature.bind_partial, 2)


def _binds(bind: Callable, count: int = 0) -> bool:
    """Whether a signature takes so many arguments by their places."""
    try:
        bind(*[None] * count)
    except TypeError:
        return False
    return True


def _made(
    path: str, make: Callable, arguments: Mapping[str, Any], random: Mapping[str, Any]
) -> Any:
    try:
        found = make(**arguments, **random)
    except Exception as error:  # of the user's own code
        raise ValueError(
            f"--model {path} cannot be made; give --model-args that it takes, not "
            f"{json.dumps(dict(arguments))}: {line(error)}"
        ) from error
    if not isinstance(found, MODULES):
        raise ValueError(f"--model {path} makes a {type(found).__name__}; give {WANTED}.")
    return found


def _takes_rngs(make: Callable, arguments: Mapping[str, Any]) -> bool:
    """Whether a model of NNX is made with random numbers, whose values a checkpoint replaces."""
    own = make.__init__ if inspect.isclass(make) else make
    return "rngs" in inspect.signature(own).parameters and "rngs" not in arguments
