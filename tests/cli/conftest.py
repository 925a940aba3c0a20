"""Models, checkpoints and images of a user, in the current folder."""

import importlib
import itertools
import sys

import jax
import numpy as np
import pytest

from lowrank_jax import save_weights

MODELS = '''
import jax
import numpy as np
from flax import linen as nn
from flax import nnx

class Net(nn.Module):
    width: int = 8

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(self.width, (3, 3))(x))
        x = nn.BatchNorm(not train)(nn.Conv(self.width, (3, 3))(x))
        return nn.Dense(4)(x.mean((1, 2)))

class Module(nnx.Module):
    def __init__(self, width=8, *, rngs):
        self.layers = nnx.List([nnx.Conv(3, width, (3, 3), rngs=rngs),
                                nnx.Conv(width, width, (3, 3), rngs=rngs)])
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(width, 4, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(self.drop(self.norm(x)).mean((1, 2)))

def make(width=8):
    return Net(width)

def make_module(width=8):
    return Module(width, rngs=nnx.Rngs(3))

made = Net()

def function(variables, images, scale=1.0):
    x = jax.lax.conv_general_dilated(images, variables["conv"], (1, 1), "SAME",
                                     dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return scale * jax.nn.relu(x).mean((1, 2)) @ variables["dense"]

rng = np.random.default_rng(0)
X = rng.random((6, 8, 8, 3), np.float32)
Y = np.arange(6) % 4

class Loader:
    """Iterates as loaders of Grain do."""

    def __iter__(self):
        for start in (0, 2, 4):
            yield {"image": X[start : start + 2], "label": Y[start : start + 2]}

loader = Loader()
def pairs(): return ((X[i : i + 2], Y[i : i + 2]) for i in (0, 2, 4))
def alone(): return iter([X[:4], X[4:]])
def nothing(): return iter([])
def number(): return 3
def three(): return iter([(X, Y, Y)])
def flat(): return iter([X[:, 0, 0]])
def raises(): raise RuntimeError("boom\\nand more")
def unnamed(): return iter([{"pixels": X}])
'''
names = itertools.count()


@pytest.fixture
def user(tmp_path, monkeypatch):
    """The module of the user, in the current folder with ``x.npy`` and checkpoints of all models.

    A name of its own for each test: Python keeps the modules that it has imported.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    name = f"user{next(names)}"
    (tmp_path / f"{name}.py").write_text(MODELS)
    module = importlib.import_module(name)
    np.save("x.npy", module.X)
    np.save("y.npy", module.Y)
    rng = np.random.default_rng(0)
    init = jax.eval_shape(module.Net().init, jax.random.key(0), module.X)
    save_weights("net.npz", filled(rng, init))
    tree = {"conv": rng.normal(size=(3, 3, 3, 16)), "dense": rng.normal(size=(16, 4))}
    save_weights("function.npz", jax.tree.map(np.float32, tree))
    return module


def filled(rng, shapes):
    """A tree of random weights, none of them zero, so that variances are positive."""
    return jax.tree.map(lambda x: rng.uniform(0.1, 0.3, x.shape).astype(np.float32), shapes)
