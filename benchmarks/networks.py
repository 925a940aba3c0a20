"""The networks of forward.py, dense and low-rank, by seed 0: the same in every process."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from lowrank_jax import decompose, lowrank, trace
from lowrank_jax.experiments.cifar10 import PAPER_RANKS
from lowrank_jax.models import NIN, CifarResNet
from lowrank_jax.models.imagenet import VGG16, ResNet50
from lowrank_jax.models.published import PUBLISHED
from lowrank_jax.program.kernel_use import Trace


def half(uses: Trace) -> dict[str, Any]:
    """Every layer at the largest rank that leaves at most half of its macs."""
    found = {}
    for path in uses.safe_paths():
        use = uses.at(path)[0]
        if rank := use.macs // (2 * use.macs_at(use.scheme(1))):
            found[path] = use.scheme(rank)
    return found


@dataclasses.dataclass(frozen=True)
class Network:
    """A model and what of it is decomposed.

    Attributes:
        make: the model of a type of computation.
        rival: its forward pass in rival_torch.py.
        side: of its images.
        choose: the table of its trace.
    """

    make: Callable[..., nn.Module]
    rival: str
    side: int
    choose: Callable[[Trace], Any]


NETWORKS = {
    "nin": Network(NIN, "nin", 32, lambda uses: PAPER_RANKS),
    "nin, no batch norm": Network(
        lambda **o: NIN(batch_norm=False, **o), "nin", 32, lambda uses: PAPER_RANKS
    ),
    "resnet20": Network(CifarResNet, "resnet20", 32, half),
    "resnet50": Network(ResNet50, "resnet50", 224, half),
    "vgg16": Network(
        lambda **o: VGG16(num_classes=None, **o),
        "vgg16",
        224,
        lambda uses: PUBLISHED["VGG-16"].ranks,
    ),
}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A model with its images and variables, and how many times its macs fall.

    Attributes:
        trees: "dense" and "low-rank" to the variables.
    """

    model: nn.Module
    images: jax.Array
    trees: dict[str, Any]
    gain: float


def prepare(name: str, batch: int, dtype: str) -> Prepared:
    """One of `NETWORKS` with random variables and images."""
    network = NETWORKS[name]
    model = network.make(dtype=None if dtype == "float32" else dtype)
    images = jax.random.normal(jax.random.key(1), (batch, network.side, network.side, 3))
    dense = jax.jit(model.init)(jax.random.key(0), images[:1])
    uses = trace(model.apply, dense, images[:1])
    low = decompose(dense, network.choose(uses), uses)
    left = trace(lowrank(model.apply), low, images[:1]).macs
    return Prepared(model, images, {"dense": dense, "low-rank": low}, uses.macs / left)
