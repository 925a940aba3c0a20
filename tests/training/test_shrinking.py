"""Compression in stages."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

import lowrank_jax as lr
from lowrank_jax.io.seals import seal
from lowrank_jax.training import checkpoints, shrinking
from lowrank_jax.training.shrinking import shrink

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(32, 8, 8, 3)).astype(np.float32)
MODEL = nn.Sequential(
    [nn.Conv(16, (3, 3)), nn.relu, nn.Conv(16, (3, 3)), nn.relu, nn.Conv(4, (8, 8))]
)
LABELS = np.zeros((32, 8, 8), int)
TUNE = dict(steps=4, batch_size=8, learning_rate=0.001, save_every=2)


@pytest.fixture(scope="module")
def dense():
    return MODEL.init(jax.random.key(0), IMAGES[:1])


def run(dense, folder=None, macs=(0.8, 0.5), **tune):
    tune = TUNE | tune
    return shrink(MODEL.apply, dense, IMAGES, IMAGES, macs=macs, tune=tune, folder=folder)


@pytest.fixture(scope="module")
def whole(dense, tmp_path_factory):
    """A run from its start to its end, and its folder."""
    folder = tmp_path_factory.mktemp("shrink")
    return *run(dense, folder), folder


def same(first, second):
    return jax.tree.all(jax.tree.map(np.array_equal, first, second))


@pytest.mark.slow
def test_the_last_plan_keeps_the_last_budget_and_is_of_the_tree(dense, whole):
    small, plan, folder = whole
    before, after = plan.total("macs")
    assert after <= 0.5 * before
    shapes = jax.eval_shape(lambda tree: lr.decompose(tree, plan), dense)
    assert jax.tree.map(np.shape, small) == jax.tree.map(np.shape, shapes)
    assert [path.name for path in sorted(folder.iterdir())] == ["0-macs-0.8", "1-macs-0.5"]


@pytest.mark.slow
def test_a_later_stage_chooses_from_what_was_tuned(whole):
    _, plan, folder = whole
    first = lr.Plan.load(folder / "0-macs-0.8" / "plan.json")
    for path, scheme in plan.ranks.items():
        assert path not in first.ranks or scheme.rank <= first.ranks[path].rank


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_with_the_same_bits(dense, whole, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    save, left = checkpoints.Checkpoints.save, [3]

    def stopping(self, *args):
        save(self, *args)
        left[0] -= 1
        if not left[0]:
            raise Stop

    monkeypatch.setattr(checkpoints.Checkpoints, "save", stopping)
    with pytest.raises(Stop):  # within the second stage
        run(dense, tmp_path)
    small, plan = run(dense, tmp_path)
    assert same(small, whole[0]) and plan.ranks == whole[1].ranks


def test_inputs_may_come_from_a_generator_which_every_stage_reads():
    def network(tree, x):
        return jax.nn.relu(x @ tree["a"]) @ tree["b"]

    tree = {"a": RNG.normal(size=(8, 8)), "b": RNG.normal(size=(8, 2))}
    tree = jax.tree.map(np.float32, tree)
    data = RNG.normal(size=(16, 8)).astype(np.float32)
    batches = (data[start : start + 8] for start in (0, 8))
    tune = dict(steps=1, batch_size=8)
    given = [shrink(network, tree, x, data, macs=(0.8, 0.6), tune=tune) for x in (batches, data)]
    assert given[0][1].ranks == given[1][1].ranks


def test_a_start_from_other_inputs_is_made_anew_before_a_step_is_saved(dense, tmp_path):
    def go(images, **tune):
        tune, data = dict(steps=1, batch_size=8) | tune, (IMAGES, LABELS)
        return shrink(MODEL.apply, dense, images, data, macs=(0.6,), tune=tune, folder=tmp_path)

    with pytest.raises(FloatingPointError):
        go(IMAGES + 100, tx=optax.sgd(float("nan")))
    small, chosen = go(IMAGES, tx=optax.sgd(0.0))
    again = lr.plan(lr.calibrate(MODEL.apply, dense, IMAGES), macs=0.6)
    assert chosen.ranks == again.ranks
    with pytest.raises(ValueError, match="began from another set of inputs; give the set"):
        go(IMAGES + 1)
    assert same(go(IMAGES, tx=optax.sgd(0.0))[0], small)


@pytest.mark.slow
def test_other_steps_for_a_stage_that_is_built_upon_are_refused_before_anything_is_done(
    dense, whole, tmp_path
):
    folder = shutil.copytree(whole[2], tmp_path / "run")
    for steps in (2, 6):
        with pytest.raises(ValueError, match=f"holds a stage of 4 steps, .* and {steps} are asked"):
            run(dense, folder, steps=steps)
    assert same(run(dense, folder)[0], whole[0])


def test_a_kernel_that_the_program_changes_is_compressed_once():
    def apply(tree, x):
        return jax.nn.relu(x @ (3 * tree["a"]["kernel"])) @ tree["b"]["kernel"]

    tree = {"a": {"kernel": RNG.normal(size=(8, 16))}, "b": {"kernel": RNG.normal(size=(16, 4))}}
    tree, x = jax.tree.map(np.float32, tree), IMAGES[:, 0, :, 0]
    data = (x, np.zeros(32, int))
    small, chosen = shrink(apply, tree, x, data, macs=(0.6,), tune=TUNE)
    assert chosen.changed == ("a",) and lr.lowrank(apply)(small, x).shape == (32, 4)
    with pytest.raises(ValueError, match=r"^a: the program changes this kernel .* macs=\(0.3,\)"):
        shrink(apply, tree, x, data, macs=(0.6, 0.3), tune=TUNE)


@pytest.mark.slow
def test_a_folder_of_other_shares_or_of_another_network_is_refused(dense, whole, tmp_path):
    folder = shutil.copytree(whole[2], tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds the stage 0-macs-0\.8, not 0-macs-0\.9"):
        run(dense, folder, macs=(0.9, 0.5))
    with pytest.raises(ValueError, match="began from another network"):
        run(jax.tree.map(lambda x: 2 * x, dense), folder)
    assert [path.name for path in sorted(folder.iterdir())] == ["0-macs-0.8", "1-macs-0.5"]


@pytest.mark.slow
def test_a_folder_of_an_older_version_goes_on(dense, whole, tmp_path):
    folder = shutil.copytree(whole[2], tmp_path / "run")
    for stage in folder.iterdir():
        (stage / "origin.json").unlink()
        shutil.rmtree(stage / "start")
        for checkpoint in (stage / "checkpoints").iterdir():
            facts = json.loads((checkpoint / "facts.json").read_text())
            del facts["start"]
            (checkpoint / "facts.json").write_text(json.dumps(facts))
            seal(checkpoint)
    for _ in range(2):
        small, plan = run(dense, folder)
        assert same(small, whole[0]) and plan.ranks == whole[1].ranks


@pytest.mark.slow
def test_a_stage_that_was_never_trained_is_made_anew(dense, whole, tmp_path):
    other = jax.tree.map(lambda x: x[..., ::-1], dense)
    for network in (other, dense):
        with pytest.raises(ValueError, match="save_every"):
            run(network, tmp_path, save_every=0)
    small, _ = run(dense, tmp_path)
    assert same(small, whole[0])


@pytest.mark.parametrize("name", ["folder", "plan"])
def test_what_each_stage_has_of_its_own_is_refused(dense, name):
    with pytest.raises(ValueError, match=f"tune={{'{name}': .* is not allowed.*leave '{name}' out"):
        shrink(MODEL.apply, dense, IMAGES, IMAGES, macs=(0.5,), tune=TUNE | {name: "x"})


@pytest.mark.parametrize("macs", [0.5, "0.5", {0.5}, (), (0.5, 0.5), (0.5, 0.8), (1.0,), (0.5, 0)])
def test_shares_that_do_not_fall_are_refused(dense, macs):
    with pytest.raises(ValueError, match="each smaller than the one before"):
        run(dense, macs=macs)


@pytest.mark.parametrize(
    "tune, text",
    [
        (None, "tune=None is not allowed; give arguments of finetune"),
        ({"setps": 2, "batch_size": 8}, "finetune has no argument 'setps'; it has steps"),
        ({"batch_size": 8}, "steps=None and epochs=None are not allowed"),
        ({"steps": 2, "batch_size": 10_000}, "batch_size=10000 is more than"),
        ({"steps": 2, "tx": "adam"}, "tx='adam' is not allowed"),
        ({"steps": 2, "loss": "entropy"}, "loss='entropy' is not allowed"),
    ],
)
def test_arguments_of_the_tuning_are_refused_before_the_first_stage(dense, tune, text, monkeypatch):
    monkeypatch.setattr(shrinking, "calibrate", None)
    apply = lambda tree, x: MODEL.apply(tree, x)  # noqa: E731
    with pytest.raises(ValueError, match=text):
        shrink(apply, dense, IMAGES, (IMAGES, LABELS), macs=(0.5,), tune=tune)


def test_a_loss_of_labels_alone_needs_no_teacher(dense):
    tune = {"steps": 1, "batch_size": 8, "loss": "cross_entropy"}
    small, _ = shrink(MODEL.apply, dense, IMAGES, (IMAGES, LABELS), macs=(0.5,), tune=tune)
    assert small.keys() == dense.keys()
