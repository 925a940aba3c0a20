"""What the moments say is what the convolutions read, wherever the program runs them."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax import Calibration, calibrate, plan
from lowrank_jax.calibration.network import Network
from lowrank_jax.calibration.sums import geometry_of, patch_sums
from lowrank_jax.factorization.moments import Moments
from lowrank_jax.program.interpreter import Rule, bind, interpret
from lowrank_jax.program.kernel import Kernel, dense, sources_of
from lowrank_jax.program.reading import READERS, Reading

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


class Whole(Rule):
    """Adds up the moments of whole patches, as a fit needs them."""

    def apply(self, eqn, values):
        if eqn.primitive.name not in READERS:
            return None
        reading = Reading.of(eqn, sources_of(values))
        outputs = bind(eqn, [dense(value) for value in values])
        x = dense(values[1 - reading.operand])
        sums, _ = patch_sums(geometry_of(reading), x, outputs[0], 0)
        return outputs, {reading.source.path: sums}


def whole_moments(apply, variables, x):
    """Those of each layer by the path of its kernel."""
    network = Network(apply, variables)
    traced = network.program((x,))
    pairs = list(zip(traced.sources, network.leaves((x,)), strict=True))

    @jax.jit
    def run(leaves):
        values = [
            leaf if s is None else Kernel.dense(s, leaf)
            for (s, _), leaf in zip(pairs, leaves, strict=True)
        ]
        return interpret(traced.program.closed, values, Whole())[1]

    return {path: moments_of(sums) for path, sums in run([leaf for _, leaf in pairs]).items()}


def moments_of(sums):
    one = {name: np.asarray(value, np.float64)[0] for name, value in sums.items()}
    return Moments(count=int(one.pop("count")), **one)


def total(found, path, index=()):
    """The moments of all images."""
    return found.moments[path][index]


def by_groups(array, groups):
    return np.asarray(array, np.float64).reshape(-1, groups, array.shape[-1] // groups)


def assert_predicts(strips, kernel, outputs, groups=1):
    """The moments are those of a layer's outputs, which are (..., features), and inputs."""
    features = outputs.shape[-1]
    kernel = by_groups(np.asarray(kernel).reshape(-1, features), groups)
    flat = by_groups(outputs, groups)
    assert strips.count == len(flat)  # every position of so small an image is taken
    for g in range(groups):
        wanted = np.cov(flat[:, g].T, bias=True)
        # Sums of some hundred products of order one in float32.
        np.testing.assert_allclose(strips.variance[g], np.diag(wanted), atol=1e-4)
        if strips.yy.ndim == 3:
            np.testing.assert_allclose(strips.output_covariance[g], wanted, atol=1e-4)
        mean = kernel[:, g].T @ (strips.x[g] / strips.count)
        np.testing.assert_allclose(mean, strips.y[g] / strips.count, atol=1e-4)


LAYERS = {
    "same": (nn.Conv(6, (3, 3)), (5, 7, 8, 4)),
    "strides": (nn.Conv(6, (2, 4), strides=(2, 1)), (5, 7, 8, 4)),
    "dilated kernel": (nn.Conv(6, (3, 3), padding="VALID", kernel_dilation=(1, 2)), (5, 7, 8, 4)),
    "circular": (nn.Conv(6, (3, 3), padding="CIRCULAR"), (5, 7, 8, 4)),
    "uneven padding": (nn.Conv(6, (3, 3), padding=((1, 2), (0, 1)), strides=2), (5, 7, 8, 4)),
    "groups": (nn.Conv(6, (3, 3), feature_group_count=2), (5, 7, 8, 4)),
    "dilated input": (nn.Conv(6, (3, 3), padding=((2, 1), (0, 2)), input_dilation=2), (5, 5, 4, 4)),
    "one axis": (nn.Conv(6, (3,)), (5, 9, 4)),
    "three axes": (nn.Conv(6, (2, 3, 2)), (5, 4, 5, 4, 4)),
    "transposed": (nn.ConvTranspose(6, (3, 3), strides=(2, 2)), (5, 4, 4, 3)),
    "transposed, not flipped": (nn.ConvTranspose(6, (4, 3), transpose_kernel=False), (5, 4, 4, 3)),
    "dense": (nn.Dense(6), (5, 4)),
    "dense on rows": (nn.Dense(6), (5, 7, 4)),
    "joined axes": (nn.DenseGeneral(6, axis=(-2, -1)), (5, 7, 2, 3)),
    "apart axes": (nn.DenseGeneral(6, axis=(1, -1)), (5, 3, 7, 2)),
    "einsum": (nn.Einsum((6, 4), "bld,hd->blh"), (5, 7, 4)),
    "heads": (nn.DenseGeneral((2, 3)), (5, 7, 4)),
}


