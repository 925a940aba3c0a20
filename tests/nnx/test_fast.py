"""`fast` of a model of NNX, dense layers and decomposed ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowrank_jax.nnx import decompose, fast, functional
from lowrank_jax.tuning.result import Fast
from lowrank_jax.tuning.timer import Timer


class Chosen(Timer):
    """Finds these algorithms the fastest without measuring."""

    def fastest(self, layer, scheme):
        return "im2col" if scheme is None else "convolve+im2col"


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.last = (nnx.Conv(4, 4, (3, 3), rngs=rngs) for _ in range(2))
        self.norm, self.drop = nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, scale):
        x = self.drop(self.norm(self.first(x)))
        return scale * self.last(nnx.relu(x)).mean((1, 2))


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (4, 8, 8, 4))


@pytest.fixture(scope="module")
def model():
    return decompose(Net(), {"first": 4})


@pytest.fixture(scope="module")
def run(model, images):
    return fast(model, images, 2.0, slices=(), timers=Chosen, rounds=2)


def evaluated(model, images):
    still = nnx.clone(model)
    still.eval()
    return still(images, 2.0)


@pytest.mark.slow
def test_it_runs_the_model_in_evaluation_for_any_batch(run, model, images):
    assert model.norm.use_running_average is False
    for variables in (functional(model)[1], nnx.state(model)):
        for x in (images, images[:3]):
            np.testing.assert_allclose(run(variables, x), evaluated(model, x), atol=1e-5)


def test_layers_dense_and_decomposed_are_measured(run):
    tried = " ".join([*run.seconds, *run.left_out])
    assert "algorithms" in tried


def test_what_was_found_is_saved_and_loaded(run, model, images, tmp_path):
    run.save(tmp_path / "net.json")
    apply, variables = functional(model)
    again = Fast.load(tmp_path / "net.json", apply, 2.0)
    np.testing.assert_allclose(again(variables, images), evaluated(model, images), atol=1e-5)
    assert again.candidate == run.candidate


def test_a_frozen_model_has_its_weights(model, images):
    frozen = fast(model, images, 2.0, slices=(), timers=Chosen, rounds=2, freeze=True, limit=1e-3)
    np.testing.assert_allclose(frozen(None, images), evaluated(model, images), atol=1e-5)
    with pytest.raises(ValueError, match="variables are part of this program"):
        frozen(jnp.ones(1), images)


def test_what_is_no_model_is_refused(images):
    with pytest.raises(ValueError, match=r"give an nnx\.Module"):
        fast(lambda x: x, images)
