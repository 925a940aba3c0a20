"""The programs that compute one separable layer: which is fastest depends on its shape and on the device.

A factor has taps along one axis. Besides the convolution itself, two programs give the same sums: one product to the
channels of all taps, of which shifted copies are added (few channels out), and a product with shifted copies of the
inputs side by side (few channels in). A whole layer may also run with its rank padded by zeros to a multiple that the
hardware prefers, with its dense kernel rebuilt, or, on a GPU, as one kernel that keeps what is between the two
convolutions on the chip (`lowrank_jax.fused`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.matricize import AXES
from lowrank_jax.schemes import Separable, merge
from lowrank_jax.separable import split_options
from lowrank_jax.uses import KernelUse

PLAIN = "convolve+convolve"
MULTIPLE = 8  # of the rank, in the program "padded"


@dataclasses.dataclass(frozen=True)
class Layer:
    """One dense convolution as numbers, so that what was measured of it can be found again.

    Attributes:
        inputs: (batch, *spatial, channels).
        features: output channels.
        size, strides, dilation, input_dilation: one entry for each spatial axis.
        padding: (before, after) for each spatial axis.
        groups: number of feature groups.
        dtype: name of the type of the computation.
    """

    inputs: tuple[int, ...]
    features: int
    size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    input_dilation: tuple[int, ...]
    groups: int = 1
    dtype: str = "float32"

    @classmethod
    def of(cls, use: KernelUse, dtype: Any = "float32") -> "Layer":
        """The layer of a traced program; of a stack of kernels, one slice."""
        if use.kind == "product" or not use.axes:
            raise ValueError(f"{use.path or '(computed)'}: no convolution of a known layout; leave it out.")
        sizes = dict(zip(use.axes, use.kernel_shape[-len(use.axes) :], strict=True))
        size = tuple(sizes[letter] for letter in use.axes if letter not in "IO")
        options = (use.strides, use.padding, use.dilation, use.input_dilation)
        return cls(use.inputs, sizes["O"], size, *options, groups=use.groups, dtype=jnp.dtype(dtype).name)

    @property
    def axes(self) -> str:
        """Layout of the kernels."""
        return AXES[len(self.size)]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Shape of the dense kernel."""
        return (*self.size, self.inputs[-1] // self.groups, self.features)

    def convolve(self, inputs: jax.Array, kernel: jax.Array, step: Callable | None = None, **options: Any) -> jax.Array:
        """Runs a kernel with some of the options changed."""
        own: dict[str, Any] = {"strides": self.strides, "padding": self.padding, "kernel_dilation": self.dilation}
        own |= {"input_dilation": self.input_dilation} | options
        spatial = self.axes[:-2]
        return (step or jax.lax.conv_general_dilated)(
            inputs,
            kernel,
            own["strides"],
            own["padding"],
            lhs_dilation=own["input_dilation"],
            rhs_dilation=own["kernel_dilation"],
            dimension_numbers=(f"N{spatial}C", self.axes, f"N{spatial}C"),
            feature_group_count=self.groups,
        )

    def run(self, program: str, first: str, inputs: jax.Array, one: jax.Array, two: jax.Array) -> jax.Array:
        """Runs the two factors by one of `programs`.

        Args:
            program: its name.
            first: which axis the first factor has.
            inputs: array of the shape ``inputs``.
            one, two: the factors, as `Separable` lays them out.
        """
        if program == "merged":
            return self.convolve(inputs, merge(one, two, self.axes))
        if program == "fused":
            return fuse(inputs, one, two, None, self.strides, self.padding, first)
        one, two = padded(one, two) if program == "padded" else (one, two)
        for half, kernel, step in zip(self.halves(first), (one, two), steps(program), strict=True):
            inputs = half(inputs, kernel, step)
        return inputs

    def halves(self, first: str) -> tuple[Callable, Callable]:
        """The two convolutions, each a function of inputs, kernel and, if not a plain convolution, the step."""
        whole = dict(strides=self.strides, padding=self.padding, kernel_dilation=self.dilation)
        pair = split_options(self.size, first, whole | {"input_dilation": self.input_dilation})
        own = [{name: value for name, value in options.items() if name != "kernel_size"} for options in pair]
        return functools.partial(self.convolve, **own[0]), functools.partial(self.convolve, **own[1])


def programs(layer: Layer, rank: int) -> list[str]:
    """Names of the programs that can run a layer at a rank; the first is always possible.

    Example:
        >>> layer = Layer((1, 8, 8, 4), 16, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))
        >>> programs(layer, 3)[:3], len(programs(layer, 8))
        (['convolve+convolve', 'convolve+shift', 'convolve+gather'], 10)
    """
    if layer.groups > 1 or len(layer.size) != 2 or set(layer.input_dilation) != {1}:
        return [PLAIN, "merged"]
    pairs = [f"{one}+{two}" for one in STEPS for two in STEPS]
    fits = jax.default_backend() == "gpu" and set(layer.dilation) == {1}
    return [*pairs, *(["padded"] if rank % MULTIPLE else []), *(["fused"] if fits else []), "merged"]


def fuse(inputs: jax.Array, one: jax.Array, two: jax.Array, bias: Any, strides: Any, padding: Any, first: str) -> Any:
    """The layer as one kernel; its module, which needs a backend of Pallas, is imported where it is used."""
    from lowrank_jax.fused import separable_conv

    return separable_conv(inputs, one, two, bias, strides=strides, padding=padding, first_axis=first)


def steps(program: str) -> tuple[Callable, Callable]:
    """The functions of the two factors, each with the arguments of ``jax.lax.conv_general_dilated``.

    Raises:
        ValueError: the name is unknown, or that of a program with one step.
    """
    names = ["convolve"] * 2 if program == "padded" else program.split("+")
    if len(names) != 2 or not set(names) <= set(STEPS):
        known = f"two of {', '.join(STEPS)} joined by '+', 'padded', 'fused' or 'merged'"
        raise ValueError(f"The program {program!r} is not known; give {known}.")
    return STEPS[names[0]], STEPS[names[1]]


def padded(one: jax.Array, two: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same factors of one group, with zeros up to a rank that is a multiple of `MULTIPLE`."""
    extra = -two.shape[-2] % MULTIPLE
    still = [(0, 0)] * (one.ndim - 2)
    return jnp.pad(one, [*still, (0, 0), (0, extra)]), jnp.pad(two, [*still, (0, extra), (0, 0)])


def shift(inputs: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any) -> jax.Array:
    """A convolution along one axis as one product to the channels of all taps, then a sum of shifted slices.

    Takes the arguments of ``jax.lax.conv_general_dilated``, channels last, and is that function where the kernel has
    taps along more than one axis, groups or dilated inputs. Sums in float32 or wider.
    """
    cut = _cut(inputs, kernel, strides, padding, options)
    if cut is None:
        return jax.lax.conv_general_dilated(inputs, kernel, strides, padding, **options)
    taps, channels, features = kernel.shape[cut.axis - 1], *kernel.shape[-2:]
    flat = kernel.reshape(taps, channels, features).transpose(1, 0, 2).reshape(channels, -1)
    spread = cut.pad(_product(inputs, flat, options))
    parts = [cut.tap(spread, i)[..., i * features : (i + 1) * features] for i in range(taps)]
    return sum(parts[1:], parts[0]).astype(jnp.result_type(inputs, kernel))


def gather(inputs: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any) -> jax.Array:
    """A convolution along one axis as one product with shifted copies of the inputs side by side; else as `shift`."""
    cut = _cut(inputs, kernel, strides, padding, options)
    if cut is None:
        return jax.lax.conv_general_dilated(inputs, kernel, strides, padding, **options)
    spread, taps = cut.pad(inputs), kernel.shape[cut.axis - 1]
    patches = jnp.concatenate([cut.tap(spread, i) for i in range(taps)], -1)
    flat = kernel.reshape(-1, kernel.shape[-1])
    return _product(patches, flat, options).astype(jnp.result_type(inputs, kernel))


STEPS: dict[str, Callable] = {"convolve": jax.lax.conv_general_dilated, "shift": shift, "gather": gather}


@dataclasses.dataclass(frozen=True)
class _Cut:
    """Slices of an array along one of its axes, one for each tap."""

    axis: int
    before: int
    after: int
    dilation: int
    stride: int
    outputs: int

    def pad(self, x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(self.before, self.after) if axis == self.axis else (0, 0) for axis in range(x.ndim)])

    def tap(self, x: jax.Array, index: int) -> jax.Array:
        start = index * self.dilation
        stop = start + (self.outputs - 1) * self.stride + 1
        return jax.lax.slice_in_dim(x, start, stop, self.stride, self.axis)


def _cut(inputs: jax.Array, kernel: jax.Array, strides: Any, padding: Any, options: dict[str, Any]) -> _Cut | None:
    """How to cut the inputs; None where the kernel is no plain one along one of two axes."""
    size, dilation = kernel.shape[:-2], tuple(options.get("rhs_dilation") or (1,) * (kernel.ndim - 2))
    long = [axis for axis, taps in enumerate(size) if taps > 1]
    plain = options.get("feature_group_count", 1) == 1 and set(options.get("lhs_dilation") or (1,)) == {1}
    if len(size) != 2 or len(long) > 1 or not plain:
        return None
    axis = long[0] if long else 0
    reach = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
    pads = jax.lax.padtype_to_pads(inputs.shape[1:-1], reach, strides, padding) if isinstance(padding, str) else padding
    if strides[1 - axis] != 1 or tuple(pads[1 - axis]) != (0, 0) or min(pads[axis]) < 0:
        return None
    outputs = (inputs.shape[1 + axis] + sum(pads[axis]) - reach[axis]) // strides[axis] + 1
    return _Cut(1 + axis, pads[axis][0], pads[axis][1], dilation[axis], strides[axis], outputs) if outputs > 0 else None


def _product(x: jax.Array, matrix: jax.Array, options: dict[str, Any]) -> jax.Array:
    wide = jnp.promote_types(jnp.result_type(x, matrix), jnp.float32)
    return jnp.matmul(x, matrix, precision=options.get("precision"), preferred_element_type=wide)


def factors(layer: Layer, rank: int, first: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two factors of a layer."""
    return Separable(rank, layer.groups, layer.axes, first).shapes(layer.kernel)
