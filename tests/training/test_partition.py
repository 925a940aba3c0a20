"""Which leaves are trained: the floating parameters, and what the first matching rule says."""

import chex
import jax
import jax.numpy as jnp
import pytest

from lowrank_jax.training.partition import joined, split, trained_leaves


def names(tree, rules=None):
    """The paths of the trained leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(trained_leaves(tree, rules))
    texts = [(jax.tree_util.keystr(p, simple=True, separator="/"), own) for p, own in leaves]
    return {text.removeprefix("params/") for text, own in texts if own}


ALL = {
    "BatchNorm_0/bias",
    "BatchNorm_0/scale",
    "Conv_0/bias",
    "Conv_0/kernel/horizontal",
    "Conv_0/kernel/vertical",
    "Dense_0/bias",
    "Dense_0/kernel",
}
CONV = {name for name in ALL if name.startswith("Conv_0")}


def test_the_parameters_of_linen_are_trained_and_its_statistics_are_not(small):
    assert names(small) == ALL


def test_all_floats_of_another_tree_are_trained():
    assert names({"w": jnp.ones(2), "steps": jnp.zeros((), int)}) == {"w"}


@pytest.mark.parametrize(
    "rules, wanted",
    [
        ({"Conv_0": False}, ALL - CONV),
        ({"Conv_0/bias": True, "Conv_0": False}, ALL - CONV | {"Conv_0/bias"}),
        ({"Dense_.*": True, ".*": False}, {"Dense_0/bias", "Dense_0/kernel"}),
        ({"Conv_0/vertical": False}, ALL - {"Conv_0/kernel/vertical"}),
        ({}, ALL),
    ],
)
def test_the_first_rule_that_matches_a_leaf_or_its_holder_decides(small, rules, wanted):
    assert names(small, rules) == wanted


@pytest.mark.parametrize("name", ["dense", "small"])
def test_a_tree_that_is_split_and_joined_is_the_same(name, request):
    tree = request.getfixturevalue(name)
    parts = split(tree, trained_leaves(tree, {"Conv_0": False}))
    chex.assert_trees_all_equal(joined(*parts), tree)
    assert len(jax.tree.leaves(parts)) == len(jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "rules, text",
    [
        ({"Conv_O": False}, r"'Conv_O' matches nothing that can be trained; did you mean 'Conv_0'"),
        ({"batch_stats": True}, "'batch_stats' matches nothing"),
        ({".*": True, "Conv_0": False}, "'Conv_0' is idle: rules before it decide"),
        ({"Conv(": False}, r"'Conv\(' is no regular expression"),
        ({"Conv_0": 0.5}, "'Conv_0': 0.5 is not allowed"),
        ({".*": False}, "No leaf is left to train"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(small, rules, text):
    with pytest.raises(ValueError, match=text):
        trained_leaves(small, rules)


def test_a_leaf_that_is_no_array_is_refused_by_name():
    with pytest.raises(ValueError, match=r"net/activation: a \w+ is not allowed"):
        trained_leaves({"net": {"activation": jax.nn.relu, "w": jnp.ones(2)}})
