"""Tests on few cores: programs run once, so that the compiler takes most of the time.

Workers and the commands that tests start inherit all that is set here.
"""

import os
import subprocess
import sys
import tempfile

import hypothesis
import pytest

# The older of XLA's code generators takes a third of the time; newer versions have lost it.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"

os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # threads of several workers wait for each other

# Examples are the same in every run, so that what fails elsewhere fails here.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")


def pytest_configure(config):
    if hasattr(config, "workerinput"):
        return
    os.environ["XLA_FLAGS"] = quick_flags()
    cache = tempfile.TemporaryDirectory(prefix="compiled", ignore_cleanup_errors=True)
    config.add_cleanup(cache.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def quick_flags():
    """The flags of XLA with those that compile fast; XLA ends a process whose flags it lacks."""
    given = os.environ.get("XLA_FLAGS", "")
    flags = f"{given} {QUICK}".strip()
    probe = [sys.executable, "-c", "import jax; jax.devices()"]
    tried = subprocess.run(probe, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True)
    return given if tried.returncode else flags


@pytest.fixture(scope="session")
def devices():
    """A function of a number to the environment of a process with so many simulated devices."""

    def environment(count):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
        return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}

    return environment
