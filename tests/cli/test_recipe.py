"""The options of a training are the arguments of `finetune` that they name."""

import argparse

import jax
import jax.numpy as jnp
import pytest

from lowrank_jax import Separable
from lowrank_jax.cli.recipe import add_recipe_options, loss_of, step_options


def options(*given):
    """What the options stand for, given as on the command line."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_recipe_options(parser.add_argument)
    return parser.parse_args(given)


def test_without_options_a_step_is_that_of_finetune_itself():
    found = step_options(options(), (8, 8), 4, 10)
    assert found == {
        "learning_rate": 0.02,
        "tx": None,
        "augment": None,
        "average": None,
        "accumulate": 1,
        "dtype": None,
        "choose": None,
    }


@pytest.mark.parametrize(
    "labels, teacher, wanted",
    [
        (True, False, "1 cross_entropy(smoothing=0.1)"),
        (False, True, "1 distillation(temperature=2) + 3 layers"),
        (
            True,
            True,
            "0.75 distillation(temperature=2) + 0.25 cross_entropy(smoothing=0.1) + 3 layers",
        ),
    ],
)
def test_the_loss_has_the_parts_that_there_is_something_to_learn_from(labels, teacher, wanted):
    given = ["--temperature", "2", "--layers", "3"] if teacher else []
    given += ["--smoothing", "0.1"] if labels else []
    given += ["--distill", "0.75"] if labels and teacher else []
    assert str(loss_of(options(*given), labels, teacher)) == wanted


def test_a_loss_without_what_it_learns_from_is_refused():
    with pytest.raises(ValueError, match="nothing to learn from"):
        loss_of(options(), False, False)


@pytest.mark.parametrize("name", ["layers", "distill", "temperature"])
def test_options_of_a_teacher_are_refused_without_one(name):
    with pytest.raises(ValueError, match=f"--{name} 0.5 needs a teacher"):
        loss_of(options(f"--{name}", "0.5"), True, False)


@pytest.mark.parametrize("name", ["smoothing", "distill"])
def test_options_of_labels_are_refused_without_any(name):
    with pytest.raises(ValueError, match=f"--{name} 0.5 needs labels"):
        loss_of(options(f"--{name}", "0.5"), False, True)


def test_the_rate_of_a_schedule_is_refused_beside_another_optimiser():
    given = options("--optimizer", "optax:sgd", "--learning-rate", "7")
    with pytest.raises(ValueError, match="--learning-rate 7 is of the schedule"):
        step_options(given, (8, 8), 4, 10)


@pytest.mark.parametrize(
    "given, mixed",
    [
        (["--crop", "2"], False),
        (["--mixup", "0.2"], True),
        (["--cutmix", "1"], True),
        (["--crop", "1", "--mixup", "0.2", "--cutmix", "1"], True),
    ],
)
def test_changed_images_keep_their_shape_and_mixed_labels_are_probabilities(given, mixed):
    augment = step_options(options(*given), (6, 9), 4, 10)["augment"]
    images = jax.random.normal(jax.random.key(0), (8, 6, 9, 3))
    changed, labels = augment(jax.random.key(1), (images, jnp.arange(8) % 4))
    assert changed.shape == images.shape and not jnp.array_equal(changed, images)
    assert labels.shape == ((8, 4) if mixed else (8,))
    if mixed:
        assert jnp.allclose(labels.sum(-1), 1, atol=1e-6)


OPTIMISERS = """
import optax

ready = optax.sgd(0.5)
word = "sgd"


def falling(updates):
    return optax.sgd(optax.linear_schedule(1.0, 0.0, updates))


def failing(updates):
    raise RuntimeError("no such schedule")
"""


@pytest.fixture
def optimisers(tmp_path, monkeypatch):
    """A module of the user with optimisers."""
    (tmp_path / "own_optimisers.py").write_text(OPTIMISERS)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("name, steps, wanted", [("ready", 2, 0.5), ("falling", 4, 0.75)])
def test_the_optimiser_is_the_users_and_knows_how_many_updates_there_are(
    optimisers, name, steps, wanted
):
    given = options("--optimizer", f"own_optimisers:{name}", "--accumulate", "2")
    tx = step_options(given, (8, 8), 4, 2 * steps)["tx"]
    one = jnp.ones(())
    _, state = tx.update(one, tx.init(one))
    update, _ = tx.update(one, state)
    assert update == -wanted


@pytest.mark.parametrize(
    "name, text",
    [
        ("word", "gives a str; give an optimiser of optax"),
        ("failing", "no such schedule"),
        ("none", "own_optimisers has no none"),
    ],
)
def test_what_is_no_optimiser_is_refused_by_its_name(optimisers, name, text):
    given = options("--optimizer", f"own_optimisers:{name}")
    with pytest.raises(ValueError, match=f"--optimizer own_optimisers:{name}.*{text}"):
        step_options(given, (8, 8), 4, 10)


def test_algorithms_are_those_of_the_factors_and_dense_layers_run_as_ever():
    choose = step_options(options("--algorithms", "kn2row+im2col"), (8, 8), 4, 10)["choose"]
    assert choose(None, Separable(2)) == "kn2row+im2col"
    assert choose(None, None) == "convolve"


@pytest.mark.parametrize(
    "given",
    [
        ["--smoothing", "1"],
        ["--average", "1"],
        ["--average", "0"],
        ["--mixup", "0"],
        ["--dtype", "int8"],
        ["--crop", "0"],
        ["--algorithms", "kn2row"],
    ],
)
def test_a_value_outside_its_range_is_refused(given):
    with pytest.raises(argparse.ArgumentError):
        options(*given)


@pytest.mark.parametrize(
    "given, text",
    [
        (("--distill", "0", "--temperature", "3"), "--temperature 3 needs a share of the teacher"),
        (("--distill", "1", "--smoothing", "0.1"), "--smoothing 0.1 needs a share of the labels"),
    ],
)
def test_options_of_what_the_shares_leave_out_are_refused(given, text):
    with pytest.raises(ValueError, match=text):
        loss_of(options(*given), True, True)
