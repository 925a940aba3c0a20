"""A small network and generated data, which the tests of training share."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax import decompose


class Small(nn.Module):
    """A convolution, batch normalisation, dropout, and a dense layer after an average."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(not train, momentum=0.5)(nn.Conv(8, (3, 3))(x))
        x = nn.Dropout(self.rate, deterministic=not train)(nn.relu(x).mean((1, 2)))
        return nn.Dense(4)(x)


@pytest.fixture(scope="session")
def model():
    return Small()


@pytest.fixture(scope="session")
def noisy():
    """The same network, half of whose features drop out."""
    return Small(rate=0.5)


@pytest.fixture(scope="session")
def batch():
    """64 images of four classes, which their means tell apart, and the classes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 64).astype(np.int32)
    images = rng.normal(size=(64, 8, 8, 3)) + labels[:, None, None, None]
    return images.astype(np.float32), labels


@pytest.fixture(scope="session")
def dense(model, batch):
    """The variables of the dense network."""
    return jax.jit(model.init)(jax.random.key(0), batch[0][:1])


@pytest.fixture(scope="session")
def small(dense):
    """The variables with factors in the place of the convolution's kernel."""
    return decompose(dense, {"Conv_0": 2})


def plain_network(tree, x):
    """Two layers of products after an average: a function of a tree that compiles soon."""
    return nn.relu(x.mean((1, 2)) @ tree["hidden"]) @ tree["head"] + tree["bias"]


@pytest.fixture(scope="session")
def plain():
    """`plain_network` and its tree, in which one kernel is factors."""
    rng = np.random.default_rng(1)
    shapes = {"hidden": (3, 16), "head": (16, 4), "bias": (4,)}
    tree = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return plain_network, decompose(tree, {"hidden": 2})
