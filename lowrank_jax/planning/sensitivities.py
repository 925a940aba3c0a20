"""What the network's output loses when one layer is cut: every candidate under one compiled
program."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lowrank_jax.factorization.layout import from_matrix, from_pair, to_matrix, to_pair
from lowrank_jax.planning.spectra import known_use
from lowrank_jax.program.compiler import default_options
from lowrank_jax.program.kernel_use import KernelUse, Trace
from lowrank_jax.tree.decomposing import find_layer, layer_leaves

Candidates = Mapping[str, Sequence[tuple[str, int]]]


def divergences(
    apply: Callable,
    variables: Any,
    images: Any,
    uses: Trace,
    candidates: Candidates,
    *args: Any,
    measure: str = "kl",
    batch: int = 256,
    **kwargs: Any,
) -> dict[str, dict[tuple[str, int], float]]:
    """How far the outputs move when one layer at a time is cut to a rank.

    The singular value decompositions are taken once; a candidate masks singular values, so that all
    of them run under one compiled program.

    Args:
        apply: ``model.apply`` of a model whose output are logits (batch, classes).
        variables: trained variables of the dense model.
        images: unlabelled inputs (batch, ...).
        uses: trace of the model.
        candidates: layer path to the (first, rank) pairs to try.
        *args, **kwargs: other arguments of ``apply``, in evaluation.
        measure: "kl", the mean divergence of the classes' probabilities, in nats; or "mse", the
            squared change of the centred logits over their square, which still tells layers apart
            where the network is so sure of its classes that the divergence vanishes.
        batch: images in a forward pass.

    Returns:
        The table that `lowrank_jax.ranks.sensitivity` takes.

    Raises:
        ValueError: a path or the measure is unknown, or there are no images.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> import lowrank_jax as lr
        >>> model, images = nn.Sequential([nn.Conv(8, (3, 3)), lambda x: x.mean((1, 2))]), jnp.ones((4, 8, 8, 4))
        >>> variables = model.init(jax.random.key(0), images)
        >>> uses = lr.trace(model.apply, variables, images)
        >>> table = divergences(model.apply, variables, images, uses, {"layers_0": [("vertical", 1), ("vertical", 12)]})
        >>> table["layers_0"]["vertical", 1] > table["layers_0"]["vertical", 12]
        True
    """
    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r} is not allowed; give one of {sorted(MEASURES)}.")
    if not len(images):
        raise ValueError("No images: give at least one batch of inputs.")
    flat = flatten_dict(variables["params"])
    layers = layer_leaves(flat)
    keys = {path: (*find_layer(path, layers), "kernel") for path in candidates}
    known = {path: known_use(uses, path) for path in candidates}
    bases = {(path, first): _basis(flat[keys[path]], known[path], first)
             for path, pairs in candidates.items() for first, _ in pairs}  # fmt: skip

    def outputs(masks: dict, x: jax.Array) -> jax.Array:
        kernels = dict(flat)
        for (path, first), mask in masks.items():
            change = _masked(bases[path, first], mask, known[path], first)
            kernels[keys[path]] = kernels[keys[path]] - change.astype(kernels[keys[path]].dtype)
        return apply({**variables, "params": unflatten_dict(kernels)}, x, *args, **kwargs)

    program = jax.jit(outputs, compiler_options=default_options())
    whole = {key: np.zeros(basis[1].shape[-1], np.float32) for key, basis in bases.items()}
    parts = [jnp.asarray(images[start : start + batch]) for start in range(0, len(images), batch)]
    dense = [np.asarray(program(whole, x), np.float64) for x in parts]

    def loss(path: str, first: str, rank: int) -> float:
        dropped = (np.arange(len(whole[path, first])) >= rank).astype(np.float32)
        low = [np.asarray(program(whole | {(path, first): dropped}, x), np.float64) for x in parts]
        return MEASURES[measure](np.concatenate(dense), np.concatenate(low))

    return {path: {pair: loss(path, *pair) for pair in pairs} for path, pairs in candidates.items()}


def _basis(kernel: Any, use: KernelUse, first: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    wide = jnp.asarray(kernel, jnp.promote_types(jnp.asarray(kernel).dtype, jnp.float32))
    u, s, v = jnp.linalg.svd(
        to_matrix(to_pair(wide, use.axes, first), use.groups), full_matrices=False
    )
    return u, s, v


def _masked(basis: tuple, mask: jax.Array, use: KernelUse, first: str) -> jax.Array:
    """The part of a kernel that the singular values of a mask carry."""
    u, s, v = basis
    matrix = jnp.matmul(u * (s * mask)[..., None, :], v, precision=jax.lax.Precision.HIGHEST)
    sizes = dict(zip(use.axes, use.kernel_shape[-len(use.axes) :], strict=True))
    a, b, c, n = to_pair(jnp.zeros(use.kernel_shape), use.axes, first).shape[-4:]
    return from_pair(from_matrix(matrix, (a, b, c, n)), use.axes, first, sizes)


def _kl(dense: np.ndarray, low: np.ndarray) -> float:
    a, b = (x - x.max(-1, keepdims=True) for x in (dense, low))
    a, b = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (a, b))
    return float(np.sum(np.exp(a) * (a - b), -1).mean())


def _mse(dense: np.ndarray, low: np.ndarray) -> float:
    a, b = (x - x.mean(-1, keepdims=True) for x in (dense, low))
    return float(np.sum((a - b) ** 2) / max(np.sum(a**2), np.finfo(float).tiny))


MEASURES = {"kl": _kl, "mse": _mse}
