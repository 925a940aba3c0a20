"""PyTorch's tensors in a Flax tree: layers paired by kind, order and shape; their names are not
read."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lowrank_jax.io.formats import natural
from lowrank_jax.program.call_order import CallOrder, call_order
from lowrank_jax.program.kernel_use import table

IGNORED = "num_batches_tracked"  # PyTorch's count of training batches, which Flax does not keep
STATISTICS = {"running_mean": "mean", "running_var": "var"}
SPATIAL = {1: "W", 2: "HW", 3: "DHW"}
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A PyTorch tensor and the leaf of the Flax tree that it fills, each with its shape as
    stored."""

    torch: str
    torch_shape: Shape
    flax: str
    flax_shape: Shape
    layout: str


@dataclasses.dataclass(frozen=True)
class TorchReport:
    """Which tensor went where; prints as a table, what has no partner first.

    Attributes:
        pairs: what was matched, in PyTorch's order.
        unmatched_torch: tensors without a partner, name to shape.
        unmatched_flax: leaves without a partner, path to shape, in the order of the forward pass.
    """

    pairs: tuple[Pair, ...]
    unmatched_torch: dict[str, Shape]
    unmatched_flax: dict[str, Shape]

    @property
    def complete(self) -> bool:
        """Whether everything has a partner."""
        return not self.unmatched_torch and not self.unmatched_flax

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("PyTorch", "shape", "Flax", "shape", "layout")]
        rows += [
            (name, _text(shape), "", "", "no partner")
            for name, shape in self.unmatched_torch.items()
        ]
        rows += [
            ("", "", name, _text(shape), "no partner")
            for name, shape in self.unmatched_flax.items()
        ]
        rows += [
            (p.torch, _text(p.torch_shape), p.flax, _text(p.flax_shape), p.layout)
            for p in self.pairs
        ]
        return table(rows, left=5)


