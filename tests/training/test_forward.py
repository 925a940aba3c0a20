"""How a network is called: the mode, the method and the collections follow from the function."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax.training import finetune
from lowrank_jax.training.forward import Forward

X = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
Y = np.zeros((8, 4), np.float32)
GIVEN = dict(steps=1, batch_size=8, loss="squared_error")


class Parts(nn.Module):
    """Its call trains by one name, a method by another, and a third has no mode."""

    def setup(self):
        self.layer = nn.Dense(4)

    def __call__(self, x, train):
        return self.layer(x)

    def still(self, x):
        return self.layer(x)

    def other(self, x, deterministic):
        return self.layer(x)


class Sown(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.sow("losses", "mean", x.mean())
        return nn.Dense(4)(x)


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(4)(nn.Dropout(0.5, deterministic=not train)(nn.BatchNorm(not train)(x)))


@pytest.mark.parametrize(
    "method, mode",
    [
        (None, {"train": True}),
        ("still", {}),
        (Parts.still, {}),
        ("other", {"deterministic": False}),
        (Parts.other, {"deterministic": False}),
    ],
)
def test_the_mode_is_that_of_the_method(method, mode):
    model, kwargs = Parts(), {} if method is None else {"method": method}
    variables = model.init(jax.random.key(0), X, train=False)
    assert Forward.of(model.apply, kwargs).training == kwargs | mode
    assert finetune(model.apply, variables, (X, Y), **GIVEN, **kwargs)


def test_a_compiled_function_trains_as_the_function_within():
    model = Noisy()
    variables = model.init(jax.random.key(0), X)
    tuned = [finetune(f, variables, (X, Y), **GIVEN) for f in (model.apply, jax.jit(model.apply))]
    chex.assert_trees_all_equal(*tuned)


def test_a_collection_that_grows_is_refused_with_the_remedy():
    model = Sown()
    variables = model.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="leave 'losses' out of the variables or of mutable="):
        finetune(model.apply, variables, (X, Y), **GIVEN)
    assert finetune(model.apply, variables, (X, Y), mutable=[], **GIVEN)
    assert finetune(model.apply, {"params": variables["params"]}, (X, Y), **GIVEN)


def test_a_function_gets_the_mode_that_it_names_and_nothing_else():
    def named(tree, x, train=False):
        return x @ tree["kernel"] + (100.0 if train else 0.0)

    def plain(tree, x):
        return x @ tree["kernel"]

    found = [Forward.of(apply, {}) for apply in (named, plain)]
    assert [dict(forward.training) for forward in found] == [{"train": True}, {}]
    tree = {"kernel": jnp.ones((5, 4))}
    gap = found[0].train(tree, (X,), jax.random.key(0))[0] - plain(tree, X)
    np.testing.assert_allclose(gap, 100, rtol=1e-5)
