"""A model of NNX as a function of its variables, which is what every verb of trees takes."""

from typing import Any

from flax import nnx

from lowrank_jax.modules.nnx import dense_form, variables_of


class Call:
    """``call(variables, *args, **kwargs)`` calls a model as it is in evaluation.

    The variables are nested dicts of arrays. Changes that the call makes in the model are lost.

    Attributes:
        model: the model that is called.
        stored_kernels: says that kernels stand as they are stored; see `trace`. A layer has no
            place for a kernel that a module around the layer has changed.
    """

    def __init__(self, model: nnx.Module) -> None:
        self.model, self.stored_kernels = model, True
        self._graphdef = nnx.graphdef(dense_form(evaluated(model)))

    def __call__(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        return nnx.merge(self._graphdef, variables, copy=True)(*args, **kwargs)


def functional(model: nnx.Module) -> tuple[Call, dict]:
    """A model as a function and its variables, for the verbs of `lowrank_jax`.

    Layers of a decomposed model have their factors in the kernel's place, for `lowrank`.

    Args:
        model: dense or decomposed; it is not changed.

    Returns:
        A function of (variables, *args, **kwargs), and the variables.

    Raises:
        ValueError: it is no model that can be called.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
        >>> apply, variables = functional(model)
        >>> apply(variables, jnp.ones((2, 8, 8, 4))).shape
        (2, 8, 8, 8)
    """
    return Call(model), variables_of(model)


def evaluated(model: nnx.Module, normalise_by_batch: bool = False) -> Any:
    """A copy of a model in evaluation mode, but for its batch normalisations where asked for.

    Raises:
        ValueError: it is no model that can be called.
    """
    if not isinstance(model, nnx.Module) or not callable(model):
        raise ValueError(
            f"A {type(model).__name__} is not allowed; give an nnx.Module that can be called."
        )
    copy = nnx.clone(model)
    copy.eval()
    for _, node in nnx.iter_graph(copy) if normalise_by_batch else ():
        if isinstance(node, nnx.BatchNorm):
            node.use_running_average = False
    return copy
