"""ConvNeXt-T, ViT-B and EfficientNet-Lite0 in Flax Linen, for benchmarks.

The layers and widths are those of Liu et al. (2022, arXiv 2201.03545), of Dosovitskiy et al. (2020,
arXiv 2010.11929) and of Tan and Le (2019, arXiv 1905.11946) without squeeze and excitation, 28.6,
86.6 and 4.7 million parameters. Nothing here is pretrained.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

LITE = (  # (blocks, taps, stride, expansion, features) of EfficientNet-Lite0
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STAGES = ((96, 3), (192, 3), (384, 9), (768, 3))  # (features, blocks) of ConvNeXt-T


class ConvNeXt(nn.Module):
    """The tiny ConvNeXt: stages of depthwise convolutions and pairs of dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for stage, (features, blocks) in enumerate(STAGES):
            x = _halved(x, features, stage)
            for _ in range(blocks):
                x = x + _mixed(x, features)
        return nn.Dense(1000)(nn.LayerNorm()(x.mean((1, 2))))


def _halved(x: jax.Array, features: int, stage: int) -> jax.Array:
    if stage == 0:
        return nn.LayerNorm()(nn.Conv(features, (4, 4), 4, padding="VALID")(x))
    return nn.Conv(features, (2, 2), 2, padding="VALID")(nn.LayerNorm()(x))


def _mixed(x: jax.Array, features: int) -> jax.Array:
    x = nn.LayerNorm()(nn.Conv(features, (7, 7), feature_group_count=features)(x))
    return nn.Dense(features)(nn.gelu(nn.Dense(4 * features)(x)))


class ViT(nn.Module):
    """The base vision transformer, of patches of 16 pixels."""

    width: int = 768
    blocks: int = 12
    heads: int = 12

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (16, 16), 16, padding="VALID")(x).reshape(len(x), -1, self.width)
        places = self.param("places", nn.initializers.normal(0.02), (1, x.shape[1] + 1, self.width))
        token = self.param("token", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], 1) + places
        for _ in range(self.blocks):
            x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(1000)(nn.LayerNorm()(x)[:, 0])


class EfficientNetLite(nn.Module):
    """The smallest one: inverted residual blocks, as of a MobileNetV2."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu6(_normalised(x, 32, 3, 2))
        for blocks, taps, stride, expansion, features in LITE:
            for block in range(blocks):
                y = _inverted(x, taps, 1 if block else stride, expansion, features)
                x = x + y if block else y
        x = nn.relu6(_normalised(x, 1280))
        return nn.Dense(1000)(x.mean((1, 2)))


def _inverted(x: jax.Array, taps: int, stride: int, expansion: int, features: int) -> jax.Array:
    if expansion > 1:
        x = nn.relu6(_normalised(x, expansion * x.shape[-1]))
    x = nn.relu6(_normalised(x, x.shape[-1], taps, stride, groups=x.shape[-1]))
    return _normalised(x, features)


def _normalised(
    x: jax.Array, features: int, taps: int = 1, stride: int = 1, groups: int = 1
) -> jax.Array:
    sides = (taps, taps)
    x = nn.Conv(features, sides, stride, feature_group_count=groups, use_bias=False)(x)
    return nn.BatchNorm(use_running_average=True, epsilon=1e-3)(x)
