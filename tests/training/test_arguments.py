"""Arguments of a training of another kind are refused by their names, before the first step."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from lowrank_jax.training import (
    TrainState,
    chain,
    crops_and_flips,
    cutmix,
    evaluate,
    finetune,
    make_step,
    mixup,
    one_cycle_sgd,
)
from lowrank_jax.training.arguments import KINDS, check_kinds

ANY = [3 + 2j, b"bytes", object()]  # which no argument is
OTHERS = {
    "learning_rate": [None, "0.1", optax.constant_schedule(0.1), [0.1], jnp.ones(2)],
    "seed": [None, -1, 2**63, 1.0, True, "0", jnp.ones(())],
    "clip": ["1", [1.0]],
    "average": ["0.9", [0.9]],
    "tx": ["adam", optax.adam, 0.1],
    "trained": [["Dense_0"], "Dense_0", ("Dense_0", False)],
    "augment": ["mixup", [crops_and_flips(8, 0)], chain, crops_and_flips, cutmix, mixup],
    "dtype": ["bf16", jnp.int32, "no type"],
    "folder": [3, ["run"]],
    "teacher_apply": [{}, "apply"],
    "plan": [{"Conv_0": 3}, "plan.json"],
    "after_epoch": [{}, "print"],
    "sharding": [PartitionSpec("data"), "data", jax.make_mesh((1,), ("data",))],
    "train_kwargs": [["train"], "train", True],
    "mutable": ["batch_stats", True, [True]],
    "rngs": ["dropout", 3, {"dropout": 1}],
    "choose": ["im2col", {}],
}
CASES = [(name, value) for name in KINDS for value in [*OTHERS[name], *ANY]]
ALLOWED = [
    {"learning_rate": np.float32(0.1), "seed": np.int64(3), "clip": 1, "average": jnp.array(0.5)},
    {"learning_rate": jnp.float32(0.1), "steps": np.int64(2), "dtype": "bfloat16", "rngs": ()},
    {"tx": optax.MultiSteps(optax.adam(0.1), 2), "trained": {}, "mutable": (), "choose": None},
    {"augment": mixup(4), "train_kwargs": {}, "batch_size": np.uint8(16)},
]


@pytest.mark.parametrize("name, value", CASES)
def test_a_value_of_another_kind_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name}=.* is not allowed; give "):
        check_kinds({name: value})


@pytest.mark.parametrize("name", KINDS)
def test_finetune_checks_all_arguments_of_the_table(name, plain, batch):
    with pytest.raises(ValueError, match=f"^{name}="):
        finetune(*plain, batch, steps=1, **{name: ANY[0]})


@pytest.mark.parametrize(
    "name", sorted(KINDS.keys() & inspect.signature(make_step).parameters.keys())
)
def test_a_step_checks_all_its_arguments_of_the_table(name, plain):
    with pytest.raises(ValueError, match=f"^{name}="):
        make_step(**{"apply": plain[0], "tx": optax.sgd(0.1), name: ANY[0]})


@pytest.mark.parametrize("name", ["tx", "seed", "trained"])
def test_a_state_checks_its_arguments(name, plain):
    with pytest.raises(ValueError, match=f"^{name}="):
        TrainState.create(**{"variables": plain[1], "tx": optax.sgd(0.1), name: ANY[0]})


@pytest.mark.parametrize("options", ALLOWED)
def test_values_of_the_kinds_are_taken(options, plain, batch):
    assert finetune(*plain, batch, **{"steps": 2, "batch_size": 16} | options)


@pytest.mark.parametrize("mesh", [PartitionSpec("data"), "data"])
def test_evaluation_takes_a_sharding_alone(mesh):
    with pytest.raises(ValueError, match=r"^sharding=.* give NamedSharding"):
        evaluate(lambda tree, x: x, {}, np.eye(3), np.arange(3), sharding=mesh)


@pytest.mark.parametrize("given", [{"learning_rate": optax.constant_schedule(0.1)}, {"clip": "1"}])
def test_the_usual_optimiser_takes_numbers_alone(given):
    with pytest.raises(ValueError, match=r"is not allowed; give a number above 0"):
        one_cycle_sgd(**{"learning_rate": 0.1, "steps": 3} | given)
