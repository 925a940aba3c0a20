"""A Flax Linen convolution in two steps, vertical and horizontal."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.linear import PromoteDtypeFn
from flax.typing import Dtype, Initializer, PaddingLike, PrecisionLike

from lowrank_jax.factorization.layout import AXES
from lowrank_jax.factorization.separable import FACTORS, Separable

PER_AXIS = {
    "strides": Integral,
    "input_dilation": Integral,
    "kernel_dilation": Integral,
    "padding": (Integral, Sequence),
}


class SeparableConv(nn.Module):
    """An `nn.Conv` whose kernel has rank at most ``rank``.

    A vertical (h x 1) convolution to ``rank`` channels per group, without bias, then a horizontal
    (1 x w) one with the bias (Tai et al., 2016, arXiv 1511.06067). Strides, padding and dilations
    are split over the axes, so that at full rank the layer computes what `nn.Conv` does. Its
    parameters are those that `decompose` makes of the parameters of the `nn.Conv` with the same
    arguments. Of one or three spatial axes the vertical convolution has the first and the
    horizontal one the others.

    Attributes:
        features: output channels n.
        kernel_size: (h, w), or one or three entries.
        rank: channels between the two convolutions, per group; 1 to min(h * c, w * n / groups).
        strides, padding, input_dilation, kernel_dilation, feature_group_count, use_bias, dtype,
        param_dtype,
            precision, bias_init, promote_dtype: as in `nn.Conv`.
        kernel_init: initialiser of both factors.
        first: "vertical", or "horizontal" where the horizontal convolution comes first and the
            vertical one has the bias.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = SeparableConv(16, (3, 3), rank=4, strides=2)
        >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
        >>> y.shape, variables["params"]["vertical"]["kernel"].shape
        ((1, 4, 4, 16), (3, 1, 3, 4))
    """

    features: int
    kernel_size: Sequence[int]
    rank: int
    strides: None | int | Sequence[int] = 1
    padding: PaddingLike = "SAME"
    input_dilation: None | int | Sequence[int] = 1
    kernel_dilation: None | int | Sequence[int] = 1
    feature_group_count: int = 1
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    promote_dtype: PromoteDtypeFn = nn.dtypes.promote_dtype
    first: str = "vertical"

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps (*batch, height, width, channels) to (*batch, height', width', features)."""
        size = check_size(self.kernel_size)
        scheme = Separable(self.rank, self.feature_group_count, AXES[len(size)], self.first)
        shape = (*size, inputs.shape[-1] // self.feature_group_count, self.features)
        rank = scheme.check(shape, self.name or "SeparableConv")
        options = {name: getattr(self, name) for name in PER_AXIS}
        first, second = split_options(size, self.first, options)
        names = FACTORS[self.first]
        between = self._conv(
            self.feature_group_count * rank, **first, name=names[0], use_bias=False
        )(inputs)
        return self._conv(self.features, **second, name=names[1], use_bias=self.use_bias)(between)

    def _conv(self, features: int, **options) -> nn.Conv:
        for name in (
            "feature_group_count",
            "dtype",
            "param_dtype",
            "precision",
            "kernel_init",
            "bias_init",
        ):
            options[name] = getattr(self, name)
        return nn.Conv(features, promote_dtype=self.promote_dtype, **options)


def check_size(kernel_size: Any) -> tuple[int, ...]:
    """The kernel size as a tuple, or an error if it is no sequence of ints."""
    sizes = tuple(kernel_size) if isinstance(kernel_size, Sequence) else ()
    if len(sizes) in AXES and all(isinstance(size, Integral) for size in sizes):
        return sizes
    raise ValueError(
        f"kernel_size={kernel_size!r} is not allowed; give one to three ints, such as (3, 3)."
    )


def split_options(
    size: tuple[int, ...], first: str, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits the options of a convolution over the spatial axes of its first and of its second
    factor.

    Args:
        size: kernel size.
        first: "vertical" or "horizontal".
        options: some of strides, padding, input_dilation, kernel_dilation, in the forms that
            `nn.Conv` takes.

    Returns:
        The same options and ``kernel_size`` for each factor; an axis that a factor leaves alone has
        size 1, stride 1, dilation 1 and no padding.
    """
    axes = range(len(size))
    vertical = [axis == 0 for axis in axes]
    masks = (vertical, [not v for v in vertical])
    masks = masks if first == "vertical" else masks[::-1]
    return tuple(_carry(mask, {"kernel_size": size} | options) for mask in masks)  # type: ignore[return-value]


def _carry(mask: list[bool], options: dict[str, Any]) -> dict[str, Any]:
    def spread(name: str, value: Any) -> Any:
        if name == "padding" and (isinstance(value, str) or callable(value)):
            return value
        entries = per_axis(name, value, len(mask))
        if name == "padding":
            pads = [
                (entry, entry) if isinstance(entry, Integral) else tuple(entry) for entry in entries
            ]
            return tuple(pad if own else (0, 0) for pad, own in zip(pads, mask, strict=True))
        return tuple(entry if own else 1 for entry, own in zip(entries, mask, strict=True))

    return {name: spread(name, value) for name, value in options.items()}


def per_axis(name: str, value: Any, count: int) -> tuple:
    """One entry for each spatial axis; None stands for 1, as in `nn.Conv`."""
    kind: Any = PER_AXIS.get(name, Integral)
    if isinstance(value, Integral) or (value is None and name != "padding"):
        return (1 if value is None else value,) * count
    if (
        isinstance(value, Sequence)
        and len(value) == count
        and all(isinstance(v, kind) for v in value)
    ):
        return tuple(value)
    raise ValueError(
        f"{name}={value!r} is not allowed; give one number, or one entry for each of {count} spatial axes."
    )
