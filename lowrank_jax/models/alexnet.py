"""The convolutions of AlexNet, as Caffe has them in two groups and as torchvision in one."""

from collections.abc import Sequence

import jax
from flax import linen as nn

Layer = tuple[int, int, int, int, bool]
# (features, size of the kernel, stride, groups, whether a pooling follows) of each convolution.
CAFFENET: Sequence[Layer] = (
    (96, 11, 4, 1, True),
    (256, 5, 1, 2, True),
    (384, 3, 1, 1, False),
    (384, 3, 1, 2, False),
    (256, 3, 1, 2, True),
)
ALEXNET: Sequence[Layer] = (
    (64, 11, 4, 1, True),
    (192, 5, 1, 1, True),
    (384, 3, 1, 1, False),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, True),
)


class CaffeNet(nn.Module):
    """The convolutions of AlexNet (Krizhevsky et al., 2012) as Caffe has them, in two groups.

    The class leaves out the local response normalisations, which have no parameters, and the dense
    layers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> images = jnp.zeros((1, 227, 227, 3))
        >>> jax.eval_shape(CaffeNet().init_with_output, jax.random.key(0), images)[0].shape
        (1, 6, 6, 256)
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (batch, 227, 227, 3) to features."""
        return _features(x, CAFFENET, pad=0)


class AlexNet(nn.Module):
    """The convolutions of AlexNet in one group (Krizhevsky, 2014, arXiv 1404.5997).

    These are the widths of torchvision. Its dense layers are left out.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> images = jnp.zeros((1, 224, 224, 3))
        >>> jax.eval_shape(AlexNet().init_with_output, jax.random.key(0), images)[0].shape
        (1, 6, 6, 256)
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (batch, 224, 224, 3) to features."""
        return _features(x, ALEXNET, pad=2)


def _features(x: jax.Array, layers: Sequence[Layer], pad: int) -> jax.Array:
    """Runs the layers; `pad` is of the strided one. Called inside a compact module."""
    for features, size, stride, groups, pools in layers:
        padding = pad if stride > 1 else size // 2
        conv = nn.Conv(features, (size, size), stride, padding, feature_group_count=groups)
        x = nn.relu(conv(x))
        x = nn.max_pool(x, (3, 3), (2, 2)) if pools else x
    return x
