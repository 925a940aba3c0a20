"""`plan` by a calibration: which forms it may choose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lowrank_jax as lr
from lowrank_jax import calibrate, plan


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="first")(x))
        return nn.Dense(4, name="head")(nn.Conv(12, (3, 3), name="second")(x))


@functools.cache
def calibrated():
    images = jax.random.normal(jax.random.key(1), (8, 6, 6, 4))
    return calibrate(CNN().apply, CNN().init(jax.random.key(0), images), images)


@pytest.mark.parametrize("forms", [["vertical", "horizontal"], ["spatial"], ["pointwise"]])
def test_a_plan_of_some_forms_chooses_these_and_the_usual_one_of_a_product(forms):
    chosen = {
        path: scheme.first
        for path, scheme in plan(calibrated(), macs=0.3, forms=forms).ranks.items()
    }
    assert chosen.pop("head", "left") == "left"
    assert chosen and set(chosen.values()) <= set(forms)


def test_without_forms_a_plan_may_choose_all_of_them():
    every = plan(calibrated(), macs=0.5, forms=["vertical", "horizontal", "spatial", "pointwise"])
    assert str(every) == str(plan(calibrated(), macs=0.5))


def test_unknown_forms_are_refused_before_anything_is_computed():
    with pytest.raises(ValueError, match=r"forms: 'tall' is not allowed; give one of .*'vertical'"):
        plan(None, macs=0.5, forms=["tall"])


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 3e4])
def test_inputs_that_are_all_alike_can_be_planned_and_fitted(value):
    """Variances are differences that cancel; rounding must not make them negative."""
    model, images = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)]), jnp.full((9, 9), value)
    variables = model.init(jax.random.key(0), images)
    found = lr.calibrate(model.apply, variables, images)
    small = lr.compress(found, lr.plan(found, macs=0.6))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(small))
