"""Layers of a PyTorch state dict and of a Flax tree, paired by kind, order and shape."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lowrank_jax.io.names import natural
from lowrank_jax.program.call_order import CallOrder

STATISTICS = {"running_mean": "mean", "running_var": "var"}
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of either side, by Flax's names of its leaves.

    Attributes:
        places: where each leaf is.
        shapes: in Flax's layout.
    """

    places: dict[str, str] = dataclasses.field(default_factory=dict)
    shapes: dict[str, Shape] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> str:
        """ "convolution", "dense", "norm", or "" for another."""
        if kernel := self.shapes.get("kernel"):
            return "convolution" if len(kernel) > 2 else "dense"
        return "norm" if self.shapes.keys() & {"scale", "mean", "var"} else ""

    def ordered(self) -> list[str]:
        """The places as PyTorch orders them, the weight first."""
        leaves = sorted(self.places, key=lambda leaf: not leaf.endswith(("kernel", "scale")))
        return [self.places[leaf] for leaf in leaves]


def torch_layers(tensors: Mapping[str, np.ndarray]) -> list[Layer]:
    """The layers of a state dict in its order."""
    layers: dict[str, Layer] = {}
    for name, tensor in tensors.items():
        prefix, _, leaf = name.rpartition(".")
        if leaf == "weight":
            leaf = "kernel" if tensor.ndim > 1 else "scale"
        leaf = STATISTICS.get(leaf, leaf)
        layer = layers.setdefault(prefix, Layer())
        layer.places[leaf], layer.shapes[leaf] = name, _flax_shape(tensor.shape)
    return list(layers.values())


def flax_layers(targets: Mapping[str, Any], order: CallOrder) -> list[Layer]:
    """The layers of a Flax tree in the order of the forward pass; idle ones come last."""
    layers: dict[str, Layer] = {}
    first: dict[str, float] = {}
    for number, (path, target) in enumerate(targets.items()):
        prefix, _, leaf = path.removeprefix("params/").removeprefix("batch_stats/").rpartition("/")
        if number in order.transposed:  # a kind without a partner
            leaf = f"transposed {leaf}"
        layer = layers.setdefault(prefix, Layer())
        layer.places[leaf], layer.shapes[leaf] = path, target.shape
        first[prefix] = min(first.get(prefix, math.inf), order.position.get(number, math.inf))
    ordered = sorted(layers, key=lambda prefix: (first[prefix], natural(prefix)))
    return [layers[prefix] for prefix in ordered]


def match(torch: list[Layer], flax: list[Layer]) -> Iterator[tuple[str, str]]:
    """Pairs (tensor, path) of the layers of a kind at the same place that agree in their leaves."""
    for kind in ("convolution", "dense", "norm"):
        sides = ([layer for layer in side if layer.kind == kind] for side in (torch, flax))
        for layer, other in _facing(*sides):
            if _agree((layer, other)):
                yield from ((place, other.places[leaf]) for leaf, place in layer.places.items())


def _facing(torch: list[Layer], flax: list[Layer]) -> list[tuple[Layer, Layer]]:
    """Layers at the same place.

    Where the numbers differ, places are counted from the start, and after a gap from the end.
    """
    if len(torch) == len(flax):
        return list(zip(torch, flax, strict=True))
    start = list(itertools.takewhile(_agree, zip(torch, flax, strict=False)))
    rest = zip(reversed(torch[len(start) :]), reversed(flax[len(start) :]), strict=False)
    return start + list(itertools.takewhile(_agree, rest))


def _agree(pair: tuple[Layer, Layer]) -> bool:
    return pair[0].shapes == pair[1].shapes


def _flax_shape(shape: Shape) -> Shape:
    """(out, in, *spatial) as (*spatial, in, out)."""
    return (*shape[2:], *shape[1::-1])


def without(layers: list[Layer], paths: set[str]) -> list[Layer]:
    """The layers without the leaves at some paths."""
    kept = []
    for layer in layers:
        places = {leaf: place for leaf, place in layer.places.items() if place not in paths}
        shapes = {leaf: layer.shapes[leaf] for leaf in places}
        if places:
            kept.append(Layer(places, shapes))
    return kept
