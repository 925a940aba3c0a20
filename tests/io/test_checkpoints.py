"""The checkpoints that people have: states of a training, steps of a manager, models of NNX."""

import logging
import string

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax import decompose, load_weights, save_weights
from lowrank_jax.nnx import functional, rebuilt

FILES = (".npz", ".safetensors", ".msgpack")
INTS = st.integers(-3, 12)
NAMES = st.text(string.ascii_letters + "_.", min_size=1, max_size=4)
LEAVES = st.integers(0, 3).map(lambda n: np.arange(n, dtype=np.float32))


def mappings(values, **options):
    """Keys of one type, as a tree of JAX has them."""
    return st.dictionaries(INTS, values, **options) | st.dictionaries(NAMES, values, **options)


TREES = mappings(st.recursive(LEAVES, lambda own: mappings(own, min_size=1), max_leaves=5))


class State(TrainState):
    """A state as most examples of Flax have it."""

    batch_stats: dict


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.drop(x).mean((1, 2))


@pytest.fixture(scope="module")
def state():
    model = nn.Sequential([nn.Conv(4, (3, 3)), nn.BatchNorm(True)])
    variables = model.init(jax.random.key(0), jnp.ones((1, 5, 5, 3)))
    return State.create(apply_fn=model.apply, tx=optax.adam(1e-3), **variables)


def variables_of(state):
    return {"params": state.params, "batch_stats": state.batch_stats}


def steps(folder, count, **items):
    """A folder of a manager that saved an item, or some, so many times."""
    with ocp.CheckpointManager(folder) as manager:
        for step in range(1, count + 1):
            scaled = jax.tree.map(lambda x, by=step: by * x, items)
            saved = {name: ocp.args.StandardSave(own) for name, own in scaled.items()}
            only = saved.get("default") if list(saved) == ["default"] else None
            manager.save(step, args=only or ocp.args.Composite(**saved))
    return folder


@pytest.mark.parametrize("suffix", FILES)
@settings(max_examples=10)
@given(tree=TREES)
def test_keys_that_are_ints_come_back_as_ints(suffix, tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("trees") / f"w{suffix}"
    save_weights(path, tree)
    found = load_weights(path)
    assert (
        flax.traverse_util.flatten_dict(found).keys()
        == flax.traverse_util.flatten_dict(tree).keys()
    )
    flat = flax.traverse_util.flatten_dict(tree)
    for key, leaf in flax.traverse_util.flatten_dict(found).items():
        np.testing.assert_array_equal(leaf, flat[key])


@pytest.mark.parametrize("name", ["w", "w.orbax"])
def test_a_name_without_an_end_is_a_folder_of_orbax(name, tmp_path, state):
    tree = decompose(variables_of(state), {"layers_0": 2})
    save_weights(tmp_path / name, tree)
    chex.assert_trees_all_equal(load_weights(tmp_path / name), tree)
    with ocp.StandardCheckpointer() as saver:
        chex.assert_trees_all_equal(saver.restore(tmp_path / name), tree)
    with pytest.raises(FileExistsError, match="a folder is never replaced"):
        save_weights(tmp_path / name, tree)


@pytest.mark.parametrize(
    "tree, text", [({0: np.ones(1)}, "key 0 is a int"), ({}, "params is an empty mapping")]
)
def test_what_orbax_would_change_is_refused(tree, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        save_weights(tmp_path / "w", {"params": tree})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", FILES)
def test_the_state_of_a_model_of_nnx_is_written_and_gives_the_model_again(suffix, tmp_path):
    model = Net(nnx.Rngs(0))
    save_weights(tmp_path / f"w{suffix}", nnx.state(model, nnx.Not(nnx.RngState)))
    again = rebuilt(Net(nnx.Rngs(1)), load_weights(tmp_path / f"w{suffix}"))
    images = jnp.ones((1, 5, 5, 3))
    found, wanted = (apply(own, images) for apply, own in map(functional, (again, model)))
    np.testing.assert_array_equal(found, wanted)


def test_the_variables_of_a_training_state_are_read_and_the_rest_is_named(tmp_path, state, caplog):
    (tmp_path / "state.msgpack").write_bytes(flax.serialization.to_bytes(state))
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "tree", state)
    with caplog.at_level(logging.INFO, "lowrank_jax"):
        for name in ("state.msgpack", "tree"):
            chex.assert_trees_all_equal(load_weights(tmp_path / name), variables_of(state))
    assert [line.partition("; ")[2] for line in caplog.messages] == [
        "left out: opt_state, step."
    ] * 2


def test_all_variables_may_be_the_params_of_a_training_state(tmp_path, state):
    variables = variables_of(state)
    whole = TrainState.create(apply_fn=None, params=variables, tx=optax.sgd(0.1))
    (tmp_path / "state.msgpack").write_bytes(flax.serialization.to_bytes(whole))
    chex.assert_trees_all_equal(load_weights(tmp_path / "state.msgpack"), variables)


@pytest.mark.parametrize("item", ["default", "state"])
def test_a_manager_s_folder_its_step_and_its_item_are_read(item, tmp_path, state, caplog):
    folder = steps(tmp_path / "run", 2, **{item: state})
    last = jax.tree.map(lambda x: 2 * x, variables_of(state))
    with caplog.at_level(logging.INFO, "lowrank_jax"):
        chex.assert_trees_all_equal(load_weights(folder), last)
    assert any("holds 2 steps, of which the last, 2, is read" in line for line in caplog.messages)
    for path in (folder / "2", folder / "2" / item):
        chex.assert_trees_all_equal(load_weights(path), last)
    chex.assert_trees_all_equal(load_weights(folder / "1"), variables_of(state))


def test_steps_are_told_by_their_numbers(tmp_path):
    with ocp.StandardCheckpointer() as saver:
        for step in (9, 10):
            saver.save(tmp_path / f"checkpoint_{step}", {"a": np.full(2, step)})
    assert load_weights(tmp_path)["a"].tolist() == [10, 10]
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "other_3", {"a": np.ones(2)})
    with pytest.raises(ValueError, match="give one of these in it: checkpoint_9, "):
        load_weights(tmp_path)
