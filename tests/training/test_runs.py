"""A run hands out what stays valid, and takes numbers of any kind."""

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax.training import finetune, read_metrics
from lowrank_jax.training.metrics import RISE, Metrics, risen


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


@pytest.mark.parametrize("name", ["step", "epoch"])
def test_a_metric_of_an_epoch_with_a_name_that_is_taken_is_refused(tune, name):
    with pytest.raises(ValueError, match=f"after_epoch returned '{name}', which every line"):
        tune(epochs=1, after_epoch=lambda *_: {name: 3})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_parameters_that_the_last_update_spoils_are_neither_kept_nor_returned(
    plain, batch, tmp_path, dtype
):
    apply, tree = plain
    tree = {**tree, "bias": jnp.zeros(4, dtype)}
    spoil = optax.chain(*[optax.scale(-1e4)] * 11)  # float16 ends at 65,504
    options = dict(tx=spoil, batch_size=32, save_every=1)
    with pytest.raises(FloatingPointError, match=r"^Step 1: the update makes .*no checkpoint"):
        finetune(apply, tree, batch, steps=1, **options)
    with pytest.raises(FloatingPointError, match=r"^Step 1: the update makes .*no checkpoint"):
        finetune(apply, tree, batch, steps=3, folder=tmp_path, **options)
    assert not list((tmp_path / "checkpoints").glob("0*"))


@pytest.mark.parametrize("labels", [{"a": np.zeros(4)}, np.zeros((4, 0), int)])
def test_a_loss_that_is_not_finite_is_told_whatever_the_labels_are(plain, labels):
    def lost(outputs, labels):
        return jnp.nan * outputs.sum()

    batches = [(np.ones((4, 8, 8, 3), np.float32), labels)]
    with pytest.raises(FloatingPointError, match=r"Step 1: the loss is nan"):
        finetune(*plain, batches, steps=1, loss=lost)


def test_a_full_disk_is_told_by_the_metrics_too(tune, monkeypatch):
    def full(self, step, values):
        raise OSError(28, "No space left on device")

    tune(steps=1)
    monkeypatch.setattr(Metrics, "write", full)
    with pytest.raises(OSError, match=r"Step 2: the metrics in .* No space left.*000000001"):
        tune(steps=2)


def test_other_settings_of_a_run_that_goes_on_are_told(tune, caplog):
    tune(steps=1, clip=1.0, accumulate=1)
    tune(steps=2, clip=None, dtype=jnp.bfloat16)
    assert "The run had clip=1.0 and goes on with None." in caplog.text
    assert "The run had dtype=None and goes on with bfloat16." in caplog.text
    assert "accumulate" not in caplog.text
