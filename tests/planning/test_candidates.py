"""Spectra computed once, and the options that follow from them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax import Separable, decompose, lowrank, reconstruct, spectrum, trace
from lowrank_jax.factorization.separable import FACTORS, max_rank
from lowrank_jax.planning.candidates import Option, front, options
from lowrank_jax.planning.evbmf import evbmf_rank
from lowrank_jax.planning.selectors import fixed
from lowrank_jax.planning.spectra import Spectra, spectra

X = jnp.zeros((2, 8, 6, 4))


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="strided")(x))
        x = nn.relu(nn.Conv(8, (3, 5), feature_group_count=2, name="grouped")(x))
        shared = nn.Conv(8, (3, 3), name="shared")
        x = shared(x) + jnp.sum(shared(x[:, ::2]))
        return nn.Dense(3, name="head")(nn.Conv(16, (1, 1), name="pointwise")(x))


@functools.cache
def network():
    variables = jax.jit(CNN().init)(jax.random.key(0), X)
    uses = trace(CNN().apply, variables, X)
    return variables, uses, spectra(variables["params"], uses)


def stack():
    many = nn.vmap(nn.Conv, variable_axes={"params": 0}, split_rngs={"params": True})
    model, images = (
        nn.Sequential([many(6, (3, 3), feature_group_count=2)]),
        jnp.zeros((3, *X.shape)),
    )
    variables = jax.jit(model.init)(jax.random.key(0), images)
    return variables["params"], trace(model.apply, variables, images)


def test_the_spectra_are_those_of_every_safe_layer_in_both_orders():
    variables, _, found = network()
    assert list(found.values) == ["strided", "grouped", "shared", "pointwise"]
    values = found.values["grouped"]
    expected = spectrum(variables["params"]["grouped"]["kernel"], 2, "HWIO", "horizontal")
    np.testing.assert_allclose(values["horizontal"], expected, rtol=1e-5)
    assert [x.dtype for x in values.values()] == [np.float64] * 2
    assert {path: x["vertical"].shape for path, x in found.values.items()} == {
        "strided": (1, 12), "grouped": (2, 12), "shared": (1, 24), "pointwise": (1, 8)
    }  # fmt: skip


def test_the_paths_and_orders_can_be_chosen():
    variables, uses, _ = network()
    found = spectra(variables["params"], uses, ["shared"], orders=["horizontal"])
    assert {path: list(orders) for path, orders in found.values.items()} == {
        "shared": ["horizontal"]
    }
    assert {option.scheme.first for option in options(uses, found).layers["shared"][1:]} == {
        "horizontal"
    }


@pytest.mark.parametrize("first", FACTORS)
def test_the_error_of_a_rank_is_the_share_that_the_factors_leave_out(first):
    variables, uses, found = network()
    for path, rank in {"strided": 5, "grouped": 3}.items():
        kernel = variables["params"][path]["kernel"]
        option = options(uses, found).at(path, uses.at(path)[0].scheme(rank, first))
        layer = {"layer": {"kernel": kernel}}
        cut = reconstruct(decompose(layer, {"layer": option.scheme}))["layer"]["kernel"]
        assert jnp.sum((kernel - cut) ** 2) / jnp.sum(kernel**2) == pytest.approx(
            option.error, rel=1e-4
        )


@pytest.mark.parametrize("first", FACTORS)
def test_every_cost_is_that_of_the_decomposed_program(first):
    variables, uses, found = network()
    table = {"strided": 3, "grouped": 2, "shared": 4, "pointwise": 2}
    plan = fixed(
        options(uses, found), {path: uses.at(path)[0].scheme(r, first) for path, r in table.items()}
    )
    small = jax.eval_shape(lambda p: decompose(p, plan.ranks, uses), variables["params"])
    after = trace(lowrank(CNN().apply), {"params": small}, X)
    assert plan.total("parameters") == (uses.parameters, after.parameters)
    assert plan.total("macs") == (uses.macs, after.macs)
    assert plan.total("bytes") == (sum(use.bytes for use in uses), sum(use.bytes for use in after))


def test_a_stack_of_kernels_has_one_rank_and_its_energies_are_summed():
    params, uses = stack()
    found = spectra(params, uses)
    (path,) = found.values
    values = found.values[path]["vertical"]
    chex.assert_shape(values, (3 * 2, 6))
    option = options(uses, found).at(path, uses[0].scheme(2))
    assert option.error == pytest.approx((values[:, 2:] ** 2).sum() / (values**2).sum())
    assert option.spectral == pytest.approx((values[:, 2] / values[:, 0]).max())
    assert option.parameters == 3 * 2 * (3 * 2 * 2 + 3 * 6)


def test_dense_comes_first_and_every_other_option_is_cheaper_by_some_measure():
    _, uses, found = network()
    table = options(uses, found)
    for layer in table.layers.values():
        dense, *others = layer
        assert dense.scheme is None and dense.error == 0
        assert all(o.parameters < dense.parameters or o.macs < dense.macs or o.bytes < dense.bytes
                   for o in others)  # fmt: skip
    assert table.dense("parameters") == uses.parameters and table.dense("macs") == uses.macs
    assert table.rest("parameters") == 16 * 3


def test_macs_do_not_follow_the_parameters_where_there_is_a_stride():
    _, uses, found = network()
    dense, low, *_ = options(uses, found).layers["strided"]
    assert low.parameters / dense.parameters != pytest.approx(low.macs / dense.macs, rel=0.1)


def test_ranks_are_restricted_to_multiples():
    _, uses, found = network()
    layers = options(uses, found, multiple=4).layers
    assert {option.scheme.rank % 4 for layer in layers.values() for option in layer[1:]} == {0}
    assert len(layers["pointwise"]) == 2  # of two orders that are the same one is enough


def test_a_multiple_that_leaves_no_rank_is_refused():
    _, uses, found = network()
    with pytest.raises(ValueError, match=r"No layer has a rank that is a multiple of 64 .*smaller"):
        options(uses, found, multiple=64)


@pytest.mark.parametrize("multiple", [0, -8, 2.0, True, "8", None])
def test_a_multiple_that_is_no_positive_int_is_refused(multiple):
    _, uses, found = network()
    with pytest.raises(ValueError, match=r"multiple=.* is not allowed; give an int of 1 or more"):
        options(uses, found, multiple)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_spectra_that_are_not_finite_are_refused(value):
    with pytest.raises(
        ValueError, match="block/conv, vertical first: the singular values hold NaN or infinite"
    ):
        Spectra({"block/conv": {"vertical": np.array([value, 1.0])}})


@pytest.mark.parametrize(
    "orders, message",
    [
        ({"diagonal": [1.0]}, "'diagonal' is not known; give one of 'vertical', 'horizontal'"),
        ({"vertical": [1.0, 2.0]}, "sorted, largest first"),
        ({"vertical": [1.0, -2.0]}, "0 or more"),
        ({"vertical": []}, "there are no singular values"),
        ({"vertical": 3.0}, "there are no singular values"),
    ],
)
def test_what_are_no_singular_values_is_refused(orders, message):
    with pytest.raises(ValueError, match=f"conv, .* first: .*{message}"):
        Spectra({"conv": orders})


def test_a_kernel_with_nan_and_an_unknown_or_unsafe_path_are_refused():
    variables, uses, _ = network()
    broken = jax.tree.map(lambda x: x * jnp.nan, variables["params"])
    with pytest.raises(ValueError, match="strided: the kernel holds NaN"):
        spectra(broken, uses)
    with pytest.raises(
        ValueError, match="'stride' is no layer of the traced program; did you mean 'strided'"
    ):
        spectra(variables["params"], uses, ["stride"])
    with pytest.raises(ValueError, match="head: cannot be decomposed: it is a matrix product"):
        options(uses, Spectra({"head": {"vertical": np.ones(3)}}))


def test_a_spectrum_of_another_network_is_refused():
    _, uses, _ = network()
    with pytest.raises(
        ValueError, match=r"strided: a spectrum of 3 values does not fit .*which has 12"
    ):
        options(uses, Spectra({"strided": {"vertical": np.ones(3)}}))


def test_a_scheme_without_a_spectrum_or_of_other_groups_is_refused():
    _, uses, found = network()
    table = options(uses, Spectra({"grouped": {"vertical": found.values["grouped"]["vertical"]}}))
    with pytest.raises(ValueError, match="grouped: there is no spectrum of it with the horizontal"):
        table.at("grouped", Separable(2, 2, first="horizontal"))
    with pytest.raises(ValueError, match="strided: there is no spectrum"):
        table.at("strided", Separable(2))
    with pytest.raises(
        ValueError,
        match=r"grouped: Separable\(rank=2, groups=1.* write Separable\(rank=2, groups=2",
    ):
        table.at("grouped", Separable(2))


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
    with pytest.raises(ValueError, match=r"spectra\.npz holds no spectra: .*'kernel' is not known"):
        Spectra.load(path)


def test_a_kernel_of_zeros_loses_nothing_at_any_rank():
    zero = Spectra({"conv": {"vertical": np.zeros((2, 4))}})
    assert (
        not zero.left_out("conv", "vertical").any()
        and not zero.largest_left_out("conv", "vertical").any()
    )


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=8))
def test_nothing_beats_an_option_of_the_front(pairs):
    layer = [Option(None, cost, 0, 0, error=loss) for cost, loss in pairs]
    best = front(layer, "parameters", lambda option: option.error)
    for kept in best:
        assert not any((o.parameters <= kept.parameters and o.error < kept.error) or
                       (o.parameters < kept.parameters and o.error <= kept.error) for o in layer)  # fmt: skip
    assert all(
        any(k.parameters <= o.parameters and k.error <= o.error for k in best) for o in layer
    )


def test_options_need_no_weights_once_the_spectra_are_there():
    shapes = jax.eval_shape(CNN().init, jax.random.key(0), X)
    uses = trace(CNN().apply, shapes, X)
    values = {
        use.path: {f: np.ones((use.groups, max_rank(use.kernel_shape, use.groups, use.axes, f))) for f in FACTORS}
        for use in uses if use.safe
    }  # fmt: skip
    assert len(options(uses, Spectra(values)).layers) == 4


@pytest.mark.parametrize("shape", [(30, 30), (20, 60)])
@pytest.mark.parametrize("rank", [0, 1, 6])
def test_the_variational_rank_is_that_of_the_signal_whatever_the_scale(shape, rank):
    rng = np.random.default_rng(rank)
    signal = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
    values = np.linalg.svd(3 * signal + 0.1 * rng.standard_normal(shape), compute_uv=False)
    assert evbmf_rank(values, shape[1]) == evbmf_rank(1e-6 * values, shape[1]) == rank


def test_the_variational_rank_of_matrices_without_noise_is_their_own():
    rng = np.random.default_rng(0)
    values = np.linalg.svd(
        rng.standard_normal((20, 4)) @ rng.standard_normal((4, 30)), compute_uv=False
    )
    exact = np.where(np.arange(20) < 4, values, 0)
    assert evbmf_rank(exact, 30) == 4 and evbmf_rank(np.zeros(5), 5) == 0
    assert evbmf_rank(np.array([2.0]), 1) in (0, 1)
