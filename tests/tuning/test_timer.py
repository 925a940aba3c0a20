"""Layers are measured once for each device; the file of two processes keeps what both found."""

import json
import subprocess
import sys

import pytest

from lowrank_jax import Separable
from lowrank_jax.tuning.algorithms import PLAIN, Layer, algorithms_of
from lowrank_jax.tuning.timer import DENSE, Timer

LAYER = Layer((1, 6, 6, 4), 8, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))


def test_a_layer_is_measured_once_and_its_algorithms_are_those_it_has(monkeypatch):
    timer = Timer(rounds=2)
    times = timer.measure(LAYER, Separable(3))
    assert {PLAIN, DENSE} <= set(times) <= {*algorithms_of(LAYER, 3), DENSE}
    monkeypatch.setattr(timer, "_time", lambda *_: pytest.fail("measured again"))
    assert timer.measure(LAYER, Separable(3)) == times
    assert timer.fastest(LAYER, Separable(3)) in times


def test_times_are_kept_in_a_file(tmp_path, monkeypatch):
    first = Timer(rounds=2, path=tmp_path / "times.json")
    times = first.measure(LAYER, None)
    second = Timer(rounds=2, path=tmp_path / "times.json")
    monkeypatch.setattr(second, "_time", lambda *_: pytest.fail("measured again"))
    assert second.measure(LAYER, None) == times


WRITER = """
import sys
from pathlib import Path
from lowrank_jax.tuning.device import Device
from lowrank_jax.tuning.timer_file import add_times, key_of
for number in range(25):
    add_times(Path(sys.argv[1]), {key_of(Device.here(), {}, sys.argv[2], number): {"dense": 1.0}})
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    path = tmp_path / "times.json"
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, str(i)], stderr=subprocess.PIPE) for i in range(3)]
    for writer in writers:
        _, problem = writer.communicate()
        assert writer.returncode == 0, problem[-1000:]
    assert len(Timer(path=path).times) == 75


@pytest.mark.parametrize("value", [-1.0, float("nan"), "fast", None])
def test_entries_that_are_no_times_are_refused(tmp_path, value):
    path = tmp_path / "times.json"
    timer = Timer(rounds=2, path=path)
    timer.measure(LAYER, None)
    found = json.loads(path.read_text())
    text = json.dumps(found).replace(
        str(next(iter(timer.times.values()))[DENSE]), json.dumps(value)
    )
    path.write_text(text)
    with pytest.raises(ValueError, match=r"times\.json"):
        Timer(path=path)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}'])
def test_a_file_that_holds_something_else_is_refused(tmp_path, text):
    (tmp_path / "times.json").write_text(text)
    with pytest.raises(ValueError, match=r"times\.json"):
        Timer(path=tmp_path / "times.json")
