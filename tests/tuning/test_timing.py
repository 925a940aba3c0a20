"""Timing and compiler options. The clock is made up: no test depends on the machine's speed."""

import functools
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax.program.compiler import (
    _known,
    candidate_options,
    default_options,
    gradient_options,
)
from lowrank_jax.tuning import timing
from lowrank_jax.tuning.agreement import agree
from lowrank_jax.tuning.timing import Throughput, compile_fastest, measure, throughput


def test_programs_run_in_turn_and_warm_up_is_not_counted():
    calls = []
    programs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = throughput(programs, items=1, rounds=4, warmup=2)
    assert [sorted(calls[i : i + 2]) for i in range(0, 12, 2)] == [["a", "b"]] * 6
    assert {len(v) for v in times.seconds.values()} == {4}


class Clock:
    """In place of the module ``time``; programs say how long they take."""

    def __init__(self) -> None:
        self.now, self.runs = 0.0, Counter()

    def perf_counter(self) -> float:
        return self.now

    def program(self, name: str, seconds: float):
        def run() -> None:
            self.runs[name] += 1
            self.now += seconds

        return run

    def programs(self, **seconds: float) -> dict:
        return {name: self.program(name, value) for name, value in seconds.items()}


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_the_ratio_is_that_of_the_times(clock):
    times = throughput(clock.programs(slow=0.03, fast=0.01), items=5, rounds=5)
    assert times.ratio("fast", "slow") == pytest.approx((3, 3, 3))
    assert times.rate("fast") == pytest.approx((500, 500, 500))


def test_rates_are_items_over_seconds_by_quartile():
    times = Throughput(10, {"a": [1.0, 2.0, 4.0, 5.0, 10.0]})
    assert times.rate("a") == (2.0, 2.5, 5.0)


def test_the_fastest_program_computes_the_function():
    x, y = jnp.ones((1, 8, 8, 3)), jax.random.normal(jax.random.key(0), (3, 3, 3, 4))
    names = ("NHWC", "HWIO", "NHWC")
    options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": names}
    conv = functools.partial(jax.lax.conv_general_dilated, **options)
    # the convolution paths add the 27 products in different orders
    assert jnp.allclose(compile_fastest(conv, x, y)(), conv(x, y), atol=1e-5)


@pytest.mark.parametrize("bad", [{"rounds": 1}, {"items": 0}, {"programs": {}}])
def test_a_measurement_without_meaning_is_refused(bad):
    with pytest.raises(ValueError, match="throughput needs"):
        throughput(**({"programs": {"a": lambda: None}, "items": 1, "rounds": 2} | bad))


def test_options_that_this_xla_does_not_know_are_no_candidates():
    assert _known({}) and not _known({"xla_no_such_option": "1"})


@pytest.mark.parametrize("options", [*candidate_options(), default_options(), gradient_options()])
def test_every_candidate_option_compiles_here(options):
    assert jax.jit(lambda x: 2 * x, compiler_options=options)(3.0) == 6


def test_the_options_are_found_while_a_program_is_traced_too():
    found = []
    jax.jit(lambda x: found.append(candidate_options.__wrapped__()) or x)(1.0)
    assert found == [candidate_options()]


def test_the_default_is_a_candidate_and_the_only_one_elsewhere():
    assert candidate_options()[0] == {}
    assert candidate_options("gpu") == candidate_options("tpu") == ({},)


def test_short_programs_run_often_in_a_turn_and_their_mean_counts(clock):
    found = throughput(clock.programs(short=0.001), items=1, rounds=2, least=0.0205)
    assert clock.runs["short"] == 1 + 2 * 21  # one run tells how long it takes, then two turns
    assert found.seconds["short"] == pytest.approx([0.001, 0.001])


def test_only_programs_that_can_be_the_fastest_run_often(clock):
    times = measure(clock.programs(first=0.01, second=0.02, beaten=0.1), rounds=9)
    assert clock.runs == {"first": 2 + 2 + 9, "second": 2 + 2, "beaten": 2}
    assert times == pytest.approx({"first": 0.01, "second": 0.02, "beaten": 0.1})


def test_short_programs_are_measured_by_turns_of_the_least_length(clock):
    times = measure(clock.programs(only=0.0001), rounds=2, least=0.0015)
    assert times == pytest.approx({"only": 0.0001}) and clock.runs["only"] > 4 * 15


def test_long_programs_have_fewer_rounds(clock):
    measure(clock.programs(a=0.01, b=0.01), rounds=100, seconds=0.1)
    assert clock.runs == {"a": 2 + 2 + 5, "b": 2 + 2 + 5}


def test_very_long_programs_run_once_and_the_fastest_twice_more(clock):
    measure(clock.programs(long=3.0, longer=8.0), rounds=9, least=0.01, seconds=6.0)
    assert clock.runs == {"long": 1 + 2, "longer": 1}


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_without_time_the_first_runs_count(clock, seconds):
    times = measure(clock.programs(a=0.01, b=3.0), rounds=9, seconds=seconds)
    assert clock.runs == {"a": 2, "b": 1} and times == pytest.approx({"a": 0.01, "b": 3.0})


def test_a_program_that_fails_is_noted_and_left_out_or_its_error_is_raised(clock):
    programs = clock.programs(works=0.01) | {"fails": lambda: 1 // 0}
    errors: dict = {}
    assert list(measure(programs, rounds=2, errors=errors)) == ["works"]
    assert list(errors) == ["fails"] and type(errors["fails"]) is ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        measure(programs, rounds=2)
    assert measure({"fails": programs["fails"]}, rounds=2, errors=errors) == {}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_do_not_depend_on_the_options_for_them(dtype):
    layers = [
        nn.Conv(16, (3, 3)), nn.BatchNorm(use_running_average=False), nn.relu, nn.Conv(16, (3, 3)),
        nn.relu, functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2)),
        nn.Conv(24, (3, 1)), nn.LayerNorm(), nn.gelu,
    ]  # fmt: skip
    model = nn.Sequential(layers)
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16, 16, 8)), dtype)
        variables = model.init(jax.random.key(0), x)

        def loss(params):
            out, _ = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return jnp.square(out - 1).mean()

        every = [default_options(), gradient_options(dtype)]
        one, two = (jax.jit(jax.grad(loss), compiler_options=o)(variables["params"]) for o in every)
    # Sums of a thousand terms in another order, rounded to float32.
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(one))
    chex.assert_trees_all_close(one, two, atol=1e-5 * scale)


def test_gradients_in_half_precision_have_the_usual_options():
    assert gradient_options("bfloat16") == gradient_options(jnp.float16) == default_options()


@pytest.mark.slow
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
    timed: list = []
    monkeypatch.setattr(timing, "throughput", lambda *_, **__: timed.append(1))
    assert compile_fastest(jnp.sin, jnp.ones(3))().shape == (3,) and not timed


def test_options_that_do_not_compile_are_left_out_and_if_all_fail_the_first_error_is_raised(
    monkeypatch,
):
    monkeypatch.setattr(timing, "candidate_options", lambda: ({"xla_no_such_option": "1"}, {}))
    assert compile_fastest(jnp.sin, jnp.ones(3))().shape == (3,)
    monkeypatch.setattr(timing, "candidate_options", lambda: ({"xla_no_such_option": "1"},))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        compile_fastest(jnp.sin, jnp.ones(3))
