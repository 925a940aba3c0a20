"""A run: steps over data, with metrics, checkpoints and an orderly end at a signal."""

import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lowrank_jax.io.progress import Progress
from lowrank_jax.planning.plans import Plan
from lowrank_jax.training.checkpoints import Checkpoints, held
from lowrank_jax.training.facts import START, check_facts
from lowrank_jax.training.fingerprints import fingerprint, magnitudes
from lowrank_jax.training.finite import FINITE, check_parameters, not_finite
from lowrank_jax.training.metrics import Metrics, floats, means, numbers, risen
from lowrank_jax.training.order import Batches
from lowrank_jax.training.placing import like, placed
from lowrank_jax.training.signals import Signals
from lowrank_jax.training.state import TrainState
from lowrank_jax.training.steps import Step

LOG = logging.getLogger("lowrank_jax")
LINE = 50  # steps between two lines of metrics
FEW = 10  # steps whose mean loss is compared
HINT = (
    "The step does not run on a batch of {}. A batch is (inputs, labels), or inputs alone "
    "where the loss needs no labels. A teacher is the tree of the dense network; a teacher of "
    "another model needs teacher_apply. Arguments that finetune does not know go to the model."
)
AfterEpoch = Callable[[int, Any, Mapping[str, float]], Mapping[str, float] | None]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """Training steps over data.

    Attributes:
        step: the compiled step, of (state, batch, variables of the teacher).
        batches: the data.
        steps: of the whole run.
        seed: of the run.
        loss: what is minimised, in words.
        settings: what else a run has, such as the learning "rate"; it may go on with other values.
        labelled: whether the loss reads labels.
        teacher: variables of the teacher.
        folder: for checkpoints and metrics; nothing is kept without one.
        save_every: steps between two checkpoints.
        plan: of the ranks, kept in the checkpoints.
        after_epoch: called with (epoch from 1, variables, mean metrics), where epochs can be
            counted; what it returns is added to the metrics.
        sharding: of the batches; None for one device.
    """

    step: Step
    batches: Batches
    steps: int
    seed: int = 0
    loss: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    labelled: bool = True
    teacher: Any = None
    folder: Path | None = None
    save_every: int = 500
    plan: Plan | None = None
    after_epoch: AfterEpoch | None = None
    sharding: NamedSharding | None = None

    def finish(self, state: TrainState) -> TrainState:
        """The state after all steps, from the newest checkpoint in the folder, or the one given.

        Raises:
            FloatingPointError: the loss is not finite.
            OSError: a checkpoint cannot be written.
            SystemExit, KeyboardInterrupt: SIGTERM or Ctrl-C came, and the state was saved.
            ValueError: the folder is of another run, the data ended, or there are several
                processes and a folder.
        """
        if self.folder is not None and jax.process_count() > 1:
            raise ValueError(
                f"folder={str(self.folder)!r} is not allowed with {jax.process_count()} processes; "
                "leave it out, and save what comes back in the first process."
            )
        if self.folder is None:
            return _Loop(self, state).finish()
        with held(self.folder):
            kept, facts = Checkpoints(self.folder), self._facts(state)
            return _Loop(self, self._resumed(kept, state, facts), kept, facts).finish()

    def _facts(self, start: TrainState) -> dict[str, Any]:
        """What a run that goes on must have again; the data are read once, before all steps."""
        own = {"seed": int(self.seed), "loss": self.loss, **self.batches.facts}
        own[START] = magnitudes(start.variables)
        return own if self.teacher is None else own | {"teacher": fingerprint(self.teacher)}

    def _resumed(self, kept: Checkpoints, state: TrainState, own: dict[str, Any]) -> TrainState:
        found = kept.newest(state)
        if found is None:
            return state
        start, (state, facts) = state, found
        check_facts(kept.folder.parent, own, facts)
        if int(state.step) > self.steps:
            raise ValueError(
                f"{self.folder} holds a run of {int(state.step)} steps, more than {self.steps}; "
                "give as many steps, or another folder."
            )
        self._tell(int(state.step), facts)
        return state if self.sharding is None else like(state, start)

    def _tell(self, step: int, facts: Mapping[str, Any]) -> None:
        """Says how a run goes on."""
        if step == self.steps:
            LOG.warning("The run in %s has all its %d steps; nothing is done.", self.folder, step)
            return
        LOG.warning("The run in %s goes on after step %d.", self.folder, step)
        for name, value in self.settings.items():
            before, shown = facts.get(name, value), "learning_rate" if name == "rate" else name
            if before != value:
                LOG.warning("The run had %s=%s and goes on with %s.", shown, before, value)


