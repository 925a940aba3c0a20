"""The file of measured times: whole, shared by processes, and checked."""

import json
import subprocess
import sys

import pytest

from lowrank_jax.tuning.device import Device
from lowrank_jax.tuning.timer_file import VERSION, add_times, key_of, read_times

PROCESSES, WRITES = 4, 25
KEY = key_of(Device.here(), {"option": True}, [1, 2], None)
WRITER = """
import sys
from pathlib import Path
from lowrank_jax.tuning.device import Device
from lowrank_jax.tuning.timer_file import add_times, key_of
here = Device("cpu", "a processor", 2, "0.10", "0.10")
print("ready", flush=True)
sys.stdin.readline()
for index in range(int(sys.argv[3])):
    key = key_of(here, {}, sys.argv[2], index)
    assert key in add_times(Path(sys.argv[1]), {key: {"dense": 1.0 + index}})
"""


def written(path, text):
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


@pytest.mark.slow
def test_processes_that_write_at_once_lose_nothing_and_the_file_is_always_whole(tmp_path):
    path = tmp_path / "times.json"
    command = [sys.executable, "-c", WRITER, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [
        subprocess.Popen([*command, str(number), str(WRITES)], **pipes)
        for number in range(PROCESSES)
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    counts = [0]
    while any(writer.poll() is None for writer in writers):
        counts.append(len(read_times(path)))
    assert [writer.wait() for writer in writers] == [0] * PROCESSES
    for writer in writers:
        writer.stdin.close()
        writer.stdout.close()
    times = read_times(path)
    assert len(times) == PROCESSES * WRITES and counts == sorted(counts)
    assert {json.loads(key)[-2] for key in times} == {"0", "1", "2", "3"}


def test_what_is_written_is_read(tmp_path):
    path, times = tmp_path / "times.json", {KEY: {"dense": 0.5, "im2col": 1, "slices": 1e-9}}
    assert read_times(path) == {} and add_times(path, times) == times == read_times(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("[1]", 'no object of a "version" and "times"'),
        ({"version": VERSION}, 'no object of a "version" and "times"'),
        ({"version": VERSION, "times": {}, "more": 1}, 'no object of a "version" and "times"'),
        ({"version": 1, "times": {}}, f"its version is 1, and this release reads {VERSION}"),
        ({"version": VERSION, "times": [KEY]}, "no object"),
        ({"version": VERSION, "times": {KEY: 3.0}}, "no object of seconds by algorithm"),
        ({"version": VERSION, "times": {KEY: {}}}, "no object of seconds by algorithm"),
        ({"version": VERSION, "times": {KEY: {"guess": 1.0}}}, "algorithm 'guess' .* not known"),
        ({"version": VERSION, "times": {"a": {"dense": 1.0}}}, "'a' does not name a device"),
        ({"version": VERSION, "times": {"[1]": {"dense": 1.0}}}, "does not name a device"),
        ({"version": VERSION, "times": {"[": {"dense": 1.0}}}, "Expecting value"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path, text, reason):
    path = written(tmp_path / "times.json", text)
    with pytest.raises(ValueError, match=rf"times.json holds no measured times: .*{reason}"):
        read_times(path)


@pytest.mark.parametrize("seconds", [-1.0, 0.0, float("nan"), float("inf"), "1.0", None, True, [1]])
def test_what_is_no_positive_number_of_seconds_is_refused(tmp_path, seconds):
    path = written(tmp_path / "t.json", {"version": VERSION, "times": {KEY: {"dense": seconds}}})
    with pytest.raises(ValueError, match=r"no positive number of seconds.*\. Remove the file"):
        read_times(path)


def test_a_file_of_bytes_and_a_deep_one_are_refused_in_one_line(tmp_path):
    (tmp_path / "bytes.json").write_bytes(bytes(range(256)) * 1000)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match="holds no measured times") as caught:
            read_times(path)
        assert len(str(caught.value)) < 500


def test_nothing_is_added_to_a_file_that_holds_something_else(tmp_path):
    path = written(tmp_path / "thesis.txt", "chapter one")
    with pytest.raises(ValueError, match="holds no measured times"):
        add_times(path, {KEY: {"dense": 1.0}})
    assert path.read_text() == "chapter one"
