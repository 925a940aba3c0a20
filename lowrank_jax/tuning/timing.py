"""Fair timing of compiled programs: ahead of time, warmed up, in turn."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from lowrank_jax.program.compiler import candidate_options
from lowrank_jax.tuning.agreement import right, rounding

LAPPED = 3.0  # times the fastest: slower programs run once
LONG = 1.0  # seconds: a run that takes so long needs none before it that is not counted
CLOSE = 1.3  # times the fastest: within it noise or another program beside it could make a program first
Program = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Times of programs that ran in turn, one run of each in every round.

    Attributes:
        items: how many items, such as images, one run handles.
        seconds: program name to the seconds of its run in each round.
    """

    items: int
    seconds: Mapping[str, list[float]]

    def rate(self, name: str) -> tuple[float, float, float]:
        """Items per second of a program: lower quartile, median, upper quartile over the rounds."""
        return _quartiles([self.items / value for value in self.seconds[name]])

    def ratio(self, name: str, base: str) -> tuple[float, float, float]:
        """How many times faster a program is than the base, round by round: quartiles as in
        `rate`."""
        pairs = zip(self.seconds[base], self.seconds[name], strict=True)
        return _quartiles([slow / fast for slow, fast in pairs])


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def compile_fastest(fn: Callable, *args: Any) -> Program:
    """Compiles a function ahead of time under each of `candidate_options` and keeps the fastest
    program.

    A program whose outputs are not those of most programs, to rounding, is left out.

    Args:
        fn: function of arrays.
        *args: its arguments; they stay on the device and are used at every run.

    Returns:
        A program without arguments that runs to completion.
    """
    args = jax.device_put(args)

    def bind(options):
        compiled = jax.jit(fn, compiler_options=options).lower(*args).compile()
        return lambda: jax.block_until_ready(compiled(*args))

    programs = {str(index): bind(options) for index, options in enumerate(candidate_options())}
    if len(programs) > 1:
        outputs = {key: program() for key, program in programs.items()}
        programs = {
            key: programs[key] for key in right(outputs, rounding(jax.make_jaxpr(fn)(*args)))
        }
    if len(programs) == 1:
        return next(iter(programs.values()))
    times = throughput(programs, items=1, rounds=3)
    return programs[max(programs, key=lambda key: times.rate(key)[1])]


def throughput(
    programs: Mapping[str, Program],
    items: int,
    rounds: int = 15,
    warmup: int = 1,
    least: float = 0.0,
) -> Throughput:
    """Times programs in turn, so that a change of the machine's speed meets all of them alike.

    Args:
        programs: name to a compiled program that blocks until it is done, as from
            `compile_fastest`.
        items: how many items one run handles.
        rounds: counted runs of each program, at least 2.
        warmup: runs of each before, not counted.
        least: seconds of a turn; a program that is done sooner runs several times, and its mean
            counts.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((64, 64))
        >>> times = throughput({"product": compile_fastest(jnp.matmul, x, x)}, items=1, rounds=2)
        >>> times.rate("product")[1] > 0
        True
    """
    if not programs or rounds < 2 or items < 1:
        raise ValueError(
            f"throughput needs a program, items >= 1 and rounds >= 2; got {items=}, {rounds=}, {list(programs)}."
        )
    seconds: dict[str, list[float]] = {key: [] for key in programs}
    repeats = dict.fromkeys(programs, 1)
    for turn in tqdm(range(warmup + rounds), "timing", leave=False, disable=None):
        names = list(programs)
        for key in np.roll(names, turn):
            elapsed = _mean(programs[str(key)], repeats[str(key)])
            if turn >= warmup:
                seconds[str(key)].append(elapsed)
            elif least > elapsed:
                repeats[str(key)] = math.ceil(least / elapsed)
    return Throughput(items, seconds)


def race(
    programs: Mapping[str, Program], rounds: int, least: float = 0.0, seconds: float = math.inf
) -> dict[str, float]:
    """Seconds of each program; only those that can be the fastest run often.

    After one run each, those up to `LAPPED` times the fastest run twice more, in turn, unless one
    run of each of them takes longer than the last runs may; and of these those up to `CLOSE` times
    the fastest as often as is asked. Medians of the last runs of each. A first run of a second or
    more counts, of a shorter one the next.

    Args:
        programs: as in `throughput`.
        rounds: last runs of each program, at least 2.
        least: seconds of a turn, as in `throughput`.
        seconds: that the last runs may take together; there are fewer of them, but 2, where they
            are long.

    Example:
        >>> times = race({"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.01)}, rounds=2)
        >>> times["short"] < times["long"]
        True
    """
    times = {name: _once(program, least) for name, program in programs.items()}
    for margin, most in ((LAPPED, 2), (CLOSE, rounds)):
        near = {
            name: call
            for name, call in programs.items()
            if times[name] <= margin * min(times.values())
        }
        fitting = seconds / sum(times[name] for name in near)
        if margin == LAPPED and fitting < 1:
            continue
        count = max(2, int(min(most, fitting)))
        short = any(
            times[name] < least for name in near
        )  # the round that is not counted finds how often these run
        found = throughput(near, items=1, rounds=count, warmup=int(short), least=least).seconds
        times |= {name: statistics.median(values) for name, values in found.items()}
    return times


def _once(program: Program, least: float) -> float:
    if (first := _mean(program, 1)) >= LONG:
        return first
    elapsed = _mean(program, 1)
    return elapsed if elapsed >= least else _mean(program, math.ceil(least / elapsed))


def _mean(program: Program, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        program()
    return (time.perf_counter() - start) / repeats
