"""Parameter tree in, parameter tree out: `decompose` and its inverse `reconstruct`."""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.factorization.axes import kernel_size
from lowrank_jax.factorization.factors import (
    check_array,
    check_floating,
    is_factors,
)
from lowrank_jax.factorization.merging import product
from lowrank_jax.factorization.scheme import Scheme, factor_all
from lowrank_jax.program.changed import KEY
from lowrank_jax.program.kernel_use import Trace
from lowrank_jax.tree.paths import find_leaf, map_named, named_leaves
from lowrank_jax.tree.rules import Rules, as_table, resolve
from lowrank_jax.tree.warning import warn

LOG = logging.getLogger("lowrank_jax")
WINDOW = 11  # the largest that the networks of the field have
NO_MATRICES = ("bias", "scale", "embedding", "mean", "var")


def decompose(
    tree: Any, rules: Rules | None = None, trace: Trace | None = None, *, axes: str = "HWIO"
) -> Any:
    """Replaces the kernels that a table names by their low-rank factors.

    A kernel (h, w, in, out) becomes a dict of two arrays in its place: ``{"vertical": (h, 1, in,
    rank), "horizontal": (1, w, rank, out)}``. Every other leaf is passed on as the same object, and
    all containers stay what they are. Pure: works under ``jax.jit``, ``jax.vmap`` and
    ``jax.eval_shape``. A kernel of more axes than its layout is a stack, decomposed slice by slice;
    one of three axes belongs to a convolution of one dimension.

    Args:
        tree: pytree of arrays: parameters, or all variables of a model.
        rules: a `Plan`, or a table of layer paths, their keys joined by "/", or of regular
            expressions that match them, to the rank, a share of the parameters, a scheme such as
            `Separable`, or None for dense: see `lowrank_jax.tree.rules.resolve`. Without a table,
            every layer that the trace proves safe and that gets smaller is cut to half its
            parameters.
        trace: `lowrank_jax.trace` of the forward pass; groups and layouts are taken from it and
            layers that cannot run decomposed are refused. Without a trace a layer with groups needs
            a scheme that has its ``groups``.
        axes: layout of the kernels where there is no trace, such as "OIHW", that of PyTorch and
            Equinox.

    Returns:
        The tree with factors in place of the named kernels, for `lowrank_jax.lowrank`.

    Raises:
        ValueError: there is neither a table nor a trace, the table is empty, or a path, a kernel or
            a rank in the table cannot be used.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"conv": {"kernel": jnp.ones((3, 3, 8, 16)), "bias": jnp.ones(16)}}
        >>> jax.tree.map(jnp.shape, decompose(params, {"conv": 2})["conv"]["kernel"])
        {'horizontal': (1, 3, 2, 16), 'vertical': (3, 1, 8, 2)}
    """
    schemes = find_schemes(tree, rules, axes, trace)
    planned = [path for path in getattr(rules, "changed", ()) if path in schemes]
    if planned and trace is None:
        raise ValueError(
            f"{planned[0]}: the program changes this kernel before it reads it, and the plan is of "
            "the changed kernel; give trace=lowrank_jax.trace(apply, variables, inputs), which "
            "computes it."
        )
    return factored(tree, schemes, changed_kernels(tree, schemes, trace))


def changed_kernels(tree: Any, paths: Collection[str], trace: Trace | None) -> dict[str, jax.Array]:
    """The kernels of some layers that the program changes first, as it changes them.

    Args:
        tree: holds the parameters.
        paths: of the layers.
        trace: of the program; without one nothing is known of changes.
    """
    if trace is None or trace.changed is None:
        return {}
    own = [path for path in paths if path in trace.changed.roots]
    return trace.changed.values(own, named_leaves(tree)) if own else {}


def factored(
    tree: Any, schemes: Mapping[str, Scheme], changed: Mapping[str, jax.Array] | None = None
) -> Any:
    """A tree with the factors of the kernels at some paths, by checked schemes.

    Args:
        tree: holds the kernels.
        schemes: layer path to its scheme.
        changed: kernels as the program changes them, in place of the stored ones.
    """
    changed = changed or {}
    kernels = named_leaves(tree) | dict(changed)
    given = [kernels[path] for path in schemes]
    factors = factor_all(list(schemes.values()), given)
    new = dict(zip(schemes, zip(schemes.values(), factors, strict=True), strict=True))
    return replaced(tree, new, changed)


def replaced(
    tree: Any,
    new: Mapping[str, tuple[Scheme, Sequence[jax.Array]]],
    changed: Collection[str] = (),
) -> Any:
    """A tree with factors in place of the kernels at some paths.

    Args:
        tree: holds the kernels.
        new: layer path to its scheme and factors.
        changed: the layers whose factors are of the kernel as the program changes it.
    """

    def leaf(name: str, old: Any) -> Any:
        if name not in new:
            return old
        scheme, factors = new[name]
        node = scheme.node(factors)
        return {KEY: node} if name in changed else node

    return map_named(leaf, tree)


