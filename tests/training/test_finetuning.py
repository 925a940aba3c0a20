"""`finetune`: one call that learns, whatever the network and the form of the data."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import lowrank_jax as lr
from lowrank_jax import SeparableConv, lowrank, reconstruct
from lowrank_jax.training import (
    TrainState,
    crops_and_flips,
    distillation,
    evaluate,
    finetune,
    layer_matching,
    make_step,
)


@pytest.fixture(scope="module")
def tune(plain):
    """`finetune` of the plain network; other arguments by name."""

    def run(batches, **options):
        usual = {"batch_size": 16} | ({} if "tx" in options else {"learning_rate": 0.1})
        return finetune(*plain, batches, **usual | options)

    return run


def test_a_decomposed_network_learns_what_its_classes_are(model, small, batch):
    before = evaluate(model.apply, small, *batch)
    tuned = finetune(model.apply, small, batch, epochs=8, batch_size=16, learning_rate=0.1)
    assert evaluate(model.apply, tuned, *batch) > max(before, 0.6)  # chance is 0.25
    chex.assert_trees_all_equal_shapes_and_dtypes(tuned, small)


@pytest.mark.slow
def test_with_a_teacher_the_labels_are_not_needed(model, dense, small, batch):
    images, _ = batch
    loss = distillation(2.0) + layer_matching()
    given = dict(teacher=dense, loss=loss, batch_size=16)
    tuned = finetune(model.apply, small, images, epochs=8, **given)

    def gap(variables):
        return jnp.linalg.norm(lowrank(model.apply)(variables, images) - model.apply(dense, images))

    assert gap(tuned) < 0.9 * gap(small)


@pytest.mark.slow
def test_a_run_is_a_function_of_its_seed(batch, tune):
    one, same, other = (tune(batch, steps=3, seed=seed) for seed in (1, 1, 2))
    chex.assert_trees_all_equal(one, same)
    gap = jax.tree.map(jnp.subtract, one, other)
    assert optax.tree_utils.tree_norm(gap) > 1e-4


def test_batches_in_any_form_give_the_same_network(batch, tune):
    images, labels = batch
    parts = [(images[i : i + 16], labels[i : i + 16]) for i in range(0, 64, 16)]
    forms = (parts, lambda: iter(parts), iter(parts * 2))
    tuned = [tune(form, steps=6) for form in forms]
    chex.assert_trees_all_equal(*tuned)


def test_the_average_of_the_parameters_is_returned(batch, tune):
    last, mean = tune(batch, steps=8), tune(batch, steps=8, average=0.9)
    gap = jax.tree.map(jnp.subtract, last, mean)
    assert optax.tree_utils.tree_norm(gap) > 1e-4


def test_what_is_frozen_is_returned_as_it_was(batch, plain, tune):
    tuned = tune(batch, steps=2, trained={"hidden": True, ".*": False}, tx=optax.adam(0.01))
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), tuned, plain[1])
    assert moved["hidden"] == {"left_factor": True, "right_factor": True}
    assert not moved["head"] and not moved["bias"]


@pytest.mark.parametrize("train", [True, False])
def test_statistics_of_frozen_layers_are_renewed_in_training_alone(model, small, batch, train):
    given = dict(trained={"BatchNorm_0": False}, train_kwargs={"train": train}, batch_size=16)
    tuned = finetune(model.apply, small, batch, steps=1, **given)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), tuned, small)
    assert not any(moved["params"]["BatchNorm_0"].values())
    assert set(jax.tree.leaves(moved["batch_stats"])) == {train}


def test_epochs_are_counted_and_shown_with_their_metrics(batch, tune):
    shown = []

    def after(epoch, variables, metrics):
        shown.append((epoch, sorted(variables), sorted(metrics)))

    tune(batch, epochs=2, after_epoch=after)
    names = ["bias", "head", "hidden"], ["cross_entropy", "gradient", "loss"]
    assert shown == [(1, *names), (2, *names)]


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(tune, batch):
    images = np.array(batch[0])
    images[40] = np.nan
    batches = [(images[i : i + 16], batch[1][i : i + 16]) for i in range(0, 64, 16)]
    text = r"Step 3: the loss is nan and .*; the first .* is bias\. There is no checkpoint"
    with pytest.raises(FloatingPointError, match=text):
        tune(batches, steps=8)


def test_labels_that_are_no_classes_are_named_with_their_range(batch, tune):
    with pytest.raises(FloatingPointError, match=r"those of the last batch are 5 to \d"):
        tune((batch[0], batch[1] + 5), steps=1)


def test_a_loss_that_rises_is_told_at_the_end(batch, tune, caplog):
    def loss(outputs, labels):
        return 0 * outputs.mean() + labels.mean()

    rising = [(batch[0][:8], np.full(8, 1 + step / 10, np.float32)) for step in range(20)]
    tune(rising[::-1], steps=20, loss=loss)
    assert "rose" not in caplog.text
    tune(rising, steps=20, loss=loss, learning_rate=0.25)
    assert "The loss rose from 1.45 to 2.45" in caplog.text and "which was 0.25" in caplog.text


def test_a_steep_loss_does_not_run_away_at_the_default_rate(batch):
    def steep(tree, x):
        return 1e4 * (x.reshape(len(x), -1)[:, :3] @ tree["weights"])

    options = dict(steps=30, batch_size=8)
    tuned = finetune(steep, {"weights": jnp.ones((3, 4))}, batch, **options)
    assert float(jnp.abs(tuned["weights"]).max()) < 3  # steps of 0.02 at most
    tuned = finetune(steep, {"weights": jnp.ones((3, 4))}, batch, clip=None, **options)
    assert float(jnp.abs(tuned["weights"]).max()) > 3


def test_collections_that_a_call_renews_are_not_trained(batch):
    def network(tree, x, mutable=()):
        outputs = x.reshape(len(x), -1)[:, :3] @ tree["weights"] + tree["state"]["mean"]
        return (outputs, {"state": {"mean": tree["state"]["mean"] + 1}}) if mutable else outputs

    tree = {"weights": jnp.ones((3, 4)), "state": {"mean": jnp.zeros(4)}}
    for rules in (None, {"state": False}):
        tuned = finetune(
            network, tree, batch, steps=3, batch_size=8, mutable=["state"], trained=rules
        )
        assert tuned["state"]["mean"].tolist() == [3.0] * 4
    step = make_step(network, optax.sgd(0.1), mutable=["state"])
    with pytest.raises(ValueError, match=r"Give TrainState.create renewed=\['state'\]"):
        step(TrainState.create(tree, optax.sgd(0.1)), batch)


def test_outputs_that_are_no_array_are_refused_with_the_remedy(batch):
    def network(tree, x):
        return x.reshape(len(x), -1)[:, :3] @ tree["weights"], {"mean": x.mean()}

    with pytest.raises(ValueError, match=r"gives a tuple of 2 arrays.*outputs\[0\], labels"):
        finetune(network, {"weights": jnp.ones((3, 4))}, batch, steps=1, batch_size=8)

    def loss(outputs, labels):
        return optax.softmax_cross_entropy_with_integer_labels(outputs[0], labels).mean()

    finetune(network, {"weights": jnp.ones((3, 4))}, batch, steps=1, batch_size=8, loss=loss)


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(not train)(nn.Dense(4)(x.mean((1, 2))))


class Own(nn.Module):
    @nn.compact
    def __call__(self, x, is_train=False):
        return nn.BatchNorm(not is_train)(nn.Dense(4)(x.mean((1, 2))))


def test_statistics_that_stay_as_they_are_are_told(batch, caplog):
    model, own = Normalised(), Own()
    variables = model.init(jax.random.key(0), batch[0])
    options = dict(steps=1, batch_size=8)
    tuned = finetune(model.apply, variables, batch, **options)
    assert "stay as they are" not in caplog.text and moved(variables, tuned)
    tuned = finetune(lambda tree, x: model.apply(tree, x), variables, batch, **options)
    assert "batch_stats of the variables stay as they are" in caplog.text
    assert not moved(variables, tuned)
    tuned = finetune(own.apply, variables, batch, **options)
    assert "give train_kwargs={'is_train': True}" in caplog.text and not moved(variables, tuned)
    told = len(caplog.records)
    tuned = finetune(own.apply, variables, batch, train_kwargs={"is_train": True}, **options)
    assert len(caplog.records) == told and moved(variables, tuned)


class Featured(nn.Module):
    @nn.compact
    def __call__(self, x, train, features=False):
        return nn.BatchNorm(not train)(nn.Dense(4)(x.mean((1, 2))))


class Always(nn.Module):
    train: bool = True

    @nn.compact
    def __call__(self, x, features=False):
        return nn.BatchNorm(not self.train)(nn.Dense(4)(x.mean((1, 2))))


def test_no_flag_is_told_of_where_the_statistics_move(batch, caplog):
    for model in (Featured(), Always()):
        given = {"train": False} if isinstance(model, Featured) else {}
        variables = model.init(jax.random.key(0), batch[0], **given)
        tuned = finetune(model.apply, variables, batch, steps=1, batch_size=8)
        assert moved(variables, tuned) and "as in evaluation" not in caplog.text


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Callable:
    """A tree that can be called, as the modules of Equinox are."""

    kernel: jax.Array

    def __call__(self, x):
        return x @ self.kernel


def test_a_teacher_may_be_a_tree_that_can_be_called(batch):
    def apply(tree, x):
        return tree(x.reshape(len(x), -1)[:, :9])

    dense = Callable(jnp.asarray(np.random.default_rng(0).normal(size=(9, 4)), jnp.float32))
    small = lr.decompose(dense, {"kernel": 2}, lr.trace(apply, dense, batch[0]))
    tuned = finetune(lr.lowrank(apply), small, batch, teacher=dense, steps=1, batch_size=8)
    assert jax.tree.structure(tuned) == jax.tree.structure(small)


def moved(one, two):
    pairs = zip(*(jax.tree.leaves(tree["batch_stats"]) for tree in (one, two)), strict=True)
    return not all(np.array_equal(*pair) for pair in pairs)


def test_a_plan_that_is_not_of_the_factors_is_refused(batch):
    def network(tree, x):
        return x.reshape(len(x), -1)[:, :9] @ tree["a"] @ tree["b"]

    rng = np.random.default_rng(0)
    tree = {"a": rng.normal(size=(9, 8)).astype("f"), "b": rng.normal(size=(8, 4)).astype("f")}
    plans = [lr.plan(network, tree, batch[0], macs=share) for share in (0.8, 0.5)]
    small, options = lr.decompose(tree, plans[0]), dict(steps=1, batch_size=8)
    finetune(network, small, batch, plan=plans[0], **options)
    for variables, text in ((small, "the plan has Matrix"), (tree, "hold no factors")):
        with pytest.raises(ValueError, match=text):
            finetune(network, variables, batch, plan=plans[1], **options)
    few = {"b": 2, **dict.fromkeys(plans[0].ranks, 2)}
    with pytest.raises(ValueError, match="the plan has"):
        finetune(network, lr.decompose(tree, few), batch, plan=plans[0], **options)


@pytest.mark.parametrize(
    "options, text",
    [
        ({}, "steps=None and epochs=None are not allowed; give one of both"),
        ({"steps": 1, "epochs": 1}, "give one of both"),
        ({"steps": 0}, "steps=0 is not allowed; give an int of 1 or more"),
        ({"epochs": 1.5}, r"epochs=1\.5 is not allowed"),
        ({"steps": 1, "batch_size": 65}, "batch_size=65 is more than the 64"),
        ({"steps": 1, "batch_size": 0}, "batch_size=0 is not allowed"),
        ({"steps": 1, "accumulate": 0}, "accumulate=0 is not allowed"),
        ({"steps": 3, "accumulate": 4}, "accumulate=4 is more than the 3 steps"),
        ({"steps": 1, "clip": 0}, "clip=0 is not allowed"),
        ({"steps": 1, "save_every": 0}, "save_every=0 is not allowed"),
        ({"steps": 1, "learning_rate": 0.0}, r"learning_rate=0\.0 is not allowed"),
        ({"steps": 1, "teacher": {}, "loss": "cross_entropy"}, "leave the teacher out"),
        ({"steps": 1, "loss": "distillation"}, "there is no teacher"),
        ({"steps": 1, "tx": optax.sgd(0.1), "clip": 0.5}, r"clip=0\.5 is not read beside tx"),
        ({"steps": 1, "tx": optax.sgd(0.1), "clip": None}, "clip=None is not read beside tx"),
        ({"steps": 1, "tx": optax.sgd(0.1), "learning_rate": 0.1}, "learning_rate=0.1 is not read"),
        ({"steps": 1, "teacher_apply": len}, "teacher_apply=.* is not allowed without teacher"),
        ({"steps": 1, "teacher": len}, "teacher=.* is not allowed; give the variables of the"),
        (
            {"steps": 1, "augment": lambda key, batch: batch[0]},
            "The batch is a ShapeDtypeStruct; give a tuple",
        ),
        ({"steps": 1, "mutable": ["batch_stat"]}, "which the variables do not have; give some of"),
        ({"steps": 1, "mutable": ["params"]}, "mutable='params' is not allowed, which is trained"),
    ],
)
def test_arguments_that_are_not_allowed_are_refused(batch, tune, options, text):
    with pytest.raises(ValueError, match=text):
        tune(batch, **options)


@pytest.mark.parametrize(
    "batches, text",
    [
        ((np.ones((4, 8, 8, 3)), np.zeros(5)), "the same number of examples"),
        ([], "There are no batches"),
        (None, "batches=None is not allowed; give arrays"),
        (3, "batches=3 is not allowed; give arrays"),
        (lambda: None, "The function of the batches gives a NoneType; give one"),
        (iter([]), "The batches ended after step 0 of 3"),
    ],
)
def test_data_that_do_not_do_are_refused(tune, batches, text):
    with pytest.raises(ValueError, match=text):
        tune(batches, steps=3, batch_size=4)


def test_a_function_after_each_epoch_of_a_stream_is_refused(tune, batch):
    with pytest.raises(ValueError, match=r"after_epoch=.* is not allowed for batches"):
        tune(iter([batch]), steps=1, after_epoch=print)


def test_what_is_no_array_in_a_tree_is_named(batch):
    with pytest.raises(ValueError, match=r"act: a .*function.* is not allowed; give a tree"):
        finetune(lambda tree, x: x, {"w": np.ones(3), "act": len}, batch, epochs=1, batch_size=8)


def test_several_inputs_without_labels_end_in_none(plain, batch):
    apply, tree = plain
    two = lambda tree, x, z: apply(tree, x) + z  # noqa: E731
    data = batch[0], np.ones((64, 4), np.float32), None
    options = dict(teacher=reconstruct(tree), steps=1, batch_size=32)
    assert finetune(two, tree, data, **options).keys() == tree.keys()


def test_epochs_of_a_stream_cannot_be_counted(tune):
    with pytest.raises(ValueError, match="batches that cannot be counted; give steps"):
        tune(iter([]), epochs=1)


def test_a_batch_without_labels_says_so(batch, tune):
    with pytest.raises(ValueError, match="the batch has no labels"):
        tune(batch[0], steps=1)


@pytest.mark.parametrize("augment", [None, crops_and_flips(8, 1)])
def test_raw_images_are_told(batch, tune, augment):
    images, labels = batch
    with pytest.warns(UserWarning, match="usually scaled and normalised"):
        tune((np.zeros(images.shape, np.uint8), labels), steps=1, augment=augment)


def test_raw_images_that_the_augmentation_scales_are_not_told(batch, tune):
    raw = np.zeros(batch[0].shape, np.uint8), batch[1]
    tune(raw, steps=1, augment=lambda key, batch: (batch[0] / 255, batch[1]))


def test_steps_that_are_left_over_are_told(batch, tune, caplog):
    tune(batch, steps=4, accumulate=2)
    assert "change nothing" not in caplog.text
    tune(batch, steps=5, accumulate=2)
    assert "The last 1 of 5 steps change nothing" in caplog.text


def test_an_error_of_the_first_step_says_what_a_batch_is(batch, tune):
    images, labels = batch
    with pytest.raises(IndexError) as caught:
        tune((labels, images), steps=1)
    assert "A batch is (inputs, labels)" in caught.value.__notes__[-1]


@pytest.mark.parametrize("batch_size", [1, 7, 64, 100])
def test_evaluation_is_exact_for_any_batch_size(model, dense, batch, batch_size):
    images, labels = batch
    expected = np.mean(np.argmax(jax.jit(model.apply)(dense, images), -1) == labels)
    assert evaluate(model.apply, dense, *batch, batch_size=batch_size) == expected


@pytest.mark.parametrize("shape", [(64, 1), (6,), (65,), (64, 4), ()])
def test_labels_that_are_not_one_for_each_image_are_refused(model, dense, batch, shape):
    with pytest.raises(ValueError, match=r"not allowed for images of shape .* give one int"):
        evaluate(model.apply, dense, batch[0], np.zeros(shape, int))


@pytest.mark.parametrize("shape", [(64, 4, 4), (64, 64, 4), (1, 4), (4,)])
def test_outputs_that_are_not_one_row_for_each_image_are_refused(batch, shape):
    with pytest.raises(ValueError, match="not allowed for 64 images; give a function"):
        evaluate(lambda tree, x: jnp.zeros(shape), {}, *batch)


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_a_batch_size_that_is_none_is_refused(model, dense, batch, size):
    with pytest.raises(ValueError, match=f"batch_size={size} is not allowed"):
        evaluate(model.apply, dense, *batch, batch_size=size)


def test_evaluating_nothing_is_refused(model):
    with pytest.raises(ValueError, match="at least one image"):
        evaluate(model.apply, {}, np.ones((0, 8, 8, 3)), np.ones(0))


def test_a_network_of_separable_layers_is_trained_from_random_weights(batch):
    model = nn.Sequential([SeparableConv(4, (3, 3), rank=2), lambda x: x.mean((1, 2))])
    start = model.init(jax.random.key(0), batch[0])
    tuned = finetune(model.apply, start, batch, steps=2, batch_size=16)
    chex.assert_trees_all_equal_shapes_and_dtypes(tuned, start)
