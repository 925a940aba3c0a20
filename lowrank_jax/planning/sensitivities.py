"""What the network's output loses when one layer is truncated; all candidates run one program."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.factorization.factors import wide
from lowrank_jax.factorization.layout import from_matrix, from_pair, to_matrix, to_pair
from lowrank_jax.factorization.parallel import side_by_side
from lowrank_jax.planning.spectra import known_use
from lowrank_jax.program.changed import KEY, changed
from lowrank_jax.program.compiler import default_options
from lowrank_jax.program.kernel_use import KernelUse, Trace
from lowrank_jax.tree.decomposing import changed_kernels, check_kernel
from lowrank_jax.tree.paths import find_leaf, map_named, named_leaves

Basis = tuple[np.ndarray, np.ndarray, np.ndarray]


def divergences(
    apply: Callable,
    variables: Any,
    images: Any,
    trace: Trace,
    candidates: Mapping[str, Sequence[tuple[str, int]]],
    *args: Any,
    measure: Literal["kl", "mse"] = "kl",
    batch: int = 256,
    **kwargs: Any,
) -> dict[str, dict[tuple[str, int], float]]:
    """How far the outputs move when one layer at a time is truncated to a rank.

    The singular value decompositions are taken once, side by side on the host. A candidate is the
    dense network with another kernel of the same shape, so that one compiled program runs them all.

    Args:
        apply: ``model.apply`` of a model whose outputs are logits (batch, classes).
        variables: trained variables of the dense model.
        images: unlabelled inputs (batch, ...).
        trace: `lowrank_jax.trace` of the model.
        candidates: layer path to the (first, rank) pairs to try.
        *args, **kwargs: other arguments of ``apply``, in evaluation.
        measure: "kl", the mean divergence of the classes' probabilities, in nats; or "mse", the
            squared change of the centred logits over their square, which still tells layers apart
            where the network is so sure of its classes that the divergence vanishes.
        batch: images in a forward pass.

    Returns:
        The table that `lowrank_jax.planning.selectors.sensitivity` takes.

    Raises:
        ValueError: a path, a form or the measure is unknown, a rank is not allowed, or there are no
            images.

    Example:
        >>> from flax import linen as nn
        >>> import lowrank_jax as lr
        >>> model = nn.Sequential([nn.Conv(8, (3, 3)), lambda x: x.mean((1, 2))])
        >>> images = jnp.ones((4, 8, 8, 4))
        >>> variables = model.init(jax.random.key(0), images)
        >>> program = lr.trace(model.apply, variables, images)
        >>> ranks = {"layers_0": [("vertical", 1), ("vertical", 12)]}
        >>> table = divergences(model.apply, variables, images, program, ranks)
        >>> table["layers_0"]["vertical", 1] > table["layers_0"]["vertical", 12]
        True
    """
    if measure not in DIVERGENCES:
        raise ValueError(f"measure={measure!r} is not allowed; give one of {sorted(DIVERGENCES)}.")
    if not len(images):
        raise ValueError("No images: give at least one batch of inputs.")
    own = changed_kernels(variables, candidates, trace)
    leaves = named_leaves(variables) | own
    known = {path: known_use(trace, path) for path in candidates}
    kernels = {path: check_kernel(path, find_leaf(path, leaves)) for path in candidates}
    bases = _bases(kernels, known, candidates)
    parts = [jnp.asarray(images[start : start + batch]) for start in range(0, len(images), batch)]
    call = lambda variables, x: changed(apply)(variables, x, *args, **kwargs)  # noqa: E731
    program = jax.jit(call, compiler_options=default_options())

    def outputs(new: Mapping[str, Any]) -> np.ndarray:
        tree = map_named(lambda name, leaf: new.get(name, leaf), variables)
        return np.concatenate([np.asarray(program(tree, x), np.float64) for x in parts])

    dense = outputs({})

    def loss(path: str, first: str, rank: int) -> float:
        low = _of_rank(bases[path, first], rank, known[path], first)
        kernel = jnp.asarray(low, kernels[path].dtype)
        return DIVERGENCES[measure](
            dense, outputs({path: {KEY: kernel} if path in own else kernel})
        )

    return {path: {pair: loss(path, *pair) for pair in pairs} for path, pairs in candidates.items()}


def _bases(
    kernels: Mapping[str, jax.Array],
    known: Mapping[str, KernelUse],
    candidates: Mapping[str, Sequence[tuple[str, int]]],
) -> dict[tuple[str, str], Basis]:
    """The decompositions U, s, V of every layer in the orders that are tried."""
    for path, tried in candidates.items():
        for first, rank in tried:
            known[path].scheme(rank, first).checked(known[path].kernel_shape, path)
    pairs = [(path, first) for path, tried in candidates.items() for first, _ in tried]
    keys = list(dict.fromkeys(pairs))
    jobs = [partial(_basis, np.asarray(kernels[path]), known[path], first) for path, first in keys]
    sizes = [kernels[path].size for path, _ in keys]
    return dict(zip(keys, side_by_side(jobs, sizes, lambda _, basis: basis), strict=True))


def _basis(kernel: np.ndarray, use: KernelUse, first: str) -> Basis:
    matrix = to_matrix(to_pair(wide(kernel), use.axes, first), use.scheme(1, first).groups)
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return u, s, v


def _of_rank(basis: Basis, rank: int, use: KernelUse, first: str) -> np.ndarray:
    """The kernel U_K S_K V_K of a rank, in the layout of its use."""
    u, s, v = basis
    matrix = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
    a, b, c, n = to_pair(np.empty(use.kernel_shape), use.axes, first).shape[-4:]
    return from_pair(from_matrix(matrix, (a, b, c, n)), use.axes, first, use.sizes)


def _kl(dense: np.ndarray, low: np.ndarray) -> float:
    a, b = (x - x.max(-1, keepdims=True) for x in (dense, low))
    a, b = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (a, b))
    return float(np.sum(np.exp(a) * (a - b), -1).mean())


def _mse(dense: np.ndarray, low: np.ndarray) -> float:
    a, b = (x - x.mean(-1, keepdims=True) for x in (dense, low))
    return float(np.sum((a - b) ** 2) / max(np.sum(a**2), np.finfo(float).tiny))


DIVERGENCES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {"kl": _kl, "mse": _mse}
