"""Every leaf of a tree has one name, and a name that there is not is answered by the nearest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax import decompose, trace
from lowrank_jax.tree.paths import find_leaf, map_named, named_leaves

KEYS = st.sampled_from(["a", "b", "a/b", "0", "params", "kernel", "weight", "w", "value", ""])
LEAVES = st.builds(object)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.dictionaries(KEYS, inner, min_size=1, max_size=3)
        | st.lists(inner, min_size=1, max_size=3)
        | st.tuples(inner)
    ),
    max_leaves=8,
)


@settings(max_examples=200)
@given(TREES)
def test_no_two_leaves_have_the_same_name(tree):
    named = named_leaves(tree)
    assert len(named) == len(jax.tree.leaves(tree))
    assert all(named[name] is leaf for name, leaf in zip(named, jax.tree.leaves(tree), strict=True))


@settings(max_examples=100)
@given(TREES)
def test_a_change_of_the_leaves_keeps_names_and_containers(tree):
    seen = []
    same = map_named(lambda name, leaf: seen.append(name) or leaf, tree)
    assert jax.tree.structure(same) == jax.tree.structure(tree)
    assert jax.tree.leaves(same) == jax.tree.leaves(tree)
    assert seen == list(named_leaves(tree))


@pytest.mark.parametrize(
    "tree, names",
    [
        ({"params": {"stem": {"kernel": 1, "bias": 2}}}, ["stem/bias", "stem"]),
        ({"stem": {"weight": 1}, "head": {"w": 2}}, ["head", "stem"]),
        ({"batch_stats": {"norm": {"mean": 1}}}, ["batch_stats/norm/mean"]),
        ({"layers": [{"kernel": 1}, {"kernel": 2}]}, ["layers/0", "layers/1"]),
        ({"kernel": 1}, ["kernel"]),
        (3, ["kernel"]),
        ({"params": {"kernel": 1}}, ["kernel"]),
        ({"a": {"kernel": 1, "weight": 2}}, ["a/kernel", "a/weight"]),
        ({"params": {"a": {"w": 1}}, "a": {"w": 2}}, ["a/w", "params/a/w"]),
        ({"a": {"b": {"w": 1}}, "a/b": {"w": 2}}, ["['a']['b']['w']", "['a/b']['w']"]),
        ({"a": {"value": 1}}, ["a/value"]),
    ],
)
def test_a_name_is_the_path_of_the_layer(tree, names):
    assert list(named_leaves(tree)) == names


def test_boxes_and_variables_leave_no_trace_in_names():
    array = jnp.ones((3, 3, 2, 4))
    boxed = {"stem": {"kernel": nn.Partitioned(array, (None,) * 4)}}
    state = nnx.State({"stem": {"kernel": nnx.Param(array)}})
    assert list(named_leaves(boxed)) == list(named_leaves(state)) == ["stem"]


def test_the_factors_of_a_kernel_are_one_leaf_with_the_kernels_name():
    tree = {"stem": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)}}
    small = decompose(tree, {"stem": 2})
    assert list(named_leaves(small)) == list(named_leaves(tree))
    assert set(named_leaves(small)["stem"]) == {"vertical", "horizontal"}


def test_the_trace_and_the_tree_have_the_same_names():
    tree = {"a": {"b": {"w": jnp.ones((3, 3, 4, 4))}}, "a/b": {"w": jnp.ones((3, 3, 4, 4))}}

    def apply(tree, x):
        for kernel in jax.tree.leaves(tree):
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return x

    uses = trace(apply, tree, jnp.ones((1, 5, 5, 4)))
    assert [use.path for use in uses] == list(named_leaves(tree))


def test_a_name_that_there_is_not_is_answered_by_the_nearest_kernels():
    leaves = {"stem": np.ones((3, 3, 2, 4)), "head/bias": np.ones(3)}
    assert find_leaf("stem", leaves) is leaves["stem"]
    with pytest.raises(ValueError, match=r"No kernel at 'stm'; did you mean 'stem'\?"):
        find_leaf("stm", leaves)
    with pytest.raises(ValueError, match="holds no array of two or more axes"):
        find_leaf("stem", {"bias": np.ones(3)})
