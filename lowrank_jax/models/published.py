"""The networks of Tai et al., 2016 (arXiv 1511.06067), with the figures of the authors."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
from flax import linen as nn

from lowrank_jax.models.imagenet import VGG16
from lowrank_jax.models.nin import NIN

# Of CaffeNet: (features, size of the kernel, stride, groups, whether a pooling follows).
CAFFENET = (
    (96, 11, 4, 1, True),
    (256, 5, 1, 2, True),
    (384, 3, 1, 1, False),
    (384, 3, 1, 2, False),
    (256, 3, 1, 2, True),
)


class CaffeNet(nn.Module):
    """The convolutions of AlexNet (Krizhevsky et al., 2012) as Caffe has them, in two groups.

    Without its local response normalisations, which have no parameters, and its dense layers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> images = jnp.zeros((1, 227, 227, 3))
        >>> jax.eval_shape(CaffeNet().init_with_output, jax.random.key(0), images)[0].shape
        (1, 6, 6, 256)
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (batch, 227, 227, 3) to features."""
        for features, size, stride, groups, pools in CAFFENET:
            pad = "VALID" if stride > 1 else "SAME"
            x = nn.relu(nn.Conv(features, (size, size), stride, pad, feature_group_count=groups)(x))
            x = nn.max_pool(x, (3, 3), (2, 2)) if pools else x
        return x


class CifarCNN(nn.Module):
    """Three 5x5 convolutions to 96, 128 and 256 channels, with poolings between them.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> images = jnp.zeros((1, 32, 32, 3))
        >>> jax.eval_shape(CifarCNN().init_with_output, jax.random.key(0), images)[0].shape
        (1, 10)
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (batch, 32, 32, 3) to logits (batch, 10)."""
        for features in (96, 128, 256):
            x = nn.relu(nn.Conv(features, (5, 5))(x))
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        return nn.Dense(10)(x.mean((1, 2)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A network with the figures of the authors.

    Attributes:
        build: makes the Flax model.
        size: side of its images, pixels.
        ranks: layer path to the rank; of a layer with groups the sum over them.
        compression, speed_up: published factors of the weights and of the time; None if none is.
    """

    build: Callable[[], nn.Module]
    size: int
    ranks: Mapping[str, int]
    compression: float | None = None
    speed_up: float | None = None


VGG_RANKS = (5, 24, 48, 48, 64, 128, 160, 192, 192, 256, 320, 320, 320)
PUBLISHED = {
    "CaffeNet": Published(
        build=CaffeNet,
        size=227,
        ranks={f"Conv_{i}": rank for i, rank in enumerate((8, 40, 60, 100, 200))},
        compression=5.0,
        speed_up=1.82,
    ),
    "VGG-16": Published(
        build=lambda: VGG16(num_classes=None),
        size=224,
        ranks={f"Conv_{i}": rank for i, rank in enumerate(VGG_RANKS)},
        compression=2.75,
        speed_up=2.05,
    ),
    "NIN": Published(build=NIN, size=32, ranks={"Conv_0": 10, "Conv_2": 51}),
    "CIFAR CNN": Published(
        build=CifarCNN, size=32, ranks={"Conv_0": 10, "Conv_1": 51, "Conv_2": 51}
    ),
}
