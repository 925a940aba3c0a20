"""A folder of checkpoints keeps the newest whole ones, whatever else lies in it."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax.training import TrainState
from lowrank_jax.training.checkpoints import Checkpoints, load_tree, save_tree

STATE = TrainState.create({"w": jnp.ones(3)}, optax.sgd(0.1))


def at(step):
    """The state at a step."""
    return TrainState(**vars(STATE) | {"step": jnp.int32(step)})


def spoil(kept, step):
    (kept.path(step) / "facts.json").write_text("{}")


@pytest.mark.parametrize("junk", [[], [99], [101, 99]])
def test_a_save_never_removes_the_checkpoint_that_it_wrote(tmp_path, junk):
    kept = Checkpoints(tmp_path)
    for step in (15, 20):
        kept.save(at(step), {})
        spoil(kept, step)
    for step in junk:
        kept.path(step).mkdir()
    for step in (3, 6, 9):
        kept.save(at(step), {})
        assert step in kept.steps()
    with pytest.warns(UserWarning, match="damaged"):
        state, _ = kept.newest(STATE)
    assert state.step == 9 and kept.steps() == [9, 6]


def test_where_all_are_damaged_they_are_set_aside_and_the_start_is_told(tmp_path):
    kept = Checkpoints(tmp_path)
    for step in (5, 10):
        kept.save(at(step), {})
        spoil(kept, step)
    with pytest.warns(UserWarning, match=r"damaged|starts at step 0") as told:
        assert kept.newest(STATE) is None
    assert "starts at step 0" in str(told[-1].message)
    assert kept.steps() == []
    names = [path.name for path in sorted((tmp_path / "damaged").iterdir())]
    assert names == ["000000005", "000000010"]


@pytest.mark.parametrize(
    "tree",
    [
        {"conv": np.ones((3, 2), np.float32), "dense": np.zeros(2, np.float32)},
        {"params": {"a": np.ones(2, np.float32)}},
        {"net/~/conv": {"w": np.ones(2, np.float32)}},
        [np.arange(3, dtype=np.int32), (np.ones(2, np.float32),)],
        np.ones(3, np.float32),
    ],
    ids=["function", "linen", "slashes", "list", "array"],
)
def test_a_tree_of_any_kind_is_read_as_it_was_written(tmp_path, tree):
    save_tree(tmp_path / "start", tree)
    found = load_tree(tmp_path / "start", jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree)))
    chex.assert_trees_all_equal(found, tree)


@given(name=st.from_regex(r"[0-9]{1,12}|[0-9]{9}\.bak", fullmatch=True))
def test_folders_of_other_names_are_no_checkpoints(tmp_path_factory, name):
    kept = Checkpoints(tmp_path_factory.mktemp("run"))
    (kept.folder / name).mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert kept.newest(STATE) is None