def from_torch(
    tensors: Mapping[str, Any],
    apply: Callable,
    variables: Any,
    *args: Any,
    strict: bool = True,
    **kwargs: Any,
) -> tuple[Any, TorchReport]:
    """Puts the tensors of a PyTorch state dict into the tree of a Flax model of the same network.

    Layers are paired in order, convolutions, dense layers and normalisations each on their own:
        PyTorch's in the
    order of ``tensors``, which is that of registration, Flax's in the order in which the forward
    pass uses them. A pair must have the same tensors of the same shapes. Kernels (out, in,
    *spatial), grouped ones too, become (*spatial, in, out). PyTorch flattens features (c, h, w),
    Flax (h, w, c): the kernel of a dense layer that the forward pass feeds flattened features is
        reordered. Transposed convolutions and normalisations of
    flattened features are not known. Two layers of equal shapes in another order cannot be noticed:
    read the report, and measure the accuracy.

    Args:
        tensors: names to arrays, as ``load_weights`` reads from a file of ``numpy.savez``. A
            ``.safetensors`` file forgets the order; its names arrive in natural order, which is
            right for most networks. To give
            another order, give another dict: ``{name: tensors[name] for name in order}``.
        apply: function (variables, *args, **kwargs) in evaluation, such as ``model.apply``.
        variables: what the model's ``init`` gives, or ``jax.eval_shape(model.init, ...)``; an NNX
            state works too, with ``apply = lambda state, images: nnx.merge(graph, state)(images)``.
        *args, **kwargs: the other arguments of ``apply``, such as a batch of images.
        strict: raise unless everything has a partner. If False, tensors without one are dropped and
            leaves without one, such as a new head, stay those of ``variables``. Where the layers of
            a kind differ in number, they are paired from the start until two differ, and then from
            the end.

    Returns:
        The tree of ``variables`` with numpy arrays of its types, and the report.

    Raises:
        ValueError: ``strict``, and something has no partner; the message holds the report.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> model, images = nn.Conv(16, (3, 5)), jnp.zeros((1, 8, 8, 4))
        >>> target = jax.eval_shape(model.init, jax.random.key(0), images)
        >>> tensors = {"conv1.weight": np.ones((16, 4, 3, 5)), "conv1.bias": np.ones(16)}
        >>> variables, report = from_torch(tensors, model.apply, target, images)
        >>> print(report)
        PyTorch       shape     Flax           shape     layout
        conv1.weight  16x4x3x5  params/kernel  3x5x4x16  OIHW to HWIO
        conv1.bias    16        params/bias    16        as it is
    """
    order = call_order(apply, variables, *args, **kwargs)
    leaves, tree = jax.tree_util.tree_flatten_with_path(variables)
    targets = {_path(keys): leaf for keys, leaf in leaves}
    space = {path: order.flattened.get(number) for number, path in enumerate(targets)}
    kept = {
        name: np.asarray(x) for name, x in tensors.items() if name.rpartition(".")[2] != IGNORED
    }
    layers = _flax_layers(targets, order)
    found = dict(_match(_torch_layers(kept), layers))
    report = _report(kept, targets, layers, found, space)
    if strict and not report.complete:
        raise ValueError(_misfit(report))
    filled = {
        path: _to_flax(kept[name], space[path]).astype(targets[path].dtype)
        for name, path in found.items()
    }
    return jax.tree.unflatten(
        tree, [filled.get(path, leaf) for path, leaf in targets.items()]
    ), report


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer of either side, by Flax's names of its leaves: where each is, and its shape in Flax's
    layout."""

    places: dict[str, str] = dataclasses.field(default_factory=dict)
    shapes: dict[str, Shape] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> str:
        if kernel := self.shapes.get("kernel"):
            return "convolution" if len(kernel) > 2 else "dense"
        return "norm" if self.shapes.keys() & {"scale", "mean", "var"} else ""

    def ordered(self) -> list[str]:
        """The places as PyTorch orders them, the weight first."""
        return [
            self.places[leaf]
            for leaf in sorted(self.places, key=lambda leaf: not leaf.endswith(("kernel", "scale")))
        ]


def _torch_layers(tensors: Mapping[str, np.ndarray]) -> list[_Layer]:
    """The layers of a state dict in its order."""
    layers: dict[str, _Layer] = {}
    for name, tensor in tensors.items():
        prefix, _, leaf = name.rpartition(".")
        if leaf == "weight":
            leaf = "kernel" if tensor.ndim > 1 else "scale"
        leaf = STATISTICS.get(leaf, leaf)
        layer = layers.setdefault(prefix, _Layer())
        layer.places[leaf], layer.shapes[leaf] = name, _flax_shape(tensor.shape)
    return list(layers.values())


def _flax_layers(targets: Mapping[str, Any], order: CallOrder) -> list[_Layer]:
    """The layers of a Flax tree as the forward pass uses them; those that it does not use come
    last."""
    layers: dict[str, _Layer] = {}
    first: dict[str, float] = {}
    for number, (path, target) in enumerate(targets.items()):
        prefix, _, leaf = path.removeprefix("params/").removeprefix("batch_stats/").rpartition("/")
        leaf = (
            f"transposed {leaf}" if number in order.transposed else leaf
        )  # a kind without a partner
        layer = layers.setdefault(prefix, _Layer())
        layer.places[leaf], layer.shapes[leaf] = path, target.shape
        first[prefix] = min(first.get(prefix, math.inf), order.position.get(number, math.inf))
    return [
        layers[prefix]
        for prefix in sorted(layers, key=lambda prefix: (first[prefix], natural(prefix)))
    ]


def _match(torch: list[_Layer], flax: list[_Layer]) -> Iterator[tuple[str, str]]:
    """Pairs (tensor, path) of the layers of each kind that stand at the same place and agree in
    their leaves."""
    for kind in ("convolution", "dense", "norm"):
        for layer, other in _facing(
            *([layer for layer in side if layer.kind == kind] for side in (torch, flax))
        ):
            if _agree((layer, other)):
                yield from ((place, other.places[leaf]) for leaf, place in layer.places.items())


def _facing(torch: list[_Layer], flax: list[_Layer]) -> list[tuple[_Layer, _Layer]]:
    """Layers at the same place; where the numbers differ, counted from the start, and after a gap
    from the end."""
    if len(torch) == len(flax):
        return list(zip(torch, flax, strict=True))
    start = list(itertools.takewhile(_agree, zip(torch, flax, strict=False)))
    rest = zip(reversed(torch[len(start) :]), reversed(flax[len(start) :]), strict=False)
    return start + list(itertools.takewhile(_agree, rest))


def _agree(pair: tuple[_Layer, _Layer]) -> bool:
    return pair[0].shapes == pair[1].shapes


def _flax_shape(shape: Shape) -> Shape:
    """(out, in, *spatial) as (*spatial, in, out)."""
    return (*shape[2:], *shape[1::-1])


def _to_flax(tensor: np.ndarray, space: Shape | None) -> np.ndarray:
    """A tensor in Flax's layout; ``space`` is (*spatial, channels) of the features flattened into
    its inputs."""
    if tensor.ndim == 2 and space:
        *spatial, channels = space
        tensor = tensor.reshape(-1, channels, *spatial)  # (out, c, h, w)
        return _to_flax(tensor, None).reshape(-1, len(tensor))
    return np.ascontiguousarray(
        tensor.transpose(*range(2, tensor.ndim), *range(min(2, tensor.ndim))[::-1])
    )


def _layout(tensor: np.ndarray, space: Shape | None) -> str:
    """What `_to_flax` does, in words."""
    if tensor.ndim < 2:
        return "as it is"
    spatial = SPATIAL.get(tensor.ndim - 2, "")
    features = SPATIAL.get(len(space or ()) - 1, "")
    reordered = (
        f", inputs C{features} to {features}C" if space and math.prod(space[:-1]) > 1 else ""
    )
    return f"OI{spatial} to {spatial}IO{reordered}"


def _report(
    tensors: Mapping, targets: Mapping, layers: list[_Layer], found: Mapping, space: Mapping
) -> TorchReport:
    """What `from_torch` found; ``layers`` gives the order of the leaves."""
    pairs = []
    for name in [name for name in tensors if name in found]:
        tensor, path = tensors[name], found[name]
        pairs.append(
            Pair(name, tensor.shape, path, targets[path].shape, _layout(tensor, space[path]))
        )
    used = set(found.values())
    lost = {name: tensor.shape for name, tensor in tensors.items() if name not in found}
    vacant = {
        path: targets[path].shape
        for layer in layers
        for path in layer.ordered()
        if path not in used
    }
    return TorchReport(tuple(pairs), lost, vacant)


def _path(keys: tuple) -> str:
    """A tree path as "params/Conv_0/kernel"; an NNX state has one more key, "value"."""
    return jax.tree_util.keystr(keys, simple=True, separator="/").removesuffix("/value")


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _misfit(report: TorchReport) -> str:
    return (
        f"{_first('PyTorch tensors', report.unmatched_torch)} and {_first('Flax leaves', report.unmatched_flax)} have "
        "no partner. Layers of a kind are paired in order, PyTorch's as the tensors are listed, Flax's as the forward "
        "pass uses them. Build the same network, list the tensors in its order, drop those that it does not have, or "
        f"give strict=False to fill what matches:\n{report}"
    )


def _first(what: str, unmatched: Mapping[str, Shape]) -> str:
    name = next(iter(unmatched), None)
    return f"{len(unmatched)} {what}" + (
        f" (first {name}, {_text(unmatched[name])})" if name is not None else ""
    )
