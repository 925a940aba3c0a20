"""NNX modules whose kernels are factors: the layer's own class, run by `lowrank`."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx, traverse_util

from lowrank_jax.factorization.factors import dense_shape, read_factors
from lowrank_jax.factorization.separable import merge
from lowrank_jax.program.transform import lowrank


class Factors(nnx.Pytree):
    """Two variables in the place of a kernel, under the names that `decompose` gives them.

    A module that reads the kernel of another one gets the product.

    Example:
        >>> import jax.numpy as jnp
        >>> kernel = nnx.Param(jnp.ones((3, 3, 4, 8)))
        >>> pair = {"vertical": jnp.ones((3, 1, 4, 2)), "horizontal": jnp.ones((1, 3, 2, 8))}
        >>> factors = Factors(kernel, pair)
        >>> factors.vertical.shape, factors.shape, factors[...].max().item()
        ((3, 1, 4, 2), (3, 3, 4, 8), 2.0)
    """

    def __init__(self, kernel: nnx.Variable, arrays: Mapping[str, jax.Array]) -> None:
        (one, two), axes, _ = read_factors(arrays, "kernel")  # noqa: RUF059
        places = {letter: index - len(axes) for index, letter in enumerate(axes)}
        for name, array in arrays.items():
            between = places["O"] if array is one else places["I"]
            mesh = _on_mesh(kernel, array.ndim, {between: None})
            setattr(self, name, kernel.copy(array, **mesh))

    def arrays(self) -> dict[str, Any]:
        """The two arrays by their names."""
        held = vars(self).items()
        return {name: x.get_raw_value() for name, x in held if isinstance(x, nnx.Variable)}

    def variable(self, abstract: bool = False) -> nnx.Variable:
        """The kernel as a variable of its own type, of shapes alone if abstract."""
        arrays = self.arrays()
        (one, two), axes, _ = read_factors(arrays, "kernel")
        names = {id(array): name for name, array in arrays.items()}
        first, second = (getattr(self, names[id(factor)]) for factor in (one, two))
        out = axes.index("O") - len(axes)
        outputs = second.get_metadata().get("out_sharding") or [None] * one.ndim
        mesh = _on_mesh(first, one.ndim, {out: outputs[out]})
        if abstract:
            shape = dense_shape(one.shape, two.shape, axes)
            return first.copy(jax.ShapeDtypeStruct(shape, one.dtype), **mesh)
        return first.copy(merge(one, two, axes), **mesh)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.variable(abstract=True).get_raw_value().shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return self.variable(abstract=True).get_raw_value().dtype

    def get_value(self) -> jax.Array:
        """The product."""
        return self.variable().get_value()

    def __getitem__(self, index: Any) -> jax.Array:
        return self.variable()[index]

    def __jax_array__(self) -> jax.Array:
        return self.get_value()


def _on_mesh(variable: nnx.Variable, ndim: int, other: Mapping[int, Any]) -> dict[str, Any]:
    """The axes of a mesh that a variable lies on, with other ones for some of its axes."""
    mesh = variable.get_metadata().get("out_sharding")
    if not mesh:
        return {}
    axes = [*mesh, *[None] * (ndim - len(mesh))]
    for place, name in other.items():
        axes[place] = name
    return {"out_sharding": tuple(axes)}


class SeparableConv(nnx.Module):
    """A layer whose kernel is factors; `lowrank_jax.nnx.decompose` makes it.

    It is of a subclass of the layer's own class, and has the layer's attributes, but that its
    kernel is `Factors`. When it is called, `lowrank` runs the layer's own function.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives; changes of its state, and of modules among the arguments, stay."""
        given = (self, args, kwargs)
        graphdef = nnx.graphdef((dense_form(self), args, kwargs))
        kernels = {path for path, node in nnx.iter_graph(given) if isinstance(node, Factors)}

        def run(variables: dict) -> tuple[Any, nnx.State]:
            whole = nnx.merge(graphdef, variables)
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


@functools.cache
def separable_class(cls: type) -> type:
    """The subclass of a module's class that runs factors."""
    own = {"__module__": cls.__module__, "_pytree__nodes": cls._pytree__nodes, "dense_class": cls}  # type: ignore[attr-defined]
    bases, is_pytree = (SeparableConv, cls), cls._pytree__is_pytree  # type: ignore[attr-defined]
    return type(cls)(f"Separable{cls.__name__}", bases, own, pytree=is_pytree)


def variables_of(model: Any) -> dict:
    """The arrays in a model as nested dicts, as `decompose` and all verbs of trees take them."""
    return nnx.to_pure_dict(nnx.state(model), raw_value)


def raw_value(leaf: Any) -> Any:
    """What a variable stores; a variable of a class of one's own may show another value."""
    return leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf


def dense_form(model: Any) -> Any:
    """A copy of a model with the layers' own classes, whose kernels have shapes alone."""
    model = nnx.clone(model, variables=False)
    nodes = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Pytree)]
    factors = [node for node in nodes if isinstance(node, Factors)]
    for node in nodes:
        if isinstance(node, SeparableConv):
            node.__class__ = node.dense_class  # type: ignore[attr-defined]
    return swap(model, {id(node): node.variable(abstract=True) for node in factors})


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
