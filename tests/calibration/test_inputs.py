"""One batch or many, whatever they come in, reach the network alike."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax import calibrate
from lowrank_jax.calibration.inputs import Inputs

X = np.random.default_rng(0).standard_normal((6, 5, 5, 4)).astype(np.float32)


def sizes(inputs):
    return [jax.tree.leaves(batch)[0].shape[0] for batch in inputs]


def test_one_batch_is_cut_into_pieces_two_at_least():
    assert sizes(Inputs(X, size=4)) == [3, 3]
    assert sizes(Inputs(X[:1])) == [1]
    assert sizes(Inputs(X)) == [3, 3]


class Loader:
    """Gives batches by index alone, as some data sources do."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return X[2 * index : 2 * index + 2] if index < 3 else X[6:][0]


KINDS = {
    "list": lambda: [X[:2], X[2:4], X[4:]],
    "generator": lambda: (X[i : i + 2] for i in (0, 2, 4)),
    "function": lambda: lambda: iter([X[:2], X[2:4], X[4:]]),
    "deque": lambda: collections.deque([X[:2], X[2:4], X[4:]]),
    "by index": lambda: Loader(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_iterable_gives_its_batches(kind):
    inputs = Inputs(KINDS[kind]())
    np.testing.assert_array_equal(inputs.first()[0], X[:2])
    assert sizes(inputs) == [2, 2, 2]


def test_an_iterator_can_be_held_for_another_pass():
    inputs = Inputs(iter([X[:2], X[2:]])).held()
    assert sizes(inputs) == sizes(inputs) == [2, 4]


def pair(variables, a, b, scale=1.0):
    return nn.Conv(4, (3, 3)).apply(variables, a + scale * b)


def keyed(variables, batch):
    return nn.Conv(4, (3, 3)).apply(variables, batch["image"])


@pytest.fixture
def variables():
    return nn.Conv(4, (3, 3)).init(jax.random.key(0), X)


def test_several_inputs_of_an_image_are_cut_together(variables):
    found = calibrate(pair, variables, (X, 2 * X), scale=2.0)
    one = calibrate(nn.Conv(4, (3, 3)).apply, variables, 5 * X)
    assert found.trace.macs == one.trace.macs
    own, other = (seen.moments["kernel"][()] for seen in (found, one))
    np.testing.assert_allclose(own.output_covariance, other.output_covariance, rtol=1e-4)


def test_dicts_are_one_argument(variables):
    found = calibrate(keyed, variables, [{"image": X[:3]}, {"image": X[3:]}])
    assert found.images == 6 and set(found.moments) == {"kernel"}


def test_a_list_of_equal_batches_is_no_array_of_five_axes(variables):
    layer = nn.Conv(4, (3, 3))
    many = calibrate(layer.apply, variables, [X[:3], X[3:]])
    assert many.trace.macs == calibrate(layer.apply, variables, X).trace.macs


def test_bare_parameters_are_variables_too():
    def apply(params, x):
        return nn.Conv(4, (3, 3)).apply({"params": params}, x)

    params = nn.Conv(4, (3, 3)).init(jax.random.key(0), X)["params"]
    assert set(calibrate(apply, params, X).moments) == {"kernel"}


@pytest.mark.parametrize(
    "inputs, text",
    [
        ([], "No calibration data"),
        (X[:0], "No calibration data"),
        ((X, X[:2]), "the same number of images"),
        (np.float32(3), "the same number of images"),
        (["a"], "type <U1"),
        ([None], "No calibration data|object"),
        (X[:, :, :, :3], r"does not run on inputs \(3, 5, 5, 3\) float32"),
    ],
    ids=str,
)
def test_what_is_no_data_for_the_network_is_refused(variables, inputs, text):
    with pytest.raises(ValueError, match=text):
        calibrate(nn.Conv(4, (3, 3)).apply, variables, inputs)


@pytest.mark.parametrize("option", [{"train": True}, {"deterministic": False}])
def test_arguments_of_training_are_refused(variables, option):
    with pytest.raises(ValueError, match="as it runs in evaluation"):
        calibrate(lambda v, x, **_: nn.Conv(4, (3, 3)).apply(v, x), variables, X, **option)


def test_raw_images_are_said(variables):
    def scaled(variables, x):
        return nn.Conv(4, (3, 3)).apply(variables, jnp.float32(x) / 255)

    with pytest.warns(UserWarning, match="uint8 images"):
        calibrate(scaled, variables, np.zeros((2, 5, 5, 4), np.uint8))
