"""What the moments say is what the convolution saw; statistics are those of the data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax import decompose, lowrank
from lowrank_jax.calibration.collecting import calibrate, output_scales, reestimate
from lowrank_jax.calibration.moments import Geometry, moments


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


OPTIONS = [
    {},
    {"strides": (2, 1)},
    {"padding": "VALID", "kernel_dilation": (1, 2)},
    {"padding": "CIRCULAR"},
    {"padding": ((1, 2), (0, 1)), "strides": 2},
    {"feature_group_count": 2},
    {"use_bias": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [(3, 3), (2, 4)])
def test_the_moments_predict_the_variance_of_the_outputs(options, size):
    layer, x = nn.Conv(6, size, **options), normal(5, 7, 8, 4)
    variables = layer.init(jax.random.key(1), x)
    found = calibrate(layer.apply, variables, [x])[""]
    outputs = np.asarray(layer.apply(variables, x), np.float64)
    groups = options.get("feature_group_count", 1)
    kernel = np.asarray(variables["params"]["kernel"], np.float64).reshape(-1, groups, 6 // groups)
    flat = outputs.reshape(-1, groups, 6 // groups)
    assert found.count == len(flat)  # every position of so small an image is taken
    for g in range(groups):
        expected = np.cov(flat[:, g].T, bias=True)
        np.testing.assert_allclose(
            kernel[:, g].T @ found.covariance[g] @ kernel[:, g], expected, atol=1e-4
        )
        np.testing.assert_allclose(kernel[:, g].T @ found.cross[g], expected, atol=1e-4)


@pytest.mark.parametrize("size, shape", [((3,), (5, 9, 4)), ((2, 3, 2), (3, 4, 5, 4, 4))])
def test_one_and_three_dimensions_are_gathered(size, shape):
    layer, x = nn.Conv(6, size), normal(*shape)
    variables = layer.init(jax.random.key(1), x)
    found = calibrate(layer.apply, variables, [x])[""]
    kernel = np.asarray(variables["params"]["kernel"], np.float64).reshape(-1, 6)
    outputs = np.asarray(layer.apply(variables, x), np.float64).reshape(-1, 6)
    np.testing.assert_allclose(
        kernel.T @ found.covariance[0] @ kernel, np.cov(outputs.T, bias=True), atol=1e-4
    )


def test_batches_add_up_to_the_whole():
    layer, x = nn.Conv(6, (3, 3)), normal(6, 7, 8, 4)
    variables = layer.init(jax.random.key(1), x)
    whole = calibrate(layer.apply, variables, [x])[""]
    parts = calibrate(layer.apply, variables, [x[:2], x[2:]])[""]
    assert whole.count == parts.count
    np.testing.assert_allclose(parts.covariance, whole.covariance, atol=1e-5)


def test_a_grid_of_positions_stands_for_all_of_them():
    x = normal(256, 16, 16, 3)
    x = (x + jnp.roll(x, 1, 1) + jnp.roll(x, 1, 2)) / 2  # neighbours are correlated, as in images
    geometry = Geometry.of(x, np.ones((3, 3, 3, 4)), (1, 1), "SAME", None, 1)
    some, every = (moments(x, x, geometry, positions) for positions in (16, 256))
    assert 10 * some.count < every.count < 20 * some.count
    # 256 * 16 samples: relative deviations of about 1/64 of the largest entry.
    assert np.abs(some.covariance - every.covariance).max() < 0.1 * np.abs(every.covariance).max()


def test_only_the_layers_asked_for_are_gathered_and_scanned_ones_are_left_out():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), name="one")(nn.Conv(4, (3, 3), name="two")(x))
            return nn.jit(nn.Conv)(4, (3, 3), name="lifted")(x)

    x = normal(2, 5, 5, 4)
    variables = Model().init(jax.random.key(0), x)
    assert set(calibrate(Model().apply, variables, [x])) == {"one", "two"}
    assert set(calibrate(Model().apply, variables, [x], ["two"])) == {"two"}


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), use_bias=False, name="conv")(x)
        x = nn.BatchNorm(not train, momentum=0.9, name="norm")(x)
        return nn.Conv(6, (3, 3), name="free")(nn.relu(x))


def test_output_scales_are_those_of_the_normalisation_that_follows():
    x = normal(2, 5, 5, 4)
    variables = Normed().init(jax.random.key(0), x)
    variables["params"]["norm"]["scale"] = jnp.arange(-3.0, 3.0)
    variables["batch_stats"]["norm"]["var"] = jnp.full(6, 4.0)
    scales = output_scales(Normed().apply, variables, x)
    assert set(scales) == {"conv"}
    np.testing.assert_allclose(scales["conv"], np.abs(np.arange(-3.0, 3.0)) / 2, rtol=1e-4)


def test_reestimated_statistics_are_those_of_the_data():
    x = normal(8, 5, 5, 4)
    variables = Normed().init(jax.random.key(0), x)
    found = reestimate(Normed().apply, variables, [x[:4], x[4:]], train=True)
    inputs = nn.Conv(6, (3, 3), use_bias=False).apply({"params": variables["params"]["conv"]}, x)
    np.testing.assert_allclose(
        found["batch_stats"]["norm"]["mean"], inputs.mean((0, 1, 2)), atol=1e-6
    )
    np.testing.assert_allclose(
        found["batch_stats"]["norm"]["var"], inputs.var((0, 1, 2)), rtol=1e-4
    )
    assert found["params"]["conv"]["kernel"] is variables["params"]["conv"]["kernel"]


def test_statistics_of_a_decomposed_model_are_those_of_its_own_layers():
    x = normal(8, 5, 5, 4)
    variables = Normed().init(jax.random.key(0), x)
    small = {**variables, "params": decompose(variables["params"], {"conv": 2})}
    found = reestimate(lowrank(Normed().apply), small, [x], train=True)
    dense = nn.Conv(6, (3, 3), use_bias=False)
    inputs = lowrank(dense.apply)({"params": small["params"]["conv"]}, x)
    np.testing.assert_allclose(
        found["batch_stats"]["norm"]["mean"], inputs.mean((0, 1, 2)), atol=1e-6
    )


def test_what_cannot_be_reestimated_is_refused():
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            scan = nn.scan(lambda norm, x, _: (norm(x), None), variable_axes={"params": 0, "batch_stats": 0},
                           split_rngs={"params": True}, length=2)  # fmt: skip
            return scan(nn.BatchNorm(not train, name="norm"), x, None)[0]

    x = normal(2, 5, 5, 4)
    for model, text in [
        (Scanned(), "norm: a batch normalisation within a transformation"),
        (nn.Sequential([nn.BatchNorm(False, axis=1)]), "layers_0: axis=1 is not known"),
    ]:
        kwargs = {"train": True} if isinstance(model, Scanned) else {}
        variables = model.init(jax.random.key(0), x, **kwargs)
        with pytest.raises(ValueError, match=text):
            reestimate(model.apply, variables, [x], **kwargs)
    variables = Normed().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="norm: the activations hold NaN"):
        reestimate(Normed().apply, variables, [x * jnp.inf], train=True)


def test_no_data_is_refused():
    x = normal(2, 5, 5, 4)
    variables = Normed().init(jax.random.key(0), x)
    for use in (calibrate, reestimate):
        with pytest.raises(ValueError, match="No calibration data"):
            use(Normed().apply, variables, [])
    with pytest.raises(ValueError, match="No calibration data"):
        calibrate(Normed().apply, variables, [x[:0]])


def test_a_model_without_batch_normalisation_has_nothing_to_reestimate():
    layer, x = nn.Conv(6, (3, 3)), normal(2, 5, 5, 4)
    with pytest.raises(ValueError, match="no batch normalisation"):
        reestimate(layer.apply, layer.init(jax.random.key(0), x), [x])


def test_activations_that_are_not_finite_are_refused():
    layer, x = nn.Conv(6, (3, 3)), normal(2, 5, 5, 4).at[0, 0, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        calibrate(layer.apply, layer.init(jax.random.key(0), x), [x])
