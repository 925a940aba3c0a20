"""A model of NNX with other variables: dense kernels become factors, and factors dense kernels."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx, traverse_util

from lowrank_jax.factorization.factors import is_factors, read_factors, shape_of
from lowrank_jax.modules.nnx import (
    Factors,
    SeparableConv,
    dense_variable,
    held_by,
    separable_class,
    swap,
    variables_of,
)
from lowrank_jax.tree.suggest import suggest

Model = TypeVar("Model")
WRAPPERS = (nnx.WeightNorm, nnx.SpectralNorm)  # they read the variables of the layer within


def rebuilt(model: Model, tree: Mapping) -> Model:
    """A copy of a model that has the arrays of a tree.

    Args:
        model: dense or decomposed; it is not changed.
        tree: as `variables_of` gives it, any kernel dense or as factors.

    Raises:
        ValueError: the tree has a leaf that the model lacks, or factors of another kernel; or
            layers that ``nnx.vmap`` maps over one input share a factor.

    Example:
        >>> import jax.numpy as jnp
        >>> conv = nnx.Conv(4, 8, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
        >>> pair = {"vertical": jnp.ones((3, 1, 4, 2)), "horizontal": jnp.ones((1, 3, 2, 8))}
        >>> small = rebuilt(conv, {"kernel": pair})
        >>> type(small).__name__, small(jnp.ones((1, 5, 5, 4))).shape
        ('SeparableConv', (1, 5, 5, 8))
    """
    model = nnx.clone(model)
    old, new = _flat(variables_of(model)), _flat(tree)
    _check_fits(old, new)
    pairs = {path for path in new if is_factors(new[path]) or is_factors(old[path])}
    others = {p: x for p, x in new.items() if p not in pairs and x is not old[p]}
    nnx.update(model, traverse_util.unflatten_dict(others))
    nodes = dict(nnx.iter_graph(model))
    for path in pairs:
        _check_mapped(path, nodes.get(path[:-1]), new[path])
    made = {id(nodes[path]): _kernel(nodes[path], new[path]) for path in pairs}
    return _retyped(swap(model, made))


def _check_fits(old: Mapping[tuple, Any], new: Mapping[tuple, Any]) -> None:
    """Refuses leaves that the model lacks, and factors of kernels of other shapes."""
    for path, value in new.items():
        name = "/".join(map(str, path))
        if path not in old:
            advice = suggest(name, ["/".join(map(str, own)) for own in old], "it has none.")
            raise ValueError(f"The model has no {name!r}; {advice}")
        wanted, found = (shape_of(x) for x in (old[path], value))
        if is_factors(value) and found != wanted:
            raise ValueError(
                f"{name}: the factors are of a kernel {found}, and the model has {wanted}; give "
                "the tree of this very model."
            )


def _check_mapped(path: tuple, layer: Any, value: Any) -> None:
    """Refuses a factor that stacked layers share: nothing in it can be mapped."""
    if not isinstance(layer, nnx.Linear) or not is_factors(value):
        return
    name = "/".join(map(str, path[:-1]))
    _, axes, _ = read_factors(value, name)
    if len(axes) > 2:
        raise ValueError(
            f"{name}: nnx.vmap maps these stacked layers over one input, which the trace reads as "
            f"one product with factors in the layout {axes}; the layers would share the first one, "
            "which nnx.vmap cannot map. Leave the layer out of the table, decompose without a "
            "trace, or run `functional` with `lowrank`."
        )


def _flat(tree: Mapping) -> dict[tuple, Any]:
    return traverse_util.flatten_dict(tree, is_leaf=lambda _, node: is_factors(node))


def _kernel(old: nnx.Variable | Factors, value: Any) -> nnx.Variable | Factors:
    """What stands for a kernel with other values."""
    variable = dense_variable(old, abstract=True) if isinstance(old, Factors) else old
    return Factors(variable, value) if is_factors(value) else variable.copy(value)


def _retyped(model: Model) -> Model:
    """Gives every module the class that its kernels need; changes the model."""
    nodes = dict(nnx.iter_graph(model))
    for node in nodes.values():
        if isinstance(node, SeparableConv):
            node.__class__ = node.dense_class  # type: ignore[attr-defined]
    for path, node in nodes.items():
        owner = next(_owners(path, nodes), None) if _holds_factors(node) else None
        if owner is not None and not isinstance(owner, SeparableConv):
            owner.__class__ = separable_class(type(owner))
    return model


def _holds_factors(node: Any) -> bool:
    leaves = jax.tree.leaves(held_by(node), is_leaf=nnx.is_data)
    return any(isinstance(leaf, Factors) for leaf in leaves)


def _owners(path: tuple, nodes: Mapping[tuple, Any]) -> Iterator[nnx.Module]:
    """The module whose call reads the kernels of the node at a path."""
    above = [nodes.get(path[:end]) for end in range(len(path), -1, -1)]
    modules = [node for node in above if isinstance(node, nnx.Module) and callable(node)]
    for inner, outer in zip(modules, [*modules[1:], None], strict=True):
        if not isinstance(outer, WRAPPERS):
            yield inner
            return
