"""The candidates of a layer by `Tucker`: pairs of ranks, and those that no other pair beats."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int

from lowrank_jax.factorization.axes import same_form, spatial_axes
from lowrank_jax.factorization.tucker import Tucker
from lowrank_jax.planning.costs import Candidate, candidate_of, costs_of
from lowrank_jax.planning.spectra import Spectra
from lowrank_jax.program.kernel_use import KernelUse

Pairs = Int[np.ndarray, "n 2"]
MOST = 48  # ranks of each kind that are tried in a layer


def tucker_forms(use: KernelUse) -> tuple[str, ...]:
    """The forms of a layer that tell what the two ranks of `Tucker` leave out.

    These are `Channel`'s, of the inputs and of the outputs, by the names that the layer has for
    them; () for a matrix product.
    """
    if use.kind == "product":
        return ()
    return tuple(same_form(use.axes, use.kernel_shape, own) for own in ("pointwise", "spatial"))


def tucker_front(
    calls: Sequence[KernelUse], spectra: Spectra, multiple: int = 1, weight: float = 1.0
) -> list[Candidate]:
    """The candidates of one layer by `Tucker` that no other pair beats in error and in some cost.

    Args:
        calls: all calls of the layer in the program.
        spectra: those of both forms of `tucker_forms`; without them there are no candidates.
        multiple: ranks are restricted to multiples of this number.
        weight: of the layer's error in its loss.
    """
    use = calls[0]
    forms, known = tucker_forms(use), spectra.values[use.path]
    if len(set(forms)) < 2 or not set(forms) <= set(known):
        return []
    grid = [_ranks(known[first].shape[-1], multiple) for first in forms]
    pairs = _useful(np.stack(np.meshgrid(*grid), -1).reshape(-1, 2), use)
    error = _error(use, spectra, pairs)
    fronts = [_front(cost, error) for cost in _costs(calls, pairs).T]
    return at_pairs(calls, spectra, pairs[np.unique(np.concatenate(fronts))], weight)


def at_pairs(
    calls: Sequence[KernelUse], spectra: Spectra, pairs: Pairs, weight: float = 1.0
) -> list[Candidate]:
    """The candidates of one layer by `Tucker` at some pairs of ranks.

    The error is the sum of what each rank leaves out by `Channel`. It bounds what the pair leaves
    out, because what both leave out counts twice.
    """
    use = calls[0]
    error, costs = _error(use, spectra, pairs), _costs(calls, pairs)
    columns = zip(tucker_forms(use), pairs.T, strict=True)
    spectral = [spectra.largest_left_out(use.path, first)[own] for first, own in columns]
    rows = zip(pairs.tolist(), costs, error.tolist(), np.hypot(*spectral).tolist(), strict=True)
    return [
        candidate_of(_scheme(use, *pair), cost, error=lost, spectral=largest, weight=weight)
        for pair, cost, lost, largest in rows
    ]


def _ranks(limit: int, multiple: int) -> Int[np.ndarray, "ranks"]:
    """Multiples up to a limit, at most `MOST` of them, evenly spread."""
    count = limit // multiple
    return multiple * np.unique(np.linspace(1, count, min(count, MOST)).round().astype(int))


def _useful(pairs: Pairs, use: KernelUse) -> Pairs:
    """The pairs in which neither rank exceeds what the other one leaves."""
    taps = math.prod(use.sizes[letter] for letter in spatial_axes(use.axes))
    return pairs[pairs.max(1) <= taps * pairs.min(1)]


def _scheme(use: KernelUse, rank: int, inner: int) -> Tucker:
    return Tucker(rank, use.groups, use.axes, inner=inner)


def _error(use: KernelUse, spectra: Spectra, pairs: Pairs) -> Float64[np.ndarray, "n"]:
    columns = zip(tucker_forms(use), pairs.T, strict=True)
    left_out = [spectra.left_out(use.path, first)[own] for first, own in columns]
    return np.minimum(np.sum(left_out, axis=0), 1.0)


def _costs(calls: Sequence[KernelUse], pairs: Pairs) -> Float64[np.ndarray, "n 3"]:
    """All costs; each is linear in each of the two ranks."""
    corners = [(1, 1), (2, 1), (1, 2), (2, 2)]
    base, down, right, both = (costs_of(calls, _scheme(calls[0], *pair)) for pair in corners)
    one, two = (pairs - 1).T[..., None]
    return (
        base + one * (down - base) + two * (right - base) + one * two * (both - down - right + base)
    )


def _front(cost: Float64[np.ndarray, "n"], error: Float64[np.ndarray, "n"]) -> np.ndarray:
    """Indices of the pairs that no other one beats, from the cheapest to that of least error."""
    order = np.lexsort((error, cost))
    before = np.minimum.accumulate(np.append(np.inf, error[order]))[:-1]
    return order[error[order] < before]
