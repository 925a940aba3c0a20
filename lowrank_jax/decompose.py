"""Parameter tree in, parameter tree out: `decompose` and its inverse `reconstruct`."""

import difflib
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from lowrank_jax.schemes import Separable, check_rank

FACTORS = ("vertical", "horizontal")
Ranks = Mapping[str, int | Separable]


def decompose(params: chex.ArrayTree, ranks: Ranks) -> dict[str, Any]:
    """Replaces the kernels that a table names by their low-rank factors.

    The layer ``{kernel, bias}`` becomes ``{vertical: {kernel}, horizontal: {kernel, bias}}``, which is the
    tree of `SeparableConv`. Every other leaf is passed on as the same object. Pure: works under ``jax.jit``,
    ``jax.vmap`` and ``jax.eval_shape``. A kernel of more than four axes is a stack, decomposed slice by slice.

    Args:
        params: nested mapping of arrays; convolution kernels are (..., h, w, in, out).
        ranks: layer path, its keys joined by "/", to the rank, or to `Separable` where the layer has groups.

    Returns:
        A plain nested dict with the factors in place of the named kernels.

    Raises:
        ValueError: the table is empty, or a path, a kernel or a rank in it cannot be used.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> small = decompose({"conv": {"kernel": jnp.ones((3, 3, 8, 16)), "bias": jnp.ones(16)}}, {"conv": 2})
        >>> jax.tree.map(jnp.shape, small["conv"])
        {'horizontal': {'bias': (16,), 'kernel': (1, 3, 2, 16)}, 'vertical': {'kernel': (3, 1, 8, 2)}}
    """
    if not ranks:
        raise ValueError("The table of ranks is empty; name at least one layer, as in {'Conv_0': 10}.")
    flat = flatten_dict(params, keep_empty_nodes=True)
    layers = layer_leaves(flat)
    for path, value in ranks.items():
        scheme = value if isinstance(value, Separable) else Separable(value)
        key = find_layer(path, layers)
        kernel = check_kernel(path, layers[key], scheme)
        bias = {name: flat.pop((*key, name)) for name in layers[key]}
        bias.pop("kernel")
        factors = dict(zip(FACTORS, scheme.factor(kernel), strict=True))
        flat |= {(*key, name, "kernel"): factor for name, factor in factors.items()}
        flat |= {(*key, "horizontal", name): leaf for name, leaf in bias.items()}
    return unflatten_dict(flat)


def reconstruct(params: chex.ArrayTree) -> dict[str, Any]:
    """Multiplies all factors back into dense kernels; the inverse of `decompose` up to the dropped ranks.

    Args:
        params: tree with or without decomposed layers; ``variables`` of a Flax model work too.

    Returns:
        A plain nested dict with the tree of the dense network. Other leaves are the same objects.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"conv": {"kernel": jnp.ones((3, 3, 8, 16)), "bias": jnp.ones(16)}}
        >>> jax.tree.map(jnp.shape, reconstruct(decompose(params, {"conv": 2})))
        {'conv': {'bias': (16,), 'kernel': (3, 3, 8, 16)}}
    """
    flat = flatten_dict(params, keep_empty_nodes=True)
    for key in [key[:-2] for key in flat if key[-2:] == ("vertical", "kernel")]:
        if not is_factored(flat, key):
            continue
        kernels = [flat.pop((*key, name, "kernel")) for name in FACTORS]
        flat[(*key, "kernel")] = Separable.merge(*kernels)
        if (bias := (*key, "horizontal", "bias")) in flat:
            flat[(*key, "bias")] = flat.pop(bias)
    return unflatten_dict(flat)


def is_factored(flat: Mapping[tuple, Any], key: tuple) -> bool:
    """Whether the layer at a key of a flattened tree holds factors as `decompose` makes them."""
    below = {k[len(key) :] for k in flat if k[: len(key)] == key}
    required = {(name, "kernel") for name in FACTORS}
    if not required <= below <= required | {("horizontal", "bias")}:
        return False
    vertical, horizontal = (jnp.shape(flat[(*key, name, "kernel")]) for name in FACTORS)
    if len(vertical) < 4 or vertical[:-4] != horizontal[:-4] or 0 in vertical + horizontal:
        return False
    groups, rest = divmod(vertical[-1], horizontal[-2])
    return vertical[-3] == horizontal[-4] == 1 and groups >= 1 and rest == 0 and horizontal[-1] % groups == 0


def layer_leaves(flat: Mapping[tuple, Any]) -> dict[tuple, dict[str, Any]]:
    """The layers of a flattened tree that hold a kernel: key to all the leaves below it, by relative path."""
    layers: dict[tuple, dict[str, Any]] = {key[:-1]: {} for key in flat if key and key[-1] == "kernel"}
    for key, leaf in flat.items():
        for depth in range(len(key)):
            if key[:depth] in layers:
                layers[key[:depth]]["/".join(map(str, key[depth:]))] = leaf
    return layers


def find_layer(path: str, layers: Mapping[tuple, Any]) -> tuple:
    """The key whose parts joined by "/" are the path, or an error that suggests the nearest ones."""
    keys = {"/".join(map(str, key)): key for key in layers}
    if path in keys:
        return keys[path]
    factors = [f"{path}/{name}" for name in FACTORS]
    if all(name in keys for name in factors):
        raise ValueError(f"{path!r} is decomposed already; call reconstruct(params) first to cut it to another rank.")
    near = difflib.get_close_matches(path, keys, n=3, cutoff=0.4) or sorted(keys)[:8]
    advice = f"did you mean {' or '.join(map(repr, near))}?" if near else "the tree holds no kernel at all."
    raise ValueError(f"No layer with a kernel at {path!r}; {advice}")


def check_kernel(path: str, leaves: Mapping[str, Any], scheme: Separable) -> jax.Array:
    """The kernel of a layer, or an error that says why `decompose` cannot use it."""
    kernel = leaves["kernel"]
    if extra := sorted(set(leaves) - {"kernel", "bias"}):
        raise ValueError(f"{path}: not a plain convolution, it also holds {extra}; leave it out of the table.")
    if not hasattr(kernel, "shape"):
        raise ValueError(
            f"{path}: the kernel is a {type(kernel).__name__}, not an array; give the tree without boxes, "
            "as flax.linen.unbox makes it."
        )
    if len(kernel.shape) < 4:
        raise ValueError(
            f"{path}: not the kernel of a two-dimensional convolution, which is (h, w, in, out); "
            f"its shape is {kernel.shape}. Leave it out of the table."
        )
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(f"{path}: the kernel has type {kernel.dtype}; convert it to a floating-point type first.")
    if scheme.groups < 1 or kernel.shape[-1] % scheme.groups:
        raise ValueError(
            f"{path}: groups={scheme.groups} must be at least 1 and divide the {kernel.shape[-1]} outputs."
        )
    check_rank(scheme.rank, kernel.shape, scheme.groups, path)
    if not isinstance(kernel, jax.core.Tracer) and not jnp.isfinite(kernel).all():
        raise ValueError(f"{path}: the kernel holds NaN or infinite values; repair the weights before decomposing.")
    return kernel
