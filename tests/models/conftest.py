"""Variables of networks, for which nothing is compiled."""

import jax
import numpy as np
import pytest


@pytest.fixture
def random():
    """A function of a skeleton and a gain: numbers as initialisers give them, and variances of 1.

    With a gain of 2 the activations keep their size through ReLUs.
    """

    def numbers(skeleton, gain=1):
        rng = np.random.default_rng(0)

        def leaf(path, like):
            if path[-1].key == "var":
                return np.ones(like.shape, np.float32)
            values = rng.standard_normal(like.shape, np.float32)
            return values * np.sqrt(gain / np.prod(like.shape[:-1]), dtype=np.float32)

        return jax.tree_util.tree_map_with_path(leaf, skeleton)

    return numbers
