"""The candidates of every layer: what they cost is what the decomposed program costs."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax import Separable, Tucker, decompose, lowrank, reconstruct, trace
from lowrank_jax.factorization.forms import FORMS
from lowrank_jax.factorization.ranks import max_rank
from lowrank_jax.planning.candidates import Candidate, candidates, front
from lowrank_jax.planning.selectors import fixed
from lowrank_jax.planning.spectra import Spectra, spectra

X = jnp.zeros((2, 8, 6, 4))
PATHS = ("strided", "grouped", "shared", "pointwise")
SPATIAL = [first for first, form in FORMS.items() if form.spatial]


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="strided")(x))
        x = nn.relu(nn.Conv(8, (3, 5), feature_group_count=2, name="grouped")(x))
        shared = nn.Conv(8, (3, 3), name="shared")
        x = shared(x) + jnp.sum(shared(x[:, ::2]))
        return nn.Dense(3, name="head")(nn.Conv(16, (1, 1), name="pointwise")(x))


def filled(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), shapes)


@functools.cache
def network():
    variables = filled(jax.eval_shape(CNN().init, jax.random.key(0), X))
    program = trace(CNN().apply, variables, X)
    return variables, program, spectra(variables["params"], program, PATHS)


def stack():
    many = nn.vmap(nn.Conv, variable_axes={"params": 0}, split_rngs={"params": True})
    model, images = (
        nn.Sequential([many(6, (3, 3), feature_group_count=2)]),
        jnp.zeros((3, *X.shape)),
    )
    variables = filled(jax.eval_shape(model.init, jax.random.key(0), images))
    return variables["params"], trace(model.apply, variables, images)


def test_the_paths_and_forms_can_be_chosen():
    variables, program, _ = network()
    found = spectra(variables["params"], program, ["shared"], forms=["horizontal"])
    assert {path: list(forms) for path, forms in found.values.items()} == {"shared": ["horizontal"]}
    assert {each.scheme.first for each in candidates(program, found).layers["shared"][1:]} == {
        "horizontal"
    }


@pytest.mark.parametrize("first", SPATIAL)
def test_the_error_of_a_rank_is_the_share_that_the_factors_leave_out(first):
    variables, program, found = network()
    for path, rank in {"strided": 4, "grouped": 3}.items():
        kernel = variables["params"][path]["kernel"]
        low = candidates(program, found).at(path, program.at(path)[0].scheme(rank, first))
        layer = {"layer": {"kernel": kernel}}
        left = reconstruct(decompose(layer, {"layer": low.scheme}))["layer"]["kernel"]
        lost = jnp.sum((kernel - left) ** 2) / jnp.sum(kernel**2)
        assert lost == pytest.approx(low.error, rel=1e-4)


def assert_costs_are_those_of_the_program(schemes, variables, program, found):
    plan = fixed(candidates(program, found), schemes)
    assert plan.ranks == schemes
    small = jax.eval_shape(lambda p: decompose(p, plan.ranks, program), variables["params"])
    after = trace(lowrank(CNN().apply), {"params": small}, X)
    assert plan.total("parameters") == (program.parameters, after.parameters)
    assert plan.total("macs") == (program.macs, after.macs)
    moved = tuple(sum(use.bytes for use in calls) for calls in (program, after))
    assert plan.total("bytes") == moved


@pytest.mark.parametrize("first", SPATIAL)
def test_every_cost_is_that_of_the_decomposed_program(first):
    variables, program, _ = network()
    found = spectra(variables["params"], program)
    ranks = {"strided": 3, "grouped": 2, "shared": 4, "pointwise": 2, "head": 2}
    schemes = {path: scheme(program.at(path)[0], rank, first) for path, rank in ranks.items()}
    assert_costs_are_those_of_the_program(schemes, variables, program, found)


def test_every_cost_of_three_factors_is_that_of_the_decomposed_program():
    variables, program, found = network()
    ranks = {"strided": (3, 5), "grouped": (2, 1), "shared": (4, 2)}
    schemes = {
        path: Tucker(rank, program.at(path)[0].groups, inner=inner)
        for path, (rank, inner) in ranks.items()
    }
    assert_costs_are_those_of_the_program(schemes, variables, program, found)


def test_the_error_of_three_factors_bounds_what_they_leave_out():
    variables, program, found = network()
    for path, groups in {"strided": 1, "grouped": 2}.items():
        low = candidates(program, found).at(path, Tucker(2, groups, inner=3))
        layer = {"layer": variables["params"][path]}
        small = reconstruct(decompose(layer, {"layer": low.scheme}))
        kernel, left = (tree["layer"]["kernel"] for tree in (layer, small))
        lost = jnp.sum((kernel - left) ** 2) / jnp.sum(kernel**2)
        assert 0.5 * low.error <= lost <= low.error


def test_no_pair_of_ranks_is_worse_than_another_by_every_cost():
    _, program, found = network()
    layer = [each for each in candidates(program, found).layers["shared"] if is_tucker(each)]
    assert layer
    for one in layer:
        for two in layer:
            costs = [(getattr(c, m) for m in ("parameters", "macs", "bytes")) for c in (one, two)]
            cheaper = all(a < b for a, b in zip(*costs, strict=True))
            assert not (cheaper and one.error <= two.error)


def is_tucker(each):
    return isinstance(each.scheme, Tucker)


def scheme(use, rank, first):
    """The scheme of a form, or the usual one where the layer does not have that form."""
    return use.scheme(rank, first if first in use.forms else None)


def test_a_stack_of_kernels_has_one_rank_and_its_energies_are_summed():
    params, program = stack()
    found = spectra(params, program)
    (path,) = found.values
    values = found.values[path]["vertical"]
    chex.assert_shape(values, (3 * 2, 6))
    low = candidates(program, found).at(path, program[0].scheme(2))
    assert low.error == pytest.approx((values[:, 2:] ** 2).sum() / (values**2).sum())
    assert low.spectral == pytest.approx((values[:, 2] / values[:, 0]).max())
    assert low.parameters == 3 * 2 * (3 * 2 * 2 + 3 * 6)


def test_dense_comes_first_and_every_other_candidate_is_cheaper_by_some_measure():
    _, program, found = network()
    table = candidates(program, found)
    for layer in table.layers.values():
        dense, *others = layer
        assert dense.scheme is None and dense.error == 0
        for low in others:
            assert any(low.cost(m) < dense.cost(m) for m in ("parameters", "macs", "bytes"))
    assert table.dense("parameters") == program.parameters and table.dense("macs") == program.macs
    assert table.rest("parameters") == 16 * 3


def test_macs_do_not_follow_the_parameters_where_there_is_a_stride():
    _, program, found = network()
    dense, low, *_ = candidates(program, found).layers["strided"]
    assert low.parameters / dense.parameters != pytest.approx(low.macs / dense.macs, rel=0.1)


def test_ranks_are_restricted_to_multiples():
    _, program, found = network()
    layers = candidates(program, found, multiple=4).layers
    assert {each.scheme.rank % 4 for layer in layers.values() for each in layer[1:]} == {0}
    assert len(layers["pointwise"]) == 2  # of two orders that are the same one is enough


def test_a_multiple_that_leaves_no_rank_is_refused():
    _, program, found = network()
    with pytest.raises(ValueError, match=r"No layer has a rank that is a multiple of 64 .*smaller"):
        candidates(program, found, multiple=64)


@pytest.mark.parametrize("multiple", [0, -8, 2.0, True, "8", None])
def test_a_multiple_that_is_no_positive_int_is_refused(multiple):
    _, program, found = network()
    with pytest.raises(ValueError, match=r"multiple=.* is not allowed; give an int of 1 or more"):
        candidates(program, found, multiple)


def test_a_layer_that_cannot_be_decomposed_is_refused():
    tree = {"last": {"kernel": jnp.ones((4, 3))}}
    program = trace(lambda tree, x: x @ (x.mean() * tree["last"]["kernel"]), tree, X)
    with pytest.raises(
        ValueError, match="last: cannot be decomposed: its kernel is changed by mul"
    ):
        candidates(program, Spectra({"last": {"left": np.ones(3)}}))


def test_a_spectrum_of_another_network_is_refused():
    _, program, _ = network()
    with pytest.raises(
        ValueError, match=r"strided: a spectrum of 3 values does not fit .*which has 12"
    ):
        candidates(program, Spectra({"strided": {"vertical": np.ones(3)}}))


def test_a_scheme_without_a_spectrum_or_of_other_groups_is_refused():
    _, program, found = network()
    vertical = {"vertical": found.values["grouped"]["vertical"]}
    table = candidates(program, Spectra({"grouped": vertical}))
    with pytest.raises(ValueError, match="grouped: there is no spectrum of its form 'horizontal'"):
        table.at("grouped", Separable(2, 2, first="horizontal"))
    with pytest.raises(ValueError, match="strided: there is no spectrum"):
        table.at("strided", Separable(2))
    with pytest.raises(
        ValueError,
        match=r"grouped: Separable\(rank=2, groups=1.* write Separable\(rank=2, groups=2",
    ):
        table.at("grouped", Separable(2))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=8))
def test_nothing_beats_a_candidate_of_the_front(pairs):
    layer = [candidate(cost, loss) for cost, loss in pairs]
    best = front(layer, "parameters", lambda each: each.error)
    for kept in best:
        assert not any(beats(each, kept) for each in layer)
    for each in layer:
        assert any(k.parameters <= each.parameters and k.error <= each.error for k in best)


def candidate(cost, loss):
    return Candidate(scheme=None, parameters=cost, macs=0, bytes=0, error=loss)


def beats(one, two):
    costs, losses = (one.parameters, two.parameters), (one.error, two.error)
    no_worse = costs[0] <= costs[1] and losses[0] <= losses[1]
    return no_worse and (costs[0] < costs[1] or losses[0] < losses[1])


def test_candidates_need_no_kernels_once_the_spectra_are_there():
    shapes = jax.eval_shape(CNN().init, jax.random.key(0), X)
    program = trace(CNN().apply, shapes, X)
    values = {use.path: {first: flat(use, first) for first in use.forms}
              for use in program if use.safe}  # fmt: skip
    assert len(candidates(program, Spectra(values)).layers) == 5


def flat(use, first):
    return np.ones((use.groups, max_rank(use.kernel_shape, use.groups, use.axes, first)))
