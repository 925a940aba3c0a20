"""A kernel that a program uses several times is fitted to all that it reads."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lowrank_jax.compression.notes import fit_note, values_of
from lowrank_jax.compression.outline import Outline, Shift, shift_after, slices
from lowrank_jax.compression.segments import Live, Segments, added

MOST = 4  # later places, which stand for all of them


def later_readings(outline: Outline, places: Mapping[int, str], place: int) -> list[int]:
    """The equations after one that read the same kernels; a few of them where they are many."""
    readings, path = outline.readings, places[place]
    own = [*slices(readings[place])]
    later = [other for other, name in places.items() if other > place and name == path]
    later = [other for other in later if [*slices(readings[other])] == own]
    some = np.linspace(0, len(later) - 1, min(len(later), MOST)).astype(int)
    return [later[index] for index in some]


def with_others(
    segments: Segments,
    outline: Outline,
    found: Sequence[Mapping],
    others: Sequence[int],
    roots: jax.Array,
    shift: Shift | None,
) -> list[Mapping]:
    """The notes of a reading, with those that later readings have in the dense network.

    The compressed network has not come to them, and what they read there depends on this fit.

    Args:
        segments: that stand at the reading.
        outline: of the program.
        found: the notes of the reading, for each set of images.
        others: the later readings.
        roots: of the importance of the outputs.
        shift: what takes up the means behind the reading; only readings that have it in common
            join in the means.
    """
    shifts = {other: shift_after(outline, other) for other in others}
    alike = {other for other, own in shifts.items() if own and shift and own.leaf == shift.leaf}
    notes = {other: fit_note(outline, other, None, roots) for other in others}
    numbers = {number for other in others for number in values_of(outline, other)}

    def note(live: Live, turn: int) -> dict[int, Any]:
        return {other: own(live, turn) for other, own in notes.items()}

    sums = list(found)
    for fold, known in enumerate(segments.ahead(max(others), numbers, note)):
        for other, own in known.items():
            sums[fold] = added(sums[fold], own if other in alike else {"sums": own["sums"]})
    return sums
