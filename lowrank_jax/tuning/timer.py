"""Times of layers on this device, measured once."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.tuning.algorithms import (
    MERGED,
    PAIRS,
    PLAIN,
    Layer,
    algorithms_of,
    factor_shapes,
)
from lowrank_jax.tuning.device import Device
from lowrank_jax.tuning.experimental.pools import POOLS, Pool
from lowrank_jax.tuning.products import Product
from lowrank_jax.tuning.steps import STEPS
from lowrank_jax.tuning.timer_file import DENSE, TWO, Times, add_times, key_of, read_times
from lowrank_jax.tuning.timing import Program, measure, reason

LEAST, MOST = 0.01, 2.0  # seconds: shorter turns are mostly noise, longer measurements too dear
MARGIN = 1.1  # by which an algorithm with "winograd" has to be faster: see `Timer.fastest`


class Timer:
    """Measures layers on the default device and remembers what it found.

    All algorithms of a layer run in turn, so that a change of the machine's speed meets them alike.
    Inputs and weights are made up, because the time depends on the shapes alone. An algorithm that
    does not compile or run is left out.

    Args:
        options: compiler options, as of ``jax.jit``; one of `candidate_options`.
        rounds: runs of each algorithm that is near the fastest; their median is taken.
        path: JSON file to start from and to keep up to date. Times belong to a device, processor,
            number of cores and release of JAX; times of other machines stay in the file. Processes
            may share the file.
        training: whether layers run as in training: forwards, and backwards to their inputs and
            kernels.

    Attributes:
        times: seconds by layer and algorithm.
        failed: algorithms that did not compile or run, to the reason.

    Raises:
        ValueError: the file holds something else.

    Example:
        >>> from lowrank_jax import Separable
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
        training: bool = False,
    ) -> None:
        self.options, self.rounds, self.training = dict(options or {}), rounds, training
        self.path = None if path is None else Path(path)
        self.times: Times = read_times(self.path) if self.path else {}
        self.failed: dict[str, str] = {}

    def fastest(self, layer: Layer, scheme: Scheme | None) -> str:
        """Name of the fastest algorithm of a layer; for `with_algorithms(apply, timer.fastest)`.

        "winograd" has many small operations. Within a network, beside other layers, these cost more
        than alone, so that an algorithm with "winograd" has to be faster than the others by a
        margin.
        """
        names = algorithms_of(layer, None if scheme is None else scheme.rank)
        if len(names) == 1:
            return names[0]
        found = self.measure(layer, scheme)
        times = {name: seconds for name, seconds in found.items() if name != DENSE}
        best, other = _least(times), _least(times, without="winograd")
        return best if times[best] * MARGIN < times[other] else other

    def measure(
        self, layer: Layer, scheme: Scheme | None, names: Sequence[str] = ()
    ) -> Mapping[str, float]:
        """Seconds of a layer by algorithm, with those of the fastest dense one under "dense".

        Args:
            layer: the dense layer.
            scheme: its decomposition. Without one, the algorithms of the dense layer are measured.
            names: the algorithms. Without them all are measured, but of pairs only two convolutions
                and the pairs of the steps that are fastest alone, with and without "winograd", and
                of merged kernels only the algorithm that is fastest for the dense one.
        """
        how = (scheme.rank, scheme.first) if scheme else (None, None)
        key = self._key(dataclasses.astuple(layer), *how, *names)
        if scheme is None:
            return self._known(key, lambda: self._dense(layer))
        return self._known(key, lambda: self._factored(layer, scheme, names))

    def measure_product(self, product: Product, scheme: Scheme) -> Mapping[str, float]:
        """Seconds of a product with two factors, and of the dense one under "dense"."""
        key = self._key(dataclasses.astuple(product), scheme.rank, scheme.groups)
        return self._known(key, lambda: self._time(product.runs(scheme), [DENSE, TWO]))

    def fastest_pool(self, pool: Pool) -> str:
        """Name of the fastest algorithm of a pooling, for `pooled`."""

        def run() -> dict[str, float]:
            x = jnp.full(pool.inputs, 0.5, pool.dtype)
            runs = {name: (functools.partial(pool.run, name), x) for name in POOLS}
            return self._time(runs, [POOLS[0]])

        return _least(self._known(self._key(dataclasses.astuple(pool)), run))

    def _key(self, *what: Any) -> str:
        how = ("training",) if self.training else ()
        return key_of(Device.here(), self.options, *how, *what)

    def _known(self, key: str, run: Callable[[], dict[str, float]]) -> Mapping[str, float]:
        if key not in self.times:
            with jax.ensure_compile_time_eval():  # while a program is traced, too
                self.times[key] = run()
            if self.path:
                self.times |= add_times(self.path, {key: self.times[key]})
        return self.times[key]

    def _dense(self, layer: Layer) -> dict[str, float]:
        names = algorithms_of(layer, None)
        times = self._time({name: _dense_run(layer, name) for name in names}, names[:1])
        return times | {DENSE: min(times.values())}

    def _factored(self, layer: Layer, scheme: Scheme, names: Sequence[str]) -> dict[str, float]:
        shapes = factor_shapes(layer, scheme.rank, scheme.first)
        arrays = [jnp.full(shape, 0.5, layer.dtype) for shape in (layer.inputs, *shapes)]
        dense = self.fastest(layer, None)
        names = names or self._worth(layer, scheme, arrays, dense)
        runs = {name: (_factored_run(layer, scheme, name), *arrays) for name in names}
        times = self._time(runs | {DENSE: _dense_run(layer, dense)}, [names[0], DENSE])
        return {name: times[name] for name in (*names, DENSE) if name in times}

    def _worth(
        self, layer: Layer, scheme: Scheme, arrays: Sequence[jax.Array], dense: str
    ) -> list[str]:
        """The algorithms worth measuring for a whole separable layer."""
        names = algorithms_of(layer, scheme.rank)
        if len(names) == 2:
            return names
        whole = [name for name in names if name not in PAIRS]
        whole = [name for name in whole if MERGED.get(name, dense) == dense]
        return list(dict.fromkeys([PLAIN, *self._best_pairs(layer, scheme, *arrays), *whole]))

    def _best_pairs(
        self, layer: Layer, scheme: Scheme, x: jax.Array, first: jax.Array, second: jax.Array
    ) -> list[str]:
        """The steps that are fastest alone, joined, with and without "winograd"."""
        halves = layer.halves(scheme.first)
        between = jax.eval_shape(halves[0], x, first)
        inputs = (x, jnp.full(between.shape, 0.5, between.dtype))
        best, others = [], []
        for half, given, kernel in zip(halves, inputs, (first, second), strict=True):
            runs = {name: (functools.partial(half, step=name), given, kernel) for name in STEPS}
            times = self._time(runs, [next(iter(STEPS))])
            best.append(_least(times))
            others.append(_least(times, without="winograd"))
        return ["+".join(best), "+".join(others)]

    def _time(self, runs: Mapping[str, tuple], needed: Sequence[str]) -> dict[str, float]:
        """Seconds of functions with their arguments; those that are the same program run once.

        Args:
            runs: name to (function, *arrays).
            needed: names whose errors are raised. Other functions that fail are left out.
        """
        texts, programs, errors = dict[str, str](), dict[str, Program](), dict[str, Exception]()
        for name, (fn, *args) in runs.items():
            try:
                own = _with_gradients(fn, len(args)) if self.training else fn
                lowered = jax.jit(own, compiler_options=self.options).lower(*args)
                texts[name] = lowered.as_text()
                if texts[name] not in programs:
                    programs[texts[name]] = _bound(lowered.compile(), args)
            except Exception as error:  # of any type, as XLA and the function raise it
                errors[name] = error
        late: dict[str, Exception] = {}
        times = measure(programs, self.rounds, LEAST, MOST, late)
        errors |= {name: late[text] for name, text in texts.items() if text in late}
        for name in needed:
            if name in errors:
                raise errors[name]
        self.failed |= {
            _described(name, runs, self.options): reason(errors[name]) for name in errors
        }
        return {name: times[text] for name, text in texts.items() if text in times}


def _described(name: str, runs: Mapping[str, tuple], options: Mapping[str, Any]) -> str:
    return f"{name} of arrays {[x.shape for x in runs[name][1:]]} with {dict(options)}"


def _bound(compiled: Any, args: Sequence[jax.Array]) -> Program:
    return lambda: jax.block_until_ready(compiled(*args))


def _with_gradients(fn: Callable, count: int) -> Callable:
    """The gradients of a function by all its arguments, towards what it gives."""

    def energy(*args: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(fn(*args).astype(jnp.float32))) / 2

    return jax.grad(energy, argnums=tuple(range(count)))


def _dense_run(layer: Layer, name: str) -> tuple:
    x, kernel = (jnp.full(shape, 0.5, layer.dtype) for shape in (layer.inputs, layer.kernel))
    return functools.partial(layer.convolve, step=name), x, kernel


def _factored_run(layer: Layer, scheme: Scheme, name: str) -> Callable:
    return functools.partial(layer.run, name, scheme.first)


def _least(times: Mapping[str, float], without: str | None = None) -> str:
    """Name of the least of some times, of those that do not have a word in their name."""
    names = [name for name in times if without is None or without not in name]
    return min(names, key=lambda name: times[name])