def apply_each(params, inputs):
    return {
        name: layer.apply({"params": params[name]}, inputs[name])
        for name, (layer, _) in LAYERS.items()
    }


@pytest.fixture(scope="module")
def each():
    """Parameters, inputs and outputs of every layer, so that one program runs them all."""
    inputs = {name: normal(*shape) for name, (_, shape) in LAYERS.items()}

    @jax.jit
    def init(key):
        return {
            name: layer.init(key, inputs[name])["params"] for name, (layer, _) in LAYERS.items()
        }

    params = init(jax.random.key(1))
    return params, inputs, jax.jit(apply_each)(params, inputs)


def matrices(name, params, outputs):
    """The kernel and the outputs of a layer in rows of 6, and its groups."""
    layer, _ = LAYERS[name]
    kernel = params[name]["kernel"]
    rows = (kernel.T if isinstance(layer, nn.Einsum) else kernel).reshape(-1, 6)
    return rows, outputs[name].reshape(-1, 6), getattr(layer, "feature_group_count", 1)


def test_the_moments_predict_the_covariance_of_the_outputs(each):
    params, inputs, outputs = each
    found = calibrate(apply_each, params, inputs)
    for name in LAYERS:
        assert_predicts(total(found, name), *matrices(name, params, outputs))


def test_the_moments_of_whole_patches_predict_the_outputs(each):
    params, inputs, outputs = each
    found = whole_moments(apply_each, params, inputs)
    for name in LAYERS:
        *rows, groups = matrices(name, params, outputs)
        kernel, flat = (by_groups(x, groups) for x in rows)
        moments = found[name]
        assert moments.count == len(flat)
        for g in range(groups):
            wanted = np.cov(flat[:, g].T, bias=True)
            own = kernel[:, g].T @ moments.covariance[g] @ kernel[:, g]
            np.testing.assert_allclose(own, wanted, atol=1e-4)
            np.testing.assert_allclose(kernel[:, g].T @ moments.cross[g], wanted, atol=1e-4)
            np.testing.assert_allclose(moments.variance[g], np.diag(wanted), atol=1e-4)


def test_strips_of_inputs_that_are_alike_everywhere_have_the_covariance_of_the_channels():
    """Every tap sees the same, so that each strip stands for all of them exactly."""
    x = jnp.broadcast_to(normal(64, 1, 1, 3), (64, 4, 4, 3))
    layer = nn.Conv(4, (3, 2), padding="CIRCULAR")
    variables = layer.init(jax.random.key(0), x)
    strips = total(calibrate(layer.apply, variables, x), "kernel")
    channels, mean = np.cov(np.asarray(x[:, 0, 0]).T, bias=True), np.asarray(x[:, 0, 0]).mean(0)
    for first, (one, two) in {
        "vertical": (3, 2),
        "horizontal": (2, 3),
        "pointwise": (1, 6),
    }.items():
        found = strips.strips[first][0] / strips.count - np.outer(
            np.tile(mean, one), np.tile(mean, one)
        )
        np.testing.assert_allclose(found, np.tile(channels, (one, one)), atol=1e-4)
        taps = strips.offsets[first][0] / strips.count - one * mean @ mean
        np.testing.assert_allclose(taps, np.full((two, two), one * np.trace(channels)), atol=1e-4)


def test_strips_of_other_inputs_have_on_the_average_their_share_of_the_patches():
    layer, x = nn.Conv(4, (3, 3)), normal(64, 8, 8, 3)
    variables = layer.init(jax.random.key(0), x)
    found = total(calibrate(layer.apply, variables, x), "kernel")
    whole = whole_moments(layer.apply, variables, x)["kernel"]
    for first in ("vertical", "horizontal", "pointwise"):
        strip, offset = (np.trace(m[first][0]) for m in (found.strips, found.offsets))
        assert offset == pytest.approx(np.trace(whole.xx[0]), rel=1e-4)
        assert strip * len(found.offsets[first][0]) == pytest.approx(offset, rel=0.05)


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
    with pytest.warns(UserWarning, match="All layers count alike"):  # a while has no derivative
        found = calibrate(apply, tree, x, paths=["w"])
    assert total(found, "w").count == 2 * 4 * 25


