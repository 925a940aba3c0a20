"""What `fast` found is saved, and restored in a new process without a search."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
from flax import linen as nn

import lowrank_jax as lr
from lowrank_jax.program.compiler import default_options
from lowrank_jax.tuning.algorithms import Layer
from lowrank_jax.tuning.candidate import Candidate, Choices, Configuration
from lowrank_jax.tuning.device import Device
from lowrank_jax.tuning.experimental.pools import Pool
from lowrank_jax.tuning.result import Fast, network_of

LAYERS = {
    (Layer((2, 8, 8, 4), 8, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1)), None): "im2col",
    (
        Layer((2, 4, 4, 8), 8, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1)),
        lr.Separable(3, first="horizontal"),
    ): "kn2row+im2col",
}
POOLS = {Pool((2, 8, 8, 8), (1, 2, 2, 1), (1, 2, 2, 1), ((0, 0),) * 4, "max"): "slices"}
OTHER_PROCESS = """
import sys
import jax, numpy as np
from flax import linen as nn
from lowrank_jax.io.weights import load_weights
from lowrank_jax.tuning.result import Fast
from lowrank_jax.tuning.timer import Timer

Timer.__init__ = None  # no search
layers = [nn.Conv(8, (3, 3)), lambda x: nn.max_pool(x, (2, 2), (2, 2)), nn.Conv(8, (3, 3))]
model, folder = nn.Sequential(layers), sys.argv[1]
run = Fast.load(f"{folder}/net.json", model.apply)
files = load_weights(f"{folder}/net.npz")
np.save(f"{folder}/found.npy", run(files["variables"], files["images"]))
text = str(jax.make_jaxpr(run.run.__wrapped__)(files["variables"], files["images"]))
print(text.count("reduce_window"), dict(run.options), run.size, *run.algorithms.values())
"""


@pytest.fixture(scope="module")
def net():
    layers = [nn.Conv(8, (3, 3)), lambda x: nn.max_pool(x, (2, 2), (2, 2)), nn.Conv(8, (3, 3))]
    model, images = nn.Sequential(layers), jax.random.normal(jax.random.key(1), (5, 8, 8, 4))
    variables = model.init(jax.random.key(0), images)
    scheme = lr.Separable(3, first="horizontal")
    return model, {"params": lr.decompose(variables["params"], {"layers_2": scheme})}, images


@pytest.fixture
def found(net):
    """As if a search had found it."""
    candidate = Candidate(Configuration(default_options(), 2), Choices(LAYERS, POOLS))
    return Fast(
        run=candidate.compiled(network_of(net[0].apply, (), {})),
        candidate=candidate,
        device=Device.here(),
        seconds={str(candidate): 0.25, "default options, all at once": 1 / 3},
        left_out={"slow": "the limit of 3 seconds was reached"},
    )


def facts(run):
    return {name: value for name, value in vars(run).items() if name != "run"}


@pytest.mark.slow
def test_a_new_process_runs_what_was_found_without_a_search(net, found, tmp_path):
    _, small, images = net
    found.save(tmp_path / "net.json")
    lr.save_weights(tmp_path / "net.npz", {"variables": small, "images": images})
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    options = dict(default_options())
    assert done.stdout.strip() == f"0 {options} 2 im2col kn2row+im2col" and not done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), found(small, images))


def test_what_is_loaded_is_what_was_saved(net, found, tmp_path):
    model, small, images = net
    found.save(tmp_path / "net.json")
    again = Fast.load(tmp_path / "net.json", model.apply)
    assert facts(again) == facts(found)
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "net.json").read_bytes()
    np.testing.assert_array_equal(again(small, images), found(small, images))


def test_arguments_of_the_model_are_given_again(net, found, tmp_path):
    model, small, images = net
    found.save(tmp_path / "net.json")

    def apply(variables, images, by, *, plus):
        return by * model.apply(variables, images) + plus

    again = Fast.load(tmp_path / "net.json", apply, 2.0, plus=1.0)
    np.testing.assert_allclose(again(small, images), 2 * found(small, images) + 1, rtol=1e-5)


def test_a_frozen_network_needs_its_variables(net, found, tmp_path):
    model, small, images = net
    dataclasses.replace(found, frozen=True).save(tmp_path / "net.json")
    with pytest.raises(ValueError, match=r"searched for with freeze; give the variables"):
        Fast.load(tmp_path / "net.json", model.apply)
    again = Fast.load(tmp_path / "net.json", model.apply, variables=small)
    np.testing.assert_allclose(again(None, images), found(small, images), atol=1e-5)
    with pytest.raises(ValueError, match="variables are part of this program"):
        again(small, images)


@pytest.mark.parametrize("use", [pickle.dumps, copy.deepcopy])
def test_it_is_no_pickle_and_says_how_it_is_kept(found, use):
    with pytest.raises(TypeError, match=r"by run.save\(path\), and restore it by Fast.load"):
        use(found)


def test_it_runs_within_other_programs_with_their_options(net, found):
    _, small, images = net
    wanted = found(small, images)
    options = {**found.options, "xla_embed_ir_in_executable": True}
    program = jax.jit(found, compiler_options=options)
    np.testing.assert_allclose(program(small, images), wanted, atol=1e-5)
    assert jax.export.export(jax.jit(found))(small, images).out_avals[0].shape == wanted.shape
    slope = jax.eval_shape(jax.grad(lambda x: found(small, x).sum()), images)
    assert slope.shape == images.shape
    assert "reduce_window" not in str(jax.make_jaxpr(found)(small, images))  # the algorithms stay


@pytest.fixture(params=["kind", "jaxlib"])
def elsewhere(request, found, tmp_path):
    """A file of another device, and in which respect it is another one."""
    device = dataclasses.replace(found.device, **{request.param: "other"})
    dataclasses.replace(found, device=device).save(tmp_path / "net.json")
    return tmp_path / "net.json", f"measured elsewhere: {request.param} other, not "


def test_on_another_device_the_plain_network_runs_after_a_warning(net, found, elsewhere):
    (path, text), (model, small, images) = elsewhere, net
    with pytest.warns(UserWarning, match=rf"{text}.* The plain network runs\. Search anew"):
        run = Fast.load(path, model.apply)
    assert run.algorithms == run.pools == run.seconds == {} and run.size is None
    assert run.options == default_options()
    np.testing.assert_allclose(run(small, images), found(small, images), atol=1e-5)


def test_on_another_device_what_was_found_runs_if_told(net, found, elsewhere):
    (path, text), (model, small, images) = elsewhere, net
    with pytest.warns(UserWarning, match=rf"{text}.* What was found there runs\. Search anew"):
        run = Fast.load(path, model.apply, elsewhere="keep")
    assert run.candidate == found.candidate and run.seconds == found.seconds
    np.testing.assert_array_equal(run(small, images), found(small, images))


def test_on_another_device_loading_is_an_error_if_told(net, elsewhere):
    path, text = elsewhere
    with pytest.raises(ValueError, match=rf"{text}.*elsewhere='plain' or 'keep'"):
        Fast.load(path, net[0].apply, elsewhere="error")


def test_here_there_is_no_warning_and_another_word_is_refused(net, found, tmp_path):
    found.save(tmp_path / "net.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Fast.load(tmp_path / "net.json", net[0].apply, elsewhere="error")
    with pytest.raises(ValueError, match=r"elsewhere='guess' is not allowed; give 'plain', 'keep'"):
        Fast.load(tmp_path / "net.json", net[0].apply, elsewhere="guess")


CHANGES = {
    "another version": ({"version": 0}, "version is not 1"),
    "an unknown algorithm": ({"algorithms": "guess"}, "'guess' is not known"),
    "an unknown pooling": ({"pools": [{"pool": {}, "name": "window"}]}, "missing"),
    "a layer without numbers": ({"algorithms": [{"layer": {}, "scheme": None}]}, "missing"),
    "a wrong size": ({"size": -1}, "slices -1 is no positive int"),
    "a size in words": ({"size": "all"}, "slices 'all' is no positive int"),
    "times that are none": ({"seconds": {"a": float("nan")}}, "nan is no positive number"),
    "no device": ({"device": {"kind": "cpu"}}, "missing"),
    "options that are none": ({"options": 3}, "not iterable"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_was_changed_is_refused(net, found, tmp_path, name):
    path, (change, reason) = tmp_path / "net.json", CHANGES[name]
    found.save(path)
    record = json.loads(path.read_text())
    if change.get("algorithms") == "guess":
        change = {"algorithms": [{**record["algorithms"][0], "name": "guess"}]}
    path.write_text(json.dumps(record | change))
    with pytest.raises(ValueError, match=rf"net.json holds no result of fast: .*{reason}"):
        Fast.load(path, net[0].apply)


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000])
def test_a_file_that_holds_something_else_is_refused(net, tmp_path, text):
    (tmp_path / "net.json").write_text(text)
    with pytest.raises(ValueError, match="holds no result of fast") as caught:
        Fast.load(tmp_path / "net.json", net[0].apply)
    assert len(str(caught.value)) < 600


def test_a_missing_file_is_missing(net, tmp_path):
    with pytest.raises(FileNotFoundError):
        Fast.load(tmp_path / "net.json", net[0].apply)
