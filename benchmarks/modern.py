"""ConvNeXt-T and ViT-B of 224 pixels in Flax Linen, for benchmarks of their size.

The layers and widths are those of Liu et al. (2022, arXiv 2201.03545) and of Dosovitskiy et al.
(2020, arXiv 2010.11929), 28.6 and 86.6 million parameters. Nothing is pretrained.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

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
