"""GoogLeNet, the network of inception modules."""

import jax
import jax.numpy as jnp
from flax import linen as nn

# Features of each module: 1x1; 1x1 before 3x3, 3x3; 1x1 before 5x5, 5x5; 1x1 after a pooling.
INCEPTIONS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
POOLED = ("3b", "4e")  # modules before a pooling


class Inception(nn.Module):
    """Four branches side by side, whose outputs are joined.

    Attributes:
        widths: features of the six convolutions, as in `INCEPTIONS`.
    """

    widths: tuple[int, int, int, int, int, int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, h, w, channels) to (batch, h, w, sum of the branches)."""
        one, before3, three, before5, five, after = self.widths
        largest = nn.max_pool(x, (3, 3), padding="SAME")
        branches = (
            conv(x, one, 1, "1x1"),
            conv(conv(x, before3, 1, "3x3_reduce"), three, 3, "3x3"),
            conv(conv(x, before5, 1, "5x5_reduce"), five, 5, "5x5"),
            conv(largest, after, 1, "pool_proj"),
        )
        return jnp.concatenate(branches, axis=-1)


class GoogLeNet(nn.Module):
    """GoogLeNet of Szegedy et al., 2014 (arXiv 1409.4842, table 1).

    The class leaves out the auxiliary classifiers, which serve the training alone, and the local
    response normalisations, which have no parameters. The layers have Caffe's names.

    Attributes:
        num_classes: of the last dense layer.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> images = jnp.zeros((1, 224, 224, 3))
        >>> variables = jax.eval_shape(GoogLeNet().init, jax.random.key(0), images)
        >>> variables["params"]["inception_3a"]["5x5"]["kernel"].shape
        (5, 5, 16, 32)
    """

    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (batch, height, width, 3) to logits (batch, num_classes)."""
        x = pool(conv(x, 64, 7, "conv1", stride=2))
        x = conv(x, 64, 1, "conv2_reduce")
        x = pool(conv(x, 192, 3, "conv2"))
        for name, widths in INCEPTIONS.items():
            x = Inception(widths, name=f"inception_{name}")(x)
            x = pool(x) if name in POOLED else x
        return nn.Dense(self.num_classes, name="classifier")(x.mean((1, 2)))


def conv(x: jax.Array, features: int, size: int, name: str, stride: int = 1) -> jax.Array:
    """A convolution and its ReLU; called inside a compact module."""
    layer = nn.Conv(features, (size, size), stride, padding=size // 2, name=name)
    return nn.relu(layer(x))


def pool(x: jax.Array) -> jax.Array:
    """The maximum of 3x3 windows with stride 2; like Caffe, a window may end beyond the image."""
    return nn.max_pool(x, (3, 3), (2, 2), ((0, 1), (0, 1)))
