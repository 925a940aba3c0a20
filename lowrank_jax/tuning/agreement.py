"""Whether two programs give the same outputs, to rounding."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.program.jaxprs import coarsest_eps


def rounding(program: Any) -> float:
    """The relative difference of outputs that is rounding, for the types that a jaxpr computes in.

    It is the root of the precision of the coarsest type. A sum in another order differs by a few
    units of that precision in every layer. Outputs of other images, or of a broken kernel, differ
    altogether.

    Example:
        >>> half = lambda x: x.astype("bfloat16").sum().astype("float32")
        >>> rounding(jax.make_jaxpr(half)(jnp.ones(3)))
        0.08838834764831845
    """
    return coarsest_eps(program) ** 0.5


def agree(wanted: Any, found: Any, tolerance: float) -> bool:
    """Whether two pytrees have the same shapes and types, and are equal within a tolerance.

    The tolerance is relative, in the norm of each array.

    Example:
        >>> agree({"a": jnp.ones(3)}, {"a": jnp.ones(3) + 1e-6}, tolerance=1e-3)
        True
    """
    shapes, others = (jax.tree.map(lambda y: (y.shape, y.dtype), tree) for tree in (wanted, found))
    if shapes != others:
        return False
    pairs = zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True)
    return all(_gap(a, b) <= tolerance * _norm(a) for a, b in pairs)


def _gap(a: Any, b: Any) -> float:
    return _norm(jnp.asarray(a, jnp.float32) - jnp.asarray(b, jnp.float32))


def _norm(a: Any) -> float:
    return float(jnp.linalg.norm(jnp.ravel(jnp.asarray(a, jnp.float32))))


def most_agreed(outputs: Mapping[str, Any], tolerance: float) -> str:
    """Name of the outputs that most of the others agree with; of equals the first.

    Example:
        >>> x, broken = jnp.ones(3), jnp.full(3, jnp.nan)
        >>> most_agreed({"broken": broken, "one": x, "other": x}, tolerance=1e-3)
        'one'
    """
    votes = {
        name: sum(agree(own, other, tolerance) for other in outputs.values())
        for name, own in outputs.items()
    }
    return max(votes, key=lambda name: votes[name])


def agreeing(outputs: Mapping[str, Any], tolerance: float) -> list[str]:
    """Names of the outputs that agree with most others. The most agreed one is first.

    Args:
        outputs: of programs, by name.
        tolerance: as in `agree`.

    Example:
        >>> x, broken = jnp.ones(3), jnp.full(3, jnp.nan)
        >>> agreeing({"broken": broken, "one": x, "other": x}, tolerance=1e-3)
        ['one', 'other']
    """
    base = most_agreed(outputs, tolerance)
    others = [name for name in outputs if name != base]
    return [base, *(name for name in others if agree(outputs[base], outputs[name], tolerance))]
