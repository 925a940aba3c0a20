"""What `fast` found is frozen: it serves any batch, measures nothing, and is restored from a
file."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax import decompose, fast, lowrank
from lowrank_jax.tuning.result import Fast
from lowrank_jax.tuning.timer import Timer


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=None):
        assert train is False, "the model's own argument reaches it"
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Conv(8, (3, 3))(x).mean((1, 2))


class Chosen(Timer):
    """Finds these algorithms the fastest without measuring, and counts how often it is asked."""

    asked = 0

    def fastest(self, layer, scheme):
        Chosen.asked += 1
        return "im2col" if scheme is None else "convolve+im2col"

    def fastest_pool(self, pool):
        return "slices"


@pytest.fixture(scope="module")
def net():
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 4))
    variables = Net().init(jax.random.key(0), images, train=False)
    return decompose(variables, {"Conv_1": 3}), images


@pytest.fixture(scope="module")
def run(net):
    return fast(Net().apply, *net, train=False, timers=Chosen, rounds=2)


def plain(variables, images):
    return lowrank(Net().apply)(variables, images, train=False)


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=1e-5)  # sums of some dozens of products


def test_any_batch_and_image_size_runs_and_nothing_is_measured(net, run):
    before = Chosen.asked
    for shape in ((4, 8, 8, 4), (3, 8, 8, 4), (5, 12, 10, 4)):
        images = jax.random.normal(jax.random.key(2), shape)
        assert_close(run(net[0], images), plain(net[0], images))
    assert Chosen.asked == before


def test_it_says_what_it_tried(run):
    assert run.seconds and all(seconds > 0 for seconds in run.seconds.values())
    assert not run.frozen and run.size in (None, 8, 16, 32, 64)


OTHER = """
import sys, jax
sys.path.insert(0, sys.argv[2])
from test_search import Net, decompose, plain
from lowrank_jax.tuning.result import Fast
images = jax.random.normal(jax.random.key(1), (4, 8, 8, 4))
variables = decompose(Net().init(jax.random.key(0), images, train=False), {"Conv_1": 3})
run = Fast.load(sys.argv[1], Net().apply, train=False)
print(abs(run(variables, images) - plain(variables, images)).max() < 1e-5)
"""


def test_another_process_restores_it_without_a_search(net, run, tmp_path):
    run.save(tmp_path / "net.json")
    folder = str(__import__("pathlib").Path(__file__).parent)
    command = [sys.executable, "-c", OTHER, str(tmp_path / "net.json"), folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr[-2000:]


def test_what_was_saved_is_what_is_loaded(run, tmp_path):
    run.save(tmp_path / "net.json")
    again = Fast.load(tmp_path / "net.json", Net().apply, train=False)
    assert again.candidate == run.candidate and again.seconds == run.seconds
    (tmp_path / "net.json").write_text("{}")
    with pytest.raises(ValueError, match=r"net\.json"):
        Fast.load(tmp_path / "net.json", Net().apply, train=False)


def test_an_algorithm_that_fails_is_left_out(net):
    def broken(variables, images):
        if images.shape[0] == 2:
            raise RuntimeError("no slices of two")
        return plain(variables, images)

    found = fast(broken, *net, slices=(2,), timers=Chosen, rounds=2)
    assert any("no slices of two" in reason for reason in found.left_out.values())
    assert_close(found(*net), plain(*net))


def test_if_nothing_runs_the_error_is_that_of_the_plain_program(net):
    def broken(variables, images):
        raise RuntimeError("it never runs")

    with pytest.raises(RuntimeError, match="it never runs"):
        fast(broken, *net, timers=Chosen, rounds=2)


def test_frozen_variables_are_constants(net):
    found = fast(Net().apply, *net, train=False, timers=Chosen, rounds=2, freeze=True)
    assert_close(found(None, net[1]), plain(*net))
    with pytest.raises(ValueError, match="part of this program"):
        found(*net)


def test_a_limit_of_time_gives_the_best_so_far(net):
    found = fast(Net().apply, *net, train=False, timers=Chosen, rounds=2, limit=0.01)
    assert_close(found(*net), plain(*net))


def test_dense_networks_are_served_too(net):
    variables = Net().init(jax.random.key(0), net[1], train=False)
    found = fast(Net().apply, variables, net[1], train=False, timers=Chosen, rounds=2)
    assert_close(found(variables, net[1]), Net().apply(variables, net[1], train=False))
    assert jnp.isfinite(found(variables, net[1])).all()
