"""Parameter tree in, parameter tree out: `decompose` and its inverse `reconstruct`."""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lowrank_jax.factorization.layout import fit_axes
from lowrank_jax.factorization.separable import FACTORS, Separable, factor_all, merge
from lowrank_jax.program.kernel_use import Trace
from lowrank_jax.tree.suggest import suggest

Ranks = Mapping[str, int | Separable]
PAIRS = tuple(FACTORS.values())


def decompose(
    params: chex.ArrayTree,
    ranks: Ranks | None = None,
    trace: Trace | None = None,
    *,
    axes: str = "HWIO",
    leaves: tuple[str, str] = ("kernel", "bias"),
) -> dict[str, Any]:
    """Replaces the kernels that a table names by their low-rank factors.

    The layer ``{kernel, bias}`` becomes ``{vertical: {kernel}, horizontal: {kernel, bias}}``, which
    is the tree of `SeparableConv`. Every other leaf is passed on as the same object. Pure: works
    under ``jax.jit``, ``jax.vmap`` and ``jax.eval_shape``. A kernel of more axes than its layout is
    a stack, decomposed slice by slice; one of three axes belongs to a convolution of one dimension.

    Args:
        params: nested mapping of arrays; convolution kernels are (..., h, w, in, out).
        ranks: layer path, its keys joined by "/", to the rank, or to `Separable`. Without it, every
            layer that the trace proves safe and that gets smaller is cut to half its parameters.
        trace: `lowrank_jax.trace` of the forward pass; groups and layouts are taken from it and
            layers that cannot run decomposed are refused. Without it a layer with groups needs
            `Separable`.
        axes: layout of the kernels where there is no trace, such as "OIHW"; for PyTorch and
            Equinox.
        leaves: names of the kernel and of the bias, such as ("w", "b") for Haiku.

    Returns:
        A plain nested dict with the factors in place of the named kernels.

    Raises:
        ValueError: the table is empty, or a path, a kernel or a rank in it cannot be used.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> small = decompose({"conv": {"kernel": jnp.ones((3, 3, 8, 16)), "bias": jnp.ones(16)}}, {"conv": 2})
        >>> jax.tree.map(jnp.shape, small["conv"])
        {'horizontal': {'bias': (16,), 'kernel': (1, 3, 2, 16)}, 'vertical': {'kernel': (3, 1, 8,
        2)}}
    """
    flat = flatten_dict(params, keep_empty_nodes=True)
    layers = layer_leaves(flat, leaves[0])
    found: dict[tuple, tuple[Separable, jax.Array]] = {}
    for path, value in choose(ranks, trace).items():
        key = find_layer(path, layers, leaves[0])
        kernel = check_kernel(path, layers[key], leaves)
        found[key] = find_scheme(path, value, kernel, axes, trace), kernel
    schemes, kernels = zip(*found.values(), strict=True)
    for key, scheme, factors in zip(found, schemes, factor_all(schemes, kernels), strict=True):
        names = FACTORS[scheme.first]
        rest = {name: flat.pop((*key, name)) for name in layers[key] if name != leaves[0]}
        del flat[(*key, leaves[0])]
        flat |= {(*key, name, leaves[0]): x for name, x in zip(names, factors, strict=True)}
        flat |= {(*key, names[1], name): leaf for name, leaf in rest.items()}
    return unflatten_dict(flat)


def reconstruct(
    params: chex.ArrayTree, *, axes: str = "HWIO", leaves: tuple[str, str] = ("kernel", "bias")
) -> dict[str, Any]:
    """Multiplies all factors back into dense kernels; the inverse of `decompose` up to the dropped
    ranks.

    Args:
        params: tree with or without decomposed layers; ``variables`` of a Flax model work too.
        axes, leaves: as they were given to `decompose`.

    Returns:
        A plain nested dict with the tree of the dense network. Other leaves are the same objects.

    Raises:
        ValueError: a layer holds a dense kernel beside its factors.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"conv": {"kernel": jnp.ones((3, 3, 8, 16)), "bias": jnp.ones(16)}}
        >>> jax.tree.map(jnp.shape, reconstruct(decompose(params, {"conv": 2})))
        {'conv': {'bias': (16,), 'kernel': (3, 3, 8, 16)}}
    """
    flat = flatten_dict(params, keep_empty_nodes=True)
    for key, names in factored_layers(flat, axes, leaves).items():
        factors = [flat.pop((*key, name, leaves[0])) for name in names]
        flat[(*key, leaves[0])] = merge(factors[0], factors[1], fit_axes(axes, factors[0].ndim))
        if (bias := (*key, names[1], leaves[1])) in flat:
            flat[(*key, leaves[1])] = flat.pop(bias)
    return unflatten_dict(flat)


def factored_layers(
    flat: Mapping[tuple, Any], axes: str = "HWIO", leaves: tuple[str, str] = ("kernel", "bias")
) -> dict[tuple, tuple[str, str]]:
    """The decomposed layers of a flattened tree: key to the names of the two factors."""
    starts = {
        key[:-2]: names for key in flat for names in PAIRS if key[-2:] == (names[0], leaves[0])
    }
    return {
        key: names for key, names in starts.items() if _is_factored(flat, key, names, axes, leaves)
    }


