"""Kernels that the program changes by parameters alone are decomposed as it changes them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lowrank_jax as lr
from lowrank_jax.program.changed import KEY, changed

IMAGES = jax.random.normal(jax.random.key(0), (8, 9, 9, 4))
SHAPE = (3, 3, 4, 6)


def conv(x, kernel, spec="HWIO"):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", spec, "NHWC")
    )


def standardised(kernel, gain):
    mean, var = kernel.mean((0, 1, 2)), kernel.var((0, 1, 2))
    return gain * (kernel - mean) / jnp.sqrt(var + 1e-4)


def weight_normed(kernel, gain):
    return gain * kernel / jnp.sqrt((kernel**2).sum((0, 1, 2)))


def equalised(kernel, gain):
    return kernel * np.sqrt(2 / np.prod(kernel.shape[:-1]))


def masked(kernel, gain):
    return kernel * (jnp.arange(3)[:, None, None, None] < 2)


def transposed(kernel, gain):
    return jax.nn.standardize(kernel.transpose(3, 2, 0, 1), (1, 2, 3)).transpose(2, 3, 1, 0)


def within_jit(kernel, gain):
    return jax.jit(standardised)(kernel, gain)


def rematerialised(kernel, gain):
    return jax.checkpoint(weight_normed)(kernel, gain)


def in_half(kernel, gain):
    return standardised(kernel, gain).astype(jnp.bfloat16).astype(jnp.float32)


CHANGES = [
    standardised,
    weight_normed,
    equalised,
    masked,
    transposed,
    within_jit,
    rematerialised,
    in_half,
]


def network(change):
    """A changed convolution between a plain one and a dense layer, with its variables."""
    keys = jax.random.split(jax.random.key(1), 4)
    variables = {
        "first": {"kernel": jax.random.normal(keys[0], SHAPE), "gain": 1 + jnp.arange(6.0)},
        "plain": {"kernel": jax.random.normal(keys[1], (3, 3, 6, 6)) / 8},
        "head": {"kernel": jax.random.normal(keys[2], (6, 3))},
    }

    def apply(variables, x):
        own = variables["first"]
        x = jax.nn.relu(conv(x, change(own["kernel"], own["gain"])))
        x = jax.nn.relu(conv(x, variables["plain"]["kernel"])) * own["gain"].mean()
        return x.mean((1, 2)) @ variables["head"]["kernel"]

    return apply, variables


@pytest.mark.parametrize("change", CHANGES)
def test_factors_of_a_changed_kernel_compute_what_their_product_does(change):
    apply, variables = network(change)
    program = lr.trace(apply, variables, IMAGES)
    use = program.at("first")[0]
    assert use.safe and use.changed and not program.at("plain")[0].changed
    assert "as the program changes it" in str(program)
    scheme = use.scheme(4)
    small = lr.decompose(variables, {"first": scheme, "plain": 3}, program)
    own = small["first"]["kernel"][KEY]
    kernel = change(variables["first"]["kernel"], variables["first"]["gain"])
    tolerance = 1e-2 if change is in_half else 1e-4
    chex.assert_trees_all_close(
        lr.merge(*own.values(), use.axes),
        lr.merge(*scheme.factor(kernel), use.axes),
        atol=tolerance * float(jnp.abs(kernel).max()),
    )
    run = jax.jit(lr.lowrank(apply))
    chex.assert_trees_all_close(
        run(small, IMAGES), run(lr.reconstruct(small), IMAGES), rtol=20 * tolerance, atol=tolerance
    )


@pytest.mark.parametrize("change", CHANGES)
def test_at_full_rank_the_network_computes_what_it_did(change):
    apply, variables = network(change)
    program = lr.trace(apply, variables, IMAGES)
    table = {use.path: use.scheme(12) for use in program if use.path == "first"}
    small = lr.decompose(variables, table, program)
    found, wanted = lr.lowrank(apply)(small, IMAGES), apply(variables, IMAGES)
    tolerance = 1e-2 if change is in_half else 1e-4
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance * abs(wanted).max())


@pytest.mark.parametrize("change", [standardised, within_jit])
def test_the_tree_may_be_any_argument(change):
    apply, variables = network(change)
    program = lr.trace(apply, variables, IMAGES)
    small = lr.decompose(variables, {"first": program.at("first")[0].scheme(3)}, program)
    wanted = lr.lowrank(apply)(small, IMAGES)
    later = lr.lowrank(lambda x, tree: apply(tree, x))
    both = lr.lowrank(lambda one, x, *, two: apply(one, x) - apply(two, x))
    for found in (later(IMAGES, small), later(x=IMAGES, tree=small)):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        both(small, IMAGES, two=variables), wanted - apply(variables, IMAGES), atol=1e-5
    )
    np.testing.assert_allclose(both(small, IMAGES, two=small), 0 * wanted, atol=1e-6)


def in_scan(stack, x, _):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, stack)[0]


def read_otherwise(stack, x, _):
    return jax.lax.scan(lambda x, kernel: (x @ kernel + kernel.sum(), None), x, stack)[0]


def in_fori(stack, x, _):
    return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ stack), x)


@pytest.mark.parametrize(
    "read, shape, known",
    [(in_scan, (3, 8, 8), True), (in_fori, (8, 8), True), (read_otherwise, (3, 8, 8), False)],
)
def test_a_stack_that_is_changed_before_a_loop_is_decomposed(read, shape, known):
    tree = {"stack": {"kernel": jax.random.normal(jax.random.key(0), shape), "gain": jnp.ones(8)}}
    x = jax.random.normal(jax.random.key(1), (16, 8))

    def apply(tree, x):
        own = tree["stack"]
        scale = own["gain"] / jnp.linalg.norm(own["kernel"], axis=-2, keepdims=True)
        return read(own["kernel"] * scale, x, None)

    program = lr.trace(apply, tree, x)
    assert program.at("stack")[0].safe == program.at("stack")[0].changed == known
    if known:
        full = lr.decompose(tree, {"stack": lr.Matrix(8)}, program)
        np.testing.assert_allclose(lr.lowrank(apply)(full, x), apply(tree, x), atol=1e-5)
        small = lr.compress(apply, tree, x, lr.plan(apply, tree, x, macs=0.6))
        assert lr.trace(lr.lowrank(apply), small, x).macs <= 0.6 * program.macs


@pytest.mark.parametrize("loop", ["fori", "scan"])
def test_a_norm_that_a_loop_finds_changes_a_kernel_as_any_other(loop):
    tree = {"a": {"kernel": jax.random.normal(jax.random.key(0), (8, 6))}}
    x = jax.random.normal(jax.random.key(1), (16, 8))

    def power(u, kernel):
        v = kernel.T @ u
        return kernel @ (v / jnp.linalg.norm(v))

    def apply(tree, x):
        kernel = 2 * tree["a"]["kernel"]
        if loop == "fori":
            u = jax.lax.fori_loop(0, 3, lambda i, u: power(u, kernel), jnp.ones(8))
        else:
            u, _ = jax.lax.scan(lambda u, _: (power(u, kernel), None), jnp.ones(8), length=3)
        return x @ (kernel / jnp.linalg.norm(u))

    program = lr.trace(apply, tree, x)
    [use] = [use for use in program if use.path == "a"]
    assert use.safe and use.changed
    full = lr.decompose(tree, {"a": lr.Matrix(6)}, program)
    np.testing.assert_allclose(lr.lowrank(apply)(full, x), apply(tree, x), atol=1e-5)


def test_its_two_convolutions_are_what_runs():
    apply, variables = network(standardised)
    program = lr.trace(apply, variables, IMAGES)
    small = lr.decompose(variables, {"first": 2}, program)
    after = lr.trace(lr.lowrank(apply), small, IMAGES)
    assert [use.macs for use in after if use.path.startswith("first")] == [
        8 * 81 * 3 * 4 * 2,
        8 * 81 * 3 * 2 * 6,
    ]
    text = str(jax.make_jaxpr(lr.lowrank(apply))(small, IMAGES))
    assert "sqrt" not in text  # the standardisation is gone


def test_three_convolutions_stand_for_a_changed_kernel():
    apply, variables = network(standardised)
    program = lr.trace(apply, variables, IMAGES)
    small = lr.decompose(variables, {"first": lr.Tucker(rank=4, inner=6)}, program)
    run = jax.jit(lr.lowrank(apply))
    chex.assert_trees_all_close(run(small, IMAGES), apply(variables, IMAGES), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_plan_spends_its_budget_on_changed_kernels_and_the_fit_uses_the_data():
    apply, variables = network(weight_normed)
    found = lr.calibrate(apply, variables, IMAGES)
    plan = lr.plan(found, macs=0.5)
    assert plan.changed == ("first",) and plan.total("macs")[1] <= plan.total("macs")[0] / 2
    small = lr.compress(found, plan)
    plain = lr.decompose(variables, plan, lr.trace(apply, variables, IMAGES))
    truth = apply(variables, IMAGES)
    gaps = [jnp.linalg.norm(lr.lowrank(apply)(tree, IMAGES) - truth) for tree in (small, plain)]
    assert gaps[0] < gaps[1]
    chex.assert_trees_all_equal(small["first"]["gain"], variables["first"]["gain"])
    assert set(small["first"]["kernel"]) == {KEY}
    chex.assert_trees_all_equal_shapes(lr.skeleton(plan), small)


def test_a_layer_may_be_called_as_the_key_of_changed_kernels_is():
    tree = {"changed": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
    apply = lambda p, x: x @ p["changed"]["kernel"] + p["changed"]["bias"]  # noqa: E731
    small = lr.decompose(tree, {"changed": 1})
    x = jnp.ones((2, 6))
    np.testing.assert_allclose(lr.lowrank(apply)(small, x), apply(tree, x), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(lr.lowrank(apply))(small, x), apply(tree, x), rtol=1e-5)


def test_a_changed_kernel_that_stays_dense_stays_as_it_is_stored():
    apply, variables = network(standardised)
    found = lr.calibrate(apply, variables, IMAGES)
    small = lr.compress(found, {"plain": 2})
    chex.assert_trees_all_equal(small["first"], variables["first"])


def test_a_plan_of_a_changed_kernel_needs_the_trace(tmp_path):
    apply, variables = network(standardised)
    plan = lr.plan(apply, variables, IMAGES, macs=0.5)
    plan.save(tmp_path / "plan.json")
    assert lr.Plan.load(tmp_path / "plan.json") == plan
    with pytest.raises(ValueError, match=r"first: the program changes this kernel.*give trace="):
        lr.decompose(variables, plan)


def test_a_tree_without_what_the_change_depends_on_is_refused():
    apply, variables = network(standardised)
    part = {"first": {"kernel": variables["first"]["kernel"]}}
    with pytest.raises(ValueError, match="first: the program changes this kernel by 'first/gain'"):
        lr.decompose(part, {"first": 2}, lr.trace(apply, variables, IMAGES))


def modulated(kernel, x):
    """By the data, as StyleGAN2 does."""
    return kernel * (1 + x.mean())


def read_twice(apply):
    """The stored kernel is read beside the changed one."""

    def both(variables, x):
        return apply(variables, x).sum() + conv(x, variables["first"]["kernel"]).sum()

    return both


def test_what_depends_on_data_or_is_read_unchanged_as_well_is_left_dense():
    apply, variables = network(standardised)
    use = lr.trace(read_twice(apply), variables, IMAGES).at("first")
    assert not any(own.changed for own in use)

    def by_data(variables, x):
        return conv(x, modulated(variables["first"]["kernel"], x))

    own = lr.trace(by_data, variables, IMAGES)[0]
    assert not own.safe and not own.changed


def test_another_program_is_refused():
    apply, variables = network(standardised)
    small = lr.decompose(variables, {"first": 2}, lr.trace(apply, variables, IMAGES))
    unchanged, _ = network(lambda kernel, gain: kernel)
    with pytest.raises(ValueError, match=r"first: .*another program changes it"):
        lr.lowrank(unchanged)(small, IMAGES)


class Wrapped(nn.Module):
    """A convolution under one of Flax's own reparametrisations."""

    kind: str

    @nn.compact
    def __call__(self, x):
        layer = nn.Conv(6, (3, 3))
        if self.kind == "weight norm":
            x = nn.WeightNorm(layer)(x)
        else:
            x = nn.SpectralNorm(layer)(x, update_stats=False)
        return nn.Dense(3)(nn.relu(x).mean((1, 2)))


