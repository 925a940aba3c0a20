"""Programs of tests run once: most of their time would be the optimisation of the compiler."""

import os

os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # commands that tests start inherit it
