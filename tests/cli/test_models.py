"""`--model` takes modules of Linen and NNX, what makes them, and functions; checkpoints of all."""

from pathlib import Path

import flax
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import lowrank_jax
from lowrank_jax import decompose, load_weights, lowrank, save_weights
from lowrank_jax.cli.jobs import load_job
from lowrank_jax.cli.main import build_parser
from lowrank_jax.nnx import functional, rebuilt


def job(user, model, checkpoint, *options):
    """The job of `compress` for a model of the user."""
    given = ["--model", f"{user.__name__}:{model}", "--checkpoint", str(checkpoint)]
    return load_job(build_parser().parse_args(["compress", *given, "--images", "x.npy", *options]))


def dense(user):
    return load_weights("net.npz")


def outputs(job):
    return np.concatenate(list(job.outputs(job.variables)))


def saved_module(user, path="module.npz", width=8):
    """A checkpoint of a model of NNX, and the model."""
    model = user.Module(width, rngs=nnx.Rngs(5))
    save_weights(path, nnx.state(model, nnx.Not(nnx.RngState)))
    return model


@pytest.mark.parametrize("model", ["Net", "make", "made"])
def test_linen_classes_functions_that_make_them_and_modules_are_alike(model, user):
    found = job(user, model, "net.npz")
    wanted = user.Net().apply(dense(user), user.X)
    np.testing.assert_allclose(outputs(found), wanted, atol=1e-5)


@pytest.mark.parametrize("model", ["Module", "make_module"])
def test_models_of_nnx_run_in_evaluation_with_the_weights_of_the_checkpoint(model, user):
    apply, variables = functional(saved_module(user))
    found = job(user, model, "module.npz")
    np.testing.assert_allclose(outputs(found), apply(variables, user.X), atol=1e-5)


def test_a_function_of_variables_and_images_is_a_model(user):
    found = job(user, "function", "function.npz", "--model-kwargs", '{"scale": 2}')
    wanted = user.function(load_weights("function.npz"), user.X, 2)
    np.testing.assert_allclose(outputs(found), wanted, rtol=1e-4)


def test_labels_come_from_their_file_or_with_the_images(user):
    with_images = job(user, "Net", "net.npz", "--images", f"{user.__name__}:pairs")
    assert with_images.labels("pairs", None).tolist() == user.Y.tolist()
    alone = job(user, "Net", "net.npz", "--count", "3")
    assert alone.labels("x.npy", None) is None
    np.testing.assert_array_equal(alone.labels("x.npy", "y.npy"), user.Y[alone.examples.rows])


def test_arguments_make_the_model(user):
    model = saved_module(user, width=5)
    found = job(user, "Module", "module.npz", "--model-args", '{"width": 5}')
    assert found.variables["head"]["kernel"].shape == model.head.kernel.shape


@pytest.mark.parametrize("model", ["Net", "Module"])
def test_a_decomposed_checkpoint_is_one_of_the_model(model, user):
    saved_module(user)
    path, layer = ("net.npz", "Conv_1") if model == "Net" else ("module.npz", "layers/1")
    save_weights("small.npz", small := decompose(load_weights(path), {layer: 2}))
    found = job(user, model, "small.npz")
    apply, variables = found.apply, found.model.weights(found.variables)
    assert jax.tree.structure(variables) == jax.tree.structure(small)
    assert lowrank(apply)(found.variables, user.X).shape == (6, 4)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.relu(nn.Conv(8, (3, 3))(x)).mean((1, 2)))


def test_parameters_without_their_name_are_found(user):
    user.Plain = Plain
    params = Plain().init(jax.random.key(0), user.X)["params"]
    save_weights("params.npz", params)
    found = job(user, "Plain", "params.npz")
    assert found.source == "{\"params\": lr.load_weights('params.npz')}"
    np.testing.assert_array_equal(
        found.variables["params"]["Dense_0"]["kernel"], params["Dense_0"]["kernel"]
    )


def as_state(tree):
    state = TrainState.create(apply_fn=None, params=tree["params"], tx=optax.adam(1e-3))
    whole = {**flax.serialization.to_state_dict(state), "batch_stats": tree["batch_stats"]}
    Path("state.msgpack").write_bytes(flax.serialization.to_bytes(whole))
    return "state.msgpack"


def as_nested(tree):
    with ocp.StandardCheckpointer() as saver:
        saver.save(Path.cwd() / "nested", {"model": tree, "n": 3})
    return "nested"


def as_step(tree):
    with ocp.CheckpointManager(Path.cwd() / "run") as manager:
        manager.save(7, args=ocp.args.Composite(state=ocp.args.StandardSave(tree)))
    return "run"


def as_frozen_extra(tree):
    save_weights("extra.npz", {**tree, "ema": {"kernel": np.ones(3)}})
    return "extra.npz"


def as_bare(tree):
    save_weights("bare.npz", {**tree["params"], "batch_stats": tree["batch_stats"]})
    return "bare.npz"


@pytest.mark.parametrize("write", [as_state, as_nested, as_step, as_frozen_extra, as_bare])
def test_the_variables_are_found_wherever_they_stand(write, user):
    tree = dense(user)
    found = job(user, "Net", write(tree))
    assert jax.tree.structure(found.variables) == jax.tree.structure(tree)
    assert jax.tree.all(jax.tree.map(np.array_equal, found.variables, tree))
    if found.source:
        source = eval(found.source, {"lr": lowrank_jax})
        assert jax.tree.all(jax.tree.map(np.array_equal, source["params"], tree["params"]))


def test_a_checkpoint_of_nnx_that_orbax_wrote_is_found_by_its_keys(user, tmp_path):
    apply, variables = functional(model := saved_module(user))
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "orbax", nnx.state(model, nnx.Not(nnx.RngState)))
    found = job(user, "Module", "orbax")
    np.testing.assert_allclose(outputs(found), apply(variables, user.X), atol=1e-5)


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda tree: tree["params"].pop("Conv_1"), "params/Conv_1/.* is missing"),
        (lambda tree: tree["params"].update(Conv_9={"bias": np.ones(1)}), "Conv_9/bias is not of"),
        (lambda tree: tree.pop("batch_stats"), "batch_stats/.* is missing"),
        (
            lambda tree: tree["params"]["Conv_0"].update(bias=np.ones(3)),
            r"params/Conv_0/bias has the shape \(3,\), not \(8,\)",
        ),
    ],
)
def test_what_a_checkpoint_has_other_than_the_model_is_named(change, text, user):
    tree = dense(user)
    change(tree)
    save_weights("changed.npz", tree)
    with pytest.raises(ValueError, match=f"does not hold the variables of .*{text}.*It holds"):
        job(user, "Net", "changed.npz")


@pytest.mark.parametrize(
    "model, options, text",
    [
        ("number", [], "makes a int; give a class or a function that makes a module"),
        ("X", [], "has no model 'X'; give a class or a function"),
        ("Loader", [], "has no model 'Loader'; give a class or a function"),
        ("function", ["--model-kwargs", '{"by": 2}'], "does not run on images"),
        (
            "Module",
            ["--model-args", '{"depth": 2}'],
            'give --model-args that it takes, not {"depth',
        ),
    ],
)
def test_what_is_no_model_is_refused(model, options, text, user):
    with pytest.raises(ValueError, match=text):
        job(user, model, "function.npz", *options)


def test_the_model_that_was_given_is_not_changed(user):
    saved_module(user)
    found = job(user, "Module", "module.npz")
    again = rebuilt(found.model.module, found.model.weights(found.variables))
    assert not np.array_equal(again.head.kernel[...], found.model.module.head.kernel[...])
