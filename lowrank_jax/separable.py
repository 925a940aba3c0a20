"""A Flax Linen convolution in two steps, vertical then horizontal."""

from collections.abc import Sequence
from numbers import Integral

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.linear import PromoteDtypeFn
from flax.typing import Dtype, Initializer, LaxPadding, PaddingLike, PrecisionLike

from lowrank_jax.schemes import check_rank

Pair = tuple[int, int]


class SeparableConv(nn.Module):
    """An `nn.Conv` of two spatial dimensions whose kernel has rank at most ``rank``.

    A vertical (h x 1) convolution to ``rank`` channels per group, without bias, then a horizontal (1 x w) one
    with the bias (Tai et al., 2016, arXiv 1511.06067). Strides, padding and dilations are split over the two
    axes, so that at full rank the layer computes what `nn.Conv` does. Its parameters are those that
    `decompose` makes of the parameters of the `nn.Conv` with the same arguments.

    Attributes:
        features: output channels n.
        kernel_size: (h, w).
        rank: channels between the two convolutions, per group; 1 to min(h * c, w * n / groups).
        strides, padding, input_dilation, kernel_dilation, feature_group_count, use_bias, dtype, param_dtype,
            precision, bias_init, promote_dtype: as in `nn.Conv`.
        kernel_init: initialiser of both factors.

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

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps (*batch, height, width, channels) to (*batch, height', width', features)."""
        h, w = self._pair("kernel_size", self.kernel_size)
        groups = self.feature_group_count
        shape = (h, w, inputs.shape[-1] // groups, self.features)
        rank = check_rank(self.rank, shape, groups, self.name or "SeparableConv")
        vertical = self._axis(0, groups * rank, (h, 1), name="vertical", use_bias=False)
        horizontal = self._axis(1, self.features, (1, w), name="horizontal", use_bias=self.use_bias)
        return horizontal(vertical(inputs))

    def _axis(self, axis: int, features: int, size: Pair, **options) -> nn.Conv:
        """The convolution along one axis, which leaves the other axis as it is."""
        for name in ("strides", "input_dilation", "kernel_dilation"):
            value = self._pair(name, getattr(self, name))[axis]
            options[name] = (value, 1) if axis == 0 else (1, value)
        for name in ("feature_group_count", "dtype", "param_dtype", "precision", "kernel_init", "bias_init"):
            options[name] = getattr(self, name)
        padding = self._padding(axis)
        return nn.Conv(features, size, padding=padding, promote_dtype=self.promote_dtype, **options)

    def _padding(self, axis: int) -> LaxPadding:
        if isinstance(self.padding, str):
            return self.padding
        low_high = self._pair("padding", self.padding, of=(Integral, Sequence))[axis]
        pads = (low_high, low_high) if isinstance(low_high, Integral) else tuple(low_high)
        return (pads, (0, 0)) if axis == 0 else ((0, 0), pads)

    def _pair(self, name: str, value, of=Integral) -> tuple:
        """One entry for each of the two axes; None stands for 1, as in `nn.Conv`."""
        if name != "kernel_size" and (value is None or isinstance(value, Integral)):
            return (1 if value is None else value,) * 2
        if isinstance(value, Sequence) and len(value) == 2 and all(isinstance(v, of) for v in value):
            return tuple(value)
        raise ValueError(f"{name}={value!r} is not allowed: SeparableConv has two spatial axes and needs two entries.")
