"""A compressed network beside the dense one: how well it does and how long it takes."""

import argparse
import dataclasses
import functools
from typing import Any, Self

import jax
import numpy as np

from lowrank_jax.cli.jobs import Job
from lowrank_jax.planning.plans import Plan
from lowrank_jax.planning.spectra import Spectra, spectra
from lowrank_jax.program.compiler import default_options
from lowrank_jax.program.tracing import trace
from lowrank_jax.report.scores import Images, Score
from lowrank_jax.report.times import Times

ENOUGH = 256  # images; of fewer, a part would say little and be missed in the fit
PART = 4  # every fourth image is held out, so that images in the order of their classes are mixed


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Comparison:
    """Which images factors are fitted to, and on which networks are compared.

    Attributes:
        fitted, scored: the network with these images.
        labels: of the images that are scored; None where there are none.
        held_out: whether these are others than those that are fitted to.
    """

    fitted: Job
    scored: Job
    labels: np.ndarray | None
    held_out: bool

    @classmethod
    def of(cls, job: Job, labels: np.ndarray | None, hold_out: bool) -> Self:
        """Decides which images are fitted to and which are scored.

        Args:
            job: the network with all images.
            labels: of the images, if there are some.
            hold_out: whether a part of the images is scored alone, where there are enough.
        """
        if not hold_out or len(job.images) < ENOUGH:
            return cls(fitted=job, scored=job, labels=labels, held_out=False)
        out = np.arange(len(job.images)) % PART == PART - 1
        return cls(
            fitted=dataclasses.replace(job, images=job.images[~out]),
            scored=dataclasses.replace(job, images=job.images[out]),
            labels=None if labels is None else labels[out],
            held_out=True,
        )

    @property
    def images(self) -> Images:
        """Those that are scored, in a word."""
        count, labelled = len(self.scored.images), self.labels is not None
        return Images(count=count, held_out=self.held_out, labelled=labelled)

    @functools.cached_property
    def dense(self) -> np.ndarray:
        """Outputs of the dense network."""
        return np.concatenate(list(self.scored.outputs(self.scored.variables)))

    def score(self, small: Any) -> Score:
        """How well a compressed network does."""
        found = np.concatenate(list(self.scored.outputs(small)))
        wide = self.dense.astype(np.float64)
        norm = float(np.linalg.norm(wide))
        return Score(
            images=self.images,
            error=float(np.linalg.norm(found - wide)) / norm if norm else 0.0,
            dense=self._right(self.dense),
            small=self._right(found),
        )

    def _right(self, outputs: np.ndarray) -> float | None:
        """Share of the outputs whose class is the wanted one; None where they are no classes."""
        if outputs.shape[-1] < 2:
            return None
        wanted = self.dense.argmax(-1) if self.labels is None else self.labels
        return float(np.mean(outputs.argmax(-1) == wanted))


def add_comparison_options(command: argparse.ArgumentParser) -> None:
    """The options of what is found out beside the result itself."""
    about = (
        "classes of the images, .npy or .npz, where the images have none, for accuracies; of "
        f"{ENOUGH} images or more every fourth is then scored and left out of the fit"
    )
    command.add_argument("--labels", help=about)
    about = "measure every layer and the network, dense and low-rank, with --batch images at once"
    command.add_argument("--time", action="store_true", help=about)


def times(job: Job, small: Any, plan: Plan, batch: int) -> Times:
    """Times of the network and of the layers of a plan, dense and low-rank, on this device."""
    from lowrank_jax.tuning.latency import scheme_seconds  # loads where times are asked for
    from lowrank_jax.tuning.timer import Timer
    from lowrank_jax.tuning.timing import compile_fastest, throughput

    images = jax.numpy.asarray(np.resize(job.images, (batch, *job.images.shape[1:])))
    program = trace(job.apply, job.variables, images, **job.kwargs)
    table = {choice.path: choice.scheme for choice in plan}
    layers = scheme_seconds(program, Timer(default_options()), table)
    networks = {"dense": job.variables, "low-rank": small}
    programs = {name: compile_fastest(job.call, tree, images) for name, tree in networks.items()}
    return Times(network=throughput(programs, items=batch), layers=layers)


def plain_spectra(job: Job, plan: Plan) -> Spectra:
    """Singular values of the kernels that a plan decomposes, where nothing was calibrated."""
    if not plan.ranks:
        return Spectra({})
    forms = {scheme.first for scheme in plan.ranks.values()}
    return spectra(job.variables, job.trace, plan.ranks, forms=forms)
