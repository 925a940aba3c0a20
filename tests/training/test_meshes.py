"""Training over meshes, in processes of their own: the parameters are those of one device."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lowrank_jax.training.placing import placed

SCRIPT = Path(__file__).with_name("on_devices.py")
ROUNDING = 1e-5  # of six steps of Adam, whose sums run in another order; weights are of order 1


def started(*args, env=None):
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, **pipes, text=True, env=env)


def found(process):
    out, error = process.communicate(timeout=400)
    assert process.returncode == 0, error
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def mesh(devices):
    return found(started("mesh", env=devices(8)))


@pytest.mark.parametrize("how", ["mesh", "explicit", "sharded", "resumed"])
def test_eight_devices_train_to_the_parameters_of_one(mesh, how):
    np.testing.assert_allclose(mesh[how], mesh["one"], atol=ROUNDING)


@pytest.mark.parametrize("place", [1, 2], ids=["automatic", "explicit"])
def test_an_optimiser_of_some_parameters_trains_on_a_mesh(mesh, place):
    np.testing.assert_allclose(mesh["parts"][place], mesh["parts"][0], atol=ROUNDING)


def test_a_fit_does_not_depend_on_how_a_mesh_was_made(mesh):
    automatic, explicit = mesh["fitted"]
    np.testing.assert_allclose(explicit, automatic, atol=ROUNDING)


def test_sharded_parameters_stay_where_they_were_put(mesh):
    assert mesh["kept"] == [True, True]


@pytest.mark.parametrize("where", [0, 1], ids=["on the mesh", "on one device"])
def test_the_accuracy_does_not_depend_on_the_devices(mesh, where):
    first, *others = mesh["scores"][where]
    assert others == [first, first]


@pytest.mark.slow
def test_two_processes_train_to_the_parameters_of_one(mesh):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [started(number, port) for number in range(2)]
    for one in map(found, both):
        assert one["count"] == 2
        np.testing.assert_allclose(one["process"], mesh["one"], atol=ROUNDING)


def test_a_batch_that_the_devices_do_not_divide_is_refused():
    sharding = NamedSharding(AbstractMesh((4,), ("data",)), P("data"))
    with pytest.raises(ValueError, match=r"\(3,\) cannot be split by .*; give a batch_size that"):
        placed(np.ones(3), sharding)


@pytest.mark.parametrize("mesh", [AbstractMesh((4,), ("data",)), AbstractMesh((1,), ("data",))])
def test_a_sharding_of_more_axes_than_an_array_has_is_refused(mesh):
    with pytest.raises(ValueError, match=r"\(16,\) cannot be split by .*the first axis alone"):
        placed(np.ones(16), NamedSharding(mesh, P(None, "data")))
