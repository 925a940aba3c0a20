"""Fair timing of compiled programs: ahead of time, warmed up, in turn."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lowrank_jax.io.progress import Progress
from lowrank_jax.program.compiler import candidate_options
from lowrank_jax.tuning.agreement import agreeing, rounding

BEATEN = 3.0  # times the fastest: slower programs run once
NEAR = 1.3  # times the fastest: noise, or another program beside it, could hide the fastest here
LONG = 1.0  # seconds: a run that takes so long needs no run before it that is not counted
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
        """How many times faster a program is than the base, round by round: the quartiles."""
        pairs = zip(self.seconds[base], self.seconds[name], strict=True)
        return _quartiles([slow / fast for slow, fast in pairs])


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def compile_fastest(fn: Callable, *args: Any) -> Program:
    """Compiles a function under each of `candidate_options` and keeps the fastest program.

    A program that does not compile or run is left out, and so is a program whose outputs differ by
    more than rounding from those of most programs.

    Args:
        fn: function of arrays.
        *args: its arguments. They stay on the device, and every run takes them.

    Returns:
        A program without arguments that runs to completion.

    Raises:
        Exception: no program compiles and runs; the error of the first one.
    """
    args = jax.device_put(args)
    programs: dict[str, Program] = {}
    outputs, errors = dict[str, Any](), list[Exception]()
    for index, options in enumerate(candidate_options()):
        try:
            program = _compiled(fn, args, options)
            outputs[str(index)] = program()
            programs[str(index)] = program
        except Exception as error:  # of any type, as XLA and the function raise it
            errors.append(error)
    if not programs:
        raise errors[0]
    names = agreeing(outputs, rounding(jax.make_jaxpr(fn)(*args)))
    if len(names) == 1:
        return programs[names[0]]
    times = throughput({name: programs[name] for name in names}, items=1, rounds=3)
    return programs[max(names, key=lambda name: times.rate(name)[1])]


def _compiled(fn: Callable, args: Any, options: Mapping[str, Any]) -> Program:
    compiled = jax.jit(fn, compiler_options=dict(options)).lower(*args).compile()
    return lambda: jax.block_until_ready(compiled(*args))


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
        warmup: runs of each program before, which are not counted.
        least: seconds of a turn. A program that takes less runs more than once in a turn, and the
            mean counts.

    Raises:
        ValueError: there is no program, or a number is too small.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((64, 64))
        >>> times = throughput({"product": compile_fastest(jnp.matmul, x, x)}, items=1, rounds=2)
        >>> times.rate("product")[1] > 0
        True
    """
    if not programs or rounds < 2 or items < 1:
        raise ValueError(
            f"throughput needs a program, items >= 1 and rounds >= 2; "
            f"got {items=}, {rounds=}, {list(programs)}."
        )
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    repeats = dict.fromkeys(programs, 1)
    with Progress("timing", warmup + rounds) as progress:
        for turn in progress.over(range(warmup + rounds)):
            for name in map(str, np.roll(list(programs), turn)):
                elapsed = _mean(programs[name], repeats[name])
                if turn >= warmup:
                    seconds[name].append(elapsed)
                elif least > elapsed:
                    repeats[name] = math.ceil(least / elapsed)
    return Throughput(items, seconds)


def measure(
    programs: Mapping[str, Program],
    rounds: int,
    least: float = 0.0,
    seconds: float = math.inf,
    errors: dict[str, Exception] | None = None,
) -> dict[str, float]:
    """Seconds of each program. Only those that can be the fastest run often.

    After one run each, programs up to `BEATEN` times the fastest run twice more, in turn. Of these,
    programs up to `NEAR` times the fastest run as often as is asked. The median of a program's last
    runs counts. A first run of a second or more counts; after a shorter first run the next run
    counts.

    Args:
        programs: as in `throughput`.
        rounds: last runs of each program, at least 2.
        least: seconds of a turn, as in `throughput`.
        seconds: that the last runs may take together. Long programs have fewer rounds, but 2; and
            none where no time is left at all.
        errors: takes the errors of programs whose first run fails, which are then left out. Without
            it they are raised.

    Example:
        >>> programs = {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.01)}
        >>> sorted(measure(programs, rounds=2))
        ['long', 'short']
    """
    times = _first_times(programs, least, errors)
    for margin, most in ((BEATEN, 2), (NEAR, rounds)):
        near = [name for name in times if times[name] <= margin * min(times.values())]
        fitting = seconds / sum(times[name] for name in near) if near else 0
        if fitting <= 0 or (margin == BEATEN and fitting < 1):
            continue
        short = any(times[name] < least for name in near)  # their repeats have to be found
        count = max(2, int(min(most, fitting)))
        chosen = {name: programs[name] for name in near}
        found = throughput(chosen, items=1, rounds=count, warmup=int(short), least=least).seconds
        times |= {name: statistics.median(values) for name, values in found.items()}
    return times


def _first_times(
    programs: Mapping[str, Program], least: float, errors: dict[str, Exception] | None
) -> dict[str, float]:
    times: dict[str, float] = {}
    for name, program in programs.items():
        try:
            times[name] = _once(program, least)
        except Exception as error:  # of any type, as XLA and the function raise it
            if errors is None:
                raise
            errors[name] = error
    return times


def reason(error: Exception) -> str:
    """An error in one line, not longer than a few lines of the screen."""
    return f"{type(error).__name__}: {error}"[:300].replace("\n", " ")


def _once(program: Program, least: float) -> float:
    first = _mean(program, 1)
    if first >= LONG:
        return first
    elapsed = _mean(program, 1)
    return elapsed if elapsed >= least else _mean(program, math.ceil(least / elapsed))


def _mean(program: Program, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        program()
    return (time.perf_counter() - start) / repeats
