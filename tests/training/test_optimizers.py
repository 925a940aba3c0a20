"""Optimisers: the usual schedule, and moments that outlive a decomposition."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_jax import decompose, reconstruct
from lowrank_jax.training import TrainState, carry_optimizer, one_cycle_sgd


def ones(tree):
    return jax.tree.map(jnp.ones_like, tree)


def test_only_kernels_decay():
    tx = one_cycle_sgd(1.0, 10, weight_decay=0.5)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert jnp.all(updates["kernel"] < 0) and jnp.all(updates["bias"] == 0)


def test_the_rate_peaks_after_a_fifth_of_the_steps():
    tx, params = one_cycle_sgd(1.0, 20, weight_decay=0.0), {"bias": jnp.ones(())}
    state, sizes = tx.init(params), []
    for _ in range(20):
        updates, state = tx.update(ones(params), state, params)
        sizes.append(-float(updates["bias"]))
    momentum = (1 - 0.9 ** (np.arange(20) + 2)) / 0.1  # of Nesterov, for a constant gradient
    rates = np.array(sizes) / momentum
    assert rates.argmax() == 4 and rates.max() == pytest.approx(1.0, rel=0.05)


OPTIMISERS = {
    "adamw": optax.adamw(0.1),
    "sgd": optax.sgd(0.1, momentum=0.9),
    "one cycle": one_cycle_sgd(0.1, 10),
    "accumulated": optax.MultiSteps(optax.adam(1.0), 2),
}


@pytest.mark.parametrize("tx", OPTIMISERS.values(), ids=OPTIMISERS)
def test_moments_of_layers_that_stay_are_carried_and_those_of_factors_start_anew(
    model, dense, batch, tx, caplog
):
    caplog.set_level("INFO", logger="lowrank_jax")
    old, new = (TrainState.create(tree, tx) for tree in (dense, decompose(dense, {"Conv_0": 2})))
    _, state = tx.update(ones(old.params), old.optimizer, old.params)
    carried = carry_optimizer(tx, state, new.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(carried, new.optimizer)
    before, after = (
        {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (state, carried)
    )
    kept = set(before) & set(after)
    assert set(after) - kept == {name for name in after if "vertical" in name or "horizon" in name}
    chex.assert_trees_all_equal({n: before[n] for n in kept}, {n: after[n] for n in kept})
    assert all(not after[name].any() for name in set(after) - kept)
    assert caplog.messages == ["The optimiser starts anew for Conv_0."]


def test_a_carried_state_trains_on(dense):
    tx = optax.adam(0.1)
    old, new = (TrainState.create(tree, tx) for tree in (dense, decompose(dense, {"Conv_0": 2})))
    _, state = tx.update(ones(old.params), old.optimizer, old.params)
    carried = carry_optimizer(tx, state, new.params)
    updates, after = jax.jit(tx.update)(ones(new.params), carried, new.params)
    assert after[0].count == 2 and optax.tree_utils.tree_norm(updates) > 0


@pytest.mark.parametrize("tx", OPTIMISERS.values(), ids=OPTIMISERS)
def test_moments_of_factors_start_anew_where_the_factors_have_the_same_shapes(small, tx, caplog):
    caplog.set_level("INFO", logger="lowrank_jax")
    again = decompose(reconstruct(small), {"Conv_0": 2})
    old, new = (TrainState.create(tree, tx) for tree in (small, again))
    _, state = tx.update(ones(old.params), old.optimizer, old.params)
    carried = carry_optimizer(tx, state, new.params)

    def wanted(path, before, fresh):
        name = jax.tree_util.keystr(path)
        return fresh if "vertical" in name or "horizontal" in name else before

    expected = jax.tree_util.tree_map_with_path(wanted, state, new.optimizer)
    chex.assert_trees_all_equal(carried, expected)
    assert caplog.messages == ["The optimiser starts anew for Conv_0."]


def test_an_optimiser_of_the_same_tree_is_carried_whole(dense, caplog):
    tx = optax.adam(0.1)
    state = TrainState.create(dense, tx)
    _, moved = tx.update(ones(state.params), state.optimizer, state.params)
    chex.assert_trees_all_equal(carry_optimizer(tx, moved, state.params), moved)
    assert not caplog.messages


@pytest.mark.parametrize("clip", [0, -1.0, float("nan")])
def test_a_largest_norm_that_is_none_is_refused(clip):
    with pytest.raises(ValueError, match=r"clip=.* is not allowed; give a number above 0"):
        one_cycle_sgd(0.1, 10, clip=clip)


@pytest.mark.parametrize("peak", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(peak):
    with pytest.raises(ValueError, match=r"learning_rate=.* is not allowed"):
        one_cycle_sgd(peak, 10)
