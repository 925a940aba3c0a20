"""The blocks of a network: they end where one value alone leads from the images to what follows."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from lowrank_jax.compression.outline import Outline
from lowrank_jax.program.derivatives import lacks_derivative

TOGETHER = 3  # blocks, whose steps make up for each other's errors


def block_ends(outline: Outline, places: Iterable[int]) -> list[int]:
    """Where blocks end, each of which fits a layer at least: residual blocks, or plain layers.

    Args:
        outline: of the program.
        places: of the equations that fit a layer.

    Returns:
        Indices of the equations that a block ends before, the last possible ones before the next
        fit; then the number of equations, the end of the program.
    """
    end = len(outline.eqns)
    single = np.flatnonzero(_alive(outline) == 1)
    fits = sorted(places)
    found: list[int] = []
    for place, after in itertools.pairwise(fits):
        own = single[(single > place) & (single <= after)]
        found.extend(int(stop) for stop in own[-1:])
    return [*found, end] if fits else []


def joined(outline: Outline, ends: Sequence[int]) -> dict[int, int]:
    """Where blocks that are trained together end, to how many they are.

    A block that has no derivative stands alone, so that its neighbours keep their steps.
    """
    moving = [eqn for eqn in outline.eqns if not outline.fixed.issuperset(outline.gives(eqn))]
    lacking = [outline.place(eqn) for eqn in moving if lacks_derivative(eqn)]
    alone = {next(end for end in ends if end > place) for place in lacking}
    parts: list[list[int]] = []
    for end in ends:
        if not parts or len(parts[-1]) == TOGETHER or alone & {end, parts[-1][-1]}:
            parts.append([])
        parts[-1].append(end)
    return {part[-1]: len(part) for part in parts}


def _alive(outline: Outline) -> np.ndarray:
    """How many variables that depend on the images are alive before each equation."""
    made = dict.fromkeys(outline.images, 0)
    for place, eqn in enumerate(outline.eqns):
        made.update(dict.fromkeys(outline.gives(eqn), place + 1))
    changes = np.zeros(len(outline.eqns) + 2, int)
    for number, last in outline.last_reads.items():
        if number in made and number not in outline.fixed:
            changes[made[number]] += 1
            changes[last + 1] -= 1
    return np.cumsum(changes)[:-1]
