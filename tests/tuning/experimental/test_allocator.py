"""Memory that the process keeps."""

import ctypes
import platform
import subprocess
import sys

import pytest

from lowrank_jax.tuning.experimental.allocator import keep_memory

FAULTS = """
import ctypes, resource, sys, threading
from lowrank_jax.tuning.experimental.allocator import keep_memory

if sys.argv[1] == "keep":
    assert keep_memory() is True
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
library.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def use():
    at = library.malloc(96 << 20)
    library.memset(at, 1, 96 << 20)
    library.free(at)

def run():
    use()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        use()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 5)

run()
thread = threading.Thread(target=run)  # JAX allocates in threads, too
thread.start()
thread.join()
"""
gnu = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only the GNU C library has these settings"
)


def _faults(how: str) -> list[int]:
    run = subprocess.run(
        [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True
    )
    return [int(line) for line in run.stdout.split()]


@pytest.mark.slow
@gnu
def test_arrays_that_are_used_again_need_no_new_pages():
    assert max(_faults("keep")) < 100


@pytest.mark.slow
@gnu
def test_without_it_large_arrays_need_new_pages_each_time():
    assert min(_faults("leave")) > 100


@pytest.mark.parametrize("error", [OSError("no such library"), TypeError("no name")])
def test_without_a_library_of_the_process_nothing_changes(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(ctypes, "CDLL", fail)
    assert keep_memory() is False


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_memory() is False


@pytest.mark.parametrize("taken", [0, 1])
def test_it_says_whether_all_settings_were_taken(monkeypatch, taken):
    class Library:
        gnu_get_libc_version = None

        @staticmethod
        def mallopt(setting, value):
            return 1 if setting != -8 else taken

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    assert keep_memory() is bool(taken)
