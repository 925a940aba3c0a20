"""The algorithm of `compress`: from stop to stop through the program, a fit or a mean at each."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.calibration.inputs import Inputs
from lowrank_jax.calibration.network import Network
from lowrank_jax.compression.activations import find_activations
from lowrank_jax.compression.blocks import block_ends, joined
from lowrank_jax.compression.descent import Descent
from lowrank_jax.compression.holding import Holding
from lowrank_jax.compression.kernels import Factors, Parts, Slice
from lowrank_jax.compression.layer_fits import LayerFits
from lowrank_jax.compression.notes import (
    drifted_mean,
    fit_note,
    lacking_mean,
    mean_note,
    trusted,
)
from lowrank_jax.compression.outline import (
    Matched,
    Outline,
    Shift,
    are_means_matched,
    find_shift,
    fit_places,
    kept_schemes,
    outlines_of,
    shift_after,
    slices,
)
from lowrank_jax.compression.refitting import Sample, fit_again
from lowrank_jax.compression.segments import Live, Segments, Values
from lowrank_jax.compression.sharing import later_readings, with_others
from lowrank_jax.compression.shortcuts import find_shortcuts
from lowrank_jax.compression.stepping import Trained, block_error, cut, stepped
from lowrank_jax.factorization.factors import wide
from lowrank_jax.factorization.importance import Importance
from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.io.progress import Progress
from lowrank_jax.program.reading import Reading
from lowrank_jax.program.transform import prepare
from lowrank_jax.tree.decomposing import replaced
from lowrank_jax.tree.paths import map_named


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """What is to be compressed: the network, its inputs, the scheme of each layer.

    Attributes:
        importance: layer path to how much errors of its outputs count.
    """

    network: Network
    inputs: Inputs
    schemes: Mapping[str, Scheme]
    importance: Mapping[str, Importance]


class Reconstruction:
    """One run of the algorithm.

    Attributes:
        layers: the fits so far.
    """

    def __init__(
        self, job: Job, sweeps: int, match_means: bool, steps: int, fit_dense: bool
    ) -> None:
        self.job, self.match_means, self.steps = job, match_means, steps
        batches = list(job.inputs)
        if steps:
            batches = cut(job.network, batches)
        outlines = outlines_of(job.network, batches)
        self.outline = outlines[0]
        kept = kept_schemes(self.outline, job.schemes) if fit_dense else {}
        kept = {path: own for path, own in kept.items() if path not in job.network.changed}
        self.layers = LayerFits(job.network, job.schemes, kept, job.importance, sweeps)
        self.factors = self.layers.factors
        images = [jax.tree.leaves(batch) for batch in batches]
        self.segments = Segments(outlines, images, self._given(batches[0]))
        self.shifts: Values = {}
        self.done: set = set()  # kernels and shifts whose steps are over
        self.places = fit_places(self.outline, self.layers.schemes)
        values = job.network.leaves(batches[0])
        self.shortcuts = find_shortcuts(self.outline, self.places, values)
        self.activations = find_activations(self.outline, self.places, values)

    def _given(self, batch: tuple) -> Values:
        outline, inputs = self.outline, self.outline.jaxpr.invars
        values = zip(inputs, self.job.network.leaves(batch), strict=True)
        given = {outline.number(var): jnp.asarray(value) for var, value in values}
        return {n: x for n, x in given.items() if n not in outline.images} | outline.constants()

    def fit(self) -> Any:
        """Fits all layers and returns the tree."""
        outline, places = self.outline, self.places
        self.factors.fill_plain(_unread(outline, places, self.factors))
        changed = {n for n, s in outline.sources.items() if s.path in self.layers.schemes}
        matched = Matched(outline, outline.differing(changed))
        ends = joined(outline, block_ends(outline, places)) if self.steps and places else {}
        if ends:
            self.segments.mark()
        with Progress("fitting", len(places)) as progress:
            self._fit_all(matched, ends, progress)
        return self._tree()

    def _fit_all(self, matched: Matched, ends: Mapping[int, int], progress: Progress) -> None:
        """From stop to stop through the program; gradient steps follow where blocks end."""
        places = self.places
        for place in range(max(places, default=-1) + 1):
            if place in ends:
                self._descend(place, ends[place])
                self.segments.advance(place, self._small(), _nothing)
                self.segments.mark()
            if place in places:
                self._fit(place, places[place], matched)
                progress.update()
            elif self.match_means:
                self._match(place, matched)
            matched.note(place)
        if ends:
            end = max(ends)  # of the program, which the loop does not reach
            self._descend(end, ends[end])

    def _small(self) -> Values:
        """The inputs of the compressed network that differ."""
        return {**self._kernels({path: {} for path in self.layers.schemes}), **self.shifts}

    def _kernels(self, new: Mapping[str, Mapping[Slice, Parts]]) -> Values:
        """Some layers as values of the program, with new factors of some kernels."""
        outline = self.outline
        return {
            number: prepare(self.factors.whole(source.path, new[source.path]), outline.survey)
            for number, source in outline.sources.items()
            if source.path in new
        }

    def _fit(self, place: int, path: str, matched: Matched) -> None:
        """Fits the kernels that an equation reads, unless they are, and matches the means."""
        reading = self.outline.readings[place]
        shift = shift_after(self.outline, place) if self.match_means else None
        lacks = self.layers.lacks(path, reading)
        if not lacks and shift is None:
            return
        others = later_readings(self.outline, self.places, place) if lacks else []
        activation = self.activations.get(place) if lacks and not others else None
        holding = Holding(len(self.segments.lives), self.segments.files)
        sample = Sample(self.outline, place, activation, holding) if activation else None
        roots, shortcut = self.layers.roots(path), self.shortcuts.get(place)
        note = fit_note(self.outline, place, shortcut, roots, sample)
        found = self.segments.advance(place, self._small(), note)
        if others:
            found = with_others(self.segments, self.outline, found, others, roots, shift)
        if lacks:
            centred = self.match_means and all(map(self._takes_up_means, (place, *others)))
            self.layers.fit(path, reading, found, centred)
        self._match_outputs(reading, shift, found, matched)
        if sample and self.layers.supported(path):
            self._fit_again(path, sample, shift, found, matched)

    def _takes_up_means(self, place: int) -> bool:
        """Whether something behind a reading takes up the means of its outputs."""
        outline = self.outline
        return shift_after(outline, place) is not None or are_means_matched(outline, place)

    def _fit_again(
        self, path: str, sample: Sample, shift: Shift | None, first: Sequence, matched: Matched
    ) -> None:
        """Fits a layer to what an activation shows of its errors."""
        lack = np.zeros(sample.activation.scale.size)
        if shift is not None:
            old, new = self.segments.given[shift.leaf], self.shifts[shift.leaf]
            lack = shift.sign * np.ravel(np.asarray(new, np.float64) - np.asarray(old, np.float64))
        lack = fit_again(self.layers, path, sample, first, lack, shift is not None)
        if shift is not None:
            self._set_shift(shift, lack, matched)

    def _match_outputs(
        self, reading: Reading, shift: Shift | None, found: Sequence[Mapping], matched: Matched
    ) -> None:
        """Gives the parameter after a layer what the means of its outputs lack."""
        if shift is not None and reading.source is not None:
            lack = functools.partial(lacking_mean, reading, self.factors.part(reading.source))
            self._set_shift(shift, trusted(lack, found), matched)

    def _descend(self, end: int, blocks: int) -> None:
        """Takes the steps of some blocks, fitted since the mark, for the values at their end."""
        self.segments.rewind()
        run, lives = self.segments.block(end)
        batches = [(self.segments.given, self._small(), own.dense, own.small) for own in lives]

        def loss(new: Trained, batch: tuple) -> jax.Array:
            given, small, *live = batch
            shifts = {number: x.astype(given[number].dtype) for number, x in new.shifts.items()}
            own = {**small, **self._kernels(new.factors), **shifts}
            dense, found = run(given, own, *live)
            # The dense network may have run the last equation before the mark.
            return block_error({**live[0], **dense}, found)

        found = stepped(loss, self._untrained(), batches, blocks * self.steps)
        if found is not None:
            self._note_steps(found)
        if found is not None and found.helped:
            self._take(found.arrays)
        self.done = {(path, index) for path, own in self.layers.fits.items() for index in own}
        self.done.update(self.shifts)

    def _untrained(self) -> Trained:
        """What was fitted and set since the steps before."""
        factors: dict[str, dict[Slice, Parts]] = {}
        for path, own in self.layers.fits.items():
            new = [index for index in own if (path, index) not in self.done]
            if new:
                factors[path] = {index: self.factors.parts(path, index) for index in new}
        shifts = {n: wide(x) for n, x in self.shifts.items() if n not in self.done}
        return Trained(factors=factors, shifts=shifts)

    def _note_steps(self, found: Descent[Trained]) -> None:
        """Adds to the fits what steps were worth."""
        for path, own in found.arrays.factors.items():
            for index in own:
                fit = self.layers.fits[path][index]
                new = dataclasses.replace(fit, closed=found.before, stepped=found.after)
                self.layers.fits[path][index] = new

    def _take(self, new: Trained) -> None:
        """Takes over what steps gave."""
        for number, value in new.shifts.items():
            self.shifts[number] = value.astype(self.shifts[number].dtype)
        for path, own in new.factors.items():
            for index, parts in own.items():
                pair = self.factors.joined(path, index, parts)
                first, second = (np.asarray(x, np.float64) for x in pair)
                fit = self.layers.fits[path][index]
                trained = dataclasses.replace(fit, first=first, second=second)
                self.layers.take(path, index, trained)

    def _match(self, place: int, matched: Matched) -> None:
        """Corrects the mean of a normalisation whose input has drifted."""
        shift = find_shift(self.outline, place)
        drifts = shift is not None and shift.sign < 0 and shift.data in matched.differing
        if shift is None or not drifts or shift.data in matched.numbers:
            return
        if shift.leaf in self.shifts:  # by the fit of the layer before it
            return
        found = self.segments.advance(place, self._small(), mean_note(shift))
        self._set_shift(shift, trusted(drifted_mean, found), matched)

    def _set_shift(self, shift: Shift, lack: np.ndarray, matched: Matched) -> None:
        """Gives a parameter what the means lack."""
        old = self.segments.given[shift.leaf]
        new = np.asarray(old, np.float64) + shift.sign * lack.reshape(np.shape(old))
        self.shifts[shift.leaf] = jnp.asarray(new, old.dtype)
        outline = self.outline
        matched.numbers.update(outline.gives(outline.eqns[shift.place]))

    def _tree(self) -> Any:
        outline, schemes = self.outline, self.job.schemes
        new = {outline.sources[number].path: value for number, value in self.shifts.items()}
        fitted = filter(self.layers.supported, self.layers.kept)
        new |= {path: self.factors.dense(path) for path in fitted}
        tree = map_named(lambda name, leaf: new.get(name, leaf), self.job.network.variables)
        new = {path: (schemes[path], self.factors.all_factors(path)) for path in schemes}
        return replaced(tree, new, self.job.network.changed)


def _nothing(live: Live, turn: int) -> int:
    """The note of a stop where nothing is fitted."""
    del live, turn
    return 0


def _unread(outline: Outline, places: Mapping[int, str], factors: Factors) -> set:
    """The kernels of stacks that loops or branches alone read, where nothing can be fitted."""
    fitted = {
        (path, index) for place, path in places.items() for index in slices(outline.readings[place])
    }
    every = {(path, index) for path in factors.schemes for index in factors.slices(path)}
    return every - fitted
