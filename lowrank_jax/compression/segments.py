"""A network run in segments, dense and compressed side by side, one batch at a time.

Between two segments lies a stop. What is alive there is held on the host for all batches, or in a
file where it is much; the device holds one batch.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from lowrank_jax.compression.holding import Files, Holding, give_back, loaded, nbytes
from lowrank_jax.compression.outline import Outline
from lowrank_jax.program.compiler import default_options
from lowrank_jax.program.interpreter import bind, step
from lowrank_jax.program.transform import LowRank

Values = dict[int, Any]
FOLDS = 2  # sets of images, of which one tells what is fitted to the other is worth


@dataclasses.dataclass
class Live:
    """What a batch has given so far, by the numbers of the variables.

    Attributes:
        dense: values of the dense network.
        small: values of the compressed network where they differ.
    """

    dense: Values
    small: Values


Note = Callable[[Live, int], Any]
Segment = Callable[[Values, Values, Values, Values], tuple[Values, Values]]


class Segments:
    """Runs both networks from stop to stop.

    Args:
        outlines: of the program at the shapes of each batch.
        batches: the leaves of the images of each batch.
        given: number of an input to its value in the dense network.
    """

    def __init__(
        self, outlines: Sequence[Outline], batches: Sequence[Sequence], given: Values
    ) -> None:
        self.outlines, self.given = outlines, given
        self.first = outlines[0]
        self.lives = [
            Live(dict(zip(outline.images, batch, strict=True)), {})
            for outline, batch in zip(outlines, batches, strict=True)
        ]
        self.last = self.first.last_reads
        self.place = self.start = 0
        self.files = Files()
        self._marked: list[Live] = []

    def mark(self) -> None:
        """Remembers this place and what is alive here, for `rewind`."""
        self.start, self._marked = self.place, _copies(self.lives)

    def rewind(self) -> None:
        """Goes back to the place that was marked last."""
        self.place, self.lives = self.start, _copies(self._marked)

    def block(self, stop: int) -> tuple[Segment, list[Live]]:
        """The segment from the marked place to a stop, and what is alive at its start.

        Returns:
            The segment at the shapes of the first batch, and the batches of these shapes alone.
        """
        pairs = zip(self._marked, self.outlines, strict=True)
        alike = [live for live, outline in pairs if outline is self.first]
        return _segment(self.first, self.start, stop, self.last), alike

    def advance(self, place: int, small: Values, note: Note) -> list:
        """Runs all batches up to an equation, and adds up what is noted of each there.

        Args:
            place: index of the equation, which the compressed network does not run yet. The dense
                network does. The number of equations stands for the end of the program.
            small: number of an input to its value in the compressed network, where it differs.
            note: function of what a batch has given, and of the number of the batch.

        Returns:
            The sums of the notes, in float64, of the even and of the odd batches.
        """
        programs = self._programs(lambda own: _segment(own, self.place, place, self.last))
        found: list[Any] = []
        still = [self._still(live, place) for live in self.lives]
        holding = Holding(len(still), self.files, sum(map(nbytes, still)))
        for turn, (live, outline) in enumerate(zip(self.lives, self.outlines, strict=True)):
            held = loaded((live.dense, live.small))
            new = programs[id(outline)](self.given, small, *held)
            add_note(found, turn % FOLDS, note(_joined(held, new), turn))
            self.lives[turn] = _joined(still[turn], holding.keep(new))
        self.place = place
        give_back()
        return found

    def ahead(self, stop: int, numbers: Collection[int], note: Note) -> list:
        """Runs the dense network alone further on, and adds up what is noted of some values.

        Args:
            stop: index of the last equation that is run.
            numbers: of the values that the note gets, as those of the dense network.
            note: as in `advance`.

        Returns:
            The sums of the notes, as `advance` gives them.
        """
        programs = self._programs(lambda own: _dense_segment(own, self.place, stop, numbers))
        found: list[Any] = []
        for turn, (live, outline) in enumerate(zip(self.lives, self.outlines, strict=True)):
            values = programs[id(outline)](self.given, loaded(live.dense))
            add_note(found, turn % FOLDS, note(Live(values, {}), turn))
        return found

    def _programs(self, make: Callable[[Outline], Callable]) -> dict[int, Callable]:
        """A compiled function for each outline, which batches of one shape share."""
        outlines = {id(outline): outline for outline in self.outlines}
        options = default_options()
        return {at: jax.jit(make(own), compiler_options=options) for at, own in outlines.items()}

    def _still(self, live: Live, place: int) -> tuple[Values, Values]:
        """What was alive before and is needed after a place."""
        one, two = (
            {number: x for number, x in values.items() if self.last.get(number, -1) >= place}
            for values in (live.dense, live.small)
        )
        return one, two


def _joined(old: tuple[Values, Values], new: tuple[Values, Values]) -> Live:
    return Live({**old[0], **new[0]}, {**old[1], **new[1]})


def _copies(lives: Sequence[Live]) -> list[Live]:
    return [dataclasses.replace(live) for live in lives]


def add_note(sums: list, fold: int, note: Any) -> None:
    """Adds a note to the sum of its fold."""
    if fold == len(sums):
        sums.append(_wide(note))
    else:
        sums[fold] = added(sums[fold], note)


def added(old: Any, new: Any) -> Any:
    """The sum of two notes, of which one may have names that the other lacks.

    Example:
        >>> added({"a": np.ones(2)}, {"a": np.ones(2), "b": np.ones(1)})
        {'a': array([2., 2.]), 'b': array([1.])}
    """
    if isinstance(new, Mapping):
        names = {name: added(old[name], x) if name in old else _wide(x) for name, x in new.items()}
        return {**old, **names}
    if isinstance(new, tuple):
        return tuple(map(added, old, new))
    return np.add(old, np.asarray(new), out=old)  # in place, since moments are large


def _wide(note: Any) -> Any:
    return jax.tree.map(lambda value: np.array(value, np.float64), note)


def _segment(outline: Outline, start: int, stop: int, last: Mapping[int, int]) -> Segment:
    """A function of (given, small inputs, dense live values, small live values).

    It gives the values that are new, of the dense and of the compressed network.
    """
    ahead = outline.eqns[stop : stop + 1]  # none at the end of the program
    own = range(start, stop + len(ahead))
    needed = _fixed_equations(outline, own)

    def run(given: Values, small: Values, dense: Values, other: Values) -> tuple:
        one, two = {**given, **dense}, {**small, **other}
        for place in needed:
            _both(outline, place, one, two)
        for place in range(start, stop):
            if place not in needed:
                _both(outline, place, one, two)
        kept = {n for n in (*one, *two) if n not in outline.fixed and last.get(n, -1) >= stop}
        for eqn in ahead:
            _dense(outline, stop, one)
            kept.update(outline.gives(eqn))
        pairs = ((one, dense), (two, other))
        return tuple({n: x[n] for n in sorted(kept) if n in x and n not in old} for x, old in pairs)

    return run


def _dense_segment(
    outline: Outline, start: int, stop: int, numbers: Collection[int]
) -> Callable[[Values, Values], Values]:
    """A function of (given, dense live values) to some values of the dense network."""
    own = range(start, stop + 1)
    needed = _fixed_equations(outline, own)

    def run(given: Values, dense: Values) -> Values:
        values = {**given, **dense}
        for place in (*needed, *own):
            _dense(outline, place, values)
        return {number: values[number] for number in numbers}

    return run


def _fixed_equations(outline: Outline, places: Sequence[int]) -> list[int]:
    """The equations that do not depend on the images, and that some equations need."""
    wanted = {n for place in places for n in outline.reads(outline.eqns[place])}
    found = []
    for place in range(len(outline.eqns) - 1, -1, -1):
        eqn = outline.eqns[place]
        results = set(outline.gives(eqn))
        if results <= outline.fixed and results & wanted:
            found.append(place)
            wanted.update(outline.reads(eqn))
    return found[::-1]


def _read(outline: Outline, eqn: Any, values: Values, others: Values | None = None) -> list:
    def value(var: Any) -> Any:
        if isinstance(var, Literal):
            return var.val
        number = outline.number(var)
        return values[number] if number in values or others is None else others[number]

    return [value(var) for var in eqn.invars]


def _both(outline: Outline, place: int, dense: Values, small: Values) -> None:
    """Runs an equation for the dense network, and for the other where it differs."""
    eqn = outline.eqns[place]
    _dense(outline, place, dense)
    if any(number in small for number in outline.reads(eqn)):
        found, _ = step(eqn, _read(outline, eqn, small, dense), LowRank())
        small.update(zip(outline.gives(eqn), found, strict=True))


def _dense(outline: Outline, place: int, dense: Values) -> None:
    eqn = outline.eqns[place]
    if not set(outline.gives(eqn)) <= set(dense):
        found = bind(eqn, _read(outline, eqn, dense))
        dense.update(zip(outline.gives(eqn), found, strict=True))
