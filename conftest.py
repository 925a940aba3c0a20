"""Tests on few cores: programs run once, and the workers share the cores.

Commands that tests start inherit both.
"""

import os

import hypothesis

os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # most of the time would be the compiler's
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # threads of several workers wait for each other

# Examples are the same in every run, so that what fails elsewhere fails here.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")
