"""The programs that compute one layer, dense or separable: which is fastest depends on its shape
and on the device.

Besides the convolution itself, a product with shifted copies of the inputs side by side gives the
same sums; of a factor, which has taps along one axis, so does one product to the channels of all
taps, of which shifted copies are added (few channels out). On a CPU, outputs in float32 may share
their multiplications (`lowrank_jax.winograd`). A whole separable layer may also run with its rank
padded by zeros to a multiple that the hardware prefers, with its dense kernel rebuilt, or, on a
GPU, as one kernel that keeps what is between the two convolutions on the chip
(`lowrank_jax.fused`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.factorization.layout import AXES
from lowrank_jax.factorization.separable import Separable, merge
from lowrank_jax.modules.linen import split_options
from lowrank_jax.program.kernel_use import KernelUse
from lowrank_jax.tuning.slices import padding_as_numbers
from lowrank_jax.tuning.steps import STEPS

Choose = Callable[
    ["Layer", Separable | None], str
]  # the program of a layer; None for the scheme if it is dense
PLAIN = "convolve+convolve"
MULTIPLE = 8  # of the rank, in the program "padded"
MERGED = {
    "merged" if step == "convolve" else f"merged {step}": step for step in STEPS if step != "shift"
}


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
    def of(cls, use: KernelUse) -> "Layer":
        """The layer of a traced program; of a stack of kernels, one slice."""
        if use.kind == "product" or not use.axes:
            raise ValueError(
                f"{use.path or '(computed)'}: no convolution of a known layout; leave it out."
            )
        sizes = dict(zip(use.axes, use.kernel_shape[-len(use.axes) :], strict=True))
        size = tuple(sizes[letter] for letter in use.axes if letter not in "IO")
        options = (use.strides, use.padding, use.dilation, use.input_dilation)
        return cls(use.inputs, sizes["O"], size, *options, groups=use.groups, dtype=use.dtype)

    @property
    def axes(self) -> str:
        """Layout of the kernels."""
        return AXES[len(self.size)]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Shape of the dense kernel."""
        return (*self.size, self.inputs[-1] // self.groups, self.features)

    def convolve(
        self, inputs: jax.Array, kernel: jax.Array, step: Callable | None = None, **options: Any
    ) -> jax.Array:
        """Runs a kernel with some of the options changed."""
        own: dict[str, Any] = {
            "strides": self.strides,
            "padding": self.padding,
            "kernel_dilation": self.dilation,
        }
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

    def run(
        self, program: str, first: str, inputs: jax.Array, one: jax.Array, two: jax.Array
    ) -> jax.Array:
        """Runs the two factors by one of `programs`.

        Args:
            program: its name.
            first: which axis the first factor has.
            inputs: array of the shape ``inputs``.
            one, two: the factors, as `Separable` lays them out.
        """
        if program in MERGED:
            return self.convolve(inputs, merge(one, two, self.axes), dense_step(MERGED[program]))
        if program == "fused":
            return fuse(inputs, one, two, None, self.strides, self.padding, first)
        one, two = padded(one, two) if program == "padded" else (one, two)
        for half, kernel, step in zip(self.halves(first), (one, two), steps(program), strict=True):
            inputs = half(inputs, kernel, step)
        return inputs

    def halves(self, first: str) -> tuple[Callable, Callable]:
        """The two convolutions, each a function of inputs, kernel and, if not a plain convolution,
        the step."""
        whole = dict(strides=self.strides, padding=self.padding, kernel_dilation=self.dilation)
        pair = split_options(self.size, first, whole | {"input_dilation": self.input_dilation})
        own = [
            {name: value for name, value in options.items() if name != "kernel_size"}
            for options in pair
        ]
        return functools.partial(self.convolve, **own[0]), functools.partial(
            self.convolve, **own[1]
        )


def programs(layer: Layer, rank: int | None) -> list[str]:
    """Names of the programs that can run a layer at a rank, or dense; the first is always possible.

    Example:
        >>> layer = Layer((1, 8, 8, 4), 16, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))
        >>> programs(layer, 3)[:3], len(programs(layer, 8))
        (['convolve+convolve', 'convolve+shift', 'convolve+gather'], 19)
        >>> programs(layer, None)
        ['convolve', 'gather', 'winograd']
    """
    cut = layer.groups == 1 and len(layer.size) == 2 and set(layer.input_dilation) == {1}
    if rank is None:
        return ["convolve", *(["gather", "winograd"] if cut else [])]
    if not cut:
        return [PLAIN, "merged"]
    pairs = [f"{one}+{two}" for one in STEPS for two in STEPS]
    fits = jax.default_backend() == "gpu" and set(layer.dilation) == {1}
    return [*pairs, *(["padded"] if rank % MULTIPLE else []), *(["fused"] if fits else []), *MERGED]


def fuse(
    inputs: jax.Array,
    one: jax.Array,
    two: jax.Array,
    bias: Any,
    strides: Any,
    padding: Any,
    first: str,
) -> Any:
    """The layer as one kernel; its module, which needs a backend of Pallas, is imported where it is
    used."""
    from lowrank_jax.tuning.experimental.fused import separable_conv

    return separable_conv(
        inputs, one, two, bias, strides=strides, padding=padding, first_axis=first
    )


def steps(program: str) -> tuple[Callable, Callable]:
    """The functions of the two factors, each with the arguments of
    ``jax.lax.conv_general_dilated``.

    Raises:
        ValueError: the name is unknown, or that of a program with one step.
    """
    names = ["convolve"] * 2 if program == "padded" else program.split("+")
    if len(names) != 2 or not set(names) <= set(STEPS):
        known = f"two of {', '.join(STEPS)} joined by '+', 'padded', 'fused', {', '.join(map(repr, MERGED))}"
        raise ValueError(f"The program {program!r} is not known; give {known}.")
    return STEPS[names[0]], STEPS[names[1]]


def dense_step(program: str) -> Callable:
    """The function that runs a dense layer, with the arguments of
    ``jax.lax.conv_general_dilated``."""
    if program not in STEPS:
        raise ValueError(
            f"The program {program!r} is not known for a dense layer; give one of {', '.join(STEPS)}."
        )
    return STEPS[program]


def chosen(choose: Choose) -> Callable:
    """A convolution that runs by the program chosen for its layer when its inputs are known.

    Takes the arguments of ``jax.lax.conv_general_dilated``, channels last, so that a Flax layer can
    have it as its own function.
    """

    def convolve(
        inputs: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any
    ) -> jax.Array:
        size, ones = kernel.shape[:-2], (1,) * (kernel.ndim - 2)
        dilation, spread = (
            tuple(options.get(name) or ones) for name in ("rhs_dilation", "lhs_dilation")
        )
        pads = padding_as_numbers(padding, inputs.shape[1:-1], size, strides, dilation, spread)
        groups, dtype = options.get("feature_group_count", 1), jnp.result_type(inputs, kernel).name
        layer = Layer(
            inputs.shape,
            kernel.shape[-1],
            size,
            tuple(strides),
            pads,
            dilation,
            spread,
            groups,
            dtype,
        )
        return dense_step(choose(layer, None))(inputs, kernel, strides, padding, **options)

    return convolve


def padded(one: jax.Array, two: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same factors of one group, with zeros up to a rank that is a multiple of `MULTIPLE`."""
    extra = -two.shape[-2] % MULTIPLE
    still = [(0, 0)] * (one.ndim - 2)
    return jnp.pad(one, [*still, (0, 0), (0, extra)]), jnp.pad(two, [*still, (0, extra), (0, 0)])


def factors(layer: Layer, rank: int, first: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two factors of a layer."""
    return Separable(rank, layer.groups, layer.axes, first).shapes(layer.kernel)
