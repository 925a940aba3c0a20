"""The blocks of a network: they end where all that compression changed is alive in one value."""

import itertools
from collections.abc import Collection, Iterable

import numpy as np

from lowrank_jax.compression.outline import Outline


def block_ends(outline: Outline, places: Iterable[int], differing: Collection[int]) -> list[int]:
    """Where blocks end, each of which fits a layer at least: residual blocks, or plain layers.

    Args:
        outline: of the program.
        places: of the equations that fit a layer.
        differing: numbers of the variables that differ in the compressed network.

    Returns:
        Indices of the equations that a block ends before, the last possible ones before the next
        fit; then the number of equations, the end of the program.
    """
    end = len(outline.eqns)
    single = np.flatnonzero(_alive(outline, differing) == 1)
    fits = sorted(places)
    found: list[int] = []
    for place, after in itertools.pairwise(fits):
        own = single[(single > place) & (single <= after)]
        found.extend(int(stop) for stop in own[-1:])
    return [*found, end] if fits else []


def _alive(outline: Outline, differing: Collection[int]) -> np.ndarray:
    """How many variables that differ and depend on the images are alive before each equation."""
    changes, last = np.zeros(len(outline.eqns) + 2, int), outline.last_reads()
    for place, eqn in enumerate(outline.eqns):
        for number in outline.gives(eqn):
            if number in differing and number not in outline.fixed and number in last:
                changes[place + 1] += 1
                changes[last[number] + 1] -= 1
    return np.cumsum(changes)[:-1]
