"""NNX modules whose kernels are factors: the layer's own class, run by `lowrank`."""

import copyreg
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx, traverse_util

from lowrank_jax.factorization.factors import (
    held_keys,
    is_factors,
    read_factors,
    shape_of,
)
from lowrank_jax.factorization.merging import product
from lowrank_jax.factorization.placement import factor_parts
from lowrank_jax.program.transform import lowrank


class Factors(nnx.Pytree):
    """Two variables in the place of a kernel, under the names that `decompose` gives them.

    A factor that stands decomposed itself is `Factors`, too. A module that reads the kernel of
    another module gets the product.

    Example:
        >>> import jax.numpy as jnp
        >>> kernel = nnx.Param(jnp.ones((3, 3, 4, 8)))
        >>> pair = {"vertical": jnp.ones((3, 1, 4, 2)), "horizontal": jnp.ones((1, 3, 2, 8))}
        >>> factors = Factors(kernel, pair)
        >>> factors.vertical.shape, factors.shape, factors[...].max().item()
        ((3, 1, 4, 2), (3, 3, 4, 8), 2.0)
    """

    def __init__(self, kernel: nnx.Variable, node: Mapping[str, Any]) -> None:
        pair, axes, first = read_factors(node, "kernel")
        for name, factor in node.items():
            index = 0 if factor is pair[0] else 1
            shape = shape_of(factor)
            mesh = _mesh_of_factor(kernel, len(shape), axes, first, index)
            if is_factors(factor):
                whole = kernel.copy(jax.ShapeDtypeStruct(shape, kernel.dtype), **mesh)
                setattr(self, name, Factors(whole, factor))
            else:
                setattr(self, name, kernel.copy(factor, **mesh))

    @property
    def shape(self) -> tuple[int, ...]:
        return dense_variable(self, abstract=True).get_raw_value().shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return dense_variable(self, abstract=True).get_raw_value().dtype

    def get_value(self) -> jax.Array:
        """The product."""
        return dense_variable(self).get_value()

    def __getitem__(self, index: Any) -> jax.Array:
        return dense_variable(self)[index]

    def __jax_array__(self) -> jax.Array:
        return self.get_value()


def dense_variable(factors: Factors, abstract: bool = False) -> nnx.Variable:
    """The kernel that factors stand for, as a variable of its own type; a shape if abstract."""
    node = variables_of(factors)
    (one, _), axes, first = read_factors(node, "kernel")
    held = [getattr(factors, name) for name in held_keys(node)]
    pair = [dense_variable(x, abstract) if isinstance(x, Factors) else x for x in held]
    mesh = _mesh_of_kernel(pair, one.ndim, axes, first)
    whole = jax.ShapeDtypeStruct(shape_of(node), one.dtype) if abstract else product(node, "kernel")
    return pair[0].copy(whole, **mesh)


def _mesh_of_factor(
    kernel: nnx.Variable, ndim: int, axes: str, first: str, index: int
) -> dict[str, Any]:
    """The axes of a mesh that a factor lies on: those of the kernel along the axes they share."""
    mesh = kernel.get_metadata().get("out_sharding")
    return {"out_sharding": factor_parts(mesh, ndim, axes, first, index)} if mesh else {}


def _mesh_of_kernel(
    pair: Sequence[nnx.Variable], ndim: int, axes: str, first: str
) -> dict[str, Any]:
    """The axes of a mesh that a kernel lies on, each as the factor that has it."""
    meshes = [variable.get_metadata().get("out_sharding") for variable in pair]
    if not meshes[0]:
        return {}
    one, two = (factor_parts(m or (), ndim, axes, first, i) for i, m in enumerate(meshes))
    either = zip(one, two, strict=True)
    return {"out_sharding": tuple(b if a is None else a for a, b in either)}


class SeparableConv(nnx.Module):
    """A layer whose kernel is factors; `lowrank_jax.nnx.decompose` makes it.

    It is of a subclass of the layer's own class, and has the layer's attributes, except that its
    kernel is `Factors`. When it is called, `lowrank` runs the layer's own function.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives; changes of its state, and of modules among the arguments, stay."""
        given = (self, args, kwargs)
        graphdef = nnx.graphdef((dense_form(self), args, kwargs))
        kernels = {path for path, node in nnx.iter_graph(given) if isinstance(node, Factors)}

        def run(variables: dict) -> tuple[Any, nnx.State]:
            whole = nnx.merge(graphdef, variables, copy=True)
            layer, own, options = whole
            outputs = layer(*own, **options)
            old = traverse_util.flatten_dict(variables)
            new = nnx.to_flat_state(nnx.state(whole))
            changed = [(p, x) for p, x in new if p not in kernels and not _same(x, old.get(p))]
            return outputs, nnx.from_flat_state(changed)

        outputs, changed = lowrank(run)(variables_of(given))
        if changed:
            nnx.update(given, changed)
        return outputs


def _same(one: Any, two: Any) -> bool:
    """Whether two trees have the very same arrays."""
    pair = jax.tree.leaves(one), jax.tree.leaves(two)
    return len(pair[0]) == len(pair[1]) and all(a is b for a, b in zip(*pair, strict=True))


class _SeparableClass(type(nnx.Module)):  # type: ignore[misc]
    """The class of the subclasses that are made for layers, so that they can be pickled."""


@functools.cache
def separable_class(cls: Any) -> Any:
    """The subclass of a module's class that runs factors."""
    own = {"__module__": cls.__module__, "_pytree__nodes": cls._pytree__nodes, "dense_class": cls}
    bases, is_pytree = (SeparableConv, cls), cls._pytree__is_pytree
    kind = _SeparableClass if issubclass(_SeparableClass, type(cls)) else type(cls)
    return kind(f"Separable{cls.__name__}", bases, own, pytree=is_pytree)


def _pickled(cls: Any) -> tuple[Any, tuple]:
    return separable_class, (cls.dense_class,)


copyreg.pickle(_SeparableClass, _pickled)


def variables_of(model: Any) -> dict:
    """The arrays in a model as nested dicts, as `decompose` and all verbs of trees take them."""
    return nnx.to_pure_dict(nnx.state(model), raw_value)


def raw_value(leaf: Any) -> Any:
    """The array that a variable stores; a variable of other values stays as it is.

    A variable of a class of one's own may show another value than it stores.
    """
    value = leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
    return value if jax.tree_util.all_leaves([value]) else leaf


def dense_form(model: Any) -> Any:
    """A copy of a model with the layers' own classes, whose kernels have shapes alone."""
    model = nnx.clone(model, variables=False)
    nodes = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Pytree)]
    factors = [node for node in nodes if isinstance(node, Factors)]
    for node in nodes:
        if isinstance(node, SeparableConv):
            node.__class__ = node.dense_class  # type: ignore[attr-defined]
    return swap(model, {id(node): dense_variable(node, abstract=True) for node in factors})


def swap(model: Any, new: Mapping[int, Any]) -> Any:
    """Puts other nodes and variables in the places of some, given by id; changes the model."""

    def put(value: Any) -> Any:
        return jax.tree.map(lambda leaf: new.get(id(leaf), leaf), value, is_leaf=nnx.is_data)

    for _, node in list(nnx.iter_graph(model)):
        for name, value in held_by(node).items():
            if any(id(leaf) in new for leaf in jax.tree.leaves(value, is_leaf=nnx.is_data)):
                setattr(node, name, put(value))
    return put(model)


def held_by(node: Any) -> dict[str, Any]:
    """The attributes of a node of NNX."""
    return dict(vars(node)) if isinstance(node, nnx.Pytree) else {}
