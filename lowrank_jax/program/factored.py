"""One Linen convolution, dense or with two factors in place of its kernel, run by any of the
programs."""

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lowrank_jax.factorization.layout import AXES
from lowrank_jax.factorization.separable import Separable, merge
from lowrank_jax.modules.linen import per_axis, split_options
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
from lowrank_jax.tuning.slices import padding_as_numbers

# Arguments with one entry for each spatial axis.
SPLIT = {nn.Conv: ("strides", "padding", "input_dilation", "kernel_dilation"),
         nn.ConvTranspose: ("strides", "padding", "kernel_dilation")}  # fmt: skip


def run_dense(layer: Any, call: Callable, inputs: jax.Array, programs: Choose | None) -> jax.Array:
    """Runs a convolution layer that has its kernel; ``call`` is its own way to do so."""
    if programs is None or type(layer) is not nn.Conv or has_own_function(layer):
        return call(inputs)
    other = layer.clone(parent=None, name=None, conv_general_dilated=chosen(programs))
    outputs: Any = other.apply({"params": layer.variables["params"]}, inputs)
    return outputs


def run_factored(
    layer: Any,
    first: str,
    factors: list[Any],
    path: str,
    inputs: jax.Array,
    programs: Choose | None = None,
) -> jax.Array:
    """Runs a convolution layer with two factors in place of its kernel.

    Args:
        layer: `nn.Conv` or `nn.ConvTranspose` that gives all arguments.
        first: which axis the first factor has, "vertical" or "horizontal".
        factors: parameters ``{"kernel"}`` and ``{"kernel", "bias"}`` of the two convolutions.
        path: of the layer, for errors.
        inputs: array (*batch, *spatial, channels).
        programs: as in `lowrank`.
    """
    size = _size(layer)
    scheme = _check_factors(layer, size, first, factors, path, inputs.shape[-1])
    own = _described(layer, size, inputs) if programs else None
    program = programs(own, scheme) if programs and own else PLAIN
    one, two = (factor["kernel"] for factor in factors)
    bias = {name: leaf for name, leaf in factors[1].items() if name != "kernel"}
    if program in MERGED:
        whole = layer.clone(
            parent=None, name=None, conv_general_dilated=dense_step(MERGED[program])
        )
        return whole.apply({"params": {"kernel": merge(one, two, scheme.axes), **bias}}, inputs)
    if own and program == "fused":
        arrays = (inputs.reshape(-1, *inputs.shape[-3:]), one, two, bias.get("bias"))
        flat, one, two, added = layer.promote_dtype(*arrays, dtype=layer.dtype)
        outputs = fuse(flat, one, two, added, own.strides, own.padding, first)
        return outputs.reshape(*inputs.shape[:-3], *outputs.shape[1:])
    one, two = padded(one, two) if program == "padded" else (one, two)
    options = split_options(
        size, first, {name: getattr(layer, name) for name in SPLIT[type(layer)]}
    )
    for each, how in zip(options, steps(program), strict=True):
        each |= (
            {"conv_general_dilated": how} if type(layer) is nn.Conv else {}
        )  # which also says that it is chosen
    between = layer.clone(
        parent=None, name=None, features=one.shape[-1], use_bias=False, **options[0]
    )
    outputs = layer.clone(parent=None, name=None, **options[1])
    return outputs.apply(
        {"params": {"kernel": two, **bias}}, between.apply({"params": {"kernel": one}}, inputs)
    )


def _size(layer: Any) -> tuple[int, ...]:
    return (layer.kernel_size,) if isinstance(layer.kernel_size, int) else tuple(layer.kernel_size)


def has_own_function(layer: Any) -> bool:
    """Whether a layer convolves by a function that it was given."""
    return bool(
        getattr(layer, "conv_general_dilated", None)
        or getattr(layer, "conv_general_dilated_cls", None)
    )


def _described(layer: Any, size: tuple[int, ...], inputs: jax.Array) -> Layer | None:
    """The layer as numbers; None where it is of another kind or pads in a way of its own."""
    own = isinstance(layer.padding, str) and layer.padding not in ("SAME", "VALID")
    if type(layer) is not nn.Conv or own or inputs.ndim < 1 + len(size):
        return None
    own_cuts = cuts(layer, size, inputs)
    shape = (math.prod(inputs.shape[: -1 - len(size)]), *inputs.shape[-1 - len(size) :])
    dtype = jnp.dtype(layer.dtype or jnp.result_type(inputs, layer.param_dtype)).name
    return Layer(shape, layer.features, size, *own_cuts, layer.feature_group_count, dtype)


def cuts(layer: Any, size: tuple[int, ...], inputs: jax.Array) -> tuple[tuple, tuple, tuple, tuple]:
    """Strides, padding as numbers, dilation of the kernel and of the inputs, one entry for each
    spatial axis."""
    names = ("strides", "kernel_dilation", "input_dilation")
    strides, dilation, spread = (per_axis(name, getattr(layer, name), len(size)) for name in names)
    if isinstance(layer.padding, str):
        extent = inputs.shape[-1 - len(size) : -1]
        return (
            strides,
            padding_as_numbers(layer.padding, extent, size, strides, dilation, spread),
            dilation,
            spread,
        )
    pads = per_axis("padding", layer.padding, len(size))
    return (
        strides,
        tuple((p, p) if isinstance(p, Integral) else tuple(p) for p in pads),
        dilation,
        spread,
    )


def _check_factors(
    layer: Any, size: tuple[int, ...], first: str, factors, path: str, channels: int
) -> Separable:
    groups = getattr(layer, "feature_group_count", 1)
    shape = (*size, channels // groups, layer.features)
    kernels = [factor["kernel"].shape for factor in factors]
    rank = kernels[1][-2] if len(kernels[1]) > 1 else 0
    scheme = Separable(rank, groups, AXES[len(size)], first)
    scheme.check(shape, path)
    expected = list(scheme.shapes(shape))
    if kernels != expected:
        raise ValueError(
            f"{path}: factors of shapes {kernels[0]} and {kernels[1]} do not fit; this layer's kernel is {shape} "
            f"in {groups} group(s), whose factors at rank {rank} are {expected[0]} and {expected[1]}. "
            "Decompose the parameters of this very model, with Separable(rank, groups) for a layer with groups."
        )
    wanted = [{"kernel"}, {"kernel", "bias"} if layer.use_bias else {"kernel"}]
    if [set(factor) for factor in factors] != wanted:
        raise ValueError(
            f"{path}: the factors hold {sorted(factors[0])} and {sorted(factors[1])}; a layer with "
            f"use_bias={layer.use_bias} needs {sorted(wanted[0])} and {sorted(wanted[1])}."
        )
    return scheme