def _is_factored(
    flat, key: tuple, names: tuple[str, str], axes: str, leaves: tuple[str, str]
) -> bool:
    below = {k[len(key) :] for k in flat if k[: len(key)] == key}
    required = {(name, leaves[0]) for name in names}
    if required <= below and (leaves[0],) in below:
        path = "/".join(map(str, key))
        raise ValueError(
            f"{path}: both a dense {leaves[0]!r} and factors; remove one of them from the tree."
        )
    if not required <= below <= required | {(names[1], leaves[1])}:
        return False
    first, second = (jnp.shape(flat[(*key, name, leaves[0])]) for name in names)
    return _fit_together(first, second, fit_axes(axes, len(first)))


def _fit_together(first: tuple[int, ...], second: tuple[int, ...], axes: str) -> bool:
    if len(first) != len(second) or len(first) < 3 or 0 in first + second:
        return False
    channels = [axes.index(letter) - len(axes) for letter in "IO"]
    (_, between), (rank, outputs) = ([shape[i] for i in channels] for shape in (first, second))
    groups, rest = divmod(between, rank)
    others = set(range(-len(first), 0)) - set(channels)
    taps = all(
        first[i] == 1 or second[i] == 1 or (first[i] == second[i] and i < -len(axes))
        for i in others
    )
    return taps and groups >= 1 and rest == 0 and outputs % groups == 0


def choose(ranks: Ranks | None, trace: Trace | None) -> Ranks:
    """The table as given, or the safe layers of the trace at half their parameters."""
    if ranks:
        return ranks
    if trace is None or ranks is not None:
        raise ValueError(
            "The table of ranks is empty; name at least one layer, as in {'Conv_0': 10}, or give no table "
            "and a trace of the forward pass, decompose(params, trace=trace(model.apply, variables, x))."
        )
    if half := trace.half_parameters():
        return half
    raise ValueError(
        f"No layer of the traced program can be decomposed and gets smaller by it:\n{trace}"
    )


def layer_leaves(flat: Mapping[tuple, Any], kernel: str = "kernel") -> dict[tuple, dict[str, Any]]:
    """The layers of a flattened tree that hold a kernel: key to all the leaves below it, by
    relative path."""
    layers: dict[tuple, dict[str, Any]] = {
        key[:-1]: {} for key in flat if key and key[-1] == kernel
    }
    for key, leaf in flat.items():
        for depth in range(len(key)):
            if key[:depth] in layers:
                layers[key[:depth]]["/".join(map(str, key[depth:]))] = leaf
    return layers


def find_layer(path: str, layers: Mapping[tuple, Any], kernel: str = "kernel") -> tuple:
    """The key whose parts joined by "/" are the path, or an error that suggests the nearest
    ones."""
    keys = {"/".join(map(str, key)): key for key in layers}
    if path in keys:
        return keys[path]
    if any(f"{path}/{name}" in keys for names in PAIRS for name in names):
        raise ValueError(
            f"{path!r} is decomposed already; call reconstruct(params) first to cut it to another rank."
        )
    advice = suggest(path, sorted(keys), f"the tree holds no {kernel!r} at all.")
    raise ValueError(f"No layer with a {kernel} at {path!r}; {advice}")


def check_kernel(
    path: str, leaves: Mapping[str, Any], names: tuple[str, str] = ("kernel", "bias")
) -> jax.Array:
    """The kernel of a layer, or an error that says why `decompose` cannot use it."""
    kernel = leaves[names[0]]
    if extra := sorted(set(leaves) - set(names)):
        raise ValueError(
            f"{path}: not a plain convolution, it also holds {extra}; leave it out of the table."
        )
    if not hasattr(kernel, "shape"):
        raise ValueError(
            f"{path}: the kernel is a {type(kernel).__name__}, not an array; give the tree without boxes, "
            "as flax.linen.unbox makes it."
        )
    if len(kernel.shape) < 3:
        raise ValueError(
            f"{path}: not the kernel of a convolution, which is (h, w, in, out); "
            f"its shape is {kernel.shape}. Leave it out of the table."
        )
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(
            f"{path}: the kernel has type {kernel.dtype}; convert it to a floating-point type first."
        )
    if isinstance(kernel, jax.ShapeDtypeStruct):
        raise ValueError(
            f"{path}: the kernel has a shape but no values; call decompose within jax.eval_shape."
        )
    if not isinstance(kernel, jax.core.Tracer) and not _finite(kernel):
        raise ValueError(
            f"{path}: the kernel holds NaN or infinite values; repair the weights before decomposing."
        )
    return kernel


def _finite(kernel: Any) -> bool:
    """On the host where it can be, for which nothing has to be compiled."""
    return bool(
        (np if getattr(kernel, "is_fully_addressable", True) else jnp).isfinite(kernel).all()
    )


def find_scheme(
    path: str, value: Any, kernel: jax.Array, axes: str, trace: Trace | None
) -> Separable:
    """The scheme of an entry of the table, checked against the kernel and, where there is one, the
    trace."""
    use = trace.safe_use(path) if trace is not None else None
    axes, groups = (use.axes, use.groups) if use else (fit_axes(axes, len(kernel.shape)), 1)
    scheme = value if isinstance(value, Separable) else Separable(value, groups, axes)
    if use and (scheme.groups, scheme.axes) != (groups, axes):
        raise ValueError(
            f"{path}: {scheme} does not fit the program, where groups={groups} and axes={axes!r}."
        )
    scheme.check(kernel.shape, path)
    return scheme
