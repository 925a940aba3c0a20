"""The singular values of every layer, computed once: budgets and curves are slices of them."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from lowrank_jax.factorization.axes import same_form, spatial_axes
from lowrank_jax.factorization.forms import FORMS
from lowrank_jax.factorization.layout import to_matrix, to_pair
from lowrank_jax.factorization.parallel import side_by_side
from lowrank_jax.io.names import nest
from lowrank_jax.io.weights import load_weights, save_weights
from lowrank_jax.program.kernel_use import KernelUse, Trace
from lowrank_jax.tree.decomposing import changed_kernels, check_kernel
from lowrank_jax.tree.paths import find_leaf, named_leaves
from lowrank_jax.tree.suggest import suggest


@dataclasses.dataclass(frozen=True, eq=False)
class Spectra:
    """Singular values of the layers, plain or whitened.

    Attributes:
        values: path, then the form of the factors, such as "vertical", then the values: float64 of
            shape (matrices, max_rank), largest first, one row for each group of each
            kernel of a stack. Arrays of more or fewer axes are brought to this shape.

    Raises:
        ValueError: a form is unknown, or values are not finite, negative or not sorted.

    Example:
        >>> spectra = Spectra({"Conv_0": {"vertical": np.array([2.0, 1.0, 1.0])}})
        >>> [round(float(share), 2) for share in spectra.left_out("Conv_0", "vertical")]
        [1.0, 0.33, 0.17, 0.0]
    """

    values: Mapping[str, Mapping[str, np.ndarray]]

    def __post_init__(self) -> None:
        checked = {
            path: {first: _check(path, first, array) for first, array in orders.items()}
            for path, orders in self.values.items()
        }
        object.__setattr__(self, "values", checked)

    def left_out(self, path: str, first: str) -> np.ndarray:
        """Share of the squared singular values, over all matrices, that a rank leaves out.

        Returns:
            Array of shape (max_rank + 1,), for each rank from 0 to max_rank.
        """
        energy = (self.values[path][first] ** 2).sum(0)
        tail = np.append(np.cumsum(energy[::-1])[::-1], 0.0)
        return tail / tail[0] if tail[0] else tail

    def largest_left_out(self, path: str, first: str) -> np.ndarray:
        """Relative error of each rank in the spectral norm, of the worst matrix.

        That is the largest singular value that the rank leaves out, over the largest of its matrix.

        Returns:
            Array of shape (max_rank + 1,), for each rank from 0 to max_rank.
        """
        values = self.values[path][first]
        share = values / np.where(values[:, :1] > 0, values[:, :1], 1.0)
        return np.append(share.max(0), 0.0)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the values; the suffix, such as ``.npz``, is the format, as in `save_weights`."""
        arrays = {
            f"{layer}/{first}": values
            for layer, orders in self.values.items()
            for first, values in orders.items()
        }
        save_weights(path, nest(arrays))

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
            raise ValueError(
                f"{path} holds no spectra; give a file that save wrote: {error}"
            ) from error


def spectra(
    tree: Any,
    trace: Trace,
    paths: Iterable[str] | None = None,
    *,
    forms: Iterable[str] | None = None,
) -> Spectra:
    """Computes the singular values of the layers of a network, in each form of the factors.

    The layers are done side by side on the host; nothing is compiled.

    Args:
        tree: pytree of arrays, as for `decompose`: parameters, or all variables of a model.
        trace: `lowrank_jax.trace` of the forward pass.
        paths: the layers; without them all that the trace proves safe.
        forms: names of the forms wanted, such as "vertical"; None for all that a layer allows. A
            layer that allows none of the named forms has its usual form.

    Raises:
        ValueError: a path is unknown or cannot be decomposed safely, or a kernel is no array, holds
            NaN or has a type of 8 or fewer bits or of integers.

    Example:
        >>> import jax
        >>> from flax import linen as nn
        >>> from lowrank_jax import trace
        >>> model, images = nn.Sequential([nn.Conv(8, (3, 3))]), np.ones((1, 8, 8, 4))
        >>> variables = model.init(jax.random.key(0), images)
        >>> found = spectra(variables, trace(model.apply, variables, images))
        >>> {first: values.shape for first, values in found.values["layers_0"].items()}
        {'vertical': (1, 12), 'horizontal': (1, 12), 'spatial': (1, 8), 'pointwise': (1, 4)}
    """
    paths = trace.safe_paths() if paths is None else list(paths)
    leaves = named_leaves(tree) | changed_kernels(tree, paths, trace)
    wanted = None if forms is None else check_forms(forms)
    jobs, sizes = {}, []
    for path in paths:
        use = known_use(trace, path)
        kernel = check_kernel(path, find_leaf(path, leaves))
        for first in _wanted_forms(use, wanted):
            jobs[path, first] = partial(singular_values, np.asarray(kernel), use, first)
            sizes.append(kernel.size)
    results = side_by_side(list(jobs.values()), sizes, lambda _, found: found)
    values: dict[str, dict[str, np.ndarray]] = {}
    for (path, first), found in zip(jobs, results, strict=True):
        values.setdefault(path, {})[first] = found
    return Spectra(values)


