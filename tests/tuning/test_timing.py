"""Timing, tracing of costs and compiler options."""

import time

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from lowrank_jax.program.compiler import _known, candidate_options, default_options
from lowrank_jax.tuning.agreement import agree, most_agreed
from lowrank_jax.tuning.timing import Throughput, compile_fastest, race, throughput


def test_programs_run_in_turn_and_warm_up_is_not_counted():
    calls = []
    programs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = throughput(programs, items=1, rounds=4, warmup=2)
    assert [sorted(calls[i : i + 2]) for i in range(0, 12, 2)] == [["a", "b"]] * 6
    assert {len(v) for v in times.seconds.values()} == {4}


def test_the_ratio_is_that_of_the_times():
    programs = {"slow": lambda: time.sleep(0.03), "fast": lambda: time.sleep(0.01)}
    low, median, high = throughput(programs, items=5, rounds=5).ratio("fast", "slow")
    assert (
        1.5 < low <= median <= high < 4.5
    )  # the true ratio is 3; sleeping is exact to a few ms on a busy machine


def test_rates_are_items_over_seconds_by_quartile():
    times = Throughput(10, {"a": [1.0, 2.0, 4.0, 5.0, 10.0]})
    assert times.rate("a") == (2.0, 2.5, 5.0)


def test_the_fastest_program_computes_the_function():
    x, y = jnp.ones((1, 8, 8, 3)), jax.random.normal(jax.random.key(0), (3, 3, 3, 4))
    conv = lambda x, y: jax.lax.conv_general_dilated(
        x, y, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    # the convolution paths add the 27 products in different orders
    assert jnp.allclose(compile_fastest(conv, x, y)(), conv(x, y), atol=1e-5)


@pytest.mark.parametrize("bad", [{"rounds": 1}, {"items": 0}, {"programs": {}}])
def test_a_measurement_without_meaning_is_refused(bad):
    with pytest.raises(ValueError, match="throughput needs"):
        throughput(**({"programs": {"a": lambda: None}, "items": 1, "rounds": 2} | bad))


def test_options_that_this_xla_does_not_know_are_no_candidates():
    assert _known({}) and not _known({"xla_no_such_option": "1"})


@pytest.mark.parametrize("options", [*candidate_options(), default_options()])
def test_every_candidate_option_compiles_here(options):
    assert jax.jit(lambda x: 2 * x, compiler_options=options)(3.0) == 6


def test_the_options_are_found_while_a_program_is_traced_too():
    found = []
    jax.jit(lambda x: found.append(candidate_options.__wrapped__()) or x)(1.0)
    assert found == [candidate_options()]


def test_the_default_is_a_candidate_and_the_only_one_elsewhere():
    assert candidate_options()[0] == {}
    assert candidate_options("gpu") == candidate_options("tpu") == ({},)


def test_short_programs_run_several_times_in_a_turn_and_their_mean_counts():
    runs = []

    def short():
        runs.append(time.sleep(0.001))

    found = throughput({"short": short}, items=1, rounds=2, least=0.02)
    assert len(runs) > 1 + 2 * 5  # one run to see how long it takes, then two turns
    assert all(0.001 <= seconds < 0.01 for seconds in found.seconds["short"])


def sleeper(runs, name, seconds):
    """A program that counts its runs."""

    def run():
        runs[name] += 1
        time.sleep(seconds)

    return run


def test_in_a_race_only_the_fast_run_often():
    runs = dict.fromkeys(("first", "second", "lapped"), 0)
    programs = {
        name: sleeper(runs, name, seconds)
        for name, seconds in zip(runs, (0.01, 0.02, 0.1), strict=True)
    }
    times = race(programs, rounds=9)
    assert runs == {"first": 2 + 2 + 9, "second": 2 + 2, "lapped": 2}
    assert times["first"] < times["second"] < times["lapped"] and 0.1 <= times["lapped"] < 0.2
    assert race({"only": sleeper(runs, "first", 0.0)}, rounds=2, least=0.001).keys() == {"only"}


def test_a_race_of_long_programs_has_fewer_rounds():
    runs = []
    race({name: lambda: runs.append(time.sleep(0.01)) for name in "ab"}, rounds=100, seconds=0.1)
    assert len(runs) <= 2 * (2 + 2 + 5)


def test_in_a_race_very_long_programs_run_once_and_the_fastest_twice_more(monkeypatch):
    monkeypatch.setattr("lowrank_jax.tuning.timing.LONG", 0.02)
    runs = {"long": 0, "longer": 0}
    programs = {"long": sleeper(runs, "long", 0.03), "longer": sleeper(runs, "longer", 0.08)}
    race(programs, rounds=9, least=0.01, seconds=0.06)
    assert runs == {"long": 1 + 2, "longer": 1}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("options", candidate_options()[1:])
def test_every_candidate_option_computes_the_same_convolutions(options, dtype):
    model = nn.Sequential([
        nn.Conv(16, (3, 1), dtype=dtype), nn.Conv(24, (1, 3), strides=(1, 2), dtype=dtype), nn.gelu,
        nn.Conv(8, (3, 3), kernel_dilation=2, padding="VALID", dtype=dtype), nn.relu,
        nn.Conv(16, (3, 5), feature_group_count=8, padding=((0, 2), (3, 1)), dtype=dtype),
        nn.ConvTranspose(4, (2, 2), strides=(2, 2), dtype=dtype), nn.Conv(3, (1, 1), dtype=dtype),
    ])  # fmt: skip
    images = jax.random.normal(jax.random.key(0), (3, 12, 15, 3))
    variables = model.init(jax.random.key(1), images)
    wanted, found = (
        jax.jit(model.apply, compiler_options=o)(variables, images) for o in ({}, options)
    )
    # seven layers, each rounded to the type
    assert agree(wanted, found, tolerance=20 * float(jnp.finfo(dtype).eps))


def test_a_program_that_computes_something_else_is_never_the_fastest(monkeypatch):
    monkeypatch.setattr("lowrank_jax.tuning.agreement.agree", lambda *_: False)
    compiled = []
    monkeypatch.setattr("lowrank_jax.tuning.timing.throughput", lambda *_, **__: compiled.append(1))
    assert compile_fastest(jnp.sin, jnp.ones(3))().shape == (3,) and not compiled


def test_the_outputs_of_most_are_trusted_and_of_equals_the_first():
    x, broken = jnp.arange(3.0), jnp.full(3, jnp.nan)
    assert most_agreed({"broken": broken, "far": x + 1, "a": x, "b": x * (1 + 1e-7)}, 1e-5) == "a"
    assert most_agreed({"default": x, "other": x + 1}, 1e-5) == "default"
    assert most_agreed({"default": broken, "other": broken}, 1e-5) == "default"


def test_outputs_agree_by_shape_type_and_value():
    x = {"a": jnp.arange(3.0), "b": jnp.zeros(2)}
    assert agree(x, jax.tree.map(lambda y: y * (1 + 1e-6), x), 1e-5)
    assert not agree(x, jax.tree.map(lambda y: y * 1.01, x), 1e-3)
    assert not agree(x, jax.tree.map(lambda y: y.astype("bfloat16"), x), 1.0)
    assert not agree(x, jax.tree.map(lambda y: y[:1], x), 1.0)
    assert not agree(x, jax.tree.map(lambda y: y + jnp.nan, x), 1.0)
