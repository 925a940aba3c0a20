"""`trace`, `decompose` and `reconstruct` for models of NNX."""

from typing import Any, TypeVar

import jax
from flax import nnx

from lowrank_jax.factorization.axes import AXES
from lowrank_jax.factorization.matrix import Matrix
from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.factorization.separable import Separable
from lowrank_jax.modules.nnx import variables_of
from lowrank_jax.modules.surgery import rebuilt
from lowrank_jax.nnx.forms import functional
from lowrank_jax.program.kernel_use import Trace
from lowrank_jax.program.names import names_of
from lowrank_jax.program.tracing import trace as trace_function
from lowrank_jax.program.transform import lowrank
from lowrank_jax.tree.decomposing import factored, find_schemes
from lowrank_jax.tree.decomposing import reconstruct as reconstruct_tree
from lowrank_jax.tree.rules import Rules

Model = TypeVar("Model")
LAYERS = (nnx.Conv, nnx.ConvTranspose, nnx.Linear)


def trace(model: nnx.Module, *args: Any, **kwargs: Any) -> Trace:
    """`lowrank_jax.trace` of ``model(*args, **kwargs)`` in evaluation.

    A kernel that several modules share has the path of the first module.

    Args:
        model: dense or decomposed, with or without values; it is not changed.
        *args, **kwargs: arguments of the model's call.

    Example:
        >>> import jax.numpy as jnp
        >>> make = lambda: nnx.Sequential(nnx.Conv(4, 16, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
        >>> calls = trace(nnx.eval_shape(make), jnp.zeros((1, 8, 8, 4)))
        >>> [(call.path, call.macs) for call in calls]
        [('layers/0', 36864)]
    """
    apply, variables = functional(model)
    return trace_function(lowrank(apply), variables, *args, **kwargs)


def decompose(model: Model, rules: Rules | None = None, trace: Trace | None = None) -> Model:
    """Makes a new model, in which the layers that a table names have factors for a kernel.

    Each of these layers becomes a `SeparableConv`. A layer runs as it did, with the two factors
    where its program lets them run, and with their product where it does not, as in a layer that
    masks its kernel. `nnx.WeightNorm` and `nnx.SpectralNorm`, which read the variables of the layer
    within, become one layer with it. A module of your own that reads a layer's variables needs a
    trace, which makes `decompose` refuse the layer.

    The model given is not changed; the new one shares its arrays but no variable. A kernel that
    modules share stays one. Stacked kernels, as `nnx.vmap` makes them, are decomposed slice by
    slice. Works under ``nnx.jit`` and ``nnx.eval_shape``.

    Args:
        model: `nnx.Module`, or a container of modules.
        rules: a `Plan`, or a table of layer paths such as "blocks/0/conv", or of regular
            expressions, as in `lowrank_jax.decompose`. Without a table, every layer that the trace
            proves safe and that gets smaller is cut to half its parameters.
        trace: `trace` of this model. Layers that cannot run decomposed are refused.

    Raises:
        ValueError: there is neither a table nor a trace, the table is empty, or a path, a kernel or
            a rank in the table cannot be used.

    Example:
        >>> model = nnx.Sequential(nnx.Conv(8, 16, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
        >>> small = decompose(model, {"layers/0": 3})
        >>> small.layers[0].kernel.vertical.shape, small.layers[0].kernel.horizontal.shape
        ((3, 1, 8, 3), (1, 3, 3, 16))
    """
    variables = variables_of(model)
    schemes = find_schemes(variables, rules, trace=trace, units=_units(model))
    return rebuilt(model, factored(variables, schemes))


def _units(model: Any) -> dict[str, Scheme]:
    """The schemes of rank 1 of the layers that tell their groups and axes."""
    nodes = dict(nnx.iter_graph(model))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model), is_leaf=_is_variable)
    paths = [path for path, _ in leaves]
    kernels = [path for path in paths if path[-1].key == "kernel"]
    holders = [nodes.get(tuple(key.key for key in path[:-1])) for path in kernels]
    known = dict(zip(paths, names_of(paths), strict=True))
    pairs = zip((known[path] for path in kernels), holders, strict=True)
    return {name: _unit(layer) for name, layer in pairs if isinstance(layer, LAYERS)}


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _unit(layer: Any) -> Scheme:
    if isinstance(layer, nnx.Linear):
        return Matrix(1)
    groups = getattr(layer, "feature_group_count", 1)
    return Separable(1, groups, AXES.get(len(layer.kernel_size), AXES[2]))


def reconstruct(model: Model) -> Model:
    """Multiplies all factors back; the inverse of `decompose` up to the ranks that were dropped.

    The layers have their own classes again. The model given is not changed.

    Args:
        model: dense or decomposed.

    Example:
        >>> model = nnx.Sequential(nnx.Conv(8, 16, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
        >>> reconstruct(decompose(model, {"layers/0": 3})).layers[0].kernel.shape
        (3, 3, 8, 16)
    """
    return rebuilt(model, reconstruct_tree(variables_of(model)))