class _Loop:
    """A run in progress: its state, and the metrics of the steps since the last line."""

    def __init__(
        self,
        run: Run,
        state: TrainState,
        kept: Checkpoints | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.run, self.state, self.kept = run, state, kept
        self.facts = {**(facts or {}), **run.settings}
        self.number = int(state.step)
        self.metrics = self._metrics(run.folder) if run.folder else None
        self.recent: list[dict[str, jax.Array]] = []
        self.batch: tuple = ()
        self.first: float | None = None  # the loss of the first steps
        self.epoch: list[dict[str, float]] = []
        self.since = time.perf_counter()

    def finish(self) -> TrainState:
        with (
            Signals() if self.kept else contextlib.nullcontext() as signals,
            self._progress() as progress,
        ):
            for batch in self._batches():
                self._advance(batch)
                progress.update()
                stops = signals is not None and signals.given is not None
                if self._every(self.run.save_every) or stops:
                    self._save()
                if signals is not None and stops:
                    signals.stop(f"step {self.number} is saved in {self.run.folder}; call again")
        return self.state

    def _tell_rise(self, losses: list[float]) -> None:
        """Warns at the end of a run whose loss has risen since the first steps."""
        first, last = np.mean(losses[:FEW]), np.mean(losses[-FEW:])
        self.first = float(first) if self.first is None else self.first
        if self.number == self.run.steps and risen(self.first, float(last)):
            rate = self.run.settings.get("rate")
            rate = "" if rate is None else f", which was {rate}"
            LOG.warning(
                "The loss rose from %.3g to %.3g. Lower the learning rate%s: a network without "
                "batch statistics, or with frozen ones, may need a tenth or less.",
                self.first,
                last,
                rate,
            )

    def _progress(self) -> Progress:
        return Progress("training", self.run.steps, self.number)

    def _batches(self) -> Iterator[tuple]:
        first, last = self.number, self.run.steps
        for batch in itertools.islice(self.run.batches.after(first), last - first):
            yield placed(batch, self.run.sharding)
        if self.number < last:
            raise ValueError(
                f"The batches ended after step {self.number} of {last}; give more, or a function "
                "that gives an iterator, which is called again."
            )

    def _advance(self, batch: tuple) -> None:
        try:
            self.state, metrics = self.run.step(self.state, batch, self.run.teacher)
        except Exception as error:
            kinds = [f"{np.shape(x)} {x.dtype}" for x in jax.tree.leaves(batch)]
            error.add_note(HINT.format(", ".join(kinds)))
            raise
        self.recent.append(metrics)
        if len(self.recent) > 1:  # the device works on the last one meanwhile
            self._check(self.number, self.recent[-2])
        self.number += 1
        self.batch = batch
        if self._every(LINE):
            self._line()
        if self.run.batches.epoch and self.number % self.run.batches.epoch == 0:
            self._end_epoch(self.number // self.run.batches.epoch)

    def _every(self, steps: int) -> bool:
        return self.number % steps == 0 or self.number == self.run.steps

    def _check(self, number: int, metrics: Mapping[str, jax.Array]) -> None:
        which = int(metrics["not_finite"])
        if which != FINITE:
            labels = self.batch[-1] if self.run.labelled and len(self.batch) > 1 else None
            raise not_finite(number, which, metrics, self.state.params, self._last(), labels)

    def _last(self) -> str:
        """Where the last good state is."""
        steps = self.kept.steps() if self.kept else []
        if self.kept is None or not steps:
            return "There is no checkpoint"
        return f"The last good checkpoint is {self.kept.path(steps[0])}"

    def _line(self) -> None:
        """Writes the means of the steps since the last line."""
        if not self.recent:
            return
        self._check(self.number, self.recent[-1])
        rows = [floats(metrics) for metrics in jax.device_get(self.recent)]
        now = time.perf_counter()
        speed = {"steps_per_second": len(rows) / (now - self.since)}
        self._write(means(rows) | speed)
        self._tell_rise([row["loss"] for row in rows])
        self.epoch = [*self.epoch, *rows] if self.run.after_epoch else []
        self.recent, self.since = [], now

    def _end_epoch(self, epoch: int) -> None:
        self._line()
        if self.run.after_epoch is not None:
            copies = jax.tree.map(jnp.copy, self.state.averaged)  # the next step donates its state
            found = self.run.after_epoch(epoch, copies, means(self.epoch))
            self._write({"epoch": epoch, **numbers(found)})
        self.epoch, self.since = [], time.perf_counter()

    def _write(self, values: Mapping[str, float]) -> None:
        metrics = self.metrics
        if metrics is not None:
            self._told(lambda: metrics.write(self.number, values))

    def _metrics(self, folder: Path) -> Metrics:
        return self._told(lambda: Metrics(folder, self.number))

    def _told(self, write: Callable[[], Any]) -> Any:
        """What some writing gives; its error says how far the run is."""
        try:
            return write()
        except OSError as error:
            raise OSError(
                error.errno,
                f"Step {self.number}: the metrics in {self.run.folder} cannot be written: "
                f"{error.strerror}. {self._last()}. Make room, and call again",
            ) from error

    def _save(self) -> None:
        self._line()
        check_parameters(self.number, self.state.params, self._last())
        if self.kept is not None:
            self.kept.save(self.state, self.facts, self.run.plan)
