"""Sums of products on the device."""

import jax
import numpy as np
import pytest

from lowrank_jax.calibration.sums import WIDE, summed_squares


@pytest.mark.parametrize("shape", [(5, 1, 1, 7), (3, 1, 1, WIDE + 3), (3, 2, 2, WIDE + 1)])
def test_squares_are_all_products_of_the_rows_with_themselves(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = np.einsum("rsgp,rsgq->sgpq", x, x)
    np.testing.assert_allclose(jax.jit(summed_squares)(x), expected, atol=1e-5)
