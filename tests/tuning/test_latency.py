"""The table of measured times that a plan with a latency takes."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import lowrank_jax as lr
from lowrank_jax.planning.candidates import candidates
from lowrank_jax.planning.selectors import latency
from lowrank_jax.planning.spectra import spectra
from lowrank_jax.tuning.algorithms import PLAIN
from lowrank_jax.tuning.latency import layer_seconds, scheme_seconds
from lowrank_jax.tuning.timer import Timer
from lowrank_jax.tuning.timer_file import DENSE, TWO


class Net(nn.Module):
    """Two convolutions, a batch normalisation and a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3))(x)))
        x = nn.Conv(8, (5, 5), strides=2)(x).mean((1, 2))
        return nn.Dense(16, name="head")(x)


class Made(Timer):
    """Makes its times up: dense layers take 1, factors their rank over 30."""

    def _dense(self, layer):
        return {"convolve": 1.0, DENSE: 1.0}

    def _factored(self, layer, scheme, names):
        return dict.fromkeys(names or [PLAIN], scheme.rank / 30) | {DENSE: 1.0}


@pytest.fixture(scope="module")
def net():
    model, images = Net(), jax.random.normal(jax.random.key(1), (6, 8, 8, 4))
    variables = model.init(jax.random.key(0), images)
    return variables, lr.trace(model.apply, variables, images)


def test_the_table_has_dense_and_every_form_and_no_rank_that_costs_more_weights(net):
    _, trace = net
    table = layer_seconds(trace, Made(), ["Conv_1"], multiple=4)
    schemes = [scheme for scheme in table["Conv_1"] if scheme]
    assert None in table["Conv_1"]
    assert {scheme.first for scheme in schemes} == set(trace.at("Conv_1")[0].forms)
    assert all(scheme.rank % 4 == 0 for scheme in schemes)
    sizes = [trace.at("Conv_1")[0].parameters_at(scheme) for scheme in schemes]
    assert max(sizes) <= 5 * 5 * 8 * 8 and min(table["Conv_1"].values()) > 0


def test_the_table_is_of_the_type_that_the_program_computes_in(monkeypatch):
    model, x = nn.Conv(6, (3, 3), dtype=jnp.bfloat16), jnp.ones((2, 8, 8, 4))
    trace = lr.trace(model.apply, model.init(jax.random.key(0), x), x)
    timer, asked = Made(), set()
    monkeypatch.setattr(
        timer, "_factored", lambda layer, *_: asked.add(layer.dtype) or {PLAIN: 1.0, DENSE: 2.0}
    )
    layer_seconds(trace, timer)
    assert asked == {"bfloat16"}


def test_a_plan_by_latency_is_never_slower_than_dense_by_the_table(net):
    variables, trace = net
    table = layer_seconds(trace, Made(), multiple=4)
    plan = latency(
        candidates(trace, spectra(variables["params"], trace)), table, lr.Budget("latency", 1.0)
    )
    chosen = [choice for choice in plan if choice.scheme]
    for choice in chosen:
        assert table[choice.path][choice.scheme] < table[choice.path][None]


def test_products_are_in_the_table_as_they_run_dense_and_with_two_factors(tmp_path):
    """A layer of attention: one product of which heads have factors of their own, and others."""
    model, x = nn.MultiHeadDotProductAttention(4), jnp.ones((2, 6, 32))
    trace = lr.trace(model.apply, model.init(jax.random.key(0), x), x)
    timer = Timer(rounds=2, path=tmp_path / "times.json")
    table = layer_seconds(trace, timer, multiple=4)
    again = layer_seconds(trace, Timer(path=tmp_path / "times.json"), multiple=4)
    assert table == again  # read, not measured
    assert set(table) == {"query", "key", "value", "out"}
    assert {scheme.first for scheme in table["query"] if scheme} == {"left", "heads"}
    assert all(seconds > 0 for row in table.values() for seconds in row.values())


def test_a_latency_budget_covers_products(monkeypatch):
    def measured(timer, product, scheme):
        return {TWO: product.inputs * scheme.rank * 1e-6, DENSE: product.inputs * 1e-5}

    monkeypatch.setattr(Timer, "measure_product", measured)
    model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(32)])
    x = jax.random.normal(jax.random.key(0), (16, 32))
    variables = model.init(jax.random.key(1), x)
    plan = lr.plan(model.apply, variables, x, latency=0.5)
    dense, chosen = plan.total("latency")
    assert chosen <= dense / 2 and set(plan.ranks) == {"layers_0", "layers_2"}
    assert all(scheme.rank < 10 for scheme in plan.ranks.values())


def test_times_of_given_factors_stand_beside_the_dense_ones(net):
    _, trace = net
    table = {"Conv_0": None, "Conv_1": lr.Separable(6), "head": None}
    found = scheme_seconds(trace, Made(rounds=2), table)
    assert found["Conv_0"] == (1.0, 1.0) and found["Conv_1"] == (1.0, 6 / 30)
    assert found["head"][0] == found["head"][1] > 0


def test_a_layer_of_three_convolutions_takes_the_time_of_the_first_and_of_the_others(net):
    _, trace = net
    found = scheme_seconds(trace, Made(), {"Conv_1": lr.Tucker(3, inner=6)})
    assert found["Conv_1"] == (1.0, pytest.approx(1 + 6 / 30))
