"""Files appear whole or not at all, whoever writes at the same time."""

import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lowrank_jax.io import atomic
from lowrank_jax.io.atomic import locked, whole_file

WRITES, SIZE = 84, 20_000  # twelve writers, 1,008 writes
WRITER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("atomic", sys.argv[1])
atomic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic)
for index in range(int(sys.argv[3])):
    with atomic.whole_file(sys.argv[2]) as scratch:
        scratch.write_text(chr(97 + index % 26) * int(sys.argv[4]))
"""
COUNTER = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("atomic", sys.argv[1])
atomic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic)
for _ in range(int(sys.argv[3])):
    with atomic.locked(sys.argv[2]), atomic.whole_file(sys.argv[2]) as scratch:
        scratch.write_text(str(int(Path(sys.argv[2]).read_text()) + 1))
"""
posix = pytest.mark.skipif(os.name != "posix", reason="modes and locks of POSIX")


def processes(script: str, path: Path, count: int, *args) -> list[subprocess.Popen]:
    command = [sys.executable, "-c", script, atomic.__file__, str(path), *map(str, args)]
    return [subprocess.Popen(command) for _ in range(count)]


def write(path: Path, index: int) -> None:
    with whole_file(path) as scratch:
        scratch.write_text(chr(65 + index % 26) * SIZE)


def test_threads_and_processes_on_one_path_never_fail_and_no_reader_meets_a_part(tmp_path):
    path, stop = tmp_path / "file.txt", threading.Event()
    write(path, 0)
    texts: list[str] = []

    def read():
        while not stop.is_set():
            texts.append(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    others = processes(WRITER, path, 4, WRITES, SIZE)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: write(path, index), range(8 * WRITES)))
    assert [other.wait(120) for other in others] == [0] * 4
    stop.set()
    reader.join()
    assert texts and all(len(text) == SIZE and len(set(text)) == 1 for text in texts)
    assert os.listdir(tmp_path) == ["file.txt"]


@posix
def test_what_is_read_and_written_under_the_lock_is_one_step(tmp_path):
    path = tmp_path / "count.txt"
    path.write_text("0")
    others = processes(COUNTER, path, 4, 50)

    def count(_):
        with locked(path), whole_file(path) as scratch:
            scratch.write_text(str(int(path.read_text()) + 1))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(50)))
    assert [other.wait(120) for other in others] == [0] * 4
    assert path.read_text() == "250"


def _write_half(path: Path, error: type[BaseException]) -> None:
    with whole_file(path) as scratch:
        scratch.write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [True, False])
def test_a_failure_leaves_the_old_file_and_no_scratch(tmp_path, error, exists):
    path = tmp_path / "file.txt"
    if exists:
        path.write_text("old")
    with pytest.raises(error):
        _write_half(path, error)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"] * exists


def test_a_body_that_writes_nothing_is_an_error_and_the_old_file_stays(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), whole_file(path):
        pass
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_the_content_is_on_the_disk_before_it_gets_the_name(tmp_path, monkeypatch):
    steps: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: steps.append("to disk"))
    monkeypatch.setattr(os, "replace", lambda scratch, path: steps.append("name"))
    write(tmp_path / "file.txt", 0)
    assert steps == ["to disk", "name"]


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
def test_a_file_that_exists_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "file.txt"
    path.write_text("old")
    path.chmod(mode)
    write(path, 0)
    assert stat.S_IMODE(path.stat().st_mode) == mode and path.read_text() == "A" * SIZE


@posix
def test_a_new_file_has_the_mode_of_any_new_file(tmp_path):
    write(tmp_path / "ours.txt", 0)
    (tmp_path / "plain.txt").write_text("")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


@posix
@pytest.mark.parametrize("exists", [True, False])
def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path, exists):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    if exists:
        (folder / "target.txt").write_text("old")
    link = tmp_path / "link.txt"
    link.symlink_to(folder / "target.txt")
    write(link, 0)
    assert link.is_symlink() and (folder / "target.txt").read_text() == "A" * SIZE
    assert os.listdir(folder) == ["target.txt"]


def test_a_long_name_has_a_scratch_file_too(tmp_path):
    path = tmp_path / ("n" * 251 + ".txt")
    write(path, 0)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*missing. Make it first"):
        write(tmp_path / "missing" / "file.txt", 0)


def test_without_locks_of_the_system_nothing_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "fcntl", None)
    with locked(tmp_path / "file.txt"):
        assert not list(tmp_path.iterdir())
