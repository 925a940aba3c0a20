"""Networks in network: that of the original CIFAR-10 experiment, and that for ImageNet."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, PrecisionLike

from lowrank_jax.models.googlenet import pool
from lowrank_jax.modules.linen import SeparableConv

LAYERS = ((192, 5), (96, 1), (192, 5), (192, 1), (192, 3), (None, 1))  # (features, kernel size)
IMAGENET = ((96, 11), (256, 5), (384, 3), (1024, 3))  # of the layers that are no 1x1 ones


class NIN(nn.Module):
    """Network in network: 5x5, 1x1, pool, 5x5, 1x1, pool, 3x3, 1x1, global average.

    The kernel sizes and widths are those of the original experiment; the pools, 3x3 with stride 2,
    maximum then average, are those of Lin et al., 2013 (arXiv 1312.4400). The layers are named
    Conv_0 to Conv_5.

    Attributes:
        num_classes: features of the last convolution.
        ranks: layer name to rank; the named layers are `SeparableConv`, the others `nn.Conv`.
        batch_norm: whether to normalise after every convolution but the last; a low-rank layer
            normalises after the horizontal convolution alone, as Tai et al. do.
        dropout: share of the outputs of a pooling that training leaves out; Lin et al. have 0.5.
        dtype: type of the computation; parameters and normalisation statistics stay float32.
        precision: numerical precision of the convolutions, as in `jax.lax.Precision`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> images = jnp.zeros((2, 32, 32, 3))
        >>> model = NIN(ranks={"Conv_0": 10, "Conv_2": 20})
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
        >>> variables["params"]["Conv_2"]["kernel"]["horizontal"].shape
        (1, 5, 20, 192)
    """

    num_classes: int = 10
    ranks: Mapping[str, int] | None = None
    batch_norm: bool = True
    dropout: float = 0.0
    dtype: Dtype | None = None
    precision: PrecisionLike = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (batch, height, width, 3) to float32 logits (batch, num_classes)."""
        self._check_ranks()
        x = images
        for index, (features, size) in enumerate(LAYERS):
            x = self._conv(index, features or self.num_classes, size)(x)
            if features is None:
                break
            if self.batch_norm:
                norm = nn.BatchNorm(
                    not train, momentum=0.9, dtype=self.dtype, name=f"BatchNorm_{index}"
                )
                x = norm(x)
            x = nn.relu(x)
            if index in (1, 3):
                pool = nn.max_pool if index == 1 else nn.avg_pool
                x = pool(x, (3, 3), (2, 2), "SAME")
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return x.mean((1, 2)).astype(jnp.float32)

    def _conv(self, index: int, features: int, size: int) -> nn.Module:
        name = f"Conv_{index}"
        options: dict[str, Any] = dict(dtype=self.dtype, precision=self.precision, name=name)
        options["use_bias"] = index == len(LAYERS) - 1 or not self.batch_norm
        rank = (self.ranks or {}).get(name)
        if rank is None:
            return nn.Conv(features, (size, size), **options)
        return SeparableConv(features, (size, size), rank, **options)

    def _check_ranks(self) -> None:
        names = [f"Conv_{index}" for index in range(len(LAYERS))]
        if unknown := sorted(set(self.ranks or {}) - set(names)):
            raise ValueError(
                f"ranks names {unknown}, which the network does not have; name some of {names}."
            )


class ImageNetNIN(nn.Module):
    """The network of Lin et al., 2013 (arXiv 1312.4400) for ImageNet, as Caffe's model zoo has it.

    It has four convolutions, each followed by two 1x1 convolutions, and poolings between them. The
    layers are named conv1 to conv4 and cccp1 to cccp8, as there.

    Attributes:
        num_classes: features of the last convolution.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> images = jnp.zeros((1, 224, 224, 3))
        >>> jax.eval_shape(ImageNetNIN().init_with_output, jax.random.key(0), images)[0].shape
        (1, 1000)
    """

    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (batch, height, width, 3) to logits (batch, num_classes)."""
        last = len(IMAGENET)
        for stage, (features, size) in enumerate(IMAGENET, 1):
            strides, padding = (4, 0) if stage == 1 else (1, size // 2)
            conv = nn.Conv(features, (size, size), strides, padding, name=f"conv{stage}")
            x = nn.relu(conv(x))
            second = self.num_classes if stage == last else features
            x = nn.relu(nn.Conv(features, (1, 1), name=f"cccp{2 * stage - 1}")(x))
            x = nn.relu(nn.Conv(second, (1, 1), name=f"cccp{2 * stage}")(x))
            x = pool(x) if stage < last else x
        return x.mean((1, 2))
