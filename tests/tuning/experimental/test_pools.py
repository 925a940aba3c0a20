"""Poolings by slices: the same numbers as XLA's windows, inside any network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax import nnx as lrx
from lowrank_jax.tuning import autotune
from lowrank_jax.tuning.experimental.pools import POOLS, Pool, pooled, pools
from lowrank_jax.tuning.search import fast
from lowrank_jax.tuning.timer import Timer

pytestmark = pytest.mark.slow

KINDS = st.sampled_from(["max", "sum"])
TOLERANCES = {
    "float32": {"rtol": 1e-6, "atol": 1e-6},
    "bfloat16": {"rtol": 0.03, "atol": 0.02},
    "float16": {"rtol": 4e-3, "atol": 0.02},
}
PADS = st.sampled_from([(0, 0), (0, 1), (1, 1), (2, 0), (-1, 0)])


def random(shape, dtype="float32"):
    return jax.random.normal(jax.random.key(0), shape).astype(dtype)


def slices(pool):
    return "slices"


def window(x, **dilation):
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "SAME", **dilation
    )


@settings(max_examples=20)
@given(KINDS, st.integers(1, 4), st.integers(1, 3), PADS, PADS, st.sampled_from(list(TOLERANCES)))
def test_slices_give_what_windows_give(kind, size, stride, rows, columns, dtype):
    pool = Pool(
        (2, 7, 6, 3),
        (1, size, 2, 1),
        (1, stride, 1, 1),
        ((0, 0), rows, columns, (0, 0)),
        kind,
        dtype,
    )
    x = random(pool.inputs, dtype)
    one, two = pool.run("window", x), jax.jit(lambda x: pool.run("slices", x))(x)
    assert one.dtype == two.dtype and one.shape == two.shape
    if kind == "max":
        assert (one == two).all()  # a maximum is one of its numbers
    else:  # XLA sums half precision in half precision: up to 8 numbers with a rounding after each
        np.testing.assert_allclose(
            *(np.asarray(y, np.float32) for y in (one, two)), **TOLERANCES[dtype]
        )


def test_nan_and_infinity_go_through():
    x = jnp.asarray([[1.0, jnp.nan, -jnp.inf, 2.0, -jnp.inf, -jnp.inf]])
    pool = Pool((1, 6), (1, 2), (1, 2), ((0, 0), (0, 0)), "max")
    np.testing.assert_array_equal(pool.run("slices", x), pool.run("window", x))


def test_a_sum_in_half_precision_is_rounded_once():
    x = jnp.ones((1, 16, 1), "bfloat16").at[0, 0].set(256)
    pool = Pool((1, 16, 1), (1, 16, 1), (1, 1, 1), ((0, 0),) * 3, "sum", "bfloat16")
    assert (
        pool.run("slices", x).item() == 272
    )  # 271 to the nearest of steps of 2; each 1 alone is lost on 256


def test_an_unknown_algorithm_is_named():
    with pytest.raises(
        ValueError, match="'slice' of a pooling is not known; give one of window, slices"
    ):
        Pool((1, 4), (1, 2), (1, 2), ((0, 0),) * 2, "max").run("slice", jnp.ones((1, 4)))


class Net(nn.Module):
    """Poolings of all sorts, in a nested jit, in a scan, and beside a rematerialised function."""

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Conv(8, (3, 3))(x))
        x = nn.relu(nn.max_pool(x, (3, 3), (2, 2), "SAME"))
        x = jax.jit(lambda x: nn.avg_pool(x, (2, 2), (1, 1), "SAME", count_include_pad=False))(x)
        x = jax.checkpoint(jnp.tanh)(x)
        last, _ = jax.lax.scan(
            lambda carry, _: (nn.max_pool(carry, (2, 2), padding="SAME"), None), x, None, 2
        )
        return {"logits": nn.avg_pool(last, last.shape[1:3]).mean((1, 2)), "count": x.shape[0]}


@pytest.mark.parametrize("jit", [False, True])
def test_a_network_with_slices_gives_its_own_outputs(jit):
    model, images, asked = Net(), random((2, 8, 8, 3)), []
    variables = model.init(jax.random.key(0), images)
    run = pooled(model.apply, lambda pool: asked.append(pool) or "slices")
    found, wanted = (
        (jax.jit(run) if jit else run)(variables, images),
        model.apply(variables, images),
    )
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    np.testing.assert_allclose(
        found["logits"], wanted["logits"], rtol=1e-5, atol=1e-6
    )  # sums in another order
    assert [(pool.kind, pool.window) for pool in asked] == [
        ("max", (1, 3, 3, 1)), ("sum", (1, 2, 2, 1)), ("sum", (1, 2, 2, 1)), ("sum", (1, 4, 4, 1)),
    ]  # fmt: skip
    inner = str(jax.make_jaxpr(run)(variables, images))
    assert inner.count("reduce_window") == 1  # that of the loop


@pytest.mark.parametrize("program", POOLS)
@pytest.mark.parametrize("pool", [nn.max_pool, nn.avg_pool])
def test_gradients_go_through_both_algorithms(pool, program):
    x = random((1, 6, 6, 2))
    loss = lambda x: (pool(jnp.sin(x), (3, 3), (2, 2), "SAME") ** 2).sum()  # noqa: E731
    np.testing.assert_allclose(
        jax.grad(pooled(loss, lambda pool: program))(x), jax.grad(loss)(x), rtol=1e-5
    )


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: nn.max_pool(x.astype(jnp.int32), (2, 2)),
        lambda x: nn.max_pool(x, (12, 12), padding="SAME"),
        functools.partial(window, base_dilation=(1, 2, 2, 1)),
        functools.partial(window, window_dilation=(1, 2, 2, 1)),
        lambda x: nn.max_pool(x, (9, 9))[:, :0],
        lambda x: jnp.cumsum(x, 1),
    ],
    ids=["integers", "many places", "dilated inputs", "dilated window", "empty", "no pooling"],
)  # fmt: skip
def test_what_slices_cannot_give_stays_as_it_is(fn):
    x = random((1, 8, 8, 1))
    assert not list(pools(jax.make_jaxpr(fn)(x)))
    np.testing.assert_array_equal(pooled(fn, slices)(x), fn(x))


def test_a_pooling_is_measured_once_and_kept(tmp_path, monkeypatch):
    pool = Pool((2, 8, 8, 4), (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (0, 1), (0, 1), (0, 0)), "max")
    path = tmp_path / "t.json"
    timer = Timer(rounds=2, path=path)
    best = timer.fastest_pool(pool)
    (times,) = timer.times.values()
    assert set(times) == {"window", "slices"} and best == min(times, key=times.get)
    again = Timer(path=path)
    monkeypatch.setattr(again, "_time", lambda runs: pytest.fail("it is known"))
    assert again.fastest_pool(pool) == best


class Slices(Timer):
    """Finds slices fastest, and everything else as it is."""

    def fastest(self, layer, scheme):
        return "convolve"

    def fastest_pool(self, pool):
        return "slices"


@pytest.fixture
def algorithms_win(monkeypatch):
    """Makes the times up: candidates with other algorithms are the fastest."""

    def made(calls, *_):
        return {name: 0.5 if "algorithms" in name else 1.0 for name in calls}

    monkeypatch.setattr(autotune, "measure", made)


def test_fast_runs_poolings_by_slices_where_they_are_faster(algorithms_win):
    model = nn.Sequential([lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME")])
    images = random((4, 8, 8, 4), "bfloat16")
    run = fast(model.apply, {}, images, slices=(), timers=Slices, rounds=2)
    np.testing.assert_array_equal(run({}, images), model.apply({}, images))
    assert set(run.pools.values()) == {"slices"}
    assert "reduce_window" not in str(jax.make_jaxpr(run.run.__wrapped__)({}, images))


def test_an_nnx_model_runs_its_poolings_by_slices(algorithms_win):
    conv = nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0), dtype="bfloat16")
    images = random((4, 8, 8, 3))
    model = nnx.Sequential(conv, lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME"))
    run = lrx.fast(model, images, slices=(), timers=Slices, rounds=2)
    found, wanted = (
        np.asarray(y, np.float32) for y in (run(nnx.state(model), images), model(images))
    )
    # kernels of XLA's two sets in half precision
    np.testing.assert_allclose(found, wanted, rtol=0.03, atol=0.03)
    assert set(run.pools.values()) == {"slices"}
