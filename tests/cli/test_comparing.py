"""Which images are fitted to and which are scored, and what the next command is told."""

import argparse

import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax import calibrate
from lowrank_jax.cli import comparing
from lowrank_jax.cli.comparing import ENOUGH, Comparison
from lowrank_jax.cli.following import setting
from lowrank_jax.cli.jobs import Job
from lowrank_jax.cli.main import build_parser
from lowrank_jax.cli.models import Model
from lowrank_jax.cli.plan_command import planner


def job(count):
    """A network that scales, with images whose brightness is their number."""
    images = np.arange(count, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
    return made_job(lambda v, x: x * v["scale"], {"scale": 1.0}, images)


def made_job(apply, variables, images):
    made = dict(model=None, source="", examples=None, kwargs={})
    return Job(apply=apply, variables=variables, images=images, **made)


def test_of_enough_images_a_quarter_is_scored_and_not_fitted_to():
    found = Comparison.of(job(ENOUGH), None, hold_out=True)
    fitted, scored = found.fitted.images[:, 0], found.scored.images[:, 0]
    assert len(scored) == ENOUGH // 4 and found.images.held_out
    assert sorted([*fitted, *scored]) == list(range(ENOUGH))
    assert np.diff(scored).max() == 4  # from all over the file


@pytest.mark.parametrize("count, hold_out", [(ENOUGH - 1, True), (ENOUGH, False)])
def test_of_few_images_all_are_fitted_to_and_scored(count, hold_out):
    found = Comparison.of(job(count), None, hold_out=hold_out)
    assert found.fitted is found.scored and not found.images.held_out


def test_labels_are_those_of_the_scored_images():
    found = Comparison.of(job(ENOUGH), np.arange(ENOUGH) % 3, hold_out=True)
    np.testing.assert_array_equal(found.labels, found.scored.images[:, 0] % 3)
    score = found.score({"scale": -2.0})
    assert score.error == pytest.approx(3) and score.images.labelled
    assert score.dense == score.small == np.mean(found.labels == 0)  # all outputs are equal


def test_outputs_of_one_number_have_no_class():
    own = job(4)
    one = made_job(own.apply, own.variables, own.images[:, :1])
    assert Comparison.of(one, None, hold_out=False).score({"scale": 2.0}).small is None


def test_the_next_command_has_the_options_of_this_one():
    given = ["--checkpoint", "a.npz", "--model", "m:Net", "--model-args", '{"width": 8}']
    given += ["--model-kwargs", '{"train": false}', "--images", "a b.npy", "--mean", "0.5,0.25"]
    args = build_parser().parse_args(
        ["plan", *given, "--std", "0.2", "--size", "8x9", "--count", "9", "--data-dir", "d"]
    )
    model = Model(path="m:Net", expression="Net(width=8)", apply=len, module=nn.Dense(1))
    found = setting(args, model)
    again = ["compress", "--checkpoint", found.checkpoint, *found.options]
    names = (
        "model",
        "model_args",
        "model_kwargs",
        "images",
        "mean",
        "std",
        "size",
        "seed",
        "data_dir",
    )
    for name in (*names, "checkpoint"):
        assert getattr(build_parser().parse_args(again), name) == getattr(args, name)
    assert found.imports == "from m import Net" and found.apply == "Net(width=8).apply"
    assert found.call == ", train=False" and found.count == ["--count", "9"]


def test_times_of_several_images_go_with_any_budget():
    tree, x = {"w": np.eye(8, dtype=np.float32)}, np.ones((4, 8), np.float32)
    found = calibrate(lambda tree, x: x @ tree["w"], tree, x)
    args = argparse.Namespace(budget={"macs": 0.5}, batch=8, multiple=None)
    assert planner(found, args)(**args.budget).total("macs")[1] <= 32


def test_times_are_of_every_layer_of_the_plan_and_of_both_networks(monkeypatch):
    from lowrank_jax import Matrix, Plan, decompose
    from lowrank_jax.planning.plans import Choice
    from lowrank_jax.tuning import latency

    kernel = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    variables, costs = {"head": kernel}, dict(parameters=(64, 32), macs=(64, 32), bytes=(9, 9))
    plan = Plan(choices=(Choice(path="head", scheme=Matrix(2, axes="IO"), **costs),), selector="a")
    one = made_job(lambda v, x: x @ v["head"], variables, np.ones((4, 8), np.float32))
    monkeypatch.setattr(latency, "scheme_seconds", lambda trace, timer, table: table)
    found = comparing.times(one, decompose(variables, plan), plan, 2)
    assert found.layers == {"head": Matrix(2, axes="IO")}
    assert found.network.items == 2 and set(found.network.seconds) == {"dense", "low-rank"}
