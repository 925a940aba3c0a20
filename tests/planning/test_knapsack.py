"""The search under a budget, proven against every choice."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowrank_jax.planning.knapsack import lower_hull, solve

CANDIDATE = st.tuples(st.integers(1, 12), st.integers(0, 20))
LAYERS = st.lists(st.lists(CANDIDATE, min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=300)
@given(LAYERS, st.integers(0, 30))
@example([[(1, 9), (2, 4), (4, 0)], [(1, 8), (3, 1)]], 3)
def test_the_search_misses_the_optimum_by_less_than_the_first_step_that_does_not_fit(layers, extra):
    costs = [np.array([cost for cost, _ in layer]) for layer in layers]
    losses = [np.array([loss for _, loss in layer]) for layer in layers]
    limit = sum(cost.min() for cost in costs) + extra
    picks = solve(costs, losses, limit)
    assert sum(cost[pick] for cost, pick in zip(costs, picks, strict=True)) <= limit
    feasible = [c for c in itertools.product(*layers) if sum(cost for cost, _ in c) <= limit]
    best = min(sum(loss for _, loss in choice) for choice in feasible)
    mine = sum(loss[pick] for loss, pick in zip(losses, picks, strict=True))
    first = first_unfit(costs, losses, limit)
    assert best <= mine and (mine == best if first is None else mine < best + first)


def first_unfit(costs, losses, limit):
    """Gain of the first step, by falling slope, that exceeds the limit; None if all fit."""
    found, spent = [], sum(cost.min() for cost in costs)
    for cost, loss in zip(costs, losses, strict=True):
        hull = lower_hull(cost, loss)
        found += zip(np.diff(cost[hull]), -np.diff(loss[hull]), strict=True)
    for cost, gain in sorted(found, key=lambda step: -step[1] / step[0]):
        spent += cost
        if spent > limit:
            return max(
                g for c, g in found if g / c == gain / cost
            )  # steps of one slope have no order
    return None


def test_a_search_without_a_feasible_choice_says_the_least():
    with pytest.raises(ValueError, match="No choice costs 2 or less; the least possible is 3"):
        solve([np.array([3, 5])], [np.array([1, 0])], 2)


def test_without_layers_there_is_nothing_to_choose():
    assert solve([], [], 0) == []