def restrict(found: Spectra, trace: Trace, forms: Iterable[str]) -> Spectra:
    """The singular values of some forms alone; a layer that allows none has its usual form.

    Args:
        found: in every form, as `spectra` gives them.
        trace: of the program, which tells the forms of a layer.
        forms: as for `spectra`.

    Raises:
        ValueError: a form is unknown, or there is none.

    Example:
        >>> import jax
        >>> from flax import linen as nn
        >>> from lowrank_jax import trace
        >>> model, images = nn.Sequential([nn.Conv(8, (3, 3))]), np.ones((1, 8, 8, 4))
        >>> variables = model.init(jax.random.key(0), images)
        >>> program = trace(model.apply, variables, images)
        >>> restrict(spectra(variables, program), program, ["spatial"]).values["layers_0"].keys()
        dict_keys(['spatial'])
    """
    wanted = check_forms(forms)
    values = {}
    for path, own in found.values.items():
        names = _wanted_forms(known_use(trace, path), wanted)
        values[path] = {first: own[first] for first in names}
    return Spectra(values)


def check_forms(forms: Iterable[str]) -> tuple[str, ...]:
    """The names of forms, or a ValueError if there is none or one is unknown."""
    names = (forms,) if isinstance(forms, str) else tuple(forms)
    known = ", ".join(map(repr, FORMS))
    if not names:
        raise ValueError(f"forms is empty; give at least one of {known}, or None for all.")
    if unknown := [name for name in names if name not in FORMS]:
        raise ValueError(f"forms: {unknown[0]!r} is not allowed; give one of {known}.")
    return names


def _wanted_forms(use: KernelUse, wanted: Iterable[str] | None = None) -> list[str]:
    """The forms of a layer that are wanted, by the names that it has for the same products."""
    if wanted is None:
        return list(use.forms)
    spatial = bool(spatial_axes(use.axes))
    fitting = [first for first in wanted if FORMS[first].spatial == spatial]
    names = {same_form(use.axes, use.kernel_shape, first) for first in fitting}
    return [first for first in use.forms if first in names] or [use.forms[0]]


def singular_values(kernel: np.ndarray, use: KernelUse, first: str) -> np.ndarray:
    """Singular values of the matrices of a kernel, largest first, without their vectors.

    They are s = sqrt(eig(M M^T)), in float64. Squaring loses values below 1e-8 of the largest
    value, which a kernel in float32 does not hold either.

    Args:
        kernel: in the layout of its use; axes before that are a stack.
        use: of the kernel in the program, for its layout and groups.
        first: name of the form.

    Returns:
        Array of shape (..., groups, max_rank).
    """
    groups = use.scheme(1, first).groups
    matrix = to_matrix(to_pair(kernel.astype(np.float64), use.axes, first), groups)
    turned = np.swapaxes(matrix, -1, -2)
    gram = matrix @ turned if matrix.shape[-2] <= matrix.shape[-1] else turned @ matrix
    return np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[..., ::-1], 0.0))


def known_use(trace: Trace, path: str) -> KernelUse:
    """The first use of a layer, or an error that says why it cannot be planned."""
    use = trace.safe_use(path)
    if use is None:
        advice = suggest(path, trace.safe_paths(), "it has none that can be decomposed.")
        raise ValueError(f"{path!r} is no layer of the traced program; {advice}")
    return use


def _check(path: str, first: str, array: np.ndarray) -> np.ndarray:
    """The values in float64, of shape (matrices, max_rank), or an error that says what is wrong."""
    where = f"{path}, {first}"
    if first not in FORMS:
        known = ", ".join(map(repr, FORMS))
        raise ValueError(f"{where}: the form {first!r} is not known; give one of {known}.")
    values = np.asarray(array, np.float64)
    if not values.ndim or not values.size:
        raise ValueError(
            f"{where}: there are no singular values; give an array of shape (matrices, max_rank)."
        )
    if not np.isfinite(values).all():
        raise ValueError(
            f"{where}: the singular values hold NaN or infinite values; repair the parameters or "
            "the statistics."
        )
    if (values < 0).any() or (np.diff(values) > 0).any():
        raise ValueError(f"{where}: singular values must be 0 or more and sorted, largest first.")
    return values.reshape(-1, values.shape[-1])
