"""A run hands out what stays valid, and takes numbers of any kind."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax.training import finetune, read_metrics
from lowrank_jax.training.metrics import RISE, risen


@pytest.fixture
def tune(plain, batch, tmp_path):
    """`finetune` of the plain network in a folder; other arguments by name."""

    def run(**options):
        own = {"batch_size": 32, "folder": tmp_path / "run"}
        return finetune(*plain, batch, **own | options)

    return run


@pytest.mark.parametrize("average", [None, 0.9])
def test_the_variables_of_each_epoch_stay_readable(tune, average):
    kept = []
    last = tune(epochs=3, average=average, after_epoch=lambda _, tree, __: kept.append(tree))
    chex.assert_trees_all_equal(kept[-1], last)
    heads = [np.asarray(tree["head"]) for tree in kept]
    assert not np.array_equal(heads[0], heads[1]) and not np.array_equal(heads[1], heads[2])


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, jnp.float32, jnp.bfloat16, int])
def test_metrics_of_any_kind_of_number_are_kept(tune, tmp_path, kind):
    tune(epochs=1, after_epoch=lambda *_: {"accuracy": kind(1)})
    [line] = [line for line in read_metrics(tmp_path / "run") if "accuracy" in line]
    assert line == {"step": 2, "epoch": 1, "accuracy": 1.0}


@pytest.mark.parametrize("found", [0.5, 0.0, [0.5], "high", {"accuracy": "high"}, {"a": None}])
def test_what_is_no_mapping_to_numbers_is_refused(tune, found):
    with pytest.raises(ValueError, match=r"after_epoch returned .*; give back a mapping"):
        tune(epochs=1, after_epoch=lambda *_: found)


@pytest.mark.parametrize("kind", [np.float32, np.float64, jnp.float32])
def test_a_rate_and_a_seed_of_numpy_are_kept_and_go_on(tune, kind, caplog):
    options = {"seed": np.int64(3), "learning_rate": kind(0.01)}
    tune(steps=1, **options)
    tune(steps=2, **options)
    assert "goes on after step 1" in caplog.text and "learning_rate" not in caplog.text


@pytest.mark.parametrize("plan", [{"Conv_0": 3}, "plan.json", 3])
def test_what_is_no_plan_is_refused_before_the_first_step(tune, plan, tmp_path):
    with pytest.raises(ValueError, match=r"plan=.* is not allowed; give a Plan"):
        tune(steps=1, plan=plan)
    assert not (tmp_path / "run").exists()


@given(st.floats(-100, 100), st.floats(0, 100))
def test_a_loss_that_falls_has_not_risen_whatever_its_sign(first, fall):
    assert not risen(first, first - fall)
    assert risen(first, first + RISE * abs(first) + 1)
