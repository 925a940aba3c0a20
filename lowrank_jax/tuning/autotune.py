"""Candidate programs of one network, measured step by step."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from lowrank_jax.io.progress import Progress
from lowrank_jax.program.compiler import candidate_options
from lowrank_jax.tuning.agreement import agree, agreeing, rounding
from lowrank_jax.tuning.candidate import Candidate, Choices, Configuration, Network, asked_of
from lowrank_jax.tuning.timer import LEAST, Timer
from lowrank_jax.tuning.timing import BEATEN, NEAR, measure, reason

MOST = 30.0  # seconds of the last runs of candidates
GAIN = 2.0  # what other algorithms save at most: compiler options that are slower cannot win
Options = Mapping[str, Any]
Timers = Callable[[Options], Timer]


class Autotuner:
    """Measures candidates, and tells which ones are worth measuring next.

    Args:
        network: makes a function of (variables, inputs), see `search`.
        args: variables and inputs.
        rounds: counted runs of each candidate that is near the fastest.
        limit: seconds after which no other candidate is begun; None for no limit. One candidate is
            measured in any case.
        progress: of the whole search.

    Attributes:
        seconds: of the candidates that were measured, by name.
        candidates, runs: the candidates that were measured, and their compiled functions.
        left_out: candidates and algorithms that were not measured, to the reason.
    """

    def __init__(
        self,
        network: Network,
        args: tuple,
        rounds: int,
        limit: float | None,
        progress: Progress,
    ) -> None:
        self.network, self.args, self.rounds = network, args, rounds
        self.progress = progress
        self.limit, self.begin = limit, time.monotonic()
        program = jax.make_jaxpr(network(None))(*args)  # raises what the plain network raises
        self.tolerance = rounding(program)
        self.outputs: Any = None  # those of most candidates
        self.candidates: dict[str, Candidate] = {}
        self.runs: dict[str, Callable] = {}
        self.seconds: dict[str, float] = {}
        self.left_out: dict[str, str] = {}
        self.errors: list[Exception] = []

    def measure(self, candidates: Sequence[Candidate]) -> None:
        """Compiles candidates, compares their outputs, and times them beside the fastest so far."""
        outputs: dict[str, Any] = {}
        for candidate in self._each(candidates):
            if self._left() <= 0 and (outputs or self.seconds):
                self._leave_out_late(str(candidate))
            else:
                outputs |= self._first_run(candidate)
        names = self._agreeing(outputs)
        if not names:
            return
        calls = {name: self._call(name) for name in (*self._within(NEAR), *names)}
        self.seconds |= measure(calls, self.rounds, LEAST, min(MOST, self._left()))
        best = self.fastest()
        self.progress.note(f"{1e3 * self.seconds[best]:.3g} ms with {best}")

    def with_slices(self, sizes: Sequence[int]) -> Iterator[list[Candidate]]:
        """Slices under the compiler options that are not beaten, or under all if no batch ran.

        The fastest options come first. Once no slice is near the whole batch, there are no more.
        """
        for options in self._options_within(BEATEN) or candidate_options():
            yield [Candidate(Configuration(options, size)) for size in sizes]
            near = [self.candidates[name].configuration.size for name in self._within(BEATEN)]
            if near and not any(near):
                return

    def with_algorithms(self, timers: Timers) -> Iterator[list[Candidate]]:
        """The fastest algorithms of layers and poolings, for each set of compiler options in turn.

        The options that were fastest are first. Options that were slower than the fastest candidate
        by more than other algorithms save are left out, so measure each list before the next list
        is made.
        """
        for options in self._options_within(GAIN):
            if self._left() <= 0:
                self._leave_out_late(f"algorithms of layers with {dict(options)}")
            elif options in self._options_within(GAIN):
                configurations = self._configurations(options)
                choices = self._choices(timers(options), configurations)
                yield [Candidate(own, choices) for own in configurations if choices.differ]

    def fastest(self) -> str:
        """Name of the fastest candidate.

        Raises:
            Exception: no candidate compiles and runs; the error of the first candidate.
        """
        if not self.seconds:
            raise self.errors[0]
        return self._within(1.0)[0]

    def _left(self) -> float:
        """Seconds until the limit."""
        return float("inf") if self.limit is None else self.begin + self.limit - time.monotonic()

    def _leave_out_late(self, name: str) -> None:
        self.left_out[name] = f"the limit of {self.limit} seconds was reached"

    def _each(self, steps: Sequence[Any]) -> Iterator[Any]:
        """The steps, one by one, as steps of the whole search."""
        self.progress.extend(len(steps))
        yield from self.progress.over(steps)

    def _first_run(self, candidate: Candidate) -> dict[str, Any]:
        """The outputs of a candidate by its name; nothing if it does not compile or run."""
        name, run = str(candidate), candidate.compiled(self.network)
        try:
            outputs = jax.block_until_ready(run(*self.args))
        except Exception as error:  # of any type, as XLA and the network raise it
            self.errors.append(error)
            self.left_out[name] = reason(error)
            return {}
        self.candidates[name], self.runs[name] = candidate, run
        return {name: outputs}

    def _agreeing(self, outputs: Mapping[str, Any]) -> list[str]:
        """Names of the outputs that are those of most. The first candidates settle these."""
        if not outputs:
            return []
        if self.outputs is None:
            self.outputs = outputs[agreeing(outputs, self.tolerance)[0]]
        names = [name for name, own in outputs.items() if self._agrees(own)]
        others = (name for name in outputs if name not in names)
        self.left_out |= dict.fromkeys(others, "its outputs are not those of most candidates")
        return names

    def _agrees(self, outputs: Any) -> bool:
        return outputs is self.outputs or agree(self.outputs, outputs, self.tolerance)

    def _call(self, name: str) -> Callable[[], Any]:
        run = self.runs[name]
        return lambda: jax.block_until_ready(run(*self.args))

    def _within(self, margin: float, names: Sequence[str] | None = None) -> list[str]:
        """Names of candidates, all or some, up to so many times the fastest, which is first."""
        ordered = sorted(
            self.seconds if names is None else names, key=lambda name: self.seconds[name]
        )
        return [name for name in ordered if self.seconds[name] <= margin * self.seconds[ordered[0]]]

    def _options_within(self, margin: float) -> list[Options]:
        """Compiler options with a candidate up to so many times the fastest, the fastest first."""
        found: list[Options] = []
        for name in self._within(margin):
            options = self.candidates[name].configuration.options
            if options not in found:
                found.append(options)
        return found

    def _configurations(self, options: Options) -> list[Configuration]:
        """Those with these options that are near the fastest of them, which comes first."""
        own = [n for n in self.seconds if self.candidates[n].configuration.options == options]
        return [self.candidates[name].configuration for name in self._within(NEAR, own)]

    def _choices(self, timer: Timer, configurations: Sequence[Configuration]) -> Choices:
        """The fastest algorithms of all layers and poolings, each measured at one batch."""
        sizes = [configuration.size for configuration in configurations]
        layers, pools = asked_of(self.network, self.args, sizes)
        algorithms = self._fastest_of(timer, timer.fastest, layers)
        of_pools = self._fastest_of(timer, timer.fastest_pool, [(pool,) for pool in pools])
        return Choices(algorithms, {pool: name for (pool,), name in of_pools.items()})

    def _fastest_of(
        self, timer: Timer, fastest: Callable[..., str], asked: Sequence[tuple]
    ) -> dict[Any, str]:
        found: dict[Any, str] = {}
        for what in self._each(asked):
            name = f"algorithms of {what} with {timer.options}"
            if self._left() <= 0:
                self._leave_out_late(name)
                continue
            try:
                found[what] = fastest(*what)
            except Exception as error:  # of any type, as XLA raises it
                self.left_out[name] = reason(error)
        self.left_out |= timer.failed
        return found
