"""A Flax Linen convolution in two steps, vertical and horizontal."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.linear import PromoteDtypeFn
from flax.typing import Dtype, Initializer, PaddingLike, PrecisionLike

from lowrank_jax.factorization.axes import AXES
from lowrank_jax.factorization.factors import factor_keys
from lowrank_jax.factorization.separable import Separable
from lowrank_jax.program.transform import lowrank

# Fields that nn.Conv has not, or not so.
OWN = ("rank", "kernel_init", "first_init", "first", "parent", "name")


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
            param_dtype, precision, bias_init, promote_dtype: as in `nn.Conv`.
        kernel_init: initialiser of the second factor, such as `nn.initializers.he_normal()` before
            a ReLU. With the default ``first_init`` the outputs have the variance that an `nn.Conv`
            with this initialiser gives them.
        first_init: initialiser of the first factor; the default keeps the variance, because no
            nonlinearity follows the first convolution.
        first: "vertical", or "horizontal" where the horizontal convolution comes first.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = SeparableConv(16, (3, 3), rank=4, strides=2)
        >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
        >>> y.shape, variables["params"]["kernel"]["vertical"].shape
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
    first_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    promote_dtype: PromoteDtypeFn = nn.dtypes.promote_dtype
    first: str = "vertical"

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps (*batch, height, width, channels) to (*batch, height', width', features)."""
        size = check_size(self.kernel_size)
        scheme = Separable(self.rank, self.feature_group_count, AXES[len(size)], self.first)
        shape = (*size, inputs.shape[-1] // self.feature_group_count, self.features)
        scheme.checked(shape, self.name or "SeparableConv")
        parameters: dict[str, Any] = {"kernel": self._kernel(scheme, shape)}
        if self.use_bias:
            parameters["bias"] = self.param(
                "bias", self.bias_init, (self.features,), self.param_dtype
            )
        return lowrank(self._dense().apply)({"params": parameters}, inputs)

    def _kernel(self, scheme: Separable, shape: tuple[int, ...]) -> Any:
        """The factors; the dense kernel within `lowrank`, which reads the program with that."""
        known: Any = self.get_variable("params", "kernel")
        if getattr(known, "shape", None) == shape:
            return known
        return self.param("kernel", self._factors, scheme, shape)

    def _factors(self, key: jax.Array, scheme: Separable, shape: tuple[int, ...]) -> dict:
        names = factor_keys(self.first, scheme.axes, len(shape))
        inits, keys = (self.first_init, self.kernel_init), jax.random.split(key)
        parts = zip(names, inits, keys, scheme.shapes(shape), strict=True)
        return {name: init(own, part, self.param_dtype) for name, init, own, part in parts}

    def _dense(self) -> nn.Conv:
        """The dense layer of these arguments, whose program runs with the factors."""
        names = [name for name in self.__dataclass_fields__ if name not in OWN]
        return nn.Conv(**{name: getattr(self, name) for name in names}, parent=None)


def check_size(kernel_size: Any) -> tuple[int, ...]:
    """The kernel size as a tuple, or an error if it is no sequence of ints.

    Raises:
        ValueError: it is no sequence of one to three ints.
    """
    sizes = tuple(kernel_size) if isinstance(kernel_size, Sequence) else ()
    if len(sizes) in AXES and all(isinstance(size, Integral) for size in sizes):
        return sizes
    raise ValueError(
        f"kernel_size={kernel_size!r} is not allowed; give one to three ints, such as (3, 3)."
    )
