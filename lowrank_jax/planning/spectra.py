"""The singular values of every layer, computed once: ranks, budgets and curves are slices of
them."""

import dataclasses
import os
from collections.abc import Iterable, Mapping

import chex
import numpy as np
from flax.traverse_util import flatten_dict

from lowrank_jax.factorization.layout import to_matrix, to_pair
from lowrank_jax.factorization.separable import FACTORS
from lowrank_jax.io.formats import nest
from lowrank_jax.io.weights import load_weights, save_weights
from lowrank_jax.program.kernel_use import KernelUse, Trace
from lowrank_jax.tree.decomposing import check_kernel, find_layer, layer_leaves
from lowrank_jax.tree.suggest import suggest


@dataclasses.dataclass(frozen=True, eq=False)
class Spectra:
    """Singular values of the layers, plain or whitened.

    Attributes:
        values: path, then the order of the factors ("vertical" or "horizontal" first), then the
            values: float64 of shape (matrices, max_rank), largest first, one row for each group of
                each kernel of a stack. Arrays
            of more or fewer axes are brought to this shape.

    Raises:
        ValueError: an order is unknown, or values are not finite, negative or not sorted.

    Example:
        >>> spectra = Spectra({"Conv_0": {"vertical": np.array([2.0, 1.0, 1.0])}})
        >>> [round(float(share), 2) for share in spectra.left_out("Conv_0", "vertical")]
        [1.0, 0.33, 0.17, 0.0]
    """

    values: Mapping[str, Mapping[str, np.ndarray]]

    def __post_init__(self) -> None:
        checked = {
            path: {
                first: _check(f"{path}, {first} first", first, array)
                for first, array in orders.items()
            }
            for path, orders in self.values.items()
        }
        object.__setattr__(self, "values", checked)

    def left_out(self, path: str, first: str) -> np.ndarray:
        """Share of the squared singular values that each rank from 0 to max_rank leaves out, over
        all matrices."""
        energy = (self.values[path][first] ** 2).sum(0)
        tail = np.append(np.cumsum(energy[::-1])[::-1], 0.0)
        return tail / tail[0] if tail[0] else tail

    def largest_left_out(self, path: str, first: str) -> np.ndarray:
        """The largest singular value that each rank leaves out, over the largest of its matrix; of
        the worst matrix.

        This is the relative error in the spectral norm.
        """
        values = self.values[path][first]
        share = values / np.where(values[:, :1] > 0, values[:, :1], 1.0)
        return np.append(share.max(0), 0.0)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the values; the suffix of the path, such as ``.npz``, chooses the format as in
        `save_weights`."""
        save_weights(
            path,
            nest(
                {
                    f"{layer}/{first}": x
                    for layer, v in self.values.items()
                    for first, x in v.items()
                }
            ),
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Spectra":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is nothing at the path.
            ValueError: the file is damaged, or holds something else.
        """
        values: dict[str, dict[str, np.ndarray]] = {}
        for (*layer, first), array in flatten_dict(load_weights(path)).items():
            values.setdefault("/".join(layer), {})[first] = array
        try:
            return cls(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no spectra: {error}") from error


def spectra(
    params: chex.ArrayTree,
    trace: Trace,
    paths: Iterable[str] | None = None,
    *,
    orders: Iterable[str] = tuple(FACTORS),
    leaves: tuple[str, str] = ("kernel", "bias"),
) -> Spectra:
    """Computes the singular values of the layers of a network, in both orders of the factors.

    Args:
        params: nested mapping of arrays, as for `decompose`.
        trace: `lowrank_jax.trace` of the forward pass.
        paths: the layers; without them all that the trace proves safe.
        orders: which convolution may come first, of "vertical" and "horizontal".
        leaves: names of the kernel and of the bias.

    Raises:
        ValueError: a path is unknown or cannot be decomposed safely, or a kernel holds NaN or is no
            array.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from lowrank_jax import trace
        >>> model, images = nn.Sequential([nn.Conv(8, (3, 3))]), jnp.ones((1, 8, 8, 4))
        >>> variables = model.init(jax.random.key(0), images)
        >>> found = spectra(variables["params"], trace(model.apply, variables, images))
        >>> {path: {first: x.shape for first, x in orders.items()} for path, orders in found.values.items()}
        {'layers_0': {'vertical': (1, 12), 'horizontal': (1, 12)}}
    """
    layers = layer_leaves(flatten_dict(params), leaves[0])
    values: dict[str, dict[str, np.ndarray]] = {}
    for path in trace.safe_paths() if paths is None else paths:
        use = known_use(trace, path)
        kernel = check_kernel(path, layers[find_layer(path, layers, leaves[0])], leaves)
        values[path] = _values(kernel, use, orders)
    return Spectra(values)


def _values(kernel: chex.Array, use: KernelUse, orders: Iterable[str]) -> dict[str, np.ndarray]:
    """By numpy in float64, because JAX would compile a decomposition for every shape."""
    values: dict[str, np.ndarray] = {}
    spatial = [
        size
        for letter, size in zip(use.axes, kernel.shape[-len(use.axes) :], strict=True)
        if letter not in "IO"
    ]
    for first in orders:
        if values and max(spatial) == 1:  # a pointwise kernel has the same matrix in both orders
            values[first] = next(iter(values.values()))
        else:
            matrix = np.asarray(to_matrix(to_pair(kernel, use.axes, first), use.groups), np.float64)
            values[first] = np.linalg.svd(matrix, compute_uv=False)
    return values


def known_use(trace: Trace, path: str) -> KernelUse:
    """The first use of a layer, or an error that says why it cannot be planned."""
    use = trace.safe_use(path)
    if use is None:
        advice = suggest(path, trace.safe_paths(), "it has none that can be decomposed.")
        raise ValueError(f"{path!r} is no layer of the traced program; {advice}")
    return use


def _check(where: str, first: str, array: np.ndarray) -> np.ndarray:
    if first not in FACTORS:
        raise ValueError(
            f"{where}: the order {first!r} is not known; give one of {', '.join(map(repr, FACTORS))}."
        )
    values = np.asarray(array, np.float64)
    values = (
        values.reshape(-1, values.shape[-1]) if values.ndim and values.size else np.empty((0, 0))
    )
    if not values.size:
        raise ValueError(
            f"{where}: there are no singular values; give an array of shape (matrices, max_rank)."
        )
    if not np.isfinite(values).all():
        raise ValueError(
            f"{where}: the singular values hold NaN or infinite values; repair the weights or statistics."
        )
    if (values < 0).any() or (np.diff(values) > 0).any():
        raise ValueError(f"{where}: singular values must be 0 or more and sorted, largest first.")
    return values
