"""What the moments say is what the convolutions read, wherever the program runs them."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax import Calibration, calibrate, plan

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def total(found, path, index=()):
    """The moments of all images."""
    first, *others = found.moments[path][index]
    return sum(others, first)


def assert_predicts(moments, kernel, outputs, groups=1):
    """The moments give the covariance of a layer's outputs, which are (..., features)."""
    features = outputs.shape[-1]
    kernel = np.asarray(kernel, np.float64).reshape(-1, groups, features // groups)
    flat = np.asarray(outputs, np.float64).reshape(-1, groups, features // groups)
    assert moments.count == len(flat)  # every position of so small an image is taken
    for g in range(groups):
        wanted = np.cov(flat[:, g].T, bias=True)
        # Sums of some hundred products of order one in float32.
        own = kernel[:, g].T @ moments.covariance[g] @ kernel[:, g]
        np.testing.assert_allclose(own, wanted, atol=1e-4)
        np.testing.assert_allclose(kernel[:, g].T @ moments.cross[g], wanted, atol=1e-4)
        np.testing.assert_allclose(moments.variance[g], np.diag(wanted), atol=1e-4)


LAYERS = [
    (nn.Conv(6, (3, 3)), (5, 7, 8, 4)),
    (nn.Conv(6, (2, 4), strides=(2, 1)), (5, 7, 8, 4)),
    (nn.Conv(6, (3, 3), padding="VALID", kernel_dilation=(1, 2)), (5, 7, 8, 4)),
    (nn.Conv(6, (3, 3), padding="CIRCULAR"), (5, 7, 8, 4)),
    (nn.Conv(6, (3, 3), padding=((1, 2), (0, 1)), strides=2), (5, 7, 8, 4)),
    (nn.Conv(6, (3, 3), feature_group_count=2), (5, 7, 8, 4)),
    (nn.Conv(6, (3, 3), padding=((2, 1), (0, 2)), input_dilation=2), (5, 5, 4, 4)),
    (nn.Conv(6, (3,)), (5, 9, 4)),
    (nn.Conv(6, (2, 3, 2)), (3, 4, 5, 4, 4)),
    (nn.ConvTranspose(6, (3, 3), strides=(2, 2)), (4, 4, 4, 3)),
    (nn.ConvTranspose(6, (4, 3), transpose_kernel=False), (4, 4, 4, 3)),
    (nn.Dense(6), (30, 4)),
    (nn.Dense(6), (5, 7, 4)),
    (nn.DenseGeneral(6, axis=(-2, -1)), (5, 7, 2, 3)),
    (nn.DenseGeneral(6, axis=(1, -1)), (5, 3, 7, 2)),
    (nn.Einsum((6, 4), "bld,hd->blh"), (5, 7, 4)),
    (nn.DenseGeneral((2, 3)), (5, 7, 4)),
]


@pytest.mark.parametrize("layer, shape", LAYERS, ids=lambda case: str(case)[:60])
def test_the_moments_predict_the_covariance_of_the_outputs(layer, shape):
    x = normal(*shape)
    variables = layer.init(jax.random.key(1), x)
    found = calibrate(layer.apply, variables, x)
    groups = getattr(layer, "feature_group_count", 1)
    kernel, outputs = variables["params"]["kernel"], layer.apply(variables, x)
    if isinstance(layer, nn.Einsum):
        kernel = kernel.T
    if outputs.shape[-1] != 6:
        outputs = outputs.reshape(*outputs.shape[:-2], 6)
    assert_predicts(total(found, "kernel"), kernel, outputs, groups)


def test_layouts_of_other_frameworks_are_read_from_the_program():
    def apply(tree, x):
        numbers = ("NCHW", "OIHW", "NCHW")
        kernel = tree["filters"][:, :, ::-1]
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    tree, x = {"filters": normal(6, 4, 3, 3)}, normal(5, 4, 7, 8)
    moments = total(calibrate(apply, tree, x), "filters")
    kernel = tree["filters"].transpose(
        1, 2, 3, 0
    )  # the stored order without the outputs, then these
    assert_predicts(moments, kernel, apply(tree, x).transpose(0, 2, 3, 1))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.tanh(nn.Conv(4, (3, 3), name="inner")(x)), None


STACKED = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
SHARED = {"variable_broadcast": "params", "split_rngs": {"params": False}, "length": 3}
CALLS = {"jit": nn.jit, "remat": nn.remat, "scan of a shared layer": lambda b: nn.scan(b, **SHARED)}


def inner_outputs(kernels, biases, x):
    """The outputs of the inner convolutions, one after the other."""
    found = []
    for kernel, bias in zip(kernels, biases, strict=True):
        found.append(nn.Conv(4, (3, 3)).apply({"params": {"kernel": kernel, "bias": bias}}, x))
        x = nn.tanh(found[-1])
    return found


@pytest.mark.parametrize("call", CALLS)
def test_layers_within_calls_and_loops_are_measured(call):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return CALLS[call](Block)(name="block")(x, None)[0]

    x = normal(4, 5, 5, 4)
    variables = Model().init(jax.random.key(0), x)
    params = variables["params"]["block"]["inner"]
    steps = 3 if call.startswith("scan") else 1
    outputs = inner_outputs([params["kernel"]] * steps, [params["bias"]] * steps, x)
    found = calibrate(Model().apply, variables, x)
    assert_predicts(total(found, "block/inner"), params["kernel"], jnp.stack(outputs))


def test_each_kernel_of_a_scanned_stack_has_moments_of_its_own():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.scan(nn.remat(Block), **STACKED)(name="block")(x, None)[0]

    x = normal(4, 5, 5, 4)
    variables = Model().init(jax.random.key(0), x)
    params = variables["params"]["block"]["inner"]
    found = calibrate(jax.jit(Model().apply), variables, x)
    for index, outputs in enumerate(inner_outputs(params["kernel"], params["bias"], x)):
        moments = total(found, "block/inner", (index,))
        assert_predicts(moments, params["kernel"][index], outputs)


@pytest.mark.parametrize("in_axes", [None, 0])
def test_each_kernel_of_an_ensemble_has_moments_of_its_own(in_axes):
    x = normal(4, 5, 5, 4) if in_axes is None else normal(3, 4, 5, 5, 4)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            split = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            many = nn.vmap(nn.Conv, in_axes=in_axes, axis_size=3, **split)
            return many(6, (3, 3), name="member")(x if in_axes is None else x.swapaxes(0, 1))

    batch = x if in_axes is None else x.swapaxes(0, 1)
    variables = Model().init(jax.random.key(0), batch)
    outputs, params = Model().apply(variables, batch), variables["params"]["member"]
    found = calibrate(Model().apply, variables, batch)
    for index in range(3):
        assert_predicts(total(found, "member", (index,)), params["kernel"][index], outputs[index])


def test_branches_and_unbounded_loops_are_measured_as_far_as_they_run():
    def apply(tree, x):
        def convolve(x):
            return jnp.tanh(
                jax.lax.conv_general_dilated(
                    x, tree["w"], (1, 1), "SAME", dimension_numbers=DIMENSIONS
                )
            )

        def loop(x):
            state = jax.lax.while_loop(
                lambda s: s[0] < 2, lambda s: (s[0] + 1, convolve(s[1])), (0, x)
            )
            return state[1]

        return jax.lax.cond(x.sum() > -jnp.inf, loop, lambda x: x, x)

    tree, x = {"w": normal(3, 3, 4, 4)}, normal(4, 5, 5, 4)
    assert total(calibrate(apply, tree, x, paths=["w"]), "w").count == 2 * 4 * 25


def test_batches_add_up_to_the_whole_and_give_two_sets_of_images():
    layer, x = nn.Conv(6, (3, 3)), normal(6, 7, 8, 4)
    variables = layer.init(jax.random.key(1), x)
    whole = calibrate(layer.apply, variables, x)
    parts = calibrate(layer.apply, variables, [x[:2], x[2:]])
    one, two = total(whole, "kernel"), total(parts, "kernel")
    assert one.count == two.count and whole.images == parts.images == 6
    assert [len(found.moments["kernel"][()]) for found in (whole, parts)] == [2, 2]
    np.testing.assert_allclose(
        one.covariance, two.covariance, atol=1e-5
    )  # float32 in another order
    alone = calibrate(layer.apply, variables, x[:1])
    assert len(alone.moments["kernel"][()]) == 1


def test_a_grid_of_positions_stands_for_all_of_them():
    x = normal(256, 16, 16, 3)
    x = (x + jnp.roll(x, 1, 1) + jnp.roll(x, 1, 2)) / 2  # neighbours are correlated, as in images
    layer = nn.Conv(4, (3, 3))
    variables = layer.init(jax.random.key(0), x)
    some = total(calibrate(layer.apply, variables, x), "kernel")
    every = np.lib.stride_tricks.sliding_window_view(
        np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (1, 2)
    )
    flat = every.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 27)
    assert some.count == 16 * 256 < len(flat)
    covariance = np.cov(flat.T, bias=True)
    # 4,096 samples: relative deviations of about 1/64 of the largest entry.
    assert np.abs(some.covariance[0] - covariance).max() < 0.1 * np.abs(covariance).max()


def test_only_the_layers_asked_for_are_measured():
    model, x = nn.Sequential([nn.Conv(4, (3, 3)), nn.Conv(4, (3, 3))]), normal(2, 5, 5, 4)
    variables = model.init(jax.random.key(0), x)
    assert set(calibrate(model.apply, variables, x, paths=["layers_1"]).moments) == {"layers_1"}


class Normed(nn.Module):
    """The output of the first layer passes through a product with one before its normalisation."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), use_bias=False, name="conv")(x) * 1.0
        x = nn.BatchNorm(True, name="norm")(x)
        return nn.Conv(6, (3, 3), name="free")(nn.relu(x))


@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "remat"]
)
def test_importance_is_the_scale_of_the_normalisation_that_follows(wrap):
    x = normal(2, 5, 5, 4)
    variables = Normed().init(jax.random.key(0), x)
    variables["params"]["norm"]["scale"] = jnp.arange(-3.0, 3.0)
    variables["batch_stats"]["norm"]["var"] = jnp.full(6, 4.0)
    found = calibrate(wrap(Normed().apply), variables, x).importance
    assert set(found) == {"conv"}
    np.testing.assert_allclose(found["conv"], np.abs(np.arange(-3.0, 3.0)) / 2, rtol=1e-4)


def test_a_calibration_is_saved_and_loaded(tmp_path):
    model, x = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu, nn.Conv(8, (3, 3))]), normal(4, 6, 6, 4)
    variables = model.init(jax.random.key(0), x)
    found = calibrate(model.apply, variables, x)
    found.save(tmp_path / "seen.npz")
    again = Calibration.load(tmp_path / "seen.npz", model.apply, variables, x)
    assert str(plan(found, macs=0.5)) == str(plan(again, macs=0.5))
    assert again.images == 4


@pytest.mark.parametrize("damage", ["half", "another", "missing"])
def test_a_file_that_is_no_calibration_of_these_variables_is_refused(tmp_path, damage):
    layer, x, path = nn.Conv(8, (3, 3)), normal(4, 6, 6, 4), tmp_path / "seen.npz"
    variables = layer.init(jax.random.key(0), x)
    calibrate(layer.apply, variables, x).save(path)
    error, text = ValueError, "no whole calibration"
    if damage == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if damage == "another":
        variables, text = layer.init(jax.random.key(1), x), "'kernel' differs"
    if damage == "missing":
        path, error, text = tmp_path / "none.npz", FileNotFoundError, "none.npz"
    with pytest.raises(error, match=text):
        Calibration.load(path, layer.apply, variables, x)


MESH = """
import jax, jax.numpy as jnp, numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec as P
import lowrank_jax as lr
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
layer, x = nn.Conv(6, (3, 3)), jax.random.normal(jax.random.key(0), (16, 6, 6, 4))
variables = layer.init(jax.random.key(1), x)
parted = [jax.device_put(part, NamedSharding(mesh, P("data"))) for part in (x[:8], x[8:])]
inside = jax.shard_map(layer.apply, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
one, *others = [
    sum(found.moments["kernel"][()][1:], found.moments["kernel"][()][0])
    for found in (
        lr.calibrate(layer.apply, variables, [x[:8], x[8:]]),
        lr.calibrate(layer.apply, variables, parted),
        lr.calibrate(inside, variables, parted),
    )
]
for other in others:
    np.testing.assert_allclose(other.covariance, one.covariance, atol=1e-5)
    assert other.count == one.count
print("same")
"""


def test_a_mesh_of_devices_gives_the_moments_of_one():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", MESH], env=os.environ | flags, capture_output=True, text=True
    )
    assert done.stdout.strip() == "same", done.stderr[-2000:]


def test_activations_that_are_not_finite_are_refused():
    layer, x = nn.Conv(6, (3, 3)), normal(2, 5, 5, 4).at[0, 0, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="kernel: the activations hold NaN or infinite"):
        calibrate(layer.apply, layer.init(jax.random.key(0), x), x)