def test_batches_add_up_to_the_whole():
    layer, x = nn.Conv(6, (3, 3)), normal(6, 7, 8, 4)
    variables = layer.init(jax.random.key(1), x)
    whole = calibrate(layer.apply, variables, x)
    parts = calibrate(layer.apply, variables, [x[:2], x[2:]])
    one, two = total(whole, "kernel"), total(parts, "kernel")
    assert one.count == two.count and whole.images == parts.images == 6
    for field in ("x", "y", "yy"):  # float32 in another order
        np.testing.assert_allclose(getattr(one, field), getattr(two, field), atol=1e-3)


def test_a_grid_of_positions_stands_for_all_of_them():
    x = normal(256, 16, 16, 3)
    x = (x + jnp.roll(x, 1, 1) + jnp.roll(x, 1, 2)) / 2  # neighbours are correlated, as in images
    layer = nn.Conv(4, (3, 3))
    variables = layer.init(jax.random.key(0), x)
    some = total(calibrate(layer.apply, variables, x), "kernel")
    every = np.asarray(layer.apply(variables, x)).reshape(-1, 4)
    assert some.count == 16 * 256 < len(every)
    covariance = np.cov(every.T, bias=True)
    # 4,096 samples: relative deviations of about 1/64 of the largest entry.
    assert np.abs(some.output_covariance[0] - covariance).max() < 0.1 * np.abs(covariance).max()


def test_only_the_layers_asked_for_are_measured():
    model, x = nn.Sequential([nn.Conv(4, (3, 3)), nn.Conv(4, (3, 3))]), normal(2, 5, 5, 4)
    variables = model.init(jax.random.key(0), x)
    for paths in (["layers_1"], "layers_1"):
        assert set(calibrate(model.apply, variables, x, paths=paths).moments) == {"layers_1"}


def test_a_layer_that_there_is_not_is_refused_with_the_nearest():
    tree, x = {"head": normal(4, 3)}, normal(8, 4)
    with pytest.raises(ValueError, match="paths: 'haed' is no layer of the network; did you mean"):
        calibrate(lambda tree, x: x @ tree["head"], tree, x, paths=["haed"])


