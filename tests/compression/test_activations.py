"""A layer is fitted to what an activation shows of its errors, where one follows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax import compress, lowrank
from lowrank_jax.calibration.inputs import Inputs
from lowrank_jax.calibration.network import Network
from lowrank_jax.compression import refitting
from lowrank_jax.compression.activations import find_activations
from lowrank_jax.compression.outline import Outline, fit_places


def images(count, seed=0):
    """Smooth random images."""
    x = np.random.default_rng(seed).standard_normal((count, 8, 8, 4))
    for axis in (1, 2):
        x = (x + np.roll(x, 1, axis) + np.roll(x, 2, axis)) / 2
    return jnp.asarray(x, jnp.float32)


class Block(nn.Module):
    """A convolution, what follows it, and an end that reads the result."""

    after: object

    @nn.compact
    def __call__(self, x):
        skip = nn.Conv(8, (1, 1), name="skip")(x)
        y = nn.BatchNorm(True, name="norm")(nn.Conv(8, (3, 3), name="conv")(x))
        return nn.Dense(3, name="head")(self.after(y, skip).mean((1, 2)))


def hard_swish(x):
    return x * jnp.minimum(nn.relu(x + 3), 6)  # steep, since nothing divides by 6 here


SHOWN = {
    "relu": lambda y, skip: nn.relu(y),
    "gelu": lambda y, skip: nn.gelu(y),
    "exact gelu": lambda y, skip: nn.gelu(y, approximate=False),
    "silu": lambda y, skip: nn.silu(y),
    "leaky": lambda y, skip: nn.leaky_relu(y),
    "clip": lambda y, skip: jnp.clip(y, 0, 6),
    "sum": lambda y, skip: nn.relu(y + skip),
    "sum the other way": lambda y, skip: nn.relu(skip + y),
    "scaled": lambda y, skip: nn.relu(-3 * y),
    "hard swish": lambda y, skip: hard_swish(y),
    "transposed": lambda y, skip: jnp.moveaxis(nn.gelu(jnp.moveaxis(y, -1, 1)), 1, -1),
    "flat": lambda y, skip: nn.relu(y.reshape(len(y), -1, 1, 8)),
    "sum before a move": lambda y, skip: nn.relu((y + skip)[:, None])[:, 0],
}
HIDDEN = {
    "nothing": lambda y, skip: y,
    "sum": lambda y, skip: y + skip,
    "read before": lambda y, skip: y + nn.relu(y),
    "read before and after": lambda y, skip: jnp.concatenate([y, nn.relu(y)], -1),
    "gate": lambda y, skip: nn.relu(y * skip),
    "softmax": lambda y, skip: nn.softmax(y),
    "sum after a move": lambda y, skip: nn.relu(y.swapaxes(1, 2) + skip),
    "sum with itself moved": lambda y, skip: nn.relu(y + y.swapaxes(1, 2)),
    "pooling": lambda y, skip: nn.relu(nn.max_pool(y, (2, 2))),
}


def network(after, x):
    model = Block(after)
    variables = model.init(jax.random.key(0), x)
    variables["batch_stats"]["norm"]["mean"] = jnp.linspace(-0.5, 0.5, 8)
    return model, variables


def found(after):
    x = images(4)
    model, variables = network(after, x)
    own = Network(model.apply, variables, (), {})
    outline = Outline(own.program(Inputs(x).first()))
    places = fit_places(outline, {"conv": None})
    return list(find_activations(outline, places, own.leaves(Inputs(x).first())).values())


@pytest.mark.parametrize("name", SHOWN)
def test_an_activation_is_found_behind_a_normalisation_and_a_sum(name):
    (activation,) = found(SHOWN[name])
    slope = -3 if name == "scaled" else 1
    np.testing.assert_allclose(activation.scale, slope / np.sqrt(1 + 1e-5), rtol=1e-5)


@pytest.mark.parametrize("name", HIDDEN)
def test_what_is_read_elsewhere_too_has_no_activation(name):
    after = HIDDEN[name]
    if name == "read before":  # one value comes of it all, and its slope is 1 or 2
        assert len(found(after)) == 1
    else:
        assert not found(after)


def shown_error(model, variables, small, x):
    """The error of what the head reads."""
    own = lambda module, _: module.name == "head"  # noqa: E731
    grab = dict(capture_intermediates=own)
    dense = model.apply(variables, x, **grab)[0]
    low = lowrank(model.apply)(small, x, **grab)[0]
    return float(jnp.mean((dense - low) ** 2))


@pytest.mark.parametrize("name", SHOWN)
def test_the_outputs_on_other_images_are_not_worse_and_mostly_better(name, monkeypatch):
    x, fresh = images(256), images(256, seed=1)
    model, variables = network(SHOWN[name], x)
    errors = []
    for again in (0, 2):
        monkeypatch.setattr(refitting, "AGAIN", again)
        small = compress(model.apply, variables, x, {"conv": 2}, fit_dense=False)
        errors.append(shown_error(model, variables, small, fresh))
    assert errors[1] < 1.05 * errors[0]
    if name in ("relu", "sum", "scaled"):
        assert errors[1] < errors[0]


def test_fits_that_show_larger_errors_are_dropped(monkeypatch):
    """Behind a steep activation the step is too long, and the first fit stays."""
    x = images(64)
    model, variables = network(lambda y, skip: y * nn.relu(20 * y), x)
    small = compress(model.apply, variables, x, {"conv": 2})
    monkeypatch.setattr(refitting, "AGAIN", 0)
    plain = compress(model.apply, variables, x, {"conv": 2})
    assert shown_error(model, variables, small, x) <= shown_error(model, variables, plain, x)


@pytest.mark.parametrize("sizes", [(16, 16), (16, 10), (26,)])
def test_batches_of_any_sizes_and_few_images_are_fitted(sizes):
    x = images(sum(sizes))
    model, variables = network(SHOWN["sum"], x)
    batches = jnp.split(x, np.cumsum(sizes)[:-1])
    small = compress(model.apply, variables, list(batches), {"conv": 3, "skip": 2})
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(small))
