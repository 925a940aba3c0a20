"""Other arrays have another fingerprint; where the arrays lie does not matter."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lowrank_jax.training.fingerprints import ROWS, fingerprint, magnitudes

SHAPES = arrays.array_shapes(min_dims=1, max_dims=3, max_side=ROWS)


@given(arrays.arrays(np.float32, SHAPES, elements=st.floats(-9, 9, width=32)), st.data())
def test_every_entry_of_a_small_array_counts(array, data):
    place = data.draw(st.integers(0, array.size - 1))
    other = array.copy()
    other.flat[place] += 1
    assert fingerprint({"x": array}) != fingerprint({"x": other})
    assert fingerprint({"x": array}) == fingerprint({"x": jnp.asarray(array)})


def test_names_and_shapes_count():
    x = np.zeros((4, 2), np.float32)
    trees = [{"a": x}, {"b": x}, {"a": x.T}, {"a": x, "b": x}, {}]
    assert len(set(map(fingerprint, trees))) == len(trees)


def test_scalars_empty_arrays_keys_and_short_types_have_one():
    tree = {
        "scalar": jnp.float32(2),
        "number": 2.0,
        "empty": np.zeros((0, 3)),
        "key": jax.random.key(0),
        "short": jnp.ones(3, "bfloat16"),
    }
    assert fingerprint(tree) == fingerprint(jax.tree.map(lambda x: x, tree))
    assert fingerprint(tree) != fingerprint(tree | {"key": jax.random.key(1)})


def test_a_large_array_is_read_in_a_few_rows():
    large = np.zeros((10**6, 4), np.float32)
    other = large.copy()
    other[::2] = 1
    assert fingerprint(large) != fingerprint(other)


def test_every_factor_of_a_decomposed_kernel_counts(small):
    leaves, structure = jax.tree.flatten(small)
    others = [[x + (i == own) for i, x in enumerate(leaves)] for own in range(len(leaves))]
    trees = [small, *(jax.tree.unflatten(structure, other) for other in others)]
    assert len(set(map(fingerprint, trees))) == len(trees)


def test_magnitudes_are_blind_to_signs_and_take_all_kinds_of_leaves(small):
    turned = jax.tree.map(lambda x: -x, small)
    assert magnitudes(small) == magnitudes(turned)
    odd = {"short": jnp.ones(3, "bfloat16"), "empty": np.zeros((0, 3)), "key": jax.random.key(0)}
    assert magnitudes(odd) == {"empty": 0.0, "key": 0.0, "short": 3.0}
