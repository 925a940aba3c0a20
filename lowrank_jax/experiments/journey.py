"""The journey: decompose a trained network at two tables of ranks, tune it, measure it."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.calibration.collecting import Calibration, calibrate
from lowrank_jax.compression.compressing import compress
from lowrank_jax.data.datasets import Dataset, normalize
from lowrank_jax.experiments.cifar10 import Log, Recipe, Variables, accuracy, fit
from lowrank_jax.factorization.scheme import spectrum
from lowrank_jax.models import NIN
from lowrank_jax.planning import selectors
from lowrank_jax.planning.budget import Budget
from lowrank_jax.planning.candidates import Candidates
from lowrank_jax.planning.planner import plan
from lowrank_jax.planning.plans import Plan
from lowrank_jax.program.transform import lowrank
from lowrank_jax.tree.decomposing import decompose
from lowrank_jax.tuning.device import machine
from lowrank_jax.tuning.search import fast
from lowrank_jax.tuning.timing import Program, Throughput, throughput

DENSE, CLOSED, FITTED, TUNED = "dense", "closed form", "fitted", "tuned"
PLANNED, PLANNED_TUNED = "planned", "planned and tuned"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Stage:
    """A network that the journey came past.

    Attributes:
        accuracy: share of the test images classified as their labels say.
        plan: its ranks and their cost; None of the dense network.
        variables: dense or decomposed.
        curve: the accuracy after each epoch of tuning; empty where none was.
    """

    accuracy: float
    plan: Plan | None
    variables: Variables
    curve: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Journey:
    """What the experiment found.

    Attributes:
        stages: "dense"; the given ranks in "closed form", "fitted" to images and "tuned"; the
            ranks that `plan` chose for the same macs, "planned" and, where asked, "planned and
            tuned".
        given, planned: the ranks and their cost, as given and as `plan` chose them.
        spectra: each layer with a given rank to its singular values, largest first.
        images: how many unlabelled images the plan and the fits saw.
        tests: how many images each accuracy is of.
        times: forward passes of "dense" and "low-rank", the last planned stage, as `jax.jit` runs
            them, and as "dense, fast" and "low-rank, fast".
        machine: device, versions.
    """

    stages: Mapping[str, Stage]
    given: Plan
    planned: Plan
    spectra: Mapping[str, np.ndarray]
    images: int
    tests: int
    times: Throughput
    machine: str

    @property
    def last(self) -> str:
        """The name of the last stage, at the ranks that the plan chose."""
        return PLANNED_TUNED if PLANNED_TUNED in self.stages else PLANNED

    @property
    def result(self) -> Stage:
        """The last network."""
        return self.stages[self.last]


def run(
    model: NIN,
    variables: Variables,
    ranks: Mapping[str, int],
    data: Dataset,
    test: Dataset,
    recipe: Recipe,
    *,
    tune_planned: bool = False,
    images: int = 1024,
    batch_size: int = 64,
    rounds: int = 7,
    limit: float = 6,
    log: Log = print,
    folder: Path | None = None,
) -> Journey:
    """Compresses a trained network in every manner, and measures the results beside it.

    Args:
        model: of the dense network.
        variables: its trained variables.
        ranks: layer name to rank.
        data: training images, for the fits and the tuning.
        test: images for every accuracy.
        recipe: of the tuning.
        tune_planned: whether the network of the plan is tuned, too.
        images: how many images of ``data`` the plan and the fits use.
        batch_size, rounds: images in a forward pass, and passes of each network in the timing.
        limit: seconds that the search for each fast program may take.
        log: called with a line after every step.
        folder: for checkpoints of the tuning; the same call goes on from there.
    """
    dense = flax.core.unfreeze(variables)
    experiment = _Experiment(model, dense, data, test, recipe, log, folder)
    experiment.add(DENSE, None, dense)
    found = calibrate(model.apply, dense, _normalized(data.images[:images]))
    given = fixed_plan(found, ranks)
    experiment.add(CLOSED, given, decompose(dense, given))
    experiment.add(FITTED, given, compress(found, given))
    experiment.tune(TUNED, FITTED)
    planned = plan(found, macs=int(given.total("macs")[1]))
    experiment.add(PLANNED, planned, compress(found, planned))
    if tune_planned:
        experiment.tune(PLANNED_TUNED, PLANNED)
    log("measuring how fast the networks run")
    networks = {"dense": dense, "low-rank": [*experiment.stages.values()][-1].variables}
    return Journey(
        stages=experiment.stages,
        given=given,
        planned=planned,
        spectra=_spectra(dense, ranks),
        images=min(images, len(data)),
        tests=len(test),
        times=measure(model, networks, test, batch_size, rounds, limit),
        machine=machine(),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Experiment:
    """Adds one stage after the other."""

    model: NIN
    dense: Variables
    data: Dataset
    test: Dataset
    recipe: Recipe
    log: Log
    folder: Path | None
    stages: dict[str, Stage] = dataclasses.field(default_factory=dict)

    def add(
        self, name: str, chosen: Plan | None, tree: Variables, curve: Sequence[float] = ()
    ) -> None:
        score = curve[-1] if curve else accuracy(self.model, tree, self.test)
        self.stages[name] = Stage(accuracy=score, plan=chosen, variables=tree, curve=tuple(curve))
        self.log(f"{name}: {score:.2%} of {len(self.test):,} test images")

    def tune(self, name: str, before: str) -> None:
        start = self.stages[before]
        folder = None if self.folder is None else self.folder / name.replace(" ", "-")
        given = (self.model, start.variables, self.data, self.test, self.recipe)
        tree, curve = fit(*given, self.log, self.dense, folder)
        self.add(name, start.plan, tree, curve)


def fixed_plan(found: Calibration, ranks: Mapping[str, int]) -> Plan:
    """What given ranks cost and lose, as a plan."""

    def select(candidates: Candidates, budget: Budget) -> Plan:
        return selectors.fixed(candidates, ranks)

    return plan(found, macs=1.0, select=select)


def measure(
    model: NIN,
    networks: Mapping[str, Variables],
    data: Dataset,
    batch_size: int,
    rounds: int,
    limit: float,
) -> Throughput:
    """Times forward passes of the same images, as `jax.jit` and as `fast` run each network."""
    images = _normalized(np.resize(data.images, (batch_size, *data.images.shape[1:])))
    programs = dict[str, Program]()
    for name, variables in networks.items():
        plain = jax.jit(lowrank(model.apply))
        found = fast(model.apply, variables, images, rounds=2, limit=limit)
        programs[name] = _program(plain, variables, images)
        programs[f"{name}, fast"] = _program(found, variables, images)
    return throughput(programs, items=batch_size, rounds=rounds)


def _program(run: Callable, variables: Variables, images: jax.Array) -> Program:
    given = jax.device_put((variables, images))
    return lambda: jax.block_until_ready(run(*given))


def _normalized(images: np.ndarray) -> jax.Array:
    return normalize(jnp.asarray(images))


def _spectra(variables: Variables, layers: Iterable[str]) -> dict[str, np.ndarray]:
    kernels = {name: variables["params"][name]["kernel"] for name in layers}
    return {name: np.asarray(spectrum(kernel)).ravel() for name, kernel in kernels.items()}
