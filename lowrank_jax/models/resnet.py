"""The residual networks of He et al. for CIFAR-10."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around which the input is added.

    The shortcut has no weights (option A of the paper). Where the width grows, the input is
    subsampled and its new channels are zeros, as many before as after.

    Attributes:
        features: channels of the output.
        stride: of the first convolution.
        dtype: type of the computation.
    """

    features: int
    stride: int = 1
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (batch, h, w, channels) to (batch, h / stride, w / stride, features)."""
        extra = self.features - x.shape[-1]
        shortcut = x[:, :: self.stride, :: self.stride]
        shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))
        x = conv_norm(x, self.features, self.stride, train, self.dtype)
        x = conv_norm(nn.relu(x), self.features, 1, train, self.dtype)
        return nn.relu(x + shortcut)


class CifarResNet(nn.Module):
    """The CIFAR-10 network of He et al., 2015 (arXiv 1512.03385, section 4.2).

    It has a 3x3 convolution, three stages of (depth - 2) / 6 blocks with 16, 32 and 64 features, a
    global average and a dense layer. A convolution pads by one pixel on every side with stride 2
    too, where "SAME" would not, so that weights trained in PyTorch fit
    (`lowrank_jax.io.torch_names`).

    Attributes:
        depth: layers with weights, 6n + 2: 20, 32, 44, 56 or 110 in the paper.
        num_classes: features of the dense layer.
        dtype: type of the computation; parameters and normalisation statistics stay float32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> images = jnp.zeros((2, 32, 32, 3))
        >>> variables = jax.eval_shape(CifarResNet(depth=20).init, jax.random.key(0), images)
        >>> variables["params"]["BasicBlock_8"]["Conv_1"]["kernel"].shape
        (3, 3, 64, 64)
    """

    depth: int = 20
    num_classes: int = 10
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (batch, height, width, 3) to float32 logits (batch, num_classes)."""
        blocks, rest = divmod(self.depth - 2, 6)
        if blocks < 1 or rest:
            raise ValueError(
                f"depth={self.depth} is not 6n + 2 with n of at least 1; choose 8, 14, 20, 26, ..."
            )
        x = nn.relu(conv_norm(images, WIDTHS[0], 1, train, self.dtype))
        for stage, features in enumerate(WIDTHS):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = BasicBlock(features, stride, self.dtype)(x, train)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x.mean((1, 2))).astype(jnp.float32)


def conv_norm(
    x: jax.Array, features: int, stride: int, train: bool, dtype: Dtype | None, size: int = 3
) -> jax.Array:
    """A convolution without bias and its normalisation; called inside a compact module."""
    conv = nn.Conv(features, (size, size), stride, padding=size // 2, use_bias=False, dtype=dtype)
    return nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, dtype=dtype)(conv(x))
