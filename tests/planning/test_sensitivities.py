"""Divergences of truncated layers are those of the decomposed network; one program is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax import decompose, lowrank, trace
from lowrank_jax.planning.sensitivities import divergences


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), 2, name="strided")(x))
        x = nn.relu(nn.Conv(8, (3, 5), feature_group_count=2, name="grouped")(x))
        x = nn.Dense(7, name="dense")(x.mean((1, 2)))
        return nn.Dense(5, dot_general=altered, name="head")(x)


def altered(x, kernel, *args, **options):
    """A product with a function of the kernel, which cannot run with factors."""
    return jax.lax.dot_general(x, jnp.tanh(kernel) + 0 * x.sum(), *args, **options)


X = jnp.asarray(np.random.default_rng(0).standard_normal((6, 8, 8, 4)), jnp.float32)
VARIABLES = jax.tree.map(
    lambda leaf: jnp.asarray(np.random.default_rng(1).standard_normal(leaf.shape) / 4, leaf.dtype),
    jax.eval_shape(Net().init, jax.random.key(0), X),
)
PROGRAM = trace(Net().apply, VARIABLES, X)
CANDIDATES = {
    "strided": [("vertical", 2), ("horizontal", 5), ("spatial", 3), ("pointwise", 1)],
    "grouped": [("vertical", 1), ("vertical", 12), ("spatial", 2)],
    "dense": [("left", 1), ("left", 4)],
}


def logits(path, first, rank):
    scheme = PROGRAM.at(path)[0].scheme(rank, first)
    small = {"params": decompose(VARIABLES["params"], {path: scheme})}
    return np.asarray(lowrank(Net().apply)(small, X), np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["kl", "mse"])
@pytest.mark.parametrize("batch", [4, 256])
def test_each_divergence_is_that_of_the_network_with_that_layer_decomposed(measure, batch):
    table = divergences(
        Net().apply, VARIABLES, X, PROGRAM, CANDIDATES, measure=measure, batch=batch
    )
    dense = np.asarray(Net().apply(VARIABLES, X), np.float64)
    for path, pairs in CANDIDATES.items():
        assert set(table[path]) == set(pairs)
        for pair in pairs:
            low = logits(path, *pair)
            if measure == "kl":
                p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (dense, low))
                expected = np.mean(np.sum(p * np.log(p / q), -1))
            else:
                a, b = (x - x.mean(-1, keepdims=True) for x in (dense, low))
                expected = np.sum((a - b) ** 2) / np.sum(a**2)
            np.testing.assert_allclose(
                table[path][pair], expected, rtol=1e-3, atol=1e-7
            )  # float32 logits


def test_all_candidates_run_under_one_compiled_program():
    count = 0

    def apply(variables, x):
        nonlocal count
        count += 1  # runs once for each trace
        return Net().apply(variables, x)

    divergences(apply, VARIABLES, X, PROGRAM, CANDIDATES)
    assert count == 1


@pytest.mark.parametrize(
    "candidates, options, text",
    [
        ({"stride": [("vertical", 1)]}, {}, "did you mean 'strided'"),
        ({"strided": [("vertical", 1)]}, {"measure": "l1"}, "measure='l1' is not allowed"),
        ({"strided": [("tucker", 1)]}, {}, "first='tucker' is not allowed; give one of"),
        (
            {"strided": [("vertical", 99)]},
            {},
            "strided: rank 99 is not allowed; give an int from 1",
        ),
        ({"dense": [("left", 0)]}, {}, "dense: rank 0 is not allowed; give an int from 1 to 7"),
        ({"head": [("left", 1)]}, {}, "head: cannot be decomposed: its kernel is changed by tanh"),
    ],
)
def test_what_cannot_be_used_is_refused(candidates, options, text):
    with pytest.raises(ValueError, match=text):
        divergences(Net().apply, VARIABLES, X, PROGRAM, candidates, **options)


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="No images"):
        divergences(Net().apply, VARIABLES, X[:0], PROGRAM, CANDIDATES)
