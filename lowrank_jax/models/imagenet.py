"""The networks that compression papers measure on ImageNet: VGG-16, ResNet-18, ResNet-50."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from lowrank_jax.models.resnet import conv_norm

VGG_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # (features, convolutions)
WIDTHS = (64, 128, 256, 512)  # features of the 3x3 convolutions of a ResNet, by stage


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


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, the stride in the first of them."""

    features: int
    strides: int = 1
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (batch, h, w, channels) to (batch, h / strides, w / strides, features)."""
        y = nn.relu(conv_norm(x, self.features, self.strides, train, self.dtype))
        y = conv_norm(y, self.features, 1, train, self.dtype)
        if x.shape != y.shape:
            x = conv_norm(x, self.features, self.strides, train, self.dtype, size=1)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut, the stride in the 3x3 one."""

    features: int
    strides: int = 1
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (batch, h, w, channels) to (batch, h / strides, w / strides, 4 features)."""
        wide = 4 * self.features
        y = nn.relu(conv_norm(x, self.features, 1, train, self.dtype, size=1))
        y = nn.relu(conv_norm(y, self.features, self.strides, train, self.dtype))
        y = conv_norm(y, wide, 1, train, self.dtype, size=1)
        if x.shape != y.shape:
            x = conv_norm(x, wide, self.strides, train, self.dtype, size=1)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """The residual networks of He et al., 2015 (arXiv 1512.03385) for ImageNet: what they share.

    Attributes:
        num_classes: of the last dense layer.
        dtype: type of the computation.
        block: of which the stages are made.
        counts: blocks of each stage.
    """

    num_classes: int = 1000
    dtype: Dtype | None = None
    block: ClassVar[type[BasicBlock] | type[Bottleneck]]
    counts: ClassVar[tuple[int, int, int, int]]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (batch, height, width, 3) to logits (batch, num_classes)."""
        x = nn.relu(conv_norm(x, 64, 2, train, self.dtype, size=7))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, (features, count) in enumerate(zip(WIDTHS, self.counts, strict=True)):
            for block in range(count):
                strides = 2 if stage > 0 and block == 0 else 1
                x = self.block(features, strides, self.dtype)(x, train)
        x = x.mean((-3, -2))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)


class ResNet18(ResNet):
    """ResNet-18, with the layers of torchvision's.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> images = jnp.zeros((1, 224, 224, 3))
        >>> variables = jax.eval_shape(ResNet18().init, jax.random.key(0), images)
        >>> variables["params"]["BasicBlock_7"]["Conv_1"]["kernel"].shape
        (3, 3, 512, 512)
    """

    block = BasicBlock
    counts = (2, 2, 2, 2)


class ResNet50(ResNet):
    """ResNet-50. The stride of a block is in its 3x3 convolution.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> images = jnp.zeros((1, 224, 224, 3))
        >>> variables = jax.eval_shape(ResNet50().init, jax.random.key(0), images)
        >>> variables["params"]["Bottleneck_0"]["Conv_1"]["kernel"].shape
        (3, 3, 64, 64)
    """

    block = Bottleneck
    counts = (3, 4, 6, 3)
