"""The fastest way to run a whole network on this device, found by measuring the ways there are."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.apply import lowrank
from lowrank_jax.compiling import candidate_options
from lowrank_jax.programs import Layer
from lowrank_jax.schemes import Separable
from lowrank_jax.throughput import throughput
from lowrank_jax.tuning import LEAST, Timer

SLICES = (8, 16, 32)


@dataclasses.dataclass(frozen=True)
class Fast:
    """A network as `fast` found it fastest: a compiled function of (variables, images).

    Attributes:
        run: the function, under ``jax.jit``; takes any batch.
        options: compiler options.
        size: images that run through the network at a time; None for all of them.
        programs: measured layers to the names of their programs; empty if two convolutions were faster everywhere.
        seconds: what was tried to the median of its time on the images given.
    """

    run: Callable
    options: Mapping[str, Any]
    size: int | None
    programs: Mapping[tuple[Layer, Separable], str]
    seconds: Mapping[str, float]

    def __call__(self, variables: Any, images: Any) -> Any:
        return self.run(variables, images)


def fast(
    apply: Callable,
    variables: Any,
    images: Any,
    *,
    slices: Sequence[int] = SLICES,
    timers: Callable[[Mapping[str, Any]], Timer] = Timer,
    rounds: int = 5,
) -> Fast:
    """Measures ways to run a Linen network in evaluation, dense or decomposed, and returns the fastest.

    First each set of compiler options (`candidate_options`), on the whole batch and on slices of it, one after the
    other: the arrays between the layers of a slice stay in the cache, those of a large batch go through memory. Then
    the fastest program of each decomposed layer, at that slice. A way whose outputs are not those of the plain program,
    to rounding, is dropped; such a network mixes its images.

    Args:
        apply: ``model.apply``, or a function of (variables, images) that calls it.
        variables: dense or decomposed ones.
        images: batch of the size that is to be fast.
        slices: sizes to try; those of the batch and above are left out.
        timers: makes the `Timer` of the layers, from compiler options.
        rounds: runs of each way that are counted, in turn.

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
    images = jnp.asarray(images)
    network = lowrank(apply)
    sizes = [None, *(size for size in slices if 0 < size < len(images))]
    plain = {(index, size): in_slices(network, size) for index in range(len(candidate_options())) for size in sizes}
    runs = {way: jax.jit(fn, compiler_options=candidate_options()[way[0]]) for way, fn in plain.items()}
    times = _time(runs, (variables, images), rounds)
    index, size = min(times, key=lambda way: times[way])
    options = candidate_options()[index]
    seconds = {_name(candidate_options()[i], s): value for (i, s), value in times.items()}

    found: dict[tuple[Layer, Separable], str] = {}
    timer = timers(options)

    def choose(layer: Layer, scheme: Separable) -> str:
        return found.setdefault((layer, scheme), timer.fastest(layer, scheme))

    chosen = jax.jit(in_slices(lowrank(apply, programs=choose), size), compiler_options=options)
    chosen.eval_shape(variables, images)  # fills the table of programs
    both = _time({"plain": runs[index, size], "programs": chosen}, (variables, images), rounds) if found else {}
    if "programs" in both:
        seconds[f"{_name(options, size)}, programs"] = both["programs"]
    if both.get("programs", math.inf) < both.get("plain", 0):
        return Fast(chosen, options, size, found, seconds)
    return Fast(runs[index, size], options, size, {}, seconds)


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


def _time(runs: Mapping[Any, Callable], args: tuple, rounds: int) -> dict[Any, float]:
    """Medians in seconds; the first function tells the outputs, and those that give others are left out."""
    base, *_ = outputs = {way: run(*args) for way, run in runs.items()}
    agree = [way for way, y in outputs.items() if _agree(outputs[base], y)]
    calls = {str(way): lambda run=runs[way]: jax.block_until_ready(run(*args)) for way in agree}
    found = throughput(calls, items=1, rounds=rounds, least=LEAST)
    return {way: statistics.median(found.seconds[str(way)]) for way in agree}


def _agree(wanted: Any, found: Any) -> bool:
    """Equal to rounding: to the root of the precision of the type, in the Euclidean norm of each array."""
    shapes, others = (jax.tree.map(lambda y: (y.shape, y.dtype), tree) for tree in (wanted, found))
    if shapes != others:
        return False
    pairs = zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True)
    return all(
        jnp.linalg.norm((a - b).astype(jnp.float32))
        <= jnp.finfo(a.dtype).eps ** 0.5 * jnp.linalg.norm(a.astype(jnp.float32))
        for a, b in pairs
    )


def _name(options: Mapping[str, Any], size: int | None) -> str:
    how = ", ".join(f"{key}={value!r}" for key, value in options.items()) or "default options"
    return f"{how}, {'all at once' if size is None else f'slices of {size}'}"
