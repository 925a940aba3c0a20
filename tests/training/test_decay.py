"""Penalties on weights: what they pull to, and that they touch nothing else."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_jax import Channel, Matrix, Separable, Tucker, decompose, reconstruct
from lowrank_jax.factorization.factors import is_factors
from lowrank_jax.training import frobenius_decay, nuclear_decay, orthogonal_decay
from lowrank_jax.tree.paths import factored_leaves, named_leaves

SCHEMES = {
    "vertical": (Separable(3), (3, 3, 4, 8)),
    "horizontal": (Separable(3, first="horizontal"), (3, 3, 4, 8)),
    "groups": (Separable(2, groups=2), (3, 3, 4, 8)),
    "PyTorch's layout": (Separable(3, axes="OIHW"), (8, 4, 3, 3)),
    "stack": (Separable(3), (2, 3, 3, 4, 8)),
    "one axis": (Separable(2, axes="WIO"), (3, 4, 8)),
    "channel": (Channel(3), (3, 3, 4, 8)),
    "mirror": (Channel(3, first="pointwise"), (3, 3, 4, 8)),
    "matrix": (Matrix(3), (6, 8)),
    "heads": (Matrix(2, groups=2, axes="IPO"), (6, 2, 4)),
    "Tucker": (Tucker(4, inner=3), (3, 3, 4, 8)),
}
DECAYS = {
    "frobenius": frobenius_decay,
    "orthogonal": orthogonal_decay,
    "nuclear": lambda weight: nuclear_decay(weight, {"conv": 2}),
}


def normal(shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def other(x):
    return normal(x.shape, seed=1)


def largest(tree):
    return max(np.abs(x).max() for x in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def factored():
    """The factors of each scheme in one tree, so that one program is compiled for all."""
    kernels = {name: normal(shape) for name, (_, shape) in SCHEMES.items()}
    schemes = {name: scheme for name, (scheme, _) in SCHEMES.items()}
    return decompose(kernels, schemes)


def update(tx, params, updates=None, jit=True):
    updates = jax.tree.map(jnp.zeros_like, params) if updates is None else updates
    run = jax.jit(tx.update) if jit else tx.update
    return run(updates, tx.init(params), params)[0]


def descend(tx, params, rate, steps):
    """The tree after steps down the gradient of the penalty alone."""
    tx = optax.chain(tx, optax.sgd(rate))
    step = jax.jit(lambda p: optax.apply_updates(p, update(tx, p)))
    for _ in range(steps):
        params = step(params)
    return params


def test_the_product_of_factors_decays_as_a_dense_kernel_does(factored):
    found = update(frobenius_decay(0.3), factored)

    def half_of_the_squares(params):
        return 0.15 * sum(jnp.sum(kernel**2) for kernel in reconstruct(params).values())

    wanted = jax.jit(jax.grad(half_of_the_squares))(factored)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_factors_of_one_truncated_svd_are_orthogonal_already(factored):
    start = {name: factors for name, factors in factored.items() if name != "Tucker"}
    # Cosines of some 1e-7 are rounding; those of random components are some 0.3.
    assert largest(update(orthogonal_decay(1.0), start)) < 1e-5
    moved = jax.tree.map(lambda x: x + 0.3 * other(x), start)
    found = update(orthogonal_decay(1.0), moved)
    assert {name for name, factors in found.items() if largest(factors) > 1e-3} == set(start)


@pytest.mark.slow
def test_components_become_orthogonal_and_keep_their_length(factored):
    start = jax.tree.map(other, factored)
    end = descend(orthogonal_decay(1.0), start, 1.0, 300)
    assert largest(update(orthogonal_decay(1.0), end)) < 1e-3
    for name in SCHEMES:
        before, after = (optax.tree_utils.tree_norm(tree[name]) for tree in (start, end))
        # The gradient of a cosine has no part along its component.
        assert before <= after * (1 + 1e-6) and after < 2 * before, name


def test_a_component_of_zeros_and_a_rank_of_one_give_finite_gradients():
    pair = {"vertical": normal((3, 1, 4, 2)).at[..., 0].set(0), "horizontal": normal((1, 3, 2, 8))}
    one = {"left_factor": normal((4, 1)), "right_factor": normal((1, 3))}
    found = update(orthogonal_decay(1.0), {"conv": pair, "dense": one})
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    assert not any(x.any() for x in jax.tree.leaves(found["dense"]))


def test_singular_values_shrink_by_the_same_amount():
    kernel = normal((3, 3, 4, 8))
    scheme = Separable(2)
    before = np.linalg.svd(np.asarray(kernel).transpose(0, 2, 1, 3).reshape(12, 24))[1]
    end = descend(nuclear_decay(1.0, {"conv": scheme}), {"conv": kernel}, 0.01, 10)["conv"]
    after = np.linalg.svd(np.asarray(end).transpose(0, 2, 1, 3).reshape(12, 24))[1]
    np.testing.assert_allclose(before - after, 0.1, rtol=1e-3)  # the smallest is 1.0 here


def test_equal_singular_values_shrink_too():
    found = update(nuclear_decay(0.5, {"dense": Matrix(1)}), {"dense": jnp.eye(3)})
    np.testing.assert_allclose(found["dense"], 0.5 * np.eye(3), atol=1e-6)


def test_the_nuclear_norm_of_a_plan_s_layers_alone_decays():
    params = {"conv": normal((3, 3, 4, 8)), "other": normal((3, 3, 4, 8))}
    found = update(nuclear_decay(1.0, {"conv": 2}), params)
    assert found["conv"].any() and not found["other"].any()


def test_a_rule_of_nuclear_decay_that_names_no_layer_is_refused():
    with pytest.raises(ValueError, match="cnv"):
        update(nuclear_decay(1.0, {"cnv": 2}), {"conv": normal((3, 3, 4, 8))})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", DECAYS)
def test_updates_keep_their_types_and_what_is_no_kernel_stays(name, dtype):
    dense = {"conv": normal((3, 3, 4, 8), dtype=dtype), "bias": normal(8, dtype=dtype)}
    params = dense if name == "nuclear" else decompose(dense, {"conv": 2})
    given = jax.tree.map(jnp.ones_like, params)
    eager, compiled = (update(DECAYS[name](0.1), params, given, jit) for jit in (False, True))
    chex.assert_trees_all_equal_shapes_and_dtypes(eager, given)
    chex.assert_trees_all_close(eager, compiled, rtol=1e-2)
    assert (eager["bias"] == 1).all()


@pytest.mark.parametrize("name", DECAYS)
def test_a_decay_below_nothing_is_refused(name):
    with pytest.raises(ValueError, match=r"weight=-0\.1 is not allowed"):
        DECAYS[name](-0.1)


def test_factors_that_nuclear_decay_is_asked_for_are_left_out():
    params = decompose({"conv": normal((3, 3, 4, 8)), "dense": normal((4, 8))}, {"conv": 2})
    found = update(nuclear_decay(1.0, {"dense": Matrix(1)}), params)
    assert is_factors(found["conv"]) and not any(x.any() for x in jax.tree.leaves(found["conv"]))


def test_a_pattern_of_nuclear_decay_means_the_layers_that_decompose_would_cut():
    params = {"conv": normal((3, 3, 4, 8)), "stack": {"bias": normal((3, 8)), "scale": normal(8)}}
    cut = decompose(params, {".*": 0.5})
    found = update(nuclear_decay(1.0, {".*": 0.5}), params)
    decayed = {path for path, leaf in named_leaves(found).items() if leaf.any()}
    assert decayed == set(factored_leaves(cut)) == {"conv"}


@pytest.mark.parametrize("name", ["frobenius", "orthogonal"])
@pytest.mark.parametrize("scheme", [Separable(3), Tucker(4, inner=3)])
@pytest.mark.parametrize("out", [None, optax.MaskedNode()])
def test_factors_of_which_one_alone_is_trained_are_refused_and_none_is_left_alone(
    name, scheme, out
):
    tree = decompose(
        {"conv": {"kernel": normal((3, 3, 4, 8))}, "bias": normal(8)}, {"conv": scheme}
    )
    tx, node = DECAYS[name](0.1), tree["conv"]["kernel"]
    for key in node:
        half = {"conv": {"kernel": {**node, key: out}}, "bias": tree["bias"]}
        with pytest.raises(ValueError, match=r"^conv: one factor is trained and the other is not"):
            tx.update(half, tx.init(half), half)
    frozen = {"conv": {"kernel": jax.tree.map(lambda _: out, node)}, "bias": tree["bias"]}
    updates, _ = tx.update(frozen, tx.init(frozen), frozen)
    chex.assert_trees_all_equal(updates, frozen)


def test_nuclear_decay_leaves_frozen_layers_out():
    tree = {"one": normal((6, 8)), "two": None}
    for table in ({"one": 2, "two": 2}, {"one": 2, "t.o": 2}, {".*": 2}):
        tx = nuclear_decay(0.1, table)
        updates, _ = tx.update(tree, tx.init(tree), tree)
        assert not np.array_equal(updates["one"], tree["one"]) and updates["two"] is None


@pytest.mark.parametrize("weight", ["x", None, -1.0, float("inf")])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(ValueError, match=r"weight=.* is not allowed; give a number of 0 or more"):
        frobenius_decay(weight)


def test_a_decay_without_the_parameters_says_so():
    with pytest.raises(ValueError, match="give them to update"):
        frobenius_decay(0.1).update({"a": jnp.ones(3)}, None)


def test_two_modules_that_are_named_like_factors_are_none():
    tree = {"vertical": {"kernel": normal((3, 4))}, "horizontal": {"kernel": None}}
    tx = frobenius_decay(0.1)
    updates, _ = tx.update(tree, tx.init(tree), tree)
    chex.assert_trees_all_equal(updates, tree)


def test_a_rule_that_is_no_regular_expression_is_told_beside_frozen_layers():
    tree, tx = {"one": normal((6, 8)), "two": None}, nuclear_decay(0.1, {"one(": 2})
    with pytest.raises(ValueError, match="is neither a layer nor a regular expression"):
        tx.update(tree, tx.init(tree), tree)
