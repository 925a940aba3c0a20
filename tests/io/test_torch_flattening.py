"""Layers that meet flattened maps, transposed convolutions, and tensors that are named by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from flax import linen as nn

from lowrank_jax.io.torch_names import from_torch

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape, np.float32)


def convert(tensors, model, x, **options):
    target = jax.eval_shape(model.init, jax.random.key(0), x)
    return from_torch(tensors, model.apply, target, x, **options)


def dense(name, out, size):
    return {f"{name}.weight": normal(out, size), f"{name}.bias": normal(out)}


def flat(x, start=1):
    """Maps (..., *spatial, c) as PyTorch, which has the channels first, flattens them."""
    moved = np.moveaxis(np.asarray(x), -1, start)
    return moved.reshape(*moved.shape[:start], -1)


def conv(name, size=3):
    """A pointwise convolution, which has no layout to be wrong about."""
    return {f"{name}.weight": normal(size, size, 1, 1), f"{name}.bias": normal(size)}


def convolved(x, tensors, name):
    return x @ tensors[f"{name}.weight"][:, :, 0, 0].T + tensors[f"{name}.bias"]


def affine(y, tensors, name):
    return y @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def run(model, tensors, x):
    variables, report = convert(tensors, model, x)
    assert report.complete
    return model.apply(variables, x)


def test_several_maps_that_are_flattened_one_after_the_other():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            maps = nn.Conv(3, (1, 1))(x), nn.Conv(3, (1, 1))(x[:, ::2, :3])
            parts = [nn.relu(part.reshape(len(x), -1)) for part in maps]
            return nn.Dense(5)(jnp.concatenate([*parts, x.mean((1, 2))], -1))

    x = normal(2, 4, 5, 3)
    tensors = conv("one") | conv("two") | dense("fc", 5, 3 * 20 + 3 * 6 + 3)
    maps = convolved(x, tensors, "one"), convolved(x[:, ::2, :3], tensors, "two")
    y = np.concatenate([*(np.maximum(flat(part), 0) for part in maps), x.mean((1, 2))], -1)
    np.testing.assert_allclose(run(Model(), tensors, x), affine(y, tensors, "fc"), atol=1e-4)


@pytest.mark.parametrize("kind", ["batch", "layer"])
def test_normalisations_of_flattened_maps(kind):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Conv(3, (1, 1))(x).reshape(len(x), -1)
            y = nn.BatchNorm(True)(y) if kind == "batch" else nn.LayerNorm(epsilon=1e-5)(y)
            return nn.Dense(5)(nn.relu(y))

    x = normal(4, 2, 3, 3)
    tensors = conv("conv") | {"norm.weight": normal(18), "norm.bias": normal(18)}
    if kind == "batch":
        tensors |= {"norm.running_mean": normal(18), "norm.running_var": normal(18) ** 2 + 1}
    tensors |= dense("fc", 5, 18)
    y = flat(convolved(x, tensors, "conv"))
    mean, var = y.mean(-1, keepdims=True), y.var(-1, keepdims=True)
    if kind == "batch":
        mean, var = tensors["norm.running_mean"], tensors["norm.running_var"]
    y = (y - mean) / np.sqrt(var + 1e-5) * tensors["norm.weight"] + tensors["norm.bias"]
    expected = affine(np.maximum(y, 0), tensors, "fc")
    np.testing.assert_allclose(run(Model(), tensors, x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("merged", [False, True])
def test_maps_with_several_leading_axes(merged):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.relu(nn.Conv(3, (1, 1))(x))
            return nn.Dense(5)(y.reshape(*((6,) if merged else (2, 3)), -1))

    x = normal(2, 3, 4, 5, 3)
    tensors = conv("conv") | dense("fc", 5, 60)
    y = flat(np.maximum(convolved(x, tensors, "conv"), 0), start=2)
    expected = affine(y, tensors, "fc").reshape(*((6,) if merged else (2, 3)), 5)
    np.testing.assert_allclose(run(Model(), tensors, x), expected, atol=1e-4)


def test_heads_of_attention_are_no_maps():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(6)(x).reshape(2, 4, 2, 3).swapaxes(1, 2)
            return nn.Dense(5)(y.swapaxes(1, 2).reshape(2, 4, 6))

    x = normal(2, 4, 6)
    tensors = dense("one", 6, 6) | dense("two", 5, 6)
    expected = affine(affine(x, tensors, "one"), tensors, "two")
    np.testing.assert_allclose(run(Model(), tensors, x), expected, atol=1e-4)


@pytest.mark.parametrize("change", ["rev", "gather", "reshape"])
def test_an_order_that_is_not_followed_is_refused_by_name(change):
    changes = {
        "rev": lambda y: y[:, ::-1],
        "gather": lambda y: y[:, jnp.array(RNG.permutation(18))],
        "reshape": lambda y: y.reshape(2, 3, 6).swapaxes(1, 2).reshape(2, -1),
    }

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Conv(3, (1, 1))(x).reshape(2, -1)
            return nn.Dense(5, name="head")(changes[change](y))

    tensors, x = conv("conv") | dense("fc", 5, 18), normal(2, 2, 3, 3)
    names = {"fc.weight": "params/head/kernel", "fc.bias": "params/head/bias"}
    with pytest.raises(ValueError, match=r"params/head/kernel: it meets flattened .*in names="):
        convert(tensors, Model(), x)
    found, _ = convert(tensors, Model(), x, names=names)
    np.testing.assert_array_equal(found["params"]["head"]["kernel"], tensors["fc.weight"].T)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(3, 3), (2, 4)])
def test_a_transposed_convolution_is_paired_by_its_name_alone(stride, size):
    model = nn.ConvTranspose(2, size, strides=(stride, stride), padding="VALID", name="up")
    x, tensors = normal(1, 5, 6, 2), {"up.weight": normal(2, 2, *size), "up.bias": normal(2)}
    with pytest.raises(ValueError, match="have no partner"):
        convert(tensors, model, x)
    names = {r"up\.weight": "params/kernel", r"up\.bias": "params/bias"}
    variables, report = convert(tensors, model, x, names=names)
    assert report.complete and report.pairs[0].layout == "IOHW turned to HWIO"
    spread = np.zeros((2, 4 * stride + 1, 5 * stride + 1), np.float32)
    spread[:, ::stride, ::stride] = np.moveaxis(x[0], -1, 0)
    full = np.stack(
        [
            sum(scipy.signal.convolve2d(spread[i], tensors["up.weight"][i, o]) for i in range(2))
            + tensors["up.bias"][o]
            for o in range(2)
        ],
        -1,
    )
    found = np.asarray(model.apply(variables, x))[0]
    np.testing.assert_allclose(found[: full.shape[0], : full.shape[1]], full, atol=1e-4)


def test_codes_are_no_weights():
    tensors = {"fc.weight": np.ones((5, 4), np.int8), "fc.bias": normal(5)}
    with pytest.raises(ValueError, match=r"fc.weight holds int8, which are codes .* its scale"):
        convert(tensors, nn.Dense(5), normal(2, 4))


@pytest.mark.parametrize(
    "names, message",
    [
        ({"fd.weight": "params/kernel"}, "'fd.weight' matches no tensor"),
        ({"fc.weight": "params/kernal"}, "which is no leaf; did you mean 'params/kernel'"),
        ({r"fc\..*": "params/kernel"}, "as another is; give it a leaf of its own"),
        ({"fc.bias": "params/kernel"}, r"fc.bias of shape \(5,\) becomes \(5,\), and its leaf has"),
    ],
)
def test_names_that_do_not_fit_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        convert(dense("fc", 5, 4), nn.Dense(5), normal(2, 4), names=names, strict=False)


def test_two_layers_that_stand_in_another_order_are_told_apart_by_names():
    model, x = nn.Sequential([nn.Dense(4), nn.Dense(4)]), normal(2, 4)
    tensors = dense("last", 4, 4) | dense("first", 4, 4)
    names = {r"first\.weight": "params/layers_0/kernel", r"first\.bias": "params/layers_0/bias"}
    variables, _ = convert(tensors, model, x, names=names)
    expected = affine(affine(x, tensors, "first"), tensors, "last")
    np.testing.assert_allclose(model.apply(variables, x), expected, atol=1e-4)
