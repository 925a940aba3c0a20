"""Poolings inside a network as maxima or sums of slices: XLA's own loop over the windows is slow on
a CPU."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

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
        aval, own = eqn.invars[0].aval, eqn.params
        dilated = {*own["base_dilation"], *own["window_dilation"]} != {1}
        many = math.prod(own["window_dimensions"]) > MOST_PLACES
        if (
            dilated
            or many
            or not jnp.issubdtype(aval.dtype, jnp.floating)
            or 0 in eqn.outvars[0].aval.shape
        ):
            return None
        window, strides = tuple(own["window_dimensions"]), tuple(own["window_strides"])
        padding = tuple((before, after) for before, after in own["padding"])
        return cls(
            aval.shape, window, strides, padding, _KINDS[eqn.primitive.name], aval.dtype.name
        )

    def run(self, program: str, x: jax.Array) -> jax.Array:
        """Runs the pooling by one of `POOLS`: XLA's loop over the windows, or one slice for each
        place of a window.

        Slices are compared or summed in float32 or wider, because XLA's CPU compiler rounds after
        every operation in half precision, which is slow as well.

        Raises:
            ValueError: the program is unknown.
        """
        operation, start = (jax.lax.max, -jnp.inf) if self.kind == "max" else (jax.lax.add, 0.0)
        if program == "window":
            return jax.lax.reduce_window(
                x, start, operation, self.window, self.strides, self.padding
            )
        if program != "slices":
            raise ValueError(
                f"The program {program!r} of a pooling is not known; give one of {', '.join(POOLS)}."
            )
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = jax.lax.pad(
            wide, jnp.asarray(start, wide.dtype), [(*pair, 0) for pair in self.padding]
        )
        counts = [
            (n - w) // s + 1 for n, w, s in zip(wide.shape, self.window, self.strides, strict=True)
        ]

        def part(place: tuple[int, ...]) -> jax.Array:
            stops = [
                p + (n - 1) * s + 1 for p, n, s in zip(place, counts, self.strides, strict=True)
            ]
            return jax.lax.slice(wide, place, stops, self.strides)

        parts = map(part, itertools.product(*map(range, self.window)))
        return functools.reduce(operation, parts).astype(x.dtype)


def pools(program: Any) -> Iterator[Pool]:
    """The poolings of a program that `pooled` can run by another program."""
    for eqn in opened(program).eqns:
        if pool := Pool.of(eqn):
            yield pool
        elif eqn.primitive.name == "jit":
            yield from (pool for inner in programs(eqn.params) for pool in pools(inner))


def pooled(fn: Callable, choose: Callable[[Pool], str]) -> Callable:
    """A function that computes what another one does, each pooling by the program that is chosen
    for it.

    Those inside loops and branches stay as they are, see `rewritten`.

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
