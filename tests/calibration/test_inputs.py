"""One batch or many, whatever they come in, reach the network alike."""

import collections
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax import calibrate, compress, finetune, plan
from lowrank_jax.calibration import inputs as inputs_module
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


class Grain:
    """Iterates anew each time, and has nothing else, as a loader of Grain."""

    def __iter__(self):
        return iter([X[:2], X[2:4], X[4:]])


KINDS = {
    "loader": Grain,
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


def pairs():
    return iter([(X[:3], np.arange(3)), (X[3:], np.arange(3))])


def named():
    return iter([{"image": X[:3], "label": np.arange(3)}] * 2)


def listed():
    return iter([[X[:3], np.arange(3)]] * 2)


@pytest.mark.parametrize(
    "loader, pick, text",
    [
        (pairs, lambda: (x for x, *_ in pairs()), r"a tuple of 2. .*\(images for images, \*_ in"),
        (listed, lambda: (x for x, *_ in listed()), r"a list of 2. .*\(images for images, \*_ in"),
        (
            named,
            lambda: (x["image"] for x in named()),
            r"dict of \['image', 'label'\]. .*\(batch\[",
        ),
    ],
)
def test_a_loader_that_gives_labels_too_is_refused_with_how_to_pick(variables, loader, pick, text):
    apply = nn.Conv(4, (3, 3)).apply
    for verb in (calibrate, functools.partial(plan, macs=0.9)):
        with pytest.raises(ValueError, match=text):
            verb(apply, variables, loader)
    with pytest.raises(ValueError, match=text):
        compress(apply, variables, loader, {"": 2})
    assert calibrate(apply, variables, pick).images == 6


def test_a_loader_is_planned_and_compressed_by_as_its_images_are(variables):
    apply, given = nn.Conv(4, (3, 3)).apply, KINDS["loader"]
    chosen = plan(apply, variables, given(), macs=0.9)
    assert chosen == plan(apply, variables, [X[:2], X[2:4], X[4:]], macs=0.9)
    small = compress(apply, variables, given(), chosen)
    wanted = compress(apply, variables, [X[:2], X[2:4], X[4:]], chosen)
    chex.assert_trees_all_close(small, wanted, atol=1e-5)


def test_a_loader_without_an_end_is_warned_of(variables, caplog, monkeypatch):
    monkeypatch.setattr(inputs_module, "MANY", 10)
    calibrate(nn.Conv(4, (3, 3)).apply, variables, iter([X] * 4))
    assert caplog.messages[0].startswith("12 images were read so far. A loader that never ends")


@pytest.mark.parametrize("option", [{"train": True}, {"deterministic": False}])
def test_arguments_of_training_are_refused(variables, option):
    with pytest.raises(ValueError, match="as it runs in evaluation"):
        calibrate(lambda v, x, **_: nn.Conv(4, (3, 3)).apply(v, x), variables, X, **option)


def test_raw_images_are_said(variables):
    def scaled(variables, x):
        return nn.Conv(4, (3, 3)).apply(variables, jnp.float32(x) / 255)

    x = np.zeros((2, 5, 5, 4), np.uint8)
    verbs = (
        lambda: calibrate(scaled, variables, x),
        lambda: compress(scaled, variables, x, {"kernel": 2}),
        lambda: finetune(scaled, variables, (x, np.zeros((2, 5, 5), int)), steps=1, batch_size=2),
    )
    for verb in verbs:
        with pytest.warns(UserWarning, match="uint8 images") as told:
            verb()
        assert told[0].filename == __file__  # the line of the user


def test_labels_that_a_second_argument_takes_are_told(variables, caplog):
    def conditioned(variables, x, kind=None):
        return nn.Conv(4, (3, 3)).apply(variables, x)

    calibrate(conditioned, variables, (X, np.zeros(len(X), int)))
    assert "Argument 2 of the network holds one int for each image" in caplog.text
    caplog.clear()
    calibrate(conditioned, variables, (X, np.zeros(len(X), np.float32)))
    assert "holds one int" not in caplog.text


@pytest.mark.parametrize("more", [(False,), (2.0,), (None,), ("name",)])
def test_arguments_after_the_inputs_may_be_no_arrays(more):
    def apply(variables, x, own):
        return (x @ variables["a"]) * (own if isinstance(own, float) else 1)

    tree = {"a": jax.random.normal(jax.random.key(0), (4, 8))}
    assert calibrate(apply, tree, X, *more).images == len(X)
    assert plan(apply, tree, X, *more, macs=0.7).ranks
    assert compress(apply, tree, X, {"a": 2}, *more)["a"]["left_factor"].shape == (4, 2)
