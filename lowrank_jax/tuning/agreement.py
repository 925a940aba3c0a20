"""Whether two programs give the same outputs, to rounding."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.program.jaxprs import coarsest_eps


def rounding(program: Any) -> float:
    """The relative difference of outputs that is rounding: the root of the precision of the
    coarsest type in a jaxpr.

    What sums in another order differs by a few units of that precision in every layer; what is
    computed from other images, or by a broken kernel, differs altogether.

    Example:
        >>> rounding(jax.make_jaxpr(lambda x: x.astype("bfloat16").sum().astype("float32"))(jnp.ones(3)))
        0.08838834764831845
    """
    return coarsest_eps(program) ** 0.5


def agree(wanted: Any, found: Any, tolerance: float) -> bool:
    """Whether two pytrees have the same shapes and types and are equal within a tolerance, in the
    norm of each array.

    Example:
        >>> agree({"a": jnp.ones(3)}, {"a": jnp.ones(3) + 1e-6}, tolerance=1e-3)
        True
    """
    shapes, others = (jax.tree.map(lambda y: (y.shape, y.dtype), tree) for tree in (wanted, found))
    if shapes != others:
        return False
    pairs = zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True)
    wide = [(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)) for a, b in pairs]
    return all(jnp.linalg.norm(a - b) <= tolerance * jnp.linalg.norm(a) for a, b in wide)


def most_agreed(outputs: Mapping[str, Any], tolerance: float) -> str:
    """Name of the outputs that most of the others agree with; of equals the first.

    Example:
        >>> most_agreed({"broken": jnp.full(3, jnp.nan), "one": jnp.ones(3), "other": jnp.ones(3)}, tolerance=1e-3)
        'one'
    """
    votes = {
        name: sum(agree(own, other, tolerance) for other in outputs.values())
        for name, own in outputs.items()
    }
    return max(votes, key=lambda name: votes[name])


def right(
    outputs: Mapping[str, Any], tolerance: float, judges: Sequence[str] | None = None
) -> list[str]:
    """Names of the outputs that are those of most judges, which come first; without judges, of most
    of all.

    Example:
        >>> right({"broken": jnp.full(3, jnp.nan), "one": jnp.ones(3), "other": jnp.ones(3)}, tolerance=1e-3)
        ['one', 'other']
    """
    base = most_agreed(
        {name: outputs[name] for name in (outputs if judges is None else judges)}, tolerance
    )
    return [
        base,
        *(
            name
            for name, own in outputs.items()
            if name != base and agree(outputs[base], own, tolerance)
        ),
    ]
