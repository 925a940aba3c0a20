"""An NNX convolution in two steps: made of a dense one, and multiplied back into it."""

from typing import Any

import jax
from flax import nnx

from lowrank_jax.factorization.layout import AXES
from lowrank_jax.factorization.separable import FACTORS, merge
from lowrank_jax.modules.linen import split_options
from lowrank_jax.nnx.layers import SPLIT, clone_layer


class SeparableConv(nnx.Module):
    """Two convolutions in place of one; `decompose` makes it.

    Its attributes ``vertical`` and ``horizontal``, or ``horizontal_first`` and ``vertical_second``,
    are each an `nnx.Conv` or `nnx.ConvTranspose`, so that its state is the tree of
    `lowrank_jax.SeparableConv`.
    """

    def __init__(self, first: str, pair: tuple[Any, Any]) -> None:
        self.first = first
        for name, conv in zip(FACTORS[first], pair, strict=True):
            setattr(self, name, conv)

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Maps (*batch, *spatial, channels) as the dense layer does; other arguments go to the
        second convolution."""
        one, two = pair(self)
        return two(one(inputs), *args, **kwargs)


def pair(layer: SeparableConv) -> tuple[Any, Any]:
    """The first and the second convolution."""
    one, two = (getattr(layer, name) for name in FACTORS[layer.first])
    return one, two


def as_variables(kernel: nnx.Variable, factors: tuple[jax.Array, jax.Array]) -> list[nnx.Variable]:
    """The factors as variables of the kernel's own kind, of which the axis between is on no axis of
    a mesh."""
    if mesh := kernel.get_metadata().get("out_sharding"):
        mesh = (*mesh, *[None] * (factors[0].ndim - len(mesh)))
        meshes = ((*mesh[:-1], None), (*mesh[:-2], None, mesh[-1]))
        return [
            kernel.copy(factor, out_sharding=axes)
            for factor, axes in zip(factors, meshes, strict=True)
        ]
    return [kernel.copy(factor) for factor in factors]


def separate(
    layer: Any, first: str, factors: list[nnx.Variable], bias: nnx.Variable | None
) -> SeparableConv:
    """A convolution layer as two, with these kernels and this very bias variable."""
    one, two = split_options(
        layer.kernel_size, first, {name: getattr(layer, name) for name in SPLIT[type(layer)]}
    )
    # Only the second convolution sums to the preferred type: the first hands on what the layer
    # would be given.
    one |= {
        "out_features": factors[0].get_value().shape[-1],
        "use_bias": False,
        "preferred_element_type": None,
    }
    two["in_features"] = one["out_features"]
    return SeparableConv(
        first,
        (clone_layer(layer, factors[0], None, one), clone_layer(layer, factors[1], bias, two)),
    )


def whole(layer: SeparableConv, kernel: nnx.Variable) -> Any:
    """The dense convolution layer with this kernel and the bias of the second one."""
    one, two = pair(layer)
    options = {
        key: _whole(getattr(one, key), getattr(two, key))
        for key in ("kernel_size", *SPLIT[type(two)])
    }
    return clone_layer(two, kernel, two.bias, options | {"in_features": one.in_features})


def merged(layer: SeparableConv) -> nnx.Variable:
    """Both kernels multiplied, as a variable of their kind."""
    one, two = pair(layer)
    kernel = merge(one.kernel.get_value(), two.kernel.get_value(), AXES[len(two.kernel_size)])
    if mesh := one.kernel.get_metadata().get("out_sharding"):
        return one.kernel.copy(
            kernel, out_sharding=(*mesh[:-1], two.kernel.get_metadata()["out_sharding"][-1])
        )
    return one.kernel.copy(kernel)


def _whole(one: Any, two: Any) -> Any:
    """An option of the dense convolution from those of its factors, each of which has it for its
    own axes."""
    if isinstance(one, str) or callable(one):
        return one
    return tuple(
        (a[0] + b[0], a[1] + b[1]) if isinstance(a, tuple) else a * b
        for a, b in zip(one, two, strict=True)
    )