class Normed(nn.Module):
    """What follows the first layer scales each of its channels on the way to the outputs."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), use_bias=False, name="conv")(x) * 1.0
        return nn.BatchNorm(True, name="norm")(x)


@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "remat"]
)
def test_importance_is_what_an_error_of_a_channel_costs_the_outputs(wrap):
    x = normal(2, 5, 5, 4)
    variables = Normed().init(jax.random.key(0), x)
    variables["params"]["norm"]["scale"] = jnp.arange(-3.0, 3.0)
    variables["batch_stats"]["norm"]["var"] = jnp.full(6, 4.0)
    found = calibrate(wrap(Normed().apply), variables, x).importance
    assert set(found) == {"conv"}
    # Signs times the scale, at 25 positions: their squares are exact.
    expected = 25 * np.square(np.arange(-3.0, 3.0) / 2)
    np.testing.assert_allclose(found["conv"].diagonal, expected, rtol=1e-4, atol=1e-9)


def test_curvature_is_the_squared_jacobian_of_the_network_on_the_average():
    model, x = nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(7)]), normal(512, 4)
    variables = model.init(jax.random.key(0), x)
    found = calibrate(model.apply, variables, x).curvature["layers_0"]
    params = variables["params"]
    y = x[:64] @ params["layers_0"]["kernel"]
    jacobian = (1 - jnp.tanh(y) ** 2)[:, :, None] * params["layers_2"]["kernel"]
    expected = np.asarray(jnp.einsum("inf,imf->nm", jacobian, jacobian)) / len(y)
    # 64 random signs each: deviations of about sqrt(2 / 64) of the diagonal.
    size = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    np.testing.assert_array_less(np.abs(found[0] - expected), 0.7 * size)


@pytest.mark.parametrize("images, width", [(9, 96), (64, 128), (65, 300), (256, 64)])
def test_a_wide_last_layer_has_the_identity_for_its_curvature(images, width):
    """Signs alone are beside the diagonal, and their noise is not taken for anything."""
    tree = {"w": normal(6, width)}
    found = calibrate(lambda p, x: x @ p["w"], tree, normal(images, 6)).curvature["w"]
    np.testing.assert_allclose(np.diagonal(found, axis1=1, axis2=2), 1, rtol=1e-5)
    beside = found - np.eye(found.shape[-1])
    # The entries of the mean of n products of signs are of size n ** -0.5; a quarter may stay.
    assert np.sqrt(np.mean(beside**2)) < 0.25 * min(images, 64) ** -0.5


def test_layers_within_loops_have_the_curvature_of_all_their_runs():
    def apply(tree, x, times=1):
        body = lambda x, _: (x @ tree["w"], None)  # noqa: E731
        return jax.lax.scan(body, x, length=times)[0]

    tree, x = {"w": jnp.asarray(np.linalg.qr(normal(4, 4))[0])}, normal(32, 4)
    one, three = (
        np.trace(calibrate(apply, tree, x, times=times).curvature["w"][0]) for times in (1, 3)
    )
    assert three == pytest.approx(3 * one, rel=1e-4)  # the matrix keeps the signs' norm


def test_a_network_without_a_derivative_says_so_and_all_its_layers_count_alike():
    def apply(tree, x):
        state = (0, x)
        loop = jax.lax.while_loop(
            lambda s: s[0] < jnp.int32(2), lambda s: (s[0] + 1, s[1] @ tree["w"]), state
        )
        return loop[1]

    with pytest.warns(UserWarning, match="All layers count alike .* no derivative: Reverse-mode"):
        found = calibrate(apply, {"w": normal(4, 4)}, normal(8, 4), paths=["w"])
    assert found.importance == {}


def unit(tree, x):
    """Vectors of length 1, whose derivative at 0 is not finite."""
    x = jax.nn.relu(x @ tree["one"]) @ tree["two"]
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("lost", [[3], [3, 30], range(40)], ids=["one", "two", "all"])
def test_inputs_whose_derivatives_are_not_finite_are_left_out(lost):
    tree = {"one": normal(8, 16), "two": normal(16, 8, seed=1)}
    x = normal(40, 8, seed=2).at[jnp.array([*lost])].set(0)
    with pytest.warns(UserWarning, match="inputs are infinite or NaN"):
        found = calibrate(unit, tree, x)
    assert all(np.isfinite(own).all() for own in found.curvature.values())
    assert set(found.curvature) == (set() if len(lost) == 40 else {"one", "two"})
    first, second = plan(found, macs=0.5).total("macs")
    assert second <= first / 2


def test_a_calibration_is_saved_and_loaded(tmp_path):
    model, x = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu, nn.Conv(8, (3, 3))]), normal(4, 6, 6, 4)
    variables = model.init(jax.random.key(0), x)
    found = calibrate(model.apply, variables, x)
    found.save(tmp_path / "seen.npz")
    again = Calibration.load(tmp_path / "seen.npz", model.apply, variables, x)
    assert str(plan(found, macs=0.5)) == str(plan(again, macs=0.5))
    assert again.images == 4
    once = Calibration.load(tmp_path / "seen.npz", model.apply, variables, iter([x[:2], x[2:]]))
    assert len(list(once.inputs)) == len(list(once.inputs)) == 2


def test_a_network_that_takes_no_single_image_says_whose_costs_are_counted(caplog):
    def apply(tree, x):
        return x.reshape(-1, 2, 6) @ tree["w"]  # pairs of images

    found = calibrate(apply, {"w": normal(6, 5)}, normal(8, 6))
    assert found.trace.macs == 4 * 6 * 5
    assert "does not run on one image alone" in caplog.text and "of 4 images" in caplog.text


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
one, *others = (
    lr.calibrate(layer.apply, variables, [x[:8], x[8:]]),
    lr.calibrate(layer.apply, variables, parted),
    lr.calibrate(inside, variables, parted),
)
known = one.moments["kernel"][()]
for other in others:
    own = other.moments["kernel"][()]
    np.testing.assert_allclose(own.output_covariance, known.output_covariance, atol=1e-5)
    assert own.count == known.count
    np.testing.assert_allclose(other.curvature["kernel"], one.curvature["kernel"], rtol=1e-4)
print("same")
"""


def test_a_mesh_of_devices_gives_the_moments_and_the_curvature_of_one(devices):
    command = [sys.executable, "-c", MESH]
    done = subprocess.run(command, env=devices(4), capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr[-2000:]


def test_activations_that_are_not_finite_are_refused():
    layer, x = nn.Conv(6, (3, 3)), normal(2, 5, 5, 4).at[0, 0, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="kernel: the activations hold NaN or infinite"):
        calibrate(layer.apply, layer.init(jax.random.key(0), x), x)
