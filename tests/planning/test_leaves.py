"""A plan alone gives the tree into which its checkpoint is read."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax import Plan, decompose, load_weights, plan, save_weights, skeleton, trace
from lowrank_jax.planning.leaves import Leaf, check_plan, leaves_of


@pytest.fixture(scope="module")
def network():
    """A plan and the variables that it is of."""
    model, x = nn.Sequential([nn.Conv(8, (3, 3)), nn.BatchNorm(True)]), jnp.ones((2, 8, 8, 8))
    variables = model.init(jax.random.key(0), x)
    return plan(model.apply, variables, x, macs=0.5), variables


def test_a_checkpoint_is_read_by_the_plan_beside_it(network, tmp_path):
    chosen, dense = network
    chosen.save(tmp_path / "plan.json")
    save_weights(tmp_path / "variables.npz", decompose(dense, chosen))
    found = jax.tree.map(jnp.asarray, load_weights(tmp_path / "variables.npz"))
    tree = skeleton(Plan.load(tmp_path / "plan.json"))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)


def test_a_plan_keeps_its_leaves_in_its_file(network, tmp_path):
    chosen, dense = network
    chosen.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == chosen
    assert len(chosen.leaves) == len(jax.tree.leaves(dense))


def test_a_plan_that_decomposes_nothing_gives_the_dense_tree(network):
    tree = skeleton(Plan(choices=(), selector="fixed", leaves=leaves_of(network[1])))
    chex.assert_trees_all_equal_shapes_and_dtypes(tree, network[1])


def test_without_leaves_a_dense_tree_is_needed(network):
    bare = Plan(choices=network[0].choices, selector="fixed")
    with pytest.raises(ValueError, match="has no leaves of its tree; give"):
        skeleton(bare)
    tree = skeleton(bare, jax.eval_shape(lambda: network[1]))
    chex.assert_trees_all_equal_shapes_and_dtypes(tree, decompose(*network[::-1]))


TYPES = st.sampled_from(["float32", "bfloat16", "int8"])
SHAPES = st.lists(st.integers(0, 3), max_size=3)
KEYS = st.one_of(st.text(min_size=1, max_size=3), st.integers(0, 9))


@settings(max_examples=15)
@given(st.dictionaries(KEYS, st.tuples(SHAPES, TYPES), max_size=4))
def test_nested_dicts_of_any_arrays_come_back(kinds):
    arrays = {name: jax.ShapeDtypeStruct(*kind) for name, kind in kinds.items()}
    if len({type(name) for name in arrays}) > 1:
        return  # JAX sorts the keys of a dict
    tree = {"outer": {"inner": arrays}} if arrays else {}
    found = skeleton(Plan(choices=(), selector="fixed", leaves=leaves_of(tree)), tree)
    assert found == tree


@pytest.mark.parametrize("tree", [[jnp.ones(2)], {"a": (jnp.ones(2),)}, {"key": jax.random.key(0)}])
def test_other_trees_have_no_leaves_of_plain_data(tree):
    assert leaves_of(tree) == ()


@pytest.mark.parametrize(
    "change", [{"path": ()}, {"path": (1.5,)}, {"shape": (-1,)}, {"shape": ("a",)}]
)
def test_what_is_no_leaf_is_refused(change):
    with pytest.raises(ValueError, match="the leaf"):
        Leaf(**{"path": ("a",), "shape": (1,), "dtype": "float32"} | change)


def test_a_plan_of_another_form_is_not_that_of_the_factors():
    tree, x = {"conv": jnp.ones((3, 3, 4, 4))}, jnp.ones((2, 6, 6, 4))

    def apply(tree, x):
        names = ("NHWC", "HWIO", "NHWC")
        kernel = tree["conv"]
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=names)

    program = trace(apply, tree, x)
    plans = [plan(apply, tree, x, macs=0.5, forms=[name]) for name in ("vertical", "horizontal")]
    small = decompose(tree, plans[0], program)
    check_plan(plans[0], small)
    with pytest.raises(ValueError, match=r"conv: the plan has .*horizontal.*, and the factors are"):
        check_plan(plans[1], small)
    with pytest.raises(ValueError, match=r"conv: .*, and the variables hold no factors"):
        check_plan(plans[0], tree)


def test_numbers_of_python_are_leaves_of_a_plan():
    def apply(tree, x):
        return jax.nn.relu(x @ tree["a"]) @ tree["b"] * tree["scale"]

    one, two = jax.random.normal(jax.random.key(0), (2, 16, 16))
    chosen = plan(apply, {"a": one, "b": two, "scale": 2.0}, one, macs=0.5)
    assert skeleton(chosen)["scale"] == jax.ShapeDtypeStruct((), jnp.float32)
