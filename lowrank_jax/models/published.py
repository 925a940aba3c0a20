"""The networks of Tai et al., 2016 (arXiv 1511.06067) and two more, with the figures published."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from lowrank_jax.models.alexnet import AlexNet, CaffeNet
from lowrank_jax.models.googlenet import GoogLeNet
from lowrank_jax.models.imagenet import VGG16, ResNet18
from lowrank_jax.models.nin import NIN, ImageNetNIN
from lowrank_jax.models.pretrained import Weights
from lowrank_jax.program.kernel_use import Trace
from lowrank_jax.program.tracing import trace
from lowrank_jax.tree.rules import Rule


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
    """A network with ranks, and with the figures of the authors.

    Attributes:
        build: makes the Flax model.
        size: side of its images, pixels.
        ranks: rules for `lowrank_jax.decompose`; an int is the rank of one group.
        note: whose ranks these are, where they are not the authors'.
        compression, speed_up: published factors of the weights and of the time; None where none was
            published.
        weights: name of its pretrained convolutions in `lowrank_jax.models.pretrained`, if any.
    """

    build: Callable[[], nn.Module]
    size: int
    ranks: Mapping[str, Rule]
    note: str = ""
    compression: float | None = None
    speed_up: float | None = None
    weights: Weights | None = None

    def trace(self) -> Trace:
        """The program for one image. No weights are made."""
        model = self.build()
        image = jax.ShapeDtypeStruct((1, self.size, self.size, 3), jnp.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), image)
        return trace(model.apply, variables, image)


def numbered(*ranks: int) -> dict[str, Rule]:
    """The ranks of Conv_0, Conv_1 and so on.

    Example:
        >>> numbered(10, 51)
        {'Conv_0': 10, 'Conv_1': 51}
    """
    return {f"Conv_{index}": rank for index, rank in enumerate(ranks)}


HALF = "The ranks are ours: each spatial layer has the largest with at most half of its parameters."
PUBLISHED = {
    "CaffeNet": Published(
        build=CaffeNet,
        size=227,
        ranks=numbered(8, 20, 60, 50, 100),  # three layers have two groups: 40, 100 and 200 in all
        compression=5.0,
        speed_up=1.82,
    ),
    "AlexNet": Published(
        build=AlexNet,
        size=224,
        ranks=numbered(8, 40, 60, 100, 200),
        note="The ranks are those of CaffeNet, whose layers are wider and have groups.",
        weights="alexnet",
    ),
    "VGG-16": Published(
        build=lambda: VGG16(num_classes=None),
        size=224,
        ranks=numbered(5, 24, 48, 48, 64, 128, 160, 192, 192, 256, 320, 320, 320),
        compression=2.75,
        speed_up=2.05,
        weights="vgg16",
    ),
    "GoogLeNet": Published(
        build=GoogLeNet,
        size=224,
        ranks={r"conv1|conv2|inception_.*/[35]x[35]": 1 / 2.84},
        note="The ranks are ours: each spatial layer has the largest that saves the published "
        "factor. Of all weights they cannot save it: the 1x1 layers, which stay, hold 38 %.",
        compression=2.84,
        speed_up=1.2,
    ),
    "ImageNet NIN": Published(build=ImageNetNIN, size=224, ranks={r"conv\d": 0.5}, note=HALF),
    "ResNet-18": Published(
        build=ResNet18,
        size=224,
        ranks={r"Conv_0|BasicBlock_\d/Conv_[01]": 0.5},
        note=HALF,
    ),
    "NIN": Published(build=NIN, size=32, ranks={"Conv_0": 10, "Conv_2": 51}),
    "CIFAR CNN": Published(build=CifarCNN, size=32, ranks=numbered(10, 51, 51)),
}
