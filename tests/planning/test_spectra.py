"""Singular values of every layer: what they are, where they are kept, what they are not."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax import spectrum, trace
from lowrank_jax.factorization.forms import FORMS
from lowrank_jax.factorization.layout import to_matrix, to_pair
from lowrank_jax.planning.spectra import Spectra, restrict, singular_values, spectra

X = jnp.zeros((2, 8, 6, 4))


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), strides=2, name="strided")(x)
        x = nn.Conv(8, (3, 5), feature_group_count=2, name="grouped")(x)
        return nn.Dense(3, name="head")(nn.Conv(16, (1, 1), name="pointwise")(x))


@functools.cache
def network():
    shapes = jax.eval_shape(CNN().init, jax.random.key(0), X)
    program, rng = trace(CNN().apply, shapes, X), np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes["params"])
    return params, program, spectra(params, program)


def test_the_spectra_are_those_of_every_safe_layer_in_every_form():
    params, _, found = network()
    shapes = {path: [x.shape for x in forms.values()] for path, forms in found.values.items()}
    assert shapes == {
        "strided": [(1, 12), (1, 12), (1, 8), (1, 4)],
        "grouped": [(2, 12), (2, 12), (2, 4), (2, 4)],
        "pointwise": [(1, 8)],
        "head": [(1, 3)],
    }
    for path, groups, axes in (("grouped", 2, "HWIO"), ("head", 1, "IO")):
        for first, values in found.values[path].items():
            expected = spectrum(params[path]["kernel"], groups, axes, first)
            np.testing.assert_allclose(values, expected, rtol=1e-5)
            assert values.dtype == np.float64


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_spectra_that_are_not_finite_are_refused(value):
    with pytest.raises(
        ValueError, match="block/conv, vertical: the singular values hold NaN or infinite"
    ):
        Spectra({"block/conv": {"vertical": np.array([value, 1.0])}})


@pytest.mark.parametrize(
    "forms, message",
    [
        ({"diagonal": [1.0]}, "'diagonal' is not known; give one of .*'vertical', 'horizontal'"),
        ({"vertical": [1.0, 2.0]}, "sorted, largest first"),
        ({"vertical": [1.0, -2.0]}, "0 or more"),
        ({"vertical": []}, "there are no singular values"),
        ({"vertical": 3.0}, "there are no singular values"),
    ],
)
def test_what_are_no_singular_values_is_refused(forms, message):
    with pytest.raises(ValueError, match=f"conv, .*: .*{message}"):
        Spectra({"conv": forms})


@pytest.mark.parametrize("suffix", ["npz", "msgpack"])
def test_spectra_are_saved_and_loaded(tmp_path, suffix):
    _, _, found = network()
    found.save(tmp_path / f"spectra.{suffix}")
    again = Spectra.load(tmp_path / f"spectra.{suffix}")
    chex.assert_trees_all_equal(again.values, found.values)


def test_damaged_spectra_and_other_files_are_refused(tmp_path):
    path = tmp_path / "spectra.npz"
    with pytest.raises(FileNotFoundError, match=r"spectra\.npz"):
        Spectra.load(path)
    path.write_bytes(b"PK damaged")
    with pytest.raises(ValueError, match=r"spectra\.npz is no whole"):
        Spectra.load(path)
    np.savez(path, **{"params/Conv_0/kernel": np.ones((3, 3, 1, 1))})
    with pytest.raises(
        ValueError, match=r"spectra\.npz holds no spectra; give .*'kernel' is not known"
    ):
        Spectra.load(path)


def test_the_layers_and_forms_can_be_chosen():
    params, program, _ = network()
    found = spectra(params, program, ["grouped", "head"], forms=["horizontal", "spatial"])
    chosen = {path: list(forms) for path, forms in found.values.items()}
    assert chosen == {"grouped": ["horizontal", "spatial"], "head": ["left"]}


def test_restricted_spectra_are_those_of_the_forms_alone():
    params, program, found = network()
    for forms in (["horizontal"], "spatial", ["vertical", "pointwise"]):
        alone, part = spectra(params, program, forms=forms), restrict(found, program, forms)
        assert {path: [*own] for path, own in part.values.items()} == {
            path: [*own] for path, own in alone.values.items()
        }
        chex.assert_trees_all_equal(part.values, alone.values)


def test_a_kernel_of_one_dimension_has_the_forms_that_are_the_same_products():
    model, x = nn.Conv(8, (3,), name="conv"), jnp.zeros((2, 8, 4))
    params = model.init(jax.random.key(0), x)["params"]
    program = trace(model.apply, {"params": params}, x)
    found = spectra(params, program, forms=["pointwise"])
    assert [list(forms) for forms in found.values.values()] == [["horizontal"]]


@pytest.mark.parametrize("forms", [["vertical", "diagonal"], "diagonal"])
def test_an_unknown_form_is_refused_with_those_there_are(forms):
    params, program, _ = network()
    with pytest.raises(ValueError, match=r"forms: 'diagonal' is not allowed; give .*'vertical'"):
        spectra(params, program, forms=forms)


def test_no_form_at_all_is_refused():
    params, program, _ = network()
    with pytest.raises(ValueError, match=r"forms is empty; give at least one of .*'vertical'"):
        spectra(params, program, forms=[])


SPATIAL = [first for first, form in FORMS.items() if form.spatial]
SHAPES = st.tuples(*[st.integers(1, 4)] * 2, *[st.integers(1, 9)] * 2)


@given(SHAPES, st.integers(0, 99), st.sampled_from(SPATIAL))
def test_singular_values_are_those_of_the_whole_decomposition(shape, seed, first):
    kernel = np.random.default_rng(seed).standard_normal(shape, np.float32)
    (use,) = trace(convolve, {"kernel": kernel}, jnp.zeros((1, 9, 9, shape[2])))
    matrix = to_matrix(to_pair(kernel.astype(np.float64), "HWIO", first))
    expected = np.linalg.svd(matrix, compute_uv=False)
    found = singular_values(kernel, use, first)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-7 * expected.max())


def convolve(tree, x):
    layout = ("NHWC", "HWIO", "NHWC")
    kernel = tree["kernel"]
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


def test_no_singular_vectors_are_computed_and_a_pointwise_kernel_is_done_once(monkeypatch):
    params, program, before = network()
    monkeypatch.setattr(np.linalg, "svd", None)
    monkeypatch.setattr(np.linalg, "eigh", None)
    sizes, eigenvalues = [], np.linalg.eigvalsh
    record = lambda gram: (sizes.append(gram.shape[-1]), eigenvalues(gram))[1]  # noqa: E731
    monkeypatch.setattr(np.linalg, "eigvalsh", record)
    chex.assert_trees_all_equal(spectra(params, program).values, before.values)
    assert sorted(sizes) == [3, 4, 4, 4, 8, 8, 12, 12, 12, 12]


def test_a_kernel_of_a_low_rank_loses_nothing_from_there_on():
    left, right = (np.random.default_rng(0).standard_normal(s) for s in ((12, 3), (3, 24)))
    kernel = (left @ right).reshape(3, 4, 3, 8).transpose(0, 2, 1, 3)
    (use,) = trace(convolve, {"kernel": kernel}, jnp.zeros((1, 9, 9, 4)))
    found = Spectra({"conv": {"vertical": singular_values(kernel, use, "vertical")}})
    lost = found.left_out("conv", "vertical")
    assert lost[2] > 1e-3 and (lost[3:] < 1e-15).all() and lost[-1] == 0


def test_a_kernel_of_zeros_loses_nothing_at_any_rank():
    zero = Spectra({"conv": {"vertical": np.zeros((2, 4))}})
    assert not zero.left_out("conv", "vertical").any()
    assert not zero.largest_left_out("conv", "vertical").any()


def test_a_kernel_with_nan_and_an_unknown_path_are_refused():
    params, program, _ = network()
    with pytest.raises(ValueError, match="strided: the kernel holds NaN"):
        spectra(jax.tree.map(lambda x: x * jnp.nan, params), program)
    with pytest.raises(ValueError, match=r"'stride' is no layer of .*did you mean 'strided'"):
        spectra(params, program, ["stride"])


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8])
def test_kernels_of_eight_bits_are_refused_by_their_path(dtype):
    params, program, _ = network()
    kernel = {"grouped": params["grouped"] | {"kernel": jnp.ones((3, 5, 4, 8), dtype)}}
    with pytest.raises(ValueError, match=f"grouped: the kernel has type {jnp.dtype(dtype)}; "):
        spectra(params | kernel, program)


def test_kernels_of_sixteen_bits_are_decomposed():
    params, program, expected = network()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    chex.assert_trees_all_close(spectra(half, program).values, expected.values, rtol=0.02)
