"""Measured times: remembered, kept in a file, and found again."""

import json

import jax
import numpy as np
import pytest
from flax import linen as nn

import lowrank_jax as lr
from lowrank_jax.tuning.algorithms import MERGED, PLAIN, Layer, algorithms_of
from lowrank_jax.tuning.device import Device
from lowrank_jax.tuning.experimental.pools import Pool
from lowrank_jax.tuning.running import with_algorithms
from lowrank_jax.tuning.steps import STEPS
from lowrank_jax.tuning.timer import MARGIN, Timer
from lowrank_jax.tuning.timer_file import DENSE

LAYER = Layer((1, 8, 8, 4), 16, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))
POOL = Pool((1, 4, 4, 2), (1, 2, 2, 1), (1, 2, 2, 1), ((0, 0),) * 4, "max")


class Made(Timer):
    """Makes its times up; what has a "2" in its name is fastest."""

    def _time(self, runs, needed):
        return {name: 1.0 - 0.5 * ("2" in name) for name in runs}


class Known(Timer):
    """Must not measure anything."""

    def _time(self, runs, needed):
        pytest.fail(f"measured again: {list(runs)}")


def test_a_layer_is_measured_once(monkeypatch):
    timer, asked = Made(), []
    monkeypatch.setattr(timer, "_factored", lambda *args: asked.append(args) or {PLAIN: 2.0})
    for rank in (2, 2, 3, 2):
        assert timer.fastest(LAYER, lr.Separable(rank)) == PLAIN
    assert len(asked) == 2


def test_what_is_measured_are_algorithms_that_the_layer_has():
    times = Timer(rounds=2).measure(LAYER, lr.Separable(3))
    assert {PLAIN, "padded", DENSE} <= set(times) <= {*algorithms_of(LAYER, 3), DENSE}
    assert len(set(times) & {*MERGED}) == 1  # as the dense layer is fastest
    assert all(seconds > 0 for seconds in times.values())


def test_of_pairs_only_the_steps_that_are_fastest_alone_are_measured():
    times = Made().measure(LAYER, lr.Separable(3))
    assert list(times) == [PLAIN, "kn2row+kn2row", "padded", "merged im2col", DENSE]


def test_algorithms_of_a_dense_layer_are_measured_too_and_a_single_one_needs_no_measuring():
    timer = Timer(rounds=2)
    times = timer.measure(LAYER, None)
    assert set(times) == {*algorithms_of(LAYER, None), DENSE}
    assert times[DENSE] == min(times.values())
    groups = Layer((1, 8, 8, 4), 16, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), groups=2)
    assert Known().fastest(groups, None) == "convolve"


def test_times_are_kept_in_a_file_and_another_timer_reads_them(tmp_path):
    path = tmp_path / "times.json"
    first = Made(path=path)
    found = [first.measure(LAYER, lr.Separable(2)), first.measure(LAYER, None)]
    pool = first.fastest_pool(POOL)
    second = Known(path=path)
    assert [second.measure(LAYER, lr.Separable(2)), second.measure(LAYER, None)] == found
    assert second.fastest_pool(POOL) == pool


@pytest.mark.parametrize(
    "other", [{"kind": "H100"}, {"cpu": "x"}, {"cores": 77}, {"jaxlib": "0.1"}, {"jax": "0.1"}]
)
def test_times_of_another_device_processor_or_release_stay_and_are_not_taken(
    tmp_path, monkeypatch, other
):
    path, here = tmp_path / "times.json", Device.here()
    Made(path=path).measure(LAYER, None)
    before = json.loads(path.read_text())["times"]
    there = Device(**{**vars(here), **other})
    monkeypatch.setattr(Device, "here", classmethod(lambda cls: there))
    Made(path=path).measure(LAYER, None)
    after = json.loads(path.read_text())["times"]
    assert len(after) == 2 * len(before) and set(before) < set(after)


def test_times_under_other_compiler_options_are_measured_apart(tmp_path):
    for options in ({}, {"xla_cpu_experimental_ynn_fusion_type": ""}):
        timer = Made(options, path=tmp_path / "times.json")
        timer.measure(LAYER, None)
    assert len(timer.times) == 2


def test_times_of_training_are_of_gradients_too_and_measured_apart(tmp_path):
    plain, training = (
        Timer(rounds=2, path=tmp_path / "times.json", training=own) for own in (False, True)
    )
    for timer in (plain, training):
        timer.measure(LAYER, lr.Separable(3))
    assert not training.failed
    assert len(Timer(path=tmp_path / "times.json").times) == 2 * len(plain.times)


def test_two_timers_with_one_file_keep_the_entries_of_both(tmp_path):
    one, two = (Made(path=tmp_path / "times.json") for _ in range(2))
    one.measure(LAYER, None)
    two.fastest_pool(POOL)
    assert len(two.times) == 2
    assert Known(path=tmp_path / "times.json").times == two.times


def test_measuring_works_while_a_program_is_traced():
    model, x = nn.Conv(8, (3, 3)), jax.random.normal(jax.random.key(1), (2, 8, 8, 4))
    variables = model.init(jax.random.key(0), x)
    timer = Timer(rounds=2)
    found = jax.jit(with_algorithms(model.apply, timer.fastest))(variables, x)
    np.testing.assert_allclose(found, model.apply(variables, x), atol=1e-5)
    assert len(timer.times) == 1


def broken(*args, **kwargs):
    raise NotImplementedError("no such kernel here")


def test_an_algorithm_that_fails_is_noted_and_left_out(monkeypatch):
    monkeypatch.setitem(STEPS, "im2col", broken)
    timer = Timer(rounds=2)
    assert set(timer.measure(LAYER, None)) == {"convolve", "winograd", DENSE}
    times = timer.measure(LAYER, lr.Separable(2))
    assert PLAIN in times and not any("im2col" in name for name in times)
    assert any("im2col of arrays [(1, 8, 8, 4), (3, 3, 4, 16)]" in name for name in timer.failed)
    assert set(timer.failed.values()) == {"NotImplementedError: no such kernel here"}


def test_if_the_plain_algorithm_fails_its_error_is_raised(monkeypatch):
    monkeypatch.setitem(STEPS, "convolve", broken)
    with pytest.raises(NotImplementedError, match="no such kernel here"):
        Timer(rounds=2).measure(LAYER, None)


@pytest.mark.parametrize(("seconds", "name"), [(0.95, "kn2row+im2col"), (0.5, "kn2row+winograd")])
def test_many_small_operations_have_to_win_by_a_margin(monkeypatch, seconds, name):
    timer = Timer()
    times = {PLAIN: 2.0, "kn2row+im2col": 1.0, "kn2row+winograd": seconds, DENSE: 0.1}
    monkeypatch.setattr(timer, "measure", lambda *_: times)
    assert MARGIN * 0.95 > 1 > MARGIN * 0.5 and timer.fastest(LAYER, lr.Separable(2)) == name
