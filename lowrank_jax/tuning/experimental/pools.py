"""Poolings inside a network as maxima or sums of slices.

XLA's own loop over the windows is slow on a CPU.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowrank_jax.factorization.factors import wide
from lowrank_jax.program.jaxprs import opened, programs
from lowrank_jax.program.rewriting import Part, rewritten

POOLS = ("window", "slices")
MOST_PLACES = 64  # of a window; each is one slice of the program
_KINDS = {"reduce_window_max": "max", "reduce_window_sum": "sum"}


@dataclasses.dataclass(frozen=True)
class Pool:
    """One pooling of floating numbers, without dilation.

    Attributes:
        inputs: shape of the array.
        window, strides: one entry for each axis of the array.
        padding: (before, after) for each axis.
        kind: "max" or "sum", of which an average is made afterwards.
        dtype: name of the type.

    Example:
        >>> pool = Pool((1, 4, 4, 1), (1, 2, 2, 1), (1, 2, 2, 1), ((0, 0),) * 4, "max")
        >>> pool.run("slices", jnp.arange(16.0).reshape(1, 4, 4, 1)).ravel().tolist()
        [5.0, 7.0, 13.0, 15.0]
    """

    inputs: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    kind: str
    dtype: str = "float32"

    @classmethod
    def of(cls, eqn: Any) -> "Pool | None":
        """The pooling of an equation; None if it is no such pooling, or one of too many slices."""
        if eqn.primitive.name not in _KINDS:
            return None
        own, dtype = eqn.params, eqn.invars[0].aval.dtype
        dilated = {*own["base_dilation"], *own["window_dilation"]} != {1}
        many = math.prod(own["window_dimensions"]) > MOST_PLACES
        empty = 0 in eqn.outvars[0].aval.shape
        if dilated or many or empty or not jnp.issubdtype(dtype, jnp.floating):
            return None
        return cls(
            inputs=eqn.invars[0].aval.shape,
            window=tuple(own["window_dimensions"]),
            strides=tuple(own["window_strides"]),
            padding=tuple((before, after) for before, after in own["padding"]),
            kind=_KINDS[eqn.primitive.name],
            dtype=dtype.name,
        )

    def run(self, algorithm: str, x: Float[Array, "*shape"]) -> Float[Array, "*pooled"]:
        """Runs the pooling by one of `POOLS`.

        "window" is XLA's loop over the windows. "slices" takes one slice for each place of a
        window. Slices are compared or summed in float32 or wider, because XLA's CPU compiler rounds
        after every operation in half precision, which is slow as well.

        Raises:
            ValueError: the algorithm is unknown.
        """
        if algorithm not in POOLS:
            raise ValueError(
                f"The algorithm {algorithm!r} of a pooling is not known; give one of "
                f"{', '.join(POOLS)}."
            )
        where = (self.window, self.strides, self.padding)
        operation, start = (jax.lax.max, -jnp.inf) if self.kind == "max" else (jax.lax.add, 0.0)
        if algorithm == "window":
            return jax.lax.reduce_window(x, start, operation, *where)
        own = wide(x)
        edges = [(before, after, 0) for before, after in self.padding]
        padded = jax.lax.pad(own, jnp.asarray(start, own.dtype), edges)
        return functools.reduce(operation, self._slices(padded)).astype(x.dtype)

    def _slices(self, padded: jax.Array) -> Iterator[jax.Array]:
        sizes = zip(padded.shape, self.window, self.strides, strict=True)
        spans = [(n - w) // s * s + 1 for n, w, s in sizes]
        for place in itertools.product(*map(range, self.window)):
            stops = [start + span for start, span in zip(place, spans, strict=True)]
            yield jax.lax.slice(padded, place, stops, self.strides)


def pools(program: Any) -> Iterator[Pool]:
    """The poolings of a program that `pooled` can run by another algorithm."""
    for eqn in opened(program).eqns:
        if pool := Pool.of(eqn):
            yield pool
        elif eqn.primitive.name == "jit":
            yield from (pool for inner in programs(eqn.params) for pool in pools(inner))


def pooled(fn: Callable, choose: Callable[[Pool], str]) -> Callable:
    """A function that computes what another does, each pooling by the algorithm chosen for it.

    Poolings inside loops and branches stay as they are, see `rewritten`.

    Args:
        fn: function of trees of arrays that gives a tree of arrays.
        choose: function of a `Pool` that gives one of `POOLS`; `Timer.fastest_pool` is one.

    Example:
        >>> from flax import linen as nn
        >>> images = jnp.arange(16.0).reshape(1, 4, 4, 1)
        >>> run = pooled(lambda x: nn.avg_pool(nn.relu(x), (2, 2), (2, 2)), lambda pool: "slices")
        >>> run(images).ravel().tolist()
        [2.5, 4.5, 10.5, 12.5]
    """

    def parts(program: Any) -> list[Part]:
        return [_part(eqn, pool, choose) for eqn in program.eqns if (pool := Pool.of(eqn))]

    return rewritten(fn, parts)


def _part(eqn: Any, pool: Pool, choose: Callable[[Pool], str]) -> Part:
    return Part([eqn], lambda read: [pool.run(choose(pool), read(eqn.invars[0]))])
