"""Times of layers on this device, measured once: the fastest program of each, and tables for the
planner."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.factorization.separable import FACTORS, Separable, max_rank
from lowrank_jax.io.atomic import whole_file
from lowrank_jax.program.kernel_use import KernelUse, Trace
from lowrank_jax.tuning.algorithms import MERGED, PLAIN, Layer, factors, programs
from lowrank_jax.tuning.experimental.pools import POOLS, Pool
from lowrank_jax.tuning.steps import STEPS
from lowrank_jax.tuning.timing import race

DENSE = "dense"
LEAST, MOST = (
    0.01,
    2.0,
)  # seconds: shorter turns are mostly noise, longer comparisons are not worth it
MARGIN = 1.1  # by which a program with "winograd" has to be faster: see `Timer.fastest`
POINTS = (
    0.125,
    0.25,
    0.375,
    0.5,
    0.75,
)  # of the rank at which the factors have as many weights as the kernel


class Timer:
    """Measures layers on the default device and remembers what it found.

    All programs of a layer run in turn, so that a change of the machine's speed meets them alike.
    Inputs and weights
    are made up: on the shapes alone depends how long they take.

    Args:
        options: compiler options, as of ``jax.jit``; one of
            `lowrank_jax.compiling.candidate_options`.
        rounds: runs of each program that is close to the fastest; their median is taken.
        path: JSON file to start from and to keep up to date; measured times of other devices in it
            stay.

    Raises:
        ValueError: the file holds something else.

    Example:
        >>> timer = Timer(rounds=2)
        >>> layer = Layer((1, 8, 8, 4), 16, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))
        >>> times = timer.measure(layer, Separable(2))
        >>> "dense" in times and timer.fastest(layer, Separable(2)) in times
        True
    """

    def __init__(
        self,
        options: Mapping[str, Any] | None = None,
        rounds: int = 7,
        path: str | os.PathLike | None = None,
    ) -> None:
        self.options, self.rounds = dict(options or {}), rounds
        self.path = None if path is None else Path(path)
        self.times: dict[str, dict[str, float]] = (
            _read(self.path) if self.path and self.path.exists() else {}
        )

    def fastest(self, layer: Layer, scheme: Separable | None) -> str:
        """Name of the fastest program of a layer; for `lowrank(apply, programs=timer.fastest)`.

        One with "winograd", which has many small operations, has to be faster than the others by a
            margin: within a
        network, beside other layers, these cost more than alone.
        """
        names = programs(layer, None if scheme is None else scheme.rank)
        if len(names) == 1:
            return names[0]
        times = {
            name: seconds for name, seconds in self.measure(layer, scheme).items() if name != DENSE
        }
        best, other = _least(times), _least(times, without="winograd")
        return best if times[best] * MARGIN < times[other] else other

    def measure(
        self, layer: Layer, scheme: Separable | None, names: Sequence[str] = ()
    ) -> Mapping[str, float]:
        """Seconds of a layer by the name of the program, with those of the fastest dense one under
        "dense".

        Args:
            layer: the dense layer.
            scheme: its decomposition; without one, the programs of the dense layer are measured.
            names: the programs; without them all but those of two steps, and of these two
                convolutions and the pairs of the steps that are fastest alone, with and without
                "winograd"; a merged kernel as the dense one is fastest.
        """
        return self._known(self._key(layer, scheme, names), lambda: self._run(layer, scheme, names))

    def fastest_pool(self, pool: Pool) -> str:
        """Name of the fastest program of a pooling, for `lowrank_jax.pools.pooled`."""

        def run() -> dict[str, float]:
            x = jnp.full(pool.inputs, 0.5, pool.dtype)
            return self._time({name: (functools.partial(pool.run, name), x) for name in POOLS})

        return _least(self._known(self._line(dataclasses.astuple(pool)), run))

    def _known(self, key: str, run: Callable[[], dict[str, float]]) -> Mapping[str, float]:
        if key not in self.times:
            with (
                jax.ensure_compile_time_eval()
            ):  # works while a program that asks for it is being traced, too
                self.times[key] = run()
            if self.path:
                _write(self.path, self.times)
        return self.times[key]

    def _key(self, layer: Layer, scheme: Separable | None, names: Sequence[str] = ()) -> str:
        how = (scheme.rank, scheme.first) if scheme else (None, None)
        return self._line(dataclasses.astuple(layer), *how, *names)

    def _line(self, *what: Any) -> str:
        return json.dumps(
            [jax.devices()[0].device_kind, jax.__version__, sorted(self.options.items()), *what]
        )

    def _run(
        self, layer: Layer, scheme: Separable | None, names: Sequence[str]
    ) -> dict[str, float]:
        x, kernel = (jnp.full(shape, 0.5, layer.dtype) for shape in (layer.inputs, layer.kernel))
        whole = programs(layer, None) if scheme is None else [self.fastest(layer, None)]
        dense = {
            name: (functools.partial(layer.convolve, step=STEPS[name]), x, kernel) for name in whole
        }
        if scheme is None:
            times = self._time(dense)
            return times | {DENSE: min(times.values())}
        shapes = factors(layer, scheme.rank, scheme.first)
        one, two = (jnp.full(shape, 0.5, layer.dtype) for shape in shapes)
        if not names and len(names := programs(layer, scheme.rank)) > 2:
            best = self._best_steps(layer, scheme, x, one, two)
            others = [
                name for name in names[len(STEPS) ** 2 :] if MERGED.get(name, whole[0]) == whole[0]
            ]
            names = list(dict.fromkeys([PLAIN, *best, *others]))

        def pair(name: str) -> Any:
            return lambda x, one, two: layer.run(name, scheme.first, x, one, two)

        times = self._time({name: (pair(name), x, one, two) for name in names} | dense)
        return {name: times[name] for name in names} | {DENSE: times[whole[0]]}

    def _best_steps(
        self, layer: Layer, scheme: Separable, x: jax.Array, one: jax.Array, two: jax.Array
    ) -> list[str]:
        halves = layer.halves(scheme.first)
        between = jax.eval_shape(halves[0], x, one)
        inputs = (x, jnp.full(between.shape, 0.5, between.dtype))
        best, others = [], []
        for half, given, kernel in zip(halves, inputs, (one, two), strict=True):
            runs = {
                name: (lambda a, b, h=half, s=step: h(a, b, s), given, kernel)
                for name, step in STEPS.items()
            }
            times = self._time(runs)
            best.append(_least(times))
            others.append(_least(times, without="winograd"))
        return ["+".join(best), "+".join(others)]

    def _time(self, runs: Mapping[str, tuple]) -> dict[str, float]:
        """Seconds of functions with their arguments; those that are the same program run once."""
        lowered = {
            name: jax.jit(fn, compiler_options=self.options).lower(*args)
            for name, (fn, *args) in runs.items()
        }
        seen: dict[str, str] = {}
        same = {name: seen.setdefault(program.as_text(), name) for name, program in lowered.items()}

        def bind(name: str) -> Callable:
            compiled, args = lowered[name].compile(), runs[name][1:]
            return lambda: jax.block_until_ready(compiled(*args))

        times = race({name: bind(name) for name in seen.values()}, self.rounds, LEAST, MOST)
        return {name: times[first] for name, first in same.items()}


def layer_seconds(
    trace: Trace, timer: Timer, paths: Sequence[str] | None = None, multiple: int = 1
) -> dict[str, dict[Separable | None, float]]:
    """Times of every layer dense and at a few ranks in both orders: the table for
    `lowrank_jax.ranks.latency`.

    The time of a layer at a rank is that of its fastest program; kernels that run several times
    count each time.

    Args:
        trace: `lowrank_jax.trace` of the forward pass, at the batch size that is to be fast.
        timer: that measures.
        paths: the layers; without them all that the trace proves safe.
        multiple: ranks are restricted to multiples of it.
    """
    found: dict[str, dict[Separable | None, float]] = {}
    for path in trace.safe_paths() if paths is None else paths:
        rows = [_row(Layer.of(use), timer, _grid(use, multiple)) for use in trace.at(path)]
        if rows[0]:
            times = list(zip(rows, trace.at(path), strict=True))
            found[path] = {
                scheme: sum(use.uses * row[scheme] for row, use in times) for scheme in rows[0]
            }
    return found


def _row(layer: Layer, timer: Timer, schemes: list[Separable]) -> dict[Separable | None, float]:
    """Times of one layer, dense and by schemes; which program suits an order is found out at its
    middle rank."""
    row: dict[Separable | None, float] = {}
    for first in dict.fromkeys(scheme.first for scheme in schemes):
        own = [scheme for scheme in schemes if scheme.first == first]
        best = timer.fastest(layer, own[len(own) // 2])
        for scheme in own:
            times = timer.measure(layer, scheme, list(dict.fromkeys([PLAIN, best])))
            row[scheme] = min(seconds for name, seconds in times.items() if name != DENSE)
            row[None] = min(row.get(None, times[DENSE]), times[DENSE])
    return row


def _grid(use: KernelUse, multiple: int) -> list[Separable]:
    size = max(
        s
        for letter, s in zip(use.axes, use.kernel_shape[-len(use.axes) :], strict=True)
        if letter not in "IO"
    )
    found = []
    for first in FACTORS if size > 1 else ["vertical"]:
        even = use.parameters // use.parameters_at(use.scheme(1, first))
        limit = min(even, max_rank(use.kernel_shape, use.groups, use.axes, first))
        ranks = {multiple * round(share * even / multiple) for share in POINTS}
        found += [use.scheme(rank, first) for rank in sorted(ranks) if 1 <= rank <= limit]
    return found


def _least(times: Mapping[str, float], without: str | None = None) -> str:
    """Name of the least of some times, of those that do not have a word in their name."""
    return min(
        (name for name in times if without is None or without not in name),
        key=lambda name: times[name],
    )


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        found = json.loads(path.read_text())
        return {
            str(key): {str(k): float(v) for k, v in times.items()} for key, times in found.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no measured times: {error}. Remove it, or name another file."
        ) from error


def _write(path: Path, times: Mapping[str, Mapping[str, float]]) -> None:
    with whole_file(path) as part:
        part.write_text(json.dumps(times, indent=0) + "\n")
