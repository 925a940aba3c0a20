"""How a tensor of PyTorch becomes an array of Flax: its axes, and the order of its features."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowrank_jax.program.call_order import CallOrder
from lowrank_jax.program.flattening import Flat
from lowrank_jax.tree.suggest import suggest

SPATIAL = {1: "W", 2: "HW", 3: "DHW"}


@dataclasses.dataclass(frozen=True)
class Move:
    """What one tensor needs.

    Attributes:
        features: the maps that were flattened into the features that it meets.
        transposed: whether it is the kernel of a transposed convolution, (in, out, *spatial).
    """

    features: Flat | None
    transposed: bool

    @classmethod
    def of(
        cls, order: CallOrder, number: int, path: str, tensor: np.ndarray, is_named: bool
    ) -> "Move":
        """The move to a leaf by its number.

        Raises:
            ValueError: the order of the features that it meets is not known, and ``names`` does not
                name the tensor.
        """
        if number in order.lost and not is_named:
            raise ValueError(
                f"{path}: it meets flattened features whose order was changed by "
                f"{order.lost[number]}, which is not followed. Reorder its tensor yourself, and "
                "name it in names=."
            )
        transposed = number in order.transposed and tensor.ndim > 2
        return cls(order.flattened.get(number), transposed)

    def __call__(self, tensor: np.ndarray, name: str, target: Any) -> np.ndarray:
        """The array for a leaf.

        Raises:
            ValueError: the tensor holds integers for a leaf of floats, or has another shape.
        """
        if jnp.issubdtype(target.dtype, jnp.floating) and tensor.dtype.kind in "iub":
            raise ValueError(
                f"{name} holds {tensor.dtype}, which are codes and no weights; multiply it by its "
                "scale first."
            )
        moved = to_flax(tensor, self.features, self.transposed)
        if moved.shape != target.shape:
            raise ValueError(
                f"{name} of shape {tensor.shape} becomes {moved.shape}, and its leaf has "
                f"{target.shape}; name another leaf in names=."
            )
        return moved.astype(target.dtype)

    def in_words(self, tensor: np.ndarray) -> str:
        """What becomes of the axes."""
        return layout(tensor, self.features, self.transposed)


def by_names(
    names: Mapping[str, str], tensors: Mapping[str, Any], targets: Mapping[str, Any]
) -> dict[str, str]:
    """The tensors that regular expressions name, each with its path.

    Raises:
        ValueError: an expression matches nothing, there is no such path, or two tensors have one
            path.

    Example:
        >>> by_names({r"up(.).weight": r"params/up_\\1/kernel"}, {"up1.weight": 0},
        ...          {"params/up_1/kernel": 0})
        {'up1.weight': 'params/up_1/kernel'}
    """
    found: dict[str, str] = {}
    idle = dict.fromkeys(names)
    for name in tensors:
        for pattern, place in names.items():
            if match := re.fullmatch(pattern, name):
                idle.pop(pattern, None)
                found[name] = _checked(name, match.expand(place), targets, set(found.values()))
                break
    if idle:
        raise ValueError(f"names: {next(iter(idle))!r} matches no tensor; leave it out.")
    return found


def _checked(name: str, path: str, targets: Mapping[str, Any], taken: set[str]) -> str:
    if path not in targets:
        advice = suggest(path, list(targets), "there are none.")
        raise ValueError(f"names: {name} is to go to {path!r}, which is no leaf; {advice}")
    if path in taken:
        raise ValueError(
            f"names: {name} is to go to {path!r}, as another is; give it a leaf of its own."
        )
    return path


def to_flax(tensor: np.ndarray, features: Flat | None, transposed: bool = False) -> np.ndarray:
    """A tensor in Flax's layout.

    Args:
        tensor: as PyTorch stores it.
        features: the maps that were flattened into the features that it meets.
        transposed: whether it is the kernel of a transposed convolution, (in, out, *spatial).
    """
    if transposed:
        return np.ascontiguousarray(np.flip(_spatial_first(tensor), tuple(range(tensor.ndim - 2))))
    if tensor.ndim <= 2 and features:
        by_feature = tensor if tensor.ndim == 1 else tensor.T
        return np.ascontiguousarray(by_feature[_order(features)])
    return np.ascontiguousarray(_spatial_first(np.swapaxes(tensor, 0, min(1, tensor.ndim - 1))))


def _spatial_first(kernel: np.ndarray) -> np.ndarray:
    """(in, out, *spatial) as (*spatial, in, out)."""
    if kernel.ndim < 3:
        return kernel
    return kernel.transpose(*range(2, kernel.ndim), 0, 1)


def _order(features: Flat) -> np.ndarray:
    """Where PyTorch, which flattens maps (c, *spatial), has each of Flax's features."""
    found, start = [], 0
    for *spatial, channels in features.parts:
        size = math.prod(spatial) * channels
        places = start + np.arange(size).reshape(channels, *spatial)
        found.append(np.moveaxis(places, 0, -1).ravel())
        start += size
    return np.concatenate(found)


def layout(tensor: np.ndarray, features: Flat | None, transposed: bool = False) -> str:
    """What `to_flax` does, in words."""
    spatial = SPATIAL.get(tensor.ndim - 2, "")
    moved = [part for part in (features.parts if features else ()) if math.prod(part[:-1]) > 1]
    order = ""
    if moved and tensor.ndim <= 2:
        axes = SPATIAL.get(len(moved[0]) - 1, "")
        order = f"inputs C{axes} to {axes}C"
    if tensor.ndim < 2:
        return order or "as it is"
    known = f"IO{spatial} turned" if transposed else f"OI{spatial}"
    return f"{known} to {spatial}IO" + (f", {order}" if order else "")
