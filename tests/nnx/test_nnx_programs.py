"""NNX models run any program of their layers, and `nnx.fast` finds the fastest way to run them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowrank_jax as lr
from lowrank_jax.nnx import decompose, fast, programmed
from lowrank_jax.tuning.algorithms import PLAIN
from lowrank_jax.tuning.timer import Timer

ATOL = 1e-4  # sums of up to 9 * 8 products of order one in another order, through six layers


def gathered(inputs, kernel, *args, **kwargs):
    return jax.lax.conv_general_dilated(inputs, kernel, *args, **kwargs)


class Net(nnx.Module):
    """Layers of every kind, one of them used twice."""

    def __init__(self, rngs: nnx.Rngs, dtype=None):
        conv = lambda *args, **options: nnx.Conv(*args, rngs=rngs, dtype=dtype, **options)  # noqa: E731
        self.first = conv(4, 8, (3, 3), strides=2, padding=[(0, 1), (2, 1)])
        self.twice = conv(8, 8, (3, 3), use_bias=False)
        self.grouped = conv(8, 8, (3, 3), feature_group_count=2, padding="VALID")
        self.around = conv(8, 8, (3, 3), padding="CIRCULAR")
        self.own = conv(8, 8, (3, 3), conv_general_dilated=gathered)
        self.up = nnx.ConvTranspose(8, 8, (3, 3), rngs=rngs, dtype=dtype)
        self.norm, self.drop = nnx.BatchNorm(8, rngs=rngs, dtype=dtype), nnx.Dropout(0.5, rngs=rngs)
        self.last = conv(8, 6, (1, 3), kernel_dilation=(1, 2))

    def __call__(self, x):
        x = self.twice(nnx.relu(self.twice(self.first(x))))
        x = self.drop(self.norm(self.up(self.own(self.around(self.grouped(x))))))
        return self.last(x).mean((-3, -2))


@pytest.fixture(scope="module")
def model():
    net = Net(nnx.Rngs(0))
    net.eval()
    return net


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (6, 12, 12, 4))


RANKS = {
    "first": 3,
    "twice": lr.Separable(4, first="horizontal"),
    "grouped": lr.Separable(2, groups=2),
    "up": 3,
}


@pytest.mark.parametrize(
    "name", [PLAIN, "shift+gather", "gather+shift", "padded", "merged", "merged winograd", "fused"]
)
@pytest.mark.parametrize("jitted", [False, True])
def test_every_program_gives_the_outputs_of_two_convolutions(model, images, name, jitted):
    small, asked = decompose(model, RANKS), []

    def choose(layer, scheme):
        asked.append((layer.size, layer.groups, scheme and (scheme.rank, scheme.first)))
        # Layers with groups have but two programs; what is dense is gathered.
        return "gather" if scheme is None else PLAIN if layer.groups > 1 else name

    run = programmed(small, choose)
    found = (nnx.jit(lambda net, x: net(x)) if jitted else lambda net, x: net(x))(run, images)
    np.testing.assert_allclose(found, small(images), atol=ATOL)
    decomposed = [
        ((3, 3), 1, (3, "vertical")),
        *[((3, 3), 1, (4, "horizontal"))] * 2,
        ((3, 3), 2, (2, "vertical")),
    ]
    assert asked == [
        *decomposed,
        ((1, 3), 1, None),
    ]  # the others have a function or a padding of their own


def test_the_model_given_is_not_changed_and_shares_no_variable(model, images):
    small = decompose(model, RANKS)
    before = nnx.state(small)
    programmed(small, lambda layer, scheme: "gather" if scheme is None else PLAIN)
    assert small.last.conv_general_dilated is jax.lax.conv_general_dilated
    chex.assert_trees_all_equal(before, nnx.state(small))


class Named(Timer):
    """Finds these programs the fastest without measuring."""

    def fastest(self, layer, scheme):
        return "gather" if scheme is None else "shift+gather"


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_fast_takes_the_state_and_any_batch(images, dtype):
    small = decompose(Net(nnx.Rngs(0), dtype), {"first": 3, "twice": 4})
    run = fast(small, images, slices=(2,), timers=Named, rounds=2)
    small.eval()
    state, wanted = nnx.state(small), small(images)
    assert run(state, images).dtype == wanted.dtype
    limit = ATOL if dtype is None else 0.1
    np.testing.assert_allclose(
        *(np.asarray(x, np.float32) for x in (run(state, images), wanted)), atol=limit
    )
    np.testing.assert_allclose(
        *(np.asarray(x, np.float32) for x in (run(state, images[:3]), wanted[:3])), atol=limit
    )
    assert any("slices of 2" in name for name in run.seconds) and any(
        "programs" in name for name in run.seconds
    )


def test_a_frozen_model_has_its_weights(images):
    small = decompose(Net(nnx.Rngs(0), None), {"first": 3, "twice": 4})
    run = fast(small, images, slices=(2,), timers=Named, rounds=2, freeze=True)
    small.eval()
    np.testing.assert_allclose(run(None, images), small(images), atol=ATOL)
    with pytest.raises(ValueError, match="variables are part of this program"):
        run(nnx.state(small), images)


def test_fast_runs_what_is_no_model_not_at_all(images):
    with pytest.raises(ValueError, match=r"give an nnx\.Module"):
        fast(lambda x: x, images)
