"""The fastest program of a whole network on this device, found by measuring candidates."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.io.progress import Progress
from lowrank_jax.program.compiler import candidate_options
from lowrank_jax.program.jaxprs import check_options
from lowrank_jax.tree.kinds import is_int, whole
from lowrank_jax.tuning.autotune import Autotuner, Timers
from lowrank_jax.tuning.candidate import Candidate, Configuration, batch_of
from lowrank_jax.tuning.device import Device
from lowrank_jax.tuning.result import Fast, network_of
from lowrank_jax.tuning.timer import Timer

SLICES = (8, 16, 32, 64)


def fast(
    apply: Callable,
    variables: Any,
    inputs: Any,
    *args: Any,
    slices: Sequence[int] = SLICES,
    timers: Timers = Timer,
    rounds: int = 5,
    freeze: bool = False,
    limit: float | None = None,
    **kwargs: Any,
) -> Fast:
    """Measures candidate programs of a network in evaluation, dense or decomposed, and returns the
    fastest.

    First each set of compiler options (`candidate_options`) runs the whole batch, then slices of
    the batch, one after the other: arrays between the layers of a slice stay in the cache, those of
    a large batch go through memory. Then, under each set that can still win, the fastest algorithm
    of each layer and of each pooling is measured, and the network runs with these. Where oneDNN's
    kernels run, scales of channels go into the kernels of the convolutions before them (`folded`):
    oneDNN adds what is left, a bias, as it convolves.

    A candidate is left out if it fails, or if its outputs differ by more than rounding from those
    of most candidates with the whole batch. That happens where the network mixes its images, or
    where XLA computes the network wrongly.

    Args:
        apply: ``model.apply``, or any function of (variables, inputs, *args, **kwargs).
        variables: the tree, dense or decomposed.
        inputs: batch of the size that is to be fast: an array, or a pytree of arrays whose first
            axis is the batch, which the function takes as one argument; for several write
            ``lambda variables, inputs: apply(variables, *inputs)``. Where a run takes seconds, a
            part of the batch finds nearly the same in less time. What is found takes any batch.
        *args, **kwargs: other arguments of ``apply``, such as ``train=False``. They become part of
            the program. An argument that has the name of an argument below has to be bound before,
            by a function of its own.
        slices: sizes to try. The size of the batch and larger ones are left out.
        timers: makes the `Timer` of the layers, from compiler options. To measure 50 layers at 224
            pixels takes minutes on a CPU. ``lambda options: Timer(options, path="times.json")``
            keeps the times for the next call.
        rounds: counted runs of each candidate that is near the fastest, in turn.
        freeze: makes the variables constants of the program, which lays them out for its kernels
            when it is compiled and not in each call: a gain at a batch of one, for a larger
            program. The result is a function of (None, inputs).
        limit: seconds. After them no other candidate is begun, and the fastest so far is returned.

    Raises:
        ValueError: an argument is not allowed.
        Exception: no candidate compiles and runs; the error of the plain candidate.

    Example:
        >>> from flax import linen as nn
        >>> import lowrank_jax as lr
        >>> model, images = nn.Sequential([nn.Conv(16, (3, 3)), nn.relu]), jnp.ones((4, 8, 8, 8))
        >>> variables = model.init(jax.random.key(0), images)
        >>> small = {"params": lr.decompose(variables["params"], {"layers_0": 3})}
        >>> run = fast(model.apply, small, images, rounds=2, limit=1)
        >>> run(small, images).shape
        (4, 8, 8, 16)
    """
    _check(rounds, limit, slices)
    check_options(fast, apply, kwargs)
    inputs = jax.tree.map(jnp.asarray, inputs)
    sizes = [size for size in slices if size < batch_of(inputs)]
    given = (None if freeze else variables, inputs)
    network = network_of(apply, args, kwargs, variables if freeze else None)
    whole = [Candidate(Configuration(options)) for options in candidate_options()]
    with Progress("fast") as progress:
        tuner = Autotuner(network, given, rounds, limit, progress)
        tuner.measure(whole)
        for candidates in tuner.with_slices(sizes):
            tuner.measure(candidates)
        for candidates in tuner.with_algorithms(timers):
            tuner.measure(candidates)
    best = tuner.fastest()
    return Fast(
        run=tuner.runs[best],
        candidate=tuner.candidates[best],
        device=Device.here(),
        seconds=tuner.seconds,
        left_out=tuner.left_out,
        frozen=freeze,
    )


def _check(rounds: int, limit: float | None, slices: Sequence[int]) -> None:
    whole("rounds", rounds, 2)
    if limit is not None and not (isinstance(limit, int | float) and limit > 0):
        raise ValueError(f"{limit=} is not allowed; give a positive number of seconds, or None.")
    if not all(is_int(size) and size > 0 for size in slices):
        raise ValueError(f"slices={tuple(slices)!r} are not allowed; give ints of 1 or more.")
