"""The fastest way to run a whole network on this device, found by measuring the ways there are."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.factorization.separable import Separable
from lowrank_jax.program.apply import lowrank
from lowrank_jax.program.compiler import calls_onednn, candidate_options
from lowrank_jax.tuning.agreement import right, rounding
from lowrank_jax.tuning.algorithms import PLAIN, Layer
from lowrank_jax.tuning.experimental.folding import folded
from lowrank_jax.tuning.experimental.pools import POOLS, Pool, pooled, pools
from lowrank_jax.tuning.timer import LEAST, Timer
from lowrank_jax.tuning.timing import CLOSE, race

SLICES = (8, 16, 32, 64)
MOST = 30.0  # seconds of the last runs of a comparison
Way = tuple[int, int | None]  # index of the compiler options, size of the slices


@dataclasses.dataclass(frozen=True)
class Fast:
    """A network as `fast` found it fastest: a compiled function of (variables, images).

    Attributes:
        run: the function, under ``jax.jit``; takes any batch.
        options: compiler options.
        size: images that run through the network at a time; None for all of them.
        programs: layers, with their scheme or None if dense, to the names of their programs; empty
            if the plain network was faster.
        pools: poolings to the names of their programs; empty in the same case.
        seconds: what was tried to the median of its time on the images given.
        frozen: whether the variables are part of the program.
    """

    run: Callable
    options: Mapping[str, Any]
    size: int | None
    programs: Mapping[tuple[Layer, Separable | None], str]
    pools: Mapping[Pool, str]
    seconds: Mapping[str, float]
    frozen: bool = False

    def __call__(self, variables: Any, images: Any) -> Any:
        if self.frozen and variables is not None:
            raise ValueError(
                "The variables are part of this program: give None for them, or search without freeze."
            )
        return self.run(variables, images)


def fast(
    apply: Callable,
    variables: Any,
    images: Any,
    *,
    slices: Sequence[int] = SLICES,
    timers: Callable[[Mapping[str, Any]], Timer] = Timer,
    rounds: int = 5,
    freeze: bool = False,
) -> Fast:
    """Measures ways to run a Linen network in evaluation, dense or decomposed, and returns the
    fastest.

    First each set of compiler options (`candidate_options`), on the whole batch and on slices of
    it, one after the
    other: the arrays between the layers of a slice stay in the cache, those of a large batch go
        through memory. Then,
    under each set and at its best slices, the fastest program of each layer and of each pooling
    (slices, or XLA's loop over the windows), measured at the best one. Where oneDNN's kernels run,
    scales of channels go into the kernels of the convolutions before them (`lowrank_jax.folding`):
    oneDNN adds what is left, a bias, as it convolves. A way whose
    outputs are not those of most ways with the whole batch, to rounding, is dropped: the network
        mixes its images, or
    XLA computes it wrongly, which happens.

    Args:
        apply: ``model.apply``, or a function of (variables, images) that calls it.
        variables: dense or decomposed ones.
        images: batch of the size that is to be fast. Where a run takes seconds, a part of it finds
            nearly the same in less time, and what is found takes any batch.
        slices: sizes to try; those of the batch and above are left out.
        timers: makes the `Timer` of the layers, from compiler options. To measure 50 layers at 224
            pixels takes minutes on a CPU; ``lambda options: Timer(options, path="times.json")``
            keeps the times for the next call.
        rounds: runs of each close way that are counted, in turn.
        freeze: makes the variables constants of the program, which lays them out for its kernels
            when it is compiled and not in each call: a gain at a batch of one, for a larger
                program. The result is a function of (None,
            images).

    Example:
        >>> from flax import linen as nn
        >>> import lowrank_jax as lr
        >>> model, images = nn.Sequential([nn.Conv(16, (3, 3)), nn.relu]), jnp.ones((4, 8, 8, 8))
        >>> variables = model.init(jax.random.key(0), images)
        >>> small = {"params": lr.decompose(variables["params"], {"layers_0": 3})}
        >>> run = fast(model.apply, small, images, rounds=2)
        >>> run(small, images).shape
        (4, 8, 8, 16)
    """
    network = lambda programs: lowrank(apply, programs)  # noqa: E731
    return search(
        network, variables, images, slices=slices, timers=timers, rounds=rounds, freeze=freeze
    )


def search(
    network: Callable,
    variables: Any,
    images: Any,
    *,
    slices: Sequence[int] = SLICES,
    timers: Callable[[Mapping[str, Any]], Timer] = Timer,
    rounds: int = 5,
    freeze: bool = False,
) -> Fast:
    """What `fast` does, for any network.

    Args:
        network: makes a function of (variables, images) that runs each layer by the program that
            the argument, a function of (layer, scheme) or None, chooses.
        variables, images, slices, timers, rounds, freeze: as in `fast`.
    """
    images = jnp.asarray(images)
    args = (None if freeze else variables, images)
    network = _frozen(network, variables) if freeze else network
    sizes = [None, *(size for size in slices if 0 < size < len(images))]
    ways = [(index, size) for index in range(len(candidate_options())) for size in sizes]
    plain = {_name(way): _compiled(network(None), way) for way in ways}
    program = jax.make_jaxpr(network(None))(*args)
    tolerance, has_pools = rounding(program), any(pools(program))
    whole = [_name(way) for way in ways if way[1] is None]  # a slice may lack what a network mixes
    seconds = _race(plain, args, rounds, tolerance, whole)

    tables: dict[str, _Table] = {}
    for close in _close_of_each(ways, seconds):
        timer, known = timers(candidate_options()[close[0][0]]), dict[Any, str]()
        for way in close:
            table = _Table(timer, known)
            chosen = pooled(network(table), table.pool) if has_pools else network(table)
            run = _compiled(chosen, way)
            run.eval_shape(*args)  # fills the table
            if table.differs:
                name = f"{_name(way)}, programs"
                plain[name], tables[name] = run, table
    if tables:
        first = min(seconds, key=lambda name: seconds[name])
        limit = CLOSE * seconds[first]
        near = {
            name: run
            for name, run in plain.items()
            if name in tables or seconds.get(name, math.inf) <= limit
        }
        seconds |= _race(near, args, rounds, tolerance, [first])
    best = min(seconds, key=lambda name: seconds[name])
    index, size = next(way for way in ways if best.removesuffix(", programs") == _name(way))
    names, own = (tables[best].names, tables[best].pools) if best in tables else ({}, {})
    return Fast(plain[best], candidate_options()[index], size, names, own, seconds, freeze)


def _frozen(network: Callable, variables: Any) -> Callable:
    return lambda programs: lambda _, images: network(programs)(variables, images)


class _Table:
    """The programs that a timer chose, as they are asked for while a network is traced.

    Attributes:
        names, pools: those of this network.
        known: those of layers and poolings by all but the batch, shared by networks that differ in
            the batch alone.
    """

    def __init__(self, timer: Timer, known: dict[Any, str]) -> None:
        self.timer, self.known = timer, known
        self.names, self.pools = dict[tuple[Layer, Separable | None], str](), dict[Pool, str]()

    def __call__(self, layer: Layer, scheme: Separable | None) -> str:
        return self.names.setdefault(
            (layer, scheme), self._shared(self.timer.fastest, layer, scheme)
        )

    def pool(self, pool: Pool) -> str:
        return self.pools.setdefault(pool, self._shared(self.timer.fastest_pool, pool))

    def _shared(self, measure: Callable, what: Layer | Pool, *how: Any) -> str:
        key = dataclasses.replace(what, inputs=what.inputs[1:]), *how
        if key not in self.known:
            self.known[key] = measure(what, *how)
        return self.known[key]

    @property
    def differs(self) -> bool:
        """Whether some program is not that of the plain network."""
        return bool({*self.names.values(), *self.pools.values()} - {PLAIN, "convolve", POOLS[0]})


def _close_of_each(ways: Sequence[Way], seconds: Mapping[str, float]) -> list[list[Way]]:
    """The ways under each set of compiler options that are close to its fastest, which comes first.

    Which set and which of these sizes is best with other programs is not known yet.
    """
    close: dict[int, list[Way]] = {}
    for way in sorted(
        (way for way in ways if _name(way) in seconds), key=lambda way: seconds[_name(way)]
    ):
        own = close.setdefault(way[0], [])
        if not own or seconds[_name(way)] <= CLOSE * seconds[_name(own[0])]:
            own.append(way)
    return list(close.values())


def _compiled(network: Callable, way: Way) -> Any:
    options = candidate_options()[way[0]]
    network = folded(network) if calls_onednn(options) else network
    return jax.jit(in_slices(network, way[1]), compiler_options=options)


def in_slices(apply: Callable, size: int | None) -> Callable:
    """A function of (variables, images) that runs so many images at a time, in one program.

    Args:
        apply: function whose outputs have the images' leading axis.
        size: of a slice; the last one may be smaller. None runs all images at once.
    """
    if size is None:
        return apply

    def run(variables: Any, images: jax.Array) -> Any:
        whole = len(images) - len(images) % size
        parts = []
        if whole:
            stacked = images[:whole].reshape(-1, size, *images.shape[1:])
            outputs = jax.lax.map(lambda part: apply(variables, part), stacked)
            parts.append(jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), outputs))
        if whole < len(images):
            parts.append(apply(variables, images[whole:]))
        return jax.tree.map(lambda *y: jnp.concatenate(y), *parts) if len(parts) > 1 else parts[0]

    return run


def _race(
    runs: Mapping[str, Callable], args: tuple, rounds: int, tolerance: float, judges: Sequence[str]
) -> dict[str, float]:
    """Seconds of the functions; those that do not give the outputs that most judges give are left
    out."""
    outputs = {name: run(*args) for name, run in runs.items()}
    names = right(outputs, tolerance, judges)
    calls = {name: lambda run=runs[name]: jax.block_until_ready(run(*args)) for name in names}
    return race(calls, rounds, LEAST, MOST)


def _name(way: Way) -> str:
    index, size = way
    options = candidate_options()[index].items()
    how = ", ".join(f"{key}={value!r}" for key, value in options) or "default options"
    return f"{how}, {'all at once' if size is None else f'slices of {size}'}"