def reconstruct(tree: Any) -> Any:
    """Multiplies all factors back into dense kernels; the inverse of `decompose`.

    Args:
        tree: pytree with or without decomposed layers; ``variables`` of a Flax model work too.

    Returns:
        The tree of the dense network, up to the ranks that were dropped. Other leaves are the same
        objects. Factors of a kernel that the program changes first become the changed kernel, as
        ``{"changed": array}``, which `lowrank` alone runs.

    Raises:
        ValueError: two factors do not fit together.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"conv": {"kernel": jnp.ones((3, 3, 8, 16)), "bias": jnp.ones(16)}}
        >>> jax.tree.map(jnp.shape, reconstruct(decompose(params, {"conv": 2})))
        {'conv': {'bias': (16,), 'kernel': (3, 3, 8, 16)}}
    """

    def leaf(name: str, old: Any) -> Any:
        return product(old, name) if is_factors(old) else old

    return map_named(leaf, tree)


def find_schemes(
    tree: Any,
    rules: Rules | None,
    axes: str = "HWIO",
    trace: Trace | None = None,
    units: Mapping[str, Scheme] | None = None,
) -> dict[str, Scheme]:
    """The scheme of every layer that a table names, checked against the kernels and the trace.

    Args:
        tree: holds the kernels.
        rules: as in `decompose`.
        axes: layout of the kernels where there is no trace.
        trace: of the program.
        units: as in `resolve`.

    Raises:
        ValueError: as `decompose` says.
    """
    if trace is not None and not isinstance(trace, Trace):
        raise ValueError(
            f"trace={trace!r:.80} is not allowed; give what trace(apply, variables, x) returns."
        )
    leaves = named_leaves(tree)
    given = _half(trace) if rules is None else rules
    for path, rule in as_table(given).items():
        if path in leaves and rule is not None:
            check_kernel(path, leaves[path])
    shapes = {name: leaf.shape for name, leaf in leaves.items() if _is_kernel(name, leaf)}
    schemes = resolve(given, shapes if trace is None else trace, axes=axes, units=units)
    for path, scheme in schemes.items():
        kernel = check_kernel(path, find_leaf(path, leaves))
        if trace is None and scheme.axes == "HWIO":
            _tell_other_layout(path, kernel.shape)
        _tell_growth(path, kernel.shape, scheme)
    return schemes


def _tell_growth(path: str, shape: tuple[int, ...], scheme: Scheme) -> None:
    """Logs ranks so high that the factors have more weights than the kernel."""
    dense, factors = kernel_size(scheme.axes, shape), scheme.parameters(shape)
    if factors > dense:
        LOG.warning("%s: %s has %d weights, the dense kernel %d.", path, scheme, factors, dense)


def _tell_other_layout(path: str, shape: tuple[int, ...]) -> None:
    """Warns of a kernel whose last two axes are a window's, and whose first two are none's."""
    if len(shape) < 4:
        return
    high, wide, inputs, outputs = shape[-4:]
    square = inputs == outputs and inputs % 2 == 1 and 3 <= inputs <= WINDOW
    if square and high * wide > inputs * outputs and (high != wide or high > WINDOW):
        warn(
            f"{path}: the kernel of shape {shape} is read as (height, width, inputs, outputs), "
            "and looks like (outputs, inputs, height, width), the layout of PyTorch and Equinox; "
            'give axes="OIHW", or trace=lowrank_jax.trace(apply, variables, inputs), which knows.'
        )


def _is_kernel(name: str, leaf: Any) -> bool:
    """Whether a rule may mean a leaf; quantised kernels are kernels, which are refused by name.

    Of the leaves with two axes, biases and scales of a stack are none, and tables of embeddings are
    read row by row.
    """
    ndim = getattr(leaf, "ndim", 0)
    if ndim < 2 or (ndim == 2 and name.rpartition("/")[2] in NO_MATRICES):
        return False
    return jnp.issubdtype(leaf.dtype, jnp.floating) or np.dtype(leaf.dtype).itemsize == 1


def _half(trace: Trace | None) -> Rules:
    """The safe layers of a trace at half their parameters."""
    if trace is None:
        raise ValueError(
            "There is no table of ranks; name at least one layer, as in {'Conv_0': 10}, or give a "
            "trace of the forward pass: "
            "decompose(variables, trace=trace(model.apply, variables, x))."
        )
    if half := trace.half_parameters():
        return half
    raise ValueError(
        "No layer of the traced program can be decomposed and gets smaller by it; leave the tree "
        f"as it is, or name layers:\n{trace}"
    )


def check_kernel(path: str, kernel: Any) -> Any:
    """The kernel of a layer, or an error that says why it cannot be decomposed.

    Raises:
        ValueError: the layer is decomposed already, or its kernel has no values, NaN, or a wrong
            shape or type.
    """
    if is_factors(kernel):
        raise ValueError(
            f"{path!r} is decomposed already; call reconstruct(tree) first to cut it to another "
            "rank."
        )
    check_array(kernel, path)
    if len(kernel.shape) < 2:
        raise ValueError(
            f"{path}: not the kernel of a layer, which is (in, out) or (h, w, in, out); "
            f"its shape is {kernel.shape}. Leave it out of the table."
        )
    check_floating(kernel.dtype, path)
    if isinstance(kernel, jax.ShapeDtypeStruct):
        raise ValueError(
            f"{path}: the kernel has a shape but no values; call decompose within jax.eval_shape."
        )
    if not isinstance(kernel, jax.core.Tracer) and not _finite(kernel):
        raise ValueError(
            f"{path}: the kernel holds NaN or infinite values; repair the weights before "
            "decomposing."
        )
    return kernel


def _finite(kernel: Any) -> bool:
    """On the host where it can be, for which nothing has to be compiled."""
    library = np if getattr(kernel, "is_fully_addressable", True) else jnp
    return bool(library.isfinite(kernel).all())
