"""The network of the experiment has the published sizes, and one tree in both of its forms."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax import decompose, reconstruct
from lowrank_jax.models.nin import NIN

RANKS = {"Conv_0": 10, "Conv_2": 20}


def init(batch=1, size=32, **options):
    """The skeleton of the variables: no array is made."""
    return jax.eval_shape(NIN(**options).init, jax.random.key(0), jnp.zeros((batch, size, size, 3)))


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("ranks", [RANKS, {"Conv_4": 7}, {"Conv_1": 3, "Conv_5": 2}])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_decomposing_the_dense_network_gives_the_tree_of_the_low_rank_one(ranks, batch_norm):
    dense = init(batch_norm=batch_norm)
    found = jax.eval_shape(lambda tree: decompose(tree, ranks), dense)
    expected = init(ranks=ranks, batch_norm=batch_norm)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)


def test_the_two_layers_have_the_published_weights():
    dense, small = init()["params"], init(ranks=RANKS)["params"]
    assert [size(tree["Conv_0"]) for tree in (dense, small)] == [14400, 9750]
    assert [size(tree["Conv_2"]) for tree in (dense, small)] == [460800, 28800]
    assert dense["Conv_1"]["kernel"].shape == (1, 1, 192, 96) and dense["Conv_5"][
        "kernel"
    ].shape == (1, 1, 192, 10)


@pytest.mark.parametrize("unknown", ["Conv_6", "conv_0", "BatchNorm_0"])
def test_an_unknown_layer_is_refused_with_those_there_are(unknown):
    with pytest.raises(ValueError, match=f"{unknown}.*Conv_0.*Conv_5"):
        init(ranks={"Conv_0": 10, unknown: 1})


def test_a_rank_too_large_is_refused_with_its_layer():
    with pytest.raises(ValueError, match=r"Conv_0: rank 16 .* 1 to 15"):
        init(ranks={"Conv_0": 16})


def test_without_batch_norm_every_convolution_has_a_bias_and_with_it_only_the_last():
    plain, normed = init(batch_norm=False), init()
    assert set(plain) == {"params"} and set(normed) == {"params", "batch_stats"}
    assert all("bias" in layer for layer in plain["params"].values())
    assert [
        name for name, layer in normed["params"].items() if name[:4] == "Conv" and "bias" in layer
    ] == ["Conv_5"]
    low = init(ranks=RANKS, batch_norm=False)["params"]["Conv_0"]
    assert set(low) == {"kernel", "bias"} and set(low["kernel"]) == {"vertical", "horizontal"}


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("ranks", [None, RANKS])
def test_logits_parameters_and_statistics_are_float32_whatever_the_computation(dtype, ranks):
    model = NIN(ranks=ranks, dtype=dtype, num_classes=7)
    images = jnp.zeros((2, 8, 8, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    chex.assert_type(jax.tree.leaves(variables), jnp.float32)
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    logits, updates = jax.eval_shape(apply, variables, images)
    chex.assert_shape(logits, (2, 7))
    chex.assert_type([logits, *jax.tree.leaves(updates)], jnp.float32)


def test_the_low_rank_network_computes_what_the_dense_one_does_with_the_reconstructed_kernels(
    random,
):
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 3)), jnp.float32)
    options = dict(ranks={"Conv_0": 5, "Conv_2": 8}, batch_norm=False)
    low, variables = NIN(**options), random(init(**options))
    found = jax.jit(low.apply)(variables, images)
    expected = jax.jit(NIN(batch_norm=False).apply)(reconstruct(variables), images)
    assert np.abs(expected).max() > 1e-2
    # Six layers of float32 sums of up to 2400 terms, of logits of the order of 1.
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_statistics_are_used_in_evaluation_and_updated_in_training_only(random):
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 3)), jnp.float32)
    model = NIN(ranks={"Conv_0": 5, "Conv_2": 8})
    variables = random(init(ranks=model.ranks))
    training = jax.jit(lambda tree, x: model.apply(tree, x, train=True, mutable=["batch_stats"]))
    logits, updates = training(variables, images)
    evaluated = jax.jit(model.apply)(variables, images)  # would raise if it wrote a statistic
    assert not np.allclose(logits, evaluated)
    for before, after in zip(
        jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(updates), strict=True
    ):
        assert not np.array_equal(before, after)


def test_dropout_changes_training_alone():
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 3)), jnp.float32)
    plain, dropping = (NIN(batch_norm=False, dropout=rate) for rate in (0.0, 0.5))
    variables = jax.jit(plain.init)(jax.random.key(0), images)
    run = jax.jit(lambda key: dropping.apply(variables, images, train=True, rngs={"dropout": key}))
    one, two = map(run, jax.random.split(jax.random.key(1)))
    assert not np.allclose(one, two)
    evaluated = [jax.jit(model.apply)(variables, images) for model in (plain, dropping)]
    np.testing.assert_array_equal(*evaluated)
