"""`from_torch`: PyTorch's tensors in a Flax tree; their names are not read."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lowrank_jax.io.torch_layers import Layer, Shape, flax_layers, match, torch_layers, without
from lowrank_jax.io.torch_moves import Move, by_names
from lowrank_jax.program.call_order import call_order
from lowrank_jax.program.kernel_use import table
from lowrank_jax.program.names import parts_of

IGNORED = "num_batches_tracked"  # PyTorch's count of training batches, which Flax does not keep


@dataclasses.dataclass(frozen=True)
class Pair:
    """A PyTorch tensor and the Flax leaf that it fills, each with its shape as stored."""

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
        for name, shape in self.unmatched_torch.items():
            rows.append((name, _text(shape), "", "", "no partner"))
        for name, shape in self.unmatched_flax.items():
            rows.append(("", "", name, _text(shape), "no partner"))
        for pair in self.pairs:
            torch, flax = _text(pair.torch_shape), _text(pair.flax_shape)
            rows.append((pair.torch, torch, pair.flax, flax, pair.layout))
        return table(rows, left=5)


def from_torch(
    tensors: Mapping[str, Any],
    apply: Callable,
    variables: Any,
    *args: Any,
    strict: bool = True,
    names: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> tuple[Any, TorchReport]:
    """Puts the tensors of a PyTorch state dict into the tree of a Flax model of the same network.

    Layers are paired in order, convolutions, dense layers and normalisations each on their own.
    PyTorch's are in the order of ``tensors``, which is that of registration. Flax's are in the
    order in which the forward pass needs them. A pair must have the same tensors of the same
    shapes. Kernels (out, in, *spatial), grouped ones too, become (*spatial, in, out). PyTorch
    flattens maps (c, h, w), Flax (h, w, c): dense kernels and normalisations that meet flattened
    maps are reordered, several maps one after the other too; an order that the program changes
    otherwise is refused. Transposed convolutions are paired by ``names`` alone. Two layers of equal
    shapes in another order cannot be noticed: read the report, and measure the accuracy.

    Args:
        tensors: names to arrays, as ``load_weights`` reads from a file of ``numpy.savez``. A
            ``.safetensors`` file forgets the order; its names arrive in natural order, which fits
            most networks. To give another order, give another dict: ``{name: tensors[name] for name
            in order}``.
        apply: function (variables, *args, **kwargs) in evaluation, such as ``model.apply``.
        variables: what the model's ``init`` gives, or ``jax.eval_shape(model.init, ...)``; an NNX
            state works too, with ``apply = lambda state, images: nnx.merge(graph, state)(images)``.
        *args, **kwargs: the other arguments of ``apply``, such as a batch of images.
        names: regular expressions of PyTorch's names to paths of leaves, for what is not to be
            paired in order: ``{r"up(\\d)\\.weight": r"params/up\\1/kernel"}``. The first that
            matches a whole name counts.
        strict: whether to raise unless everything has a partner. If False, tensors without a
            partner are dropped, and leaves without a partner, such as a new head, stay those of
            ``variables``. Where the layers of a kind differ in number, they are paired from the
            start until two differ, and then from the end.

    Returns:
        The tree of ``variables`` with numpy arrays of its types, and the report.

    Raises:
        ValueError: ``strict``, and something has no partner; the message holds the report. Or a
            tensor holds integers for a leaf of floats, a name of ``names`` does not fit, or the
            order of flattened features is not known.

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
    kept = {
        name: np.asarray(x) for name, x in tensors.items() if name.rpartition(".")[2] != IGNORED
    }
    named = by_names(names or {}, kept, targets)
    layers = without(flax_layers(targets, order), set(named.values()))
    others = {name: tensor for name, tensor in kept.items() if name not in named}
    found = named | dict(match(torch_layers(others), layers))
    numbers = {path: number for number, path in enumerate(targets)}
    moves = {
        path: Move.of(order, numbers[path], path, kept[name], name in named)
        for name, path in found.items()
    }
    report = _report(kept, targets, layers, found, moves)
    if strict and not report.complete:
        raise ValueError(_misfit(report))
    filled = {path: moves[path](kept[name], name, targets[path]) for name, path in found.items()}
    new = [filled.get(path, leaf) for path, leaf in targets.items()]
    return jax.tree.unflatten(tree, new), report


def _report(
    tensors: Mapping, targets: Mapping, layers: list[Layer], found: Mapping, moves: Mapping
) -> TorchReport:
    """What `from_torch` found; ``layers`` gives the order of the leaves."""
    pairs = []
    for name in [name for name in tensors if name in found]:
        tensor, path = tensors[name], found[name]
        words = moves[path].in_words(tensor)
        pairs.append(Pair(name, tensor.shape, path, targets[path].shape, words))
    filled = set(found.values())
    lost = {name: tensor.shape for name, tensor in tensors.items() if name not in found}
    paths = [path for layer in layers for path in layer.ordered() if path not in filled]
    return TorchReport(tuple(pairs), lost, {path: targets[path].shape for path in paths})


def _path(keys: tuple) -> str:
    """A tree path as "params/Conv_0/kernel"."""
    return "/".join(parts_of(keys))


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _misfit(report: TorchReport) -> str:
    torch = _first("PyTorch tensors", report.unmatched_torch)
    flax = _first("Flax leaves", report.unmatched_flax)
    return (
        f"{torch} and {flax} have no partner. Layers of a kind are paired in order, PyTorch's as "
        "the tensors are listed, Flax's as the forward pass needs them. Build the same network, "
        "list the tensors in its order, drop those that it does not have, or give strict=False to "
        f"fill what matches:\n{report}"
    )


def _first(what: str, unmatched: Mapping[str, Shape]) -> str:
    name = next(iter(unmatched), None)
    return f"{len(unmatched)} {what}" + (
        f" (first {name}, {_text(unmatched[name])})" if name is not None else ""
    )
