"""NNX models whose convolutions run by chosen programs, and the fastest way to run one."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowrank_jax.factorization.separable import Separable
from lowrank_jax.nnx.layers import PLAIN as ALLOWED
from lowrank_jax.nnx.layers import clone_layer, groups_of, swap
from lowrank_jax.nnx.separable import SeparableConv, merged, pair, whole
from lowrank_jax.nnx.watch import evaluated
from lowrank_jax.program.factored import cuts
from lowrank_jax.tuning.algorithms import (
    MERGED,
    PLAIN,
    Choose,
    Layer,
    chosen,
    dense_step,
    fuse,
    padded,
    steps,
)
from lowrank_jax.tuning.search import SLICES, Fast, search
from lowrank_jax.tuning.timer import Timer


def fast(
    model: Any,
    images: Any,
    *,
    slices: Sequence[int] = SLICES,
    timers: Callable[[Mapping[str, Any]], Timer] = Timer,
    rounds: int = 5,
    freeze: bool = False,
) -> Fast:
    """Measures ways to run an NNX model in evaluation, dense or decomposed, and returns the
    fastest.

    Args:
        model: `nnx.Module`; it is not changed.
        images, slices, timers, rounds, freeze: as in `lowrank_jax.fast`.

    Returns:
        A compiled function of (``nnx.state(model)``, images), of (None, images) if frozen, with the
        attributes of `lowrank_jax.fast.Fast`.

    Example:
        >>> model, images = nnx.Sequential(nnx.Conv(8, 16, (3, 3), rngs=nnx.Rngs(0))), jnp.ones((4, 8, 8, 8))
        >>> run = fast(model, images, rounds=2)
        >>> run(nnx.state(model), images).shape
        (4, 8, 8, 16)
    """
    graphdef, state = nnx.split(evaluated(model))

    def network(programs: Choose | None) -> Callable:
        def run(state: Any, images: jax.Array) -> Any:
            still = nnx.merge(graphdef, state)
            return (still if programs is None else programmed(still, programs))(images)

        return run

    return search(
        network, state, images, slices=slices, timers=timers, rounds=rounds, freeze=freeze
    )


def programmed(model: Any, choose: Choose) -> Any:
    """A copy of a model whose plain convolutions, dense and decomposed, run by the programs chosen
    when it is called.

    Args:
        model: `nnx.Module`.
        choose: function of (layer, scheme), as for `lowrank_jax.lowrank`; `Timer.fastest` is one.
    """
    model = nnx.clone(model)
    nodes = [node for _, node in nnx.iter_graph(model)]
    pairs = [node for node in nodes if type(node) is SeparableConv]
    factors = {id(conv) for node in pairs for conv in pair(node)}
    for conv in nodes:
        if _plain(conv) and id(conv) not in factors:
            conv.conv_general_dilated = chosen(choose)
    return swap(
        model, {id(node): _Chosen(node, choose) for node in pairs if all(map(_plain, pair(node)))}
    )


class _Chosen(nnx.Module):
    """A decomposed layer that runs by a program chosen when its inputs are known."""

    def __init__(self, layer: SeparableConv, choose: Choose) -> None:
        self.layer, self.choose = layer, choose

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        layer = self.layer
        program = PLAIN if args or kwargs else self.choose(*_described(layer, inputs))
        if program == PLAIN:
            return layer(inputs, *args, **kwargs)
        if program in MERGED:
            dense = whole(layer, merged(layer))
            dense.conv_general_dilated = dense_step(MERGED[program])
            return dense(inputs)
        convs = pair(layer)
        one, two = (conv.kernel.get_value() for conv in convs)
        if program == "fused":
            return _fused(layer, inputs, one, two)
        kernels = padded(one, two) if program == "padded" else (one, two)
        for conv, kernel, how in zip(convs, kernels, steps(program), strict=True):
            sizes = {"in_features": kernel.shape[-2], "out_features": kernel.shape[-1]}
            options = {"conv_general_dilated": how, **sizes}
            inputs = clone_layer(conv, conv.kernel.copy(kernel), conv.bias, options)(inputs)
        return inputs


def _plain(conv: Any) -> bool:
    """Whether a layer is a convolution, channels last, with no function of its own and no padding
    of Flax's own."""
    name = "conv_general_dilated"
    own = (
        type(conv) is not nnx.Conv or getattr(conv, name, ALLOWED[name][0]) is not ALLOWED[name][0]
    )
    return not own and (not isinstance(conv.padding, str) or conv.padding in ("SAME", "VALID"))


def _described(layer: SeparableConv, inputs: jax.Array) -> tuple[Layer, Separable]:
    """A decomposed layer as numbers, and its scheme."""
    dense = whole(layer, pair(layer)[0].kernel)  # for its options; no kernel of it is read
    size, groups = tuple(dense.kernel_size), groups_of(dense)
    shape = (math.prod(inputs.shape[: -1 - len(size)]), *inputs.shape[-1 - len(size) :])
    dtype = jnp.dtype(dense.dtype or jnp.result_type(inputs, dense.param_dtype)).name
    own = Layer(shape, dense.out_features, size, *cuts(dense, size, inputs), groups, dtype)
    rank = pair(layer)[1].kernel.get_value().shape[-2]
    return own, Separable(rank, groups, own.axes, layer.first)


def _fused(layer: SeparableConv, inputs: jax.Array, one: jax.Array, two: jax.Array) -> jax.Array:
    own, last = _described(layer, inputs)[0], pair(layer)[1]
    bias = None if last.bias is None else last.bias.get_value()
    flat, one, two, bias = last.promote_dtype(
        (inputs.reshape(own.inputs), one, two, bias), dtype=last.dtype
    )
    outputs = fuse(flat, one, two, bias, own.strides, own.padding, layer.first)
    return outputs.reshape(*inputs.shape[:-3], *outputs.shape[1:])
