"""Trains on all simulated devices, or in one of two processes; prints what came out as JSON.

Usage: python on_devices.py mesh | python on_devices.py PROCESS PORT
"""

import json
import sys
import tempfile

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_jax as lr
from lowrank_jax.training import crops_and_flips, evaluate


class Net(nn.Module):
    """A convolution with batch normalisation, whose statistics are of the whole batch."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(16, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.5)(x))
        return nn.Dense(4)(x.mean((1, 2)))


RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(48, 8, 8, 3)).astype(np.float32)
LABELS = RNG.integers(0, 4, 48)
MODEL = Net()


def start():
    """The decomposed network at its start, and the dense one."""
    dense = MODEL.init(jax.random.key(0), IMAGES[:1])
    return lr.decompose(dense, {"Conv_0": 4}), dense


def tuned(variables, teacher, sharding=None, **options):
    return lr.finetune(
        MODEL.apply,
        variables,
        (IMAGES, LABELS),
        teacher=teacher,
        augment=crops_and_flips(8, 1),
        average=0.9,
        batch_size=16,
        sharding=sharding,
        **{"steps": 6, "tx": optax.adam(0.01)} | options,
    )


def fitted(dense, sharding):
    """The dense network compressed, with variables and a batch on a mesh."""
    whole = jax.device_put(dense, NamedSharding(sharding.mesh, P()))
    return lr.compress(MODEL.apply, whole, [jax.device_put(IMAGES, sharding)], {"Conv_0": 4})


def flat(tree):
    """All numbers of a tree, in order."""
    leaves = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves).tolist()


def on_a_mesh():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    split = NamedSharding(mesh, P("data"))
    small, dense = start()
    found = tuned(small, dense, split)
    spread = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P())), small)
    columns = NamedSharding(mesh, P(None, "model"))
    spread["params"]["Dense_0"]["kernel"] = jax.device_put(
        small["params"]["Dense_0"]["kernel"], columns
    )
    other = tuned(spread, dense, split)
    with tempfile.TemporaryDirectory() as folder:
        tuned(spread, dense, split, steps=4, folder=folder)
        again = tuned(spread, dense, split, folder=folder)
    explicit = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
    places = None, split, explicit
    parts = optax.multi_transform(
        {"matrices": optax.adam(0.01), "others": optax.sgd(0.01)},
        lambda tree: jax.tree.map(lambda x: "matrices" if x.ndim > 1 else "others", tree),
    )
    here = jax.device_put(small, jax.devices()[0])
    score = dict(images=IMAGES[:47], labels=LABELS[:47])
    return {
        "one": flat(tuned(small, dense)),
        "mesh": flat(found),
        "explicit": flat(tuned(small, dense, explicit)),
        "parts": [flat(tuned(small, dense, place, tx=parts)) for place in places],
        "sharded": flat(other),
        "resumed": flat(again),
        "fitted": [flat(fitted(dense, place)) for place in (split, explicit)],
        "kept": [
            tree["params"]["Dense_0"]["kernel"].sharding == columns for tree in (other, again)
        ],
        "scores": [
            [evaluate(MODEL.apply, tree, sharding=place, **score) for place in places]
            for tree in (found, here)
        ],
    }


def in_a_process(number, port):
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=number)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    small, dense = start()
    found = tuned(small, dense, NamedSharding(mesh, P("data")))
    return {"process": flat(found), "count": jax.process_count()}


if __name__ == "__main__":
    known = on_a_mesh() if sys.argv[1:] == ["mesh"] else in_a_process(*map(int, sys.argv[1:]))
    print(json.dumps(known))
