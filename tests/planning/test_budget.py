"""Budgets: a measure, and a share or a count of it."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax.planning.budget import MEASURES, Budget


@pytest.mark.parametrize("amount", [0, -3, 0.0, 1.5, math.nan, True, "half", None])
@pytest.mark.parametrize("measure", ["parameters", "latency"])
def test_a_budget_of_another_type_or_out_of_range_is_refused(measure, amount):
    with pytest.raises(
        ValueError,
        match=rf"Budget of {measure}: .* is not allowed; give a float above 0 and up to 1",
    ):
        Budget(measure, amount)


def test_numbers_of_numpy_and_jax_are_budgets_too():
    assert Budget("parameters", np.int64(300)) == Budget("parameters", 300)
    assert Budget("parameters", np.float32(0.5)) == Budget("parameters", 0.5)
    assert Budget("parameters", jnp.float32(0.5)) == Budget("parameters", 0.5)


@given(st.sampled_from(MEASURES[:3]), st.integers(1, 10**6), st.integers(1, 100))
def test_a_share_of_a_count_is_its_whole_part(measure, dense, percent):
    assert Budget(measure, percent / 100).limit(dense) == percent * dense // 100


def test_a_budget_prints_what_is_asked():
    assert str(Budget("macs", 1_000_000)) == "at most 1,000,000 macs"
    assert str(Budget("latency", 0.25)) == "at most 0.25 of the dense latency"
