"""The blocks of a network: they end where one value alone leads from the images to what follows."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from lowrank_jax.compression.outline import Outline

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


def joined(ends: Sequence[int]) -> dict[int, int]:
    """Where blocks that are trained together end, to how many they are.

    Example:
        >>> joined([10, 20, 30, 40])
        {30: 3, 40: 1}
    """
    parts = [ends[start : start + TOGETHER] for start in range(0, len(ends), TOGETHER)]
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
