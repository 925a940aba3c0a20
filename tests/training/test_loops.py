"""Training and evaluation, on a small network and generated data."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from lowrank_jax.training.loops import (
    TrainState,
    batches,
    crop_and_flip,
    evaluate,
    make_train_step,
    one_cycle_sgd,
    train,
)

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 4, 64).astype(np.int32)
IMAGES = (RNG.normal(size=(64, 8, 8, 3)) + LABELS[:, None, None, None]).astype(np.float32)


class Small(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(not train, momentum=0.5)(nn.Conv(8, (3, 3))(x))
        return nn.Dense(4)(nn.relu(x).mean((1, 2)))


def keep(key, images):
    return images


@functools.cache
def variables():
    return jax.jit(Small().init)(jax.random.key(0), IMAGES[:1])


@functools.cache
def optimiser():
    """The optimiser with a step, compiled once for all tests."""
    tx = one_cycle_sgd(0.1, 40)
    return tx, make_train_step(Small().apply, tx, keep)


def start(seed=0):
    tx, step = optimiser()
    return TrainState.create(variables(), tx, seed), step


def run(seed):
    state, step = start(seed)
    losses = []

    def after(epoch, state, loss):
        losses.append(loss)

    options = dict(epochs=5, batch_size=16, seed=seed, after_epoch=after)
    return train(state, step, IMAGES, LABELS, **options), losses


def test_training_learns_a_separable_problem():
    state, losses = run(0)
    assert losses[-1] < losses[0] / 2
    assert evaluate(Small().apply, state.variables, IMAGES, LABELS) > 0.6  # chance is 0.25


def test_with_a_teacher_the_labels_do_not_matter_and_its_classes_are_learnt():
    def teacher(images):
        return 20 * jax.nn.one_hot((jnp.round(images.mean((1, 2, 3))).astype(int) + 1) % 4, 4)

    tx = one_cycle_sgd(0.1, 40)
    step = make_train_step(Small().apply, tx, keep, teacher)
    state = TrainState.create(variables(), tx, 0)
    state = train(state, step, IMAGES, np.zeros_like(LABELS), epochs=10, batch_size=16, seed=0)
    taught = np.asarray(teacher(IMAGES).argmax(-1))
    assert evaluate(Small().apply, state.variables, IMAGES, taught) > 0.6  # chance is 0.25


def test_a_seed_reproduces_a_run_exactly_and_another_does_not():
    (first, again), other = (run(1)[0] for _ in range(2)), run(2)[0]
    chex.assert_trees_all_equal(first.params, again.params)
    difference = optax.tree_utils.tree_norm(jax.tree.map(jnp.subtract, first.params, other.params))
    assert difference > 1e-4


def test_a_step_donates_its_state_but_not_the_callers_variables():
    state, step = start()
    step(state, IMAGES[:16], LABELS[:16])
    assert jax.tree.leaves(state.params)[0].is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(variables()))


def test_a_step_updates_parameters_and_batch_statistics():
    state, step = start()
    before = jax.tree.map(np.asarray, state.variables)
    after = step(state, IMAGES[:16], LABELS[:16])[0].variables
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, after)
    assert changed["params"]["Conv_0"]["kernel"]
    assert all(jax.tree.leaves(changed["batch_stats"]))


@pytest.mark.parametrize("batch_size", [1, 7, 64, 100])
def test_evaluation_is_exact_for_any_batch_size(batch_size):
    logits = jax.jit(Small().apply)(variables(), IMAGES)
    expected = np.mean(np.argmax(logits, -1) == LABELS)
    assert evaluate(Small().apply, variables(), IMAGES, LABELS, batch_size=batch_size) == expected


def test_evaluating_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        evaluate(Small().apply, {}, IMAGES[:0], LABELS[:0])


def test_a_batch_larger_than_the_data_is_refused():
    state, step = start()
    with pytest.raises(ValueError, match="batch_size=65 is more than the 64"):
        train(state, step, IMAGES, LABELS, epochs=1, batch_size=65)


def test_batches_are_disjoint_and_shuffled():
    rows = list(batches(10, 3, np.random.default_rng(0)))
    assert [len(r) for r in rows] == [3, 3, 3]
    assert len(set(np.concatenate(rows))) == 9
    assert not np.array_equal(np.concatenate(rows), np.arange(9))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("size", "padding"), [(8, 0), (8, 2), (5, 0)])
def test_every_crop_is_a_window_of_the_padded_image_or_its_mirror(size, padding, compiled):
    images = jnp.arange(6 * 8 * 8 * 2.0).reshape(6, 8, 8, 2) + 1
    fn = jax.jit(crop_and_flip, static_argnums=(2, 3)) if compiled else crop_and_flip
    padded = np.pad(images, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    room = padded.shape[1] - size + 1
    for image, out in zip(padded, fn(jax.random.key(0), images, size, padding), strict=True):
        windows = [image[y : y + size, x : x + size] for y in range(room) for x in range(room)]
        assert any(np.array_equal(out, w) or np.array_equal(out, w[:, ::-1]) for w in windows)


def test_crops_reach_every_corner_and_flip_about_half():
    images = jnp.broadcast_to(jnp.arange(16.0).reshape(1, 4, 4, 1), (400, 4, 4, 1))
    out = np.asarray(crop_and_flip(jax.random.key(0), images, 3, 0))
    flipped = out[:, 0, 0, 0] > out[:, 0, 2, 0]
    assert 0.4 < flipped.mean() < 0.6  # binomial with n=400: 4 standard deviations
    assert set(out[~flipped][:, 0, 0, 0]) == {0.0, 1.0, 4.0, 5.0}


def test_a_crop_larger_than_the_padded_image_is_refused():
    with pytest.raises(ValueError, match="size=9 is larger"):
        crop_and_flip(jax.random.key(0), jnp.ones((1, 8, 8, 1)), 9, 0)


def test_the_schedule_peaks_once_and_decays_only_kernels():
    tx = one_cycle_sgd(1.0, 10, weight_decay=0.5)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert jnp.all(updates["kernel"] < 0)
    assert jnp.all(updates["bias"] == 0)
