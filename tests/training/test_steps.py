"""A step is a pure function: of Linen in training mode, of any function, in any type."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_jax import Channel, Separable, Tucker, decompose, lowrank, reconstruct
from lowrank_jax.training import (
    Loss,
    TrainState,
    cross_entropy,
    distillation,
    layer_matching,
    make_step,
    squared_error,
)
from lowrank_jax.training.finite import FINITE

TX = optax.sgd(0.1)


@pytest.fixture(scope="module")
def step(model):
    """A compiled step, shared by the tests that need no other."""
    return jax.jit(make_step(model.apply, TX))


def changed(before, after):
    return jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, after)


def test_a_step_is_that_of_a_loop_written_by_hand(model, small, batch):
    images, labels = batch

    def objective(params):
        own = {**small, "params": params}
        logits, _ = lowrank(model.apply)(own, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.jit(jax.value_and_grad(objective))(small["params"])
    wanted = jax.tree.map(lambda p, g: p - 0.1 * g, small["params"], grads)
    state, metrics = jax.jit(make_step(model.apply, TX))(TrainState.create(small, TX), batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient"], optax.tree_utils.tree_norm(grads), rtol=1e-4)
    chex.assert_trees_all_close(state.variables["params"], wanted, rtol=1e-5, atol=1e-6)
    assert state.step == 1 and metrics["not_finite"] == -1


def test_a_step_changes_factors_and_statistics_and_leaves_what_is_frozen(small, batch, step):
    state = TrainState.create(small, TX, trained={"Dense_0": False})
    found = changed(small, step(state, batch)[0].variables)
    assert all(found["params"]["Conv_0"]["kernel"].values())
    assert all(jax.tree.leaves(found["batch_stats"]))
    assert not any(found["params"]["Dense_0"].values())


def test_a_step_does_not_change_its_state(small, batch, step):
    state = TrainState.create(small, TX)
    first, again = step(state, batch), step(state, batch)
    chex.assert_trees_all_equal(state.variables, small)
    chex.assert_trees_all_equal(first[0].params, again[0].params)


def test_a_state_owns_its_arrays_so_that_a_step_may_donate_it(model, small, batch):
    donating = jax.jit(make_step(model.apply, TX), donate_argnums=0)
    state = TrainState.create(small, TX)
    donating(state, batch)
    assert jax.tree.leaves(state.params)[0].is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(small))


def test_dropout_differs_from_step_to_step_and_follows_from_the_seed(noisy, small, batch):
    run = jax.jit(make_step(noisy.apply, optax.sgd(0.0)))
    losses = []
    for seed in (0, 0, 1):
        state = TrainState.create(small, optax.sgd(0.0), seed=seed)
        state, first = run(state, batch)
        losses.append((float(first["loss"]), float(run(state, batch)[1]["loss"])))
    assert losses[0] == losses[1] != losses[2]
    assert all(first != second for first, second in losses)


def test_any_function_of_a_tree_can_be_trained():
    tree = {"a": jnp.ones((3, 4)), "count": jnp.zeros((), int)}
    step = make_step(lambda tree, x, y: (x + y) @ tree["a"], TX, "squared_error")
    state = TrainState.create(tree, TX)
    state, metrics = jax.jit(step)(state, (jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.zeros((2, 4))))
    assert metrics["loss"] == 36 and state.variables["count"] == 0
    assert jnp.all(state.variables["a"] < 1)


def test_arguments_of_the_model_are_given_in_both_of_its_calls():
    def apply(tree, x, scale, deterministic):
        return scale * x @ tree["a"] + (0.0 if deterministic else 1.0)

    tree, x = {"a": jnp.ones((3, 4))}, jnp.ones((2, 3))
    needs = lambda outputs, teacher: jnp.mean(outputs - teacher)  # noqa: E731
    step = make_step(apply, TX, needs, scale=2.0, deterministic=True)
    _, metrics = jax.jit(step)(TrainState.create(tree, TX), x, tree)
    assert metrics["loss"] == 1


def test_a_computation_in_bfloat16_keeps_the_types_of_the_state(model, small, batch):
    step = jax.jit(make_step(model.apply, TX, dtype=jnp.bfloat16))
    state = TrainState.create(small, TX)
    found, metrics = step(state, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, state)
    _, wide = jax.jit(make_step(model.apply, TX))(state, batch)
    assert metrics["loss"] != wide["loss"] and metrics["loss"].dtype == jnp.float32
    np.testing.assert_allclose(metrics["loss"], wide["loss"], rtol=0.05)
    program = str(jax.make_jaxpr(make_step(model.apply, TX, dtype=jnp.bfloat16))(state, batch))
    assert "bf16[64,8,8,8]" in program and "f32[64,8,8,2]" not in program


def test_accumulated_gradients_update_as_one_batch_does():
    tree, x = {"a": jnp.ones((3, 4))}, jax.random.normal(jax.random.key(0), (8, 3))
    y = jnp.zeros((8, 4))
    apply = lambda tree, x: x @ tree["a"]  # noqa: E731
    halves = optax.MultiSteps(TX, 2).gradient_transformation()
    run = jax.jit(make_step(apply, halves, "squared_error"))
    state = TrainState.create(tree, halves)
    for part in (slice(0, 4), slice(4, 8)):
        state, _ = run(state, (x[part], y[part]))
    wanted, _ = jax.jit(make_step(apply, TX, "squared_error"))(TrainState.create(tree, TX), (x, y))
    chex.assert_trees_all_close(state.params, wanted.params, rtol=1e-6)


def test_the_average_follows_the_parameters():
    tree, batch = {"a": jnp.ones((3, 4))}, (jnp.ones((2, 3)), jnp.zeros((2, 4)))
    run = jax.jit(make_step(lambda tree, x: x @ tree["a"], TX, "squared_error", average=0.5))
    state, mean = TrainState.create(tree, TX, average=True), jnp.ones((3, 4))
    for step in range(8):
        state, _ = run(state, batch)
        kept = min(0.5, (1 + step) / (10 + step))
        mean = kept * mean + (1 - kept) * state.params["a"]
    np.testing.assert_allclose(state.averaged["a"], mean, rtol=1e-5)
    assert state.averaged["a"][0, 0] > state.variables["a"][0, 0]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_average_is_wide_and_the_types_stay(dtype):
    tree, batch = {"a": jnp.ones((3, 4), dtype)}, (jnp.ones((2, 3), dtype), jnp.zeros((2, 4)))
    step = make_step(lambda tree, x: x @ tree["a"], TX, "squared_error", average=0.999)
    state = TrainState.create(tree, TX, average=True)
    again = lambda state, _: (step(state, batch)[0], None)  # noqa: E731
    found, _ = jax.lax.scan(again, state, length=9)  # which refuses types that change
    assert found.average["a"].dtype == jnp.float32 and found.averaged["a"].dtype == dtype
    assert found.average["a"][0, 0] < 1


def test_the_average_counts_updates_and_not_the_batches_of_one():
    tree, batch = {"a": jnp.ones((3, 4))}, (jnp.ones((2, 3)), jnp.zeros((2, 4)))
    apply = lambda tree, x: x @ tree["a"]  # noqa: E731
    whole = TrainState.create(tree, TX, average=True)
    many = optax.MultiSteps(TX, 3).gradient_transformation()
    parts = TrainState.create(tree, many, average=True)
    inner = optax.chain(optax.identity(), many)
    deep = TrainState.create(tree, inner, average=True)
    one, two, three = (
        jax.jit(make_step(apply, tx, "squared_error", average=0.5)) for tx in (TX, many, inner)
    )
    for _ in range(4):
        whole, _ = one(whole, batch)
        for _ in range(3):
            parts, _ = two(parts, batch)
            deep, _ = three(deep, batch)
    chex.assert_trees_all_close(parts.average, whole.average, rtol=1e-6)
    chex.assert_trees_all_close(deep.average, whole.average, rtol=1e-6)


def test_the_average_of_what_is_not_accumulated_counts_each_step():
    tree, batch = {"a": jnp.ones((3, 4)), "b": jnp.ones(4)}, (jnp.ones((2, 3)), jnp.zeros((2, 4)))
    many = optax.MultiSteps(optax.sgd(0.1), 3).gradient_transformation()
    tx = optax.multi_transform({"s": many, "f": optax.sgd(0.1)}, {"a": "s", "b": "f"})
    state = TrainState.create(tree, tx, average=True)
    step = make_step(lambda tree, x: x @ tree["a"] + tree["b"], tx, "squared_error", average=0.5)
    for _ in range(2):
        state, _ = jax.jit(step)(state, batch)
    assert not np.array_equal(state.average["b"], tree["b"])


def test_renewed_collections_keep_their_types():
    def apply(variables, x, mutable=()):
        mean = variables["state"]["mean"]
        outputs = x @ variables["params"]["a"] + mean.astype(jnp.float32)
        renewed = {"state": {"mean": mean.astype(jnp.float32) + x.mean(), "seen": True}}
        return (outputs, renewed) if mutable else outputs

    variables = {"params": {"a": jnp.ones((3, 4))}, "state": {"mean": jnp.zeros(4, jnp.float16)}}
    variables["state"]["seen"] = jnp.zeros((), bool)
    state = TrainState.create(variables, TX, renewed=["state"])
    step = make_step(apply, TX, "squared_error", mutable=["state"])
    found, _ = jax.jit(step)(state, (jnp.ones((2, 3)), jnp.zeros((2, 4))))
    chex.assert_trees_all_equal_shapes_and_dtypes(found.variables, variables)
    assert (found.variables["state"]["mean"] == 1).all() and found.variables["state"]["seen"]


def test_collections_that_the_variables_lack_are_refused_by_the_step():
    step = make_step(lambda tree, x: x @ tree["a"], TX, "squared_error", mutable=["s"])
    state = TrainState.create({"a": jnp.ones((3, 4))}, TX)
    with pytest.raises(ValueError, match="mutable='s' is not allowed"):
        step(state, (jnp.ones((2, 3)), jnp.zeros((2, 4))))


def test_a_term_does_not_hide_the_whole_loss():
    def loss(outputs):
        return jnp.float32(7)

    step = make_step(lambda tree, x: x @ tree["a"], TX, 0.5 * Loss.of(loss) + squared_error())
    state = TrainState.create({"a": jnp.ones((3, 4))}, TX)
    _, metrics = step(state, (jnp.ones((2, 3)), jnp.ones((2, 4))))
    assert float(metrics["loss"]) == 3.5 + 4 == 3.5 + float(metrics["squared_error"])


def test_the_norm_of_a_gradient_in_float16_does_not_overflow():
    step = make_step(lambda tree, x: x @ tree["a"], TX, "squared_error")
    state = TrainState.create({"a": jnp.ones((3, 4), jnp.float16)}, TX)
    x, y = 100 * jnp.ones((2, 3), jnp.float16), jnp.zeros((2, 4))
    _, metrics = jax.jit(step)(state, (x, y))
    assert 65_504**0.5 < metrics["gradient"] < jnp.inf and metrics["not_finite"] == FINITE


def test_a_network_that_equals_its_teacher_stays_as_it_is(model, small, batch):
    wanted = distillation(2.0) + layer_matching()
    step = jax.jit(make_step(model.apply, TX, wanted, train_kwargs={"train": False}, mutable=()))
    state = TrainState.create(small, TX)
    found, metrics = step(state, batch, small)
    assert abs(metrics["distillation"]) < 1e-6 and metrics["layers"] == 0
    chex.assert_trees_all_close(found.params, state.params, atol=1e-6)


@pytest.mark.parametrize("scheme", [Separable(3), Channel(2), Tucker(2, inner=2)])
def test_layers_are_matched_with_those_of_the_dense_network(model, dense, batch, scheme):
    images, _ = batch
    small = decompose(dense, {"Conv_0": scheme})
    step = jax.jit(make_step(model.apply, TX, layer_matching()))
    _, metrics = step(TrainState.create(small, TX), images, dense)
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    found, wanted = (
        convolve(images, own["params"]["Conv_0"]["kernel"]) for own in (reconstruct(small), dense)
    )
    error = jnp.sum((found - wanted) ** 2) / jnp.sum(wanted**2)
    np.testing.assert_allclose(metrics["layers"], error, rtol=1e-4)
    assert 0.01 < metrics["layers"] < 1


@pytest.mark.parametrize("loss", [cross_entropy(), distillation() + layer_matching()])
def test_a_step_with_other_algorithms_is_the_same_step(model, dense, small, batch, loss):
    asked = []

    def choose(layer, scheme):
        asked.append((layer.size, scheme))
        return "im2col" if scheme is None else "kn2row+im2col"

    found = []
    for own in (None, choose):
        step = jax.jit(make_step(model.apply, TX, loss, choose=own))
        state, metrics = step(TrainState.create(small, TX), batch, dense)
        found.append((state.variables, metrics))
    assert ((3, 3), None) in asked or "teacher" not in loss.needs
    assert any(scheme is not None for _, scheme in asked)
    chex.assert_trees_all_close(found[0], found[1], rtol=1e-4, atol=1e-5)  # other orders of sums


@pytest.mark.parametrize(
    "loss, number",
    [
        (lambda outputs: outputs["a"].sum() + outputs["b"].sum(), -1),
        (lambda outputs: outputs["a"].sum() + jnp.sqrt(outputs["b"]).sum(), 1),  # in its gradient
        (lambda outputs: outputs["a"].sum() * jnp.inf, 0),
        (lambda outputs: jnp.inf + outputs["a"].sum(), 3),  # the loss alone
        (lambda outputs: outputs["c"].sum(), 2),  # in its value
    ],
)
def test_the_first_parameter_that_is_not_finite_is_told_by_its_number(loss, number):
    tree = {"a": jnp.ones(2), "b": jnp.zeros(2), "c": jnp.full(2, jnp.nan if number == 2 else 1.0)}
    step = jax.jit(make_step(lambda tree, x: tree, TX, loss))
    _, metrics = step(TrainState.create(tree, TX), jnp.ones(1))
    assert metrics["not_finite"] == number


def test_a_loss_without_its_teacher_is_refused(model, small, batch):
    with pytest.raises(ValueError, match=r"needs .* and there is no teacher"):
        make_step(model.apply, TX, "distillation")(TrainState.create(small, TX), batch)


def test_a_teacher_without_the_layers_is_refused(model, small, batch):
    step = make_step(
        model.apply, TX, layer_matching(), teacher_apply=lambda tree, x, train: x.mean((1, 2, 3))
    )
    with pytest.raises(ValueError, match="runs none of the decomposed layers"):
        step(TrainState.create(small, TX), batch[0], {"w": jnp.ones(1)})


def test_layers_of_a_dense_network_cannot_be_matched(model, dense, batch):
    with pytest.raises(ValueError, match="no layer of the network is decomposed"):
        make_step(model.apply, TX, "layers")(TrainState.create(dense, TX), batch[0], dense)


@pytest.mark.parametrize("kept", [True, False])
def test_a_state_and_its_step_have_both_an_average_or_none(kept):
    tree, batch = {"a": jnp.ones((3, 4))}, (jnp.ones((2, 3)), jnp.zeros((2, 4)))
    average = None if kept else 0.9
    step = make_step(lambda tree, x: x @ tree["a"], TX, "squared_error", average=average)
    with pytest.raises(ValueError, match=rf"average={average} .*average={kept}\); give both"):
        step(TrainState.create(tree, TX, average=kept), batch)


def test_a_decay_that_is_none_is_refused(model):
    with pytest.raises(ValueError, match=r"average=1\.5 is not allowed"):
        make_step(model.apply, TX, average=1.5)


def test_the_mode_of_a_call_is_found_by_its_name(model, noisy, small, batch):
    still = make_step(model.apply, TX, cross_entropy(), train_kwargs={"train": False}, mutable=())
    state, _ = jax.jit(still)(TrainState.create(small, TX), batch)
    chex.assert_trees_all_equal(state.variables["batch_stats"], small["batch_stats"])


LOSS_READERS = {
    "plateau": lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)),
    "polyak": lambda: optax.polyak_sgd(0.1),
    "momo": lambda: optax.contrib.momo(0.1),
}


@pytest.mark.parametrize("make", LOSS_READERS.values(), ids=LOSS_READERS)
def test_an_optimiser_may_read_the_loss_as_in_a_loop_by_hand(make):
    tree, tx = {"a": jax.random.normal(jax.random.key(0), (3, 4))}, make()
    x, y = jnp.ones((2, 3)), jnp.zeros((2, 4))

    def objective(params):
        return jnp.mean((x @ params["a"] - y) ** 2)

    wanted, own = tree, tx.init(tree)
    state = TrainState.create(tree, tx)
    step = jax.jit(make_step(lambda tree, x: x @ tree["a"], tx, "squared_error"))
    for _ in range(4):
        value, grads = jax.value_and_grad(objective)(wanted)
        updates, own = tx.update(grads, own, wanted, value=value)
        wanted = optax.apply_updates(wanted, updates)
        state, _ = step(state, (x, y))
    chex.assert_trees_all_close(state.params, wanted, rtol=1e-5, atol=1e-6)


def test_an_optimiser_that_needs_the_function_itself_is_refused():
    tree, batch = {"a": jnp.ones((3, 4))}, (jnp.ones((2, 3)), jnp.zeros((2, 4)))
    step = make_step(lambda tree, x: x @ tree["a"], optax.lbfgs(), "squared_error")
    with pytest.raises(ValueError, match=r"tx=.*'value_fn'.* give an optimiser that needs no more"):
        step(TrainState.create(tree, optax.lbfgs()), batch)


@pytest.mark.parametrize("make", [optax.contrib.prodigy, optax.contrib.dowg])
def test_a_state_can_be_donated_whose_optimiser_keeps_the_first_parameters(make):
    tree, batch = {"a": jnp.ones((3, 4))}, (jnp.ones((2, 3)), jnp.zeros((2, 4)))
    step = make_step(lambda tree, x: x @ tree["a"], make(), "squared_error")
    donating = jax.jit(step, donate_argnums=0)
    state, _ = donating(TrainState.create(tree, make()), batch)
    chex.assert_tree_all_finite(donating(state, batch)[0].params)
