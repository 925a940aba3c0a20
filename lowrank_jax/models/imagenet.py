"""The two networks that compression papers measure on ImageNet."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

VGG_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # (features, convolutions)
RESNET_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # (features of the 3x3, blocks)


class VGG16(nn.Module):
    """VGG-16 of Simonyan and Zisserman, 2014 (arXiv 1409.1556).

    Its 13 convolutions are named Conv_0 to Conv_12.

    Attributes:
        num_classes: of the last dense layer; None leaves the three dense layers out and returns
            features.
        dtype: type of the computation.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = VGG16(num_classes=None)
        >>> images = jnp.zeros((1, 224, 224, 3))
        >>> jax.eval_shape(model.init_with_output, jax.random.key(0), images)[0].shape
        (1, 7, 7, 512)
    """

    num_classes: int | None = 1000
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (batch, height, width, 3) to logits (batch, num_classes)."""
        for features, count in VGG_STAGES:
            for _ in range(count):
                x = nn.relu(nn.Conv(features, (3, 3), dtype=self.dtype)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        if self.num_classes is None:
            return x
        x = x.reshape(*x.shape[:-3], -1)
        for features in (4096, 4096):
            x = nn.relu(nn.Dense(features, dtype=self.dtype)(x))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut, the stride in the 3x3 one."""

    features: int
    strides: int = 1
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def norm(x):
            return nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype)(x)

        def conv(features, size, strides=1):
            return nn.Conv(
                features, (size, size), strides, size // 2, use_bias=False, dtype=self.dtype
            )

        y = nn.relu(norm(conv(self.features, 1)(x)))
        y = nn.relu(norm(conv(self.features, 3, self.strides)(y)))
        y = norm(conv(4 * self.features, 1)(y))
        if x.shape != y.shape:
            x = norm(conv(4 * self.features, 1, self.strides)(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """ResNet-50 of He et al., 2015 (arXiv 1512.03385).

    The stride of a block is in its 3x3 convolution.

    Attributes:
        num_classes: of the last dense layer.
        dtype: type of the computation.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> images = jnp.zeros((1, 224, 224, 3))
        >>> variables = jax.eval_shape(ResNet50().init, jax.random.key(0), images)
        >>> variables["params"]["Bottleneck_0"]["Conv_1"]["kernel"].shape
        (3, 3, 64, 64)
    """

    num_classes: int = 1000
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (batch, height, width, 3) to logits (batch, num_classes)."""
        x = nn.Conv(64, (7, 7), 2, 3, use_bias=False, dtype=self.dtype)(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, (features, count) in enumerate(RESNET_STAGES):
            for block in range(count):
                strides = 2 if stage > 0 and block == 0 else 1
                x = Bottleneck(features, strides, self.dtype)(x, train)
        x = x.mean((-3, -2))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)
