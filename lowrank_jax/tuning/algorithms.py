"""The algorithms that compute one layer, dense or separable.

Which is fastest depends on the layer's shape and on the device. Besides the convolution itself
there are products of matrices. "im2col" multiplies shifted copies of the inputs side by side.
"kn2row" is for a factor, which has taps along one axis: it multiplies to the channels of all taps,
and adds their shifted slices. On a CPU, outputs in float32 may share their multiplications
("winograd"). A whole separable layer may also run with its rank padded by zeros to a multiple that
the hardware prefers ("padded"), with its dense kernel rebuilt ("merged"), or, on a GPU, as one
kernel that keeps the intermediate between the two convolutions on the chip ("fused").
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowrank_jax.factorization.axes import AXES, split_options
from lowrank_jax.factorization.forms import SCHEMES
from lowrank_jax.factorization.merging import merge
from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.program.kernel_use import KernelUse
from lowrank_jax.tuning.slices import Pads
from lowrank_jax.tuning.steps import STEPS

# The algorithm of a layer, by name. The scheme is None where the layer is dense.
Choose = Callable[["Layer", Scheme | None], str]
PLAIN, PLAIN_DENSE = "convolve+convolve", "convolve"
MULTIPLE = 8  # of the rank, in the algorithm "padded"
MERGED = {  # the rebuilt kernel, and the algorithm that it runs by
    "merged" if step == "convolve" else f"merged {step}": step for step in STEPS if step != "kn2row"
}
PAIRS = [f"{one}+{two}" for one in STEPS for two in STEPS]
NAMES = (*STEPS, *PAIRS, "padded", "fused", *MERGED)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One dense convolution as numbers, by which its measured times are found again.

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
    padding: Pads
    dilation: tuple[int, ...]
    input_dilation: tuple[int, ...]
    groups: int = 1
    dtype: str = "float32"

    @classmethod
    def of(cls, use: KernelUse) -> "Layer":
        """The layer of a traced program; of a stack of kernels, one slice.

        Raises:
            ValueError: it is no convolution.
        """
        if use.kind == "product" or not use.axes:
            raise ValueError(
                f"{use.path or '(computed)'}: no convolution of a known layout; leave it out."
            )
        sizes = use.sizes
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
        self,
        inputs: Float[Array, "n *space c"],
        kernel: Float[Array, "*taps i o"],
        step: str | Callable = PLAIN_DENSE,
        *,
        precision: Any = None,
        **changes: Any,
    ) -> Float[Array, "n *out o"]:
        """Runs one kernel.

        Args:
            inputs: array.
            kernel: array.
            step: name of one of `STEPS`, or a function with the arguments of
                ``jax.lax.conv_general_dilated``.
            precision: as in ``jax.lax.conv_general_dilated``.
            **changes: strides, padding, dilation or input_dilation in place of the layer's own.
        """
        own = dataclasses.replace(self, **changes)
        spatial = self.axes[:-2]
        return (step if callable(step) else dense_step(step))(
            inputs,
            kernel,
            own.strides,
            own.padding,
            lhs_dilation=own.input_dilation,
            rhs_dilation=own.dilation,
            dimension_numbers=(f"N{spatial}C", self.axes, f"N{spatial}C"),
            feature_group_count=self.groups,
            precision=precision,
        )

    def run(
        self,
        algorithm: str,
        first_axis: str,
        inputs: Float[Array, "n *space c"],
        first: Float[Array, "*taps i k"],
        second: Float[Array, "*other_taps k o"],
        precision: Any = None,
    ) -> Float[Array, "n *out o"]:
        """Runs the two factors by one of `algorithms_of`.

        Args:
            algorithm: its name.
            first_axis: name of the form of the factors, such as "vertical".
            inputs: array.
            first, second: the factors, as `Separable` lays them out.
            precision: as in ``jax.lax.conv_general_dilated``.

        Raises:
            ValueError: the algorithm is not known.
        """
        if algorithm in MERGED:
            kernel = merge(first, second, self.axes)
            return self.convolve(inputs, kernel, MERGED[algorithm], precision=precision)
        if algorithm == "fused":
            return self._fused(first_axis, inputs, first, second, precision)
        pair = padded(first, second) if algorithm == "padded" else (first, second)
        halves = self.halves(first_axis)
        for half, kernel, step in zip(halves, pair, steps(algorithm), strict=True):
            inputs = half(inputs, kernel, step, precision=precision)
        return inputs

    def _fused(
        self,
        first_axis: str,
        inputs: Float[Array, "n h w c"],
        first: Float[Array, "*taps c k"],
        second: Float[Array, "*other_taps k o"],
        precision: Any,
    ) -> Float[Array, "n h2 w2 o"]:
        from lowrank_jax.tuning.experimental.fused import (  # needs a backend of Pallas
            HIGHEST,
            separable_conv,
        )

        return separable_conv(
            inputs,
            first,
            second,
            strides=self.strides,
            padding=self.padding,
            first_axis=first_axis,
            precision=precision or HIGHEST,
        )

    def halves(self, first_axis: str) -> tuple[Callable, Callable]:
        """The convolutions of the two factors: functions of inputs, kernel and a step."""
        names = ("strides", "padding", "dilation", "input_dilation")
        options = {name: getattr(self, name) for name in names}
        one, two = split_options(self.size, first_axis, options)
        return functools.partial(self.convolve, **one), functools.partial(self.convolve, **two)


def plain(scheme: Scheme | None) -> str:
    """The algorithm of a layer for which nothing was measured."""
    return PLAIN_DENSE if scheme is None else PLAIN


def factors_by(algorithm: str) -> Choose:
    """The same algorithm for all factors; dense layers, as those of a teacher, run as ever.

    Example:
        >>> factors_by("kn2row+im2col")(None, None)
        'convolve'
    """
    return lambda _, scheme: algorithm if scheme else plain(None)


def algorithms_of(layer: Layer, rank: int | None) -> list[str]:
    """Names of the algorithms that can run a layer at a rank, or dense. The first is the plain one.

    Example:
        >>> layer = Layer((1, 8, 8, 4), 16, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))
        >>> algorithms_of(layer, 3)[:3], len(algorithms_of(layer, 8))
        (['convolve+convolve', 'convolve+kn2row', 'convolve+im2col'], 19)
        >>> algorithms_of(layer, None)
        ['convolve', 'im2col', 'winograd']
    """
    sliced = layer.groups == 1 and len(layer.size) == 2 and set(layer.input_dilation) == {1}
    if rank is None:
        return [PLAIN_DENSE, *(["im2col", "winograd"] if sliced else [])]
    if not sliced:
        return [PLAIN, "merged"]
    fits = jax.default_backend() == "gpu" and set(layer.dilation) == {1}
    return [*PAIRS, *["padded"] * bool(rank % MULTIPLE), *["fused"] * fits, *MERGED]


def steps(algorithm: str) -> tuple[Callable, Callable]:
    """The functions of the two factors, with the arguments of ``jax.lax.conv_general_dilated``.

    Raises:
        ValueError: the name is unknown, or names an algorithm with one step.
    """
    names = ["convolve"] * 2 if algorithm == "padded" else str(algorithm).split("+")
    if len(names) != 2 or not set(names) <= set(STEPS):
        raise ValueError(
            f"The algorithm {algorithm!r} is not known for a separable layer; give two of "
            f"{', '.join(STEPS)} joined by '+', 'padded', 'fused', {', '.join(map(repr, MERGED))}."
        )
    return STEPS[names[0]], STEPS[names[1]]


def dense_step(algorithm: str) -> Callable:
    """The function that runs a dense layer, with the arguments of
    ``jax.lax.conv_general_dilated``.

    Raises:
        ValueError: the name is unknown.
    """
    if algorithm not in STEPS:
        raise ValueError(
            f"The algorithm {algorithm!r} is not known for a dense layer; give one of "
            f"{', '.join(STEPS)}."
        )
    return STEPS[algorithm]


def padded(
    first: Float[Array, "*taps i k"], second: Float[Array, "*other_taps k o"]
) -> tuple[Float[Array, "*taps i k2"], Float[Array, "*other_taps k2 o"]]:
    """The factors of one group, with zeros up to a rank that is a multiple of `MULTIPLE`."""
    extra = -second.shape[-2] % MULTIPLE
    still = [(0, 0)] * (first.ndim - 2)
    columns, rows = [*still, (0, 0), (0, extra)], [*still, (0, extra), (0, 0)]
    return jnp.pad(first, columns), jnp.pad(second, rows)


def factor_shapes(
    layer: Layer, rank: int, first_axis: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two factors of a layer."""
    scheme = SCHEMES[first_axis](rank, layer.groups, layer.axes, first_axis)
    return scheme.shapes(layer.kernel)
