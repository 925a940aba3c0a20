"""`plan` by a calibration: which forms it may choose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lowrank_jax as lr
from lowrank_jax import calibrate, plan
from lowrank_jax.planning.planner import calibrated_spectra


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


def test_a_network_without_a_layer_to_decompose_is_refused_for_its_own_reason():
    tied = lambda tree, x: jnp.tanh(x @ tree["w"]) @ tree["w"].T  # noqa: E731
    with pytest.raises(ValueError, match=r"reasons in the last column.*\n.*\n.* IO and OI"):
        plan(tied, {"w": jnp.ones((4, 4))}, jnp.ones((9, 4)), macs=0.5)
    small = lambda tree, x: x @ tree["w"]  # noqa: E731
    with pytest.raises(ValueError, match="No layer has a rank that is cheaper than dense; give a"):
        plan(small, {"w": jnp.ones((2, 2))}, jnp.ones((9, 2)), macs=0.5)


@pytest.mark.parametrize("select", ["total_energy", None, 3])
def test_a_selector_that_is_no_function_is_refused(select):
    with pytest.raises(ValueError, match=r"select=.* is not allowed; give a function of cand"):
        plan(calibrated(), macs=0.5, select=select)


def test_a_branch_that_no_input_takes_has_plain_errors():
    rng = np.random.default_rng(0)
    tree = {name: rng.standard_normal((8, 8)).astype("f") for name in "abc"}
    inputs = rng.standard_normal((32, 8)).astype("f")

    def apply(p, x):
        taken = lambda x: jnp.tanh(x) @ p["b"]  # noqa: E731
        return jax.lax.cond(x.sum() > 1e9, lambda x: x @ p["a"], taken, x) @ p["c"]

    found = lr.calibrate(apply, tree, inputs)
    chosen = plan(found, macs=0.8)
    assert np.isfinite([choice.error for choice in chosen]).all()
    spectrum = np.linalg.svd(tree["a"], compute_uv=False)
    np.testing.assert_allclose(calibrated_spectra(found).values["a"]["left"][0], spectrum, 1e-5)
    small = lr.compress(found, chosen)
    assert np.isfinite(lr.lowrank(apply)(small, inputs)).all()


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 3e4])
def test_inputs_that_are_all_alike_can_be_planned_and_fitted(value):
    """Variances are differences that cancel; rounding must not make them negative."""
    model, images = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)]), jnp.full((9, 9), value)
    variables = model.init(jax.random.key(0), images)
    found = lr.calibrate(model.apply, variables, images)
    small = lr.compress(found, lr.plan(found, macs=0.6))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(small))


@pytest.mark.parametrize("given", [([1.0], None), (None, [1.0]), (None, None, True)])
def test_what_a_calibration_was_given_is_not_given_again(given):
    with pytest.raises(ValueError, match="a budget alone"):
        plan(calibrated(), *given, macs=0.5)


@pytest.mark.parametrize("own", [{"batch": 7}, {"timer": "nonsense"}])
def test_what_latency_alone_reads_is_refused_beside_another_budget(own):
    with pytest.raises(ValueError, match="is read for a budget of latency alone"):
        plan(calibrated(), macs=0.5, **own)


@pytest.mark.parametrize("amount", [0.5, 1000])
def test_a_budget_without_its_name_is_refused_with_the_remedy(amount):
    with pytest.raises(ValueError, match=f"what {amount} is of; give .* such as macs={amount}"):
        plan(calibrated(), amount)


@pytest.mark.parametrize("count", [1, 4])
def test_equal_images_say_nothing_of_a_head_that_then_stays_near_its_kernel(count):
    class Pooled(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(16, (3, 3), name="first")(x))
            x = nn.relu(nn.Conv(16, (3, 3), name="second")(x))
            return nn.Dense(12, name="head")(x.mean((1, 2)))

    image = jax.random.normal(jax.random.key(1), (1, 6, 6, 4))
    variables = Pooled().init(jax.random.key(0), image)
    chosen = plan(Pooled().apply, variables, jnp.repeat(image, count, 0), macs=0.8)
    rank = chosen.ranks["head"].rank if "head" in chosen.ranks else 12
    assert rank > 4 and "second" in chosen.ranks