@pytest.mark.parametrize("kind", ["weight norm", "spectral norm"])
def test_flax_own_reparametrisations_are_decomposed(kind):
    model = Wrapped(kind)
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    found = lr.calibrate(model.apply, variables, IMAGES)
    plan = lr.plan(found, macs=0.6)
    assert len(plan.changed) == 1
    small = lr.compress(found, plan)
    run, wanted = jax.jit(lr.lowrank(model.apply)), model.apply(variables, IMAGES)
    assert float(jnp.linalg.norm(run(small, IMAGES) - wanted) / jnp.linalg.norm(wanted)) < 0.5


@pytest.mark.parametrize("transform", ["jit", "grad", "vmap", "eval_shape"])
def test_trees_with_changed_kernels_pass_transformations(transform):
    apply, variables = network(standardised)
    program = lr.trace(apply, variables, IMAGES)
    small = jax.jit(functools.partial(lr.decompose, rules={"first": 2}, trace=program))(variables)
    run = lr.lowrank(apply)
    wanted = run(small, IMAGES)
    if transform == "jit":
        chex.assert_trees_all_close(jax.jit(run)(small, IMAGES), wanted, rtol=1e-4, atol=1e-4)
    elif transform == "grad":
        grads = jax.grad(lambda tree: run(tree, IMAGES).sum())(small)
        assert all(jnp.abs(x).max() > 0 for x in grads["first"]["kernel"][KEY].values())
    elif transform == "vmap":
        found = jax.vmap(run, (None, 0))(small, IMAGES[:, None])
        chex.assert_trees_all_close(found[:, 0], wanted, rtol=1e-3, atol=1e-3)
    else:
        assert jax.eval_shape(run, small, IMAGES).shape == wanted.shape


def test_a_tree_without_changed_kernels_runs_the_function_itself():
    apply, variables = network(standardised)
    chex.assert_trees_all_equal(changed(apply)(variables, IMAGES), apply(variables, IMAGES))
