"""The examples of docs/training.md run."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

TEXT = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.S)
WHOLE, LOOP, BLOCK, STAGES, SPEED = EXAMPLES


def run(example, folder, monkeypatch):
    monkeypatch.chdir(folder)
    scope: dict = {}
    exec(example, scope)
    return scope


@pytest.mark.slow
def test_the_call_trains_and_keeps_a_checkpoint(tmp_path, monkeypatch):
    scope = run(WHOLE + STAGES + SPEED, tmp_path, monkeypatch)
    dense, low = scope["plan"].total("macs")
    assert low <= 0.6 * dense
    assert (tmp_path / "run" / "checkpoints" / "000000002").is_dir()
    assert set(scope["tuned"]) == {"params", "batch_stats"}


@pytest.mark.slow
def test_the_loop_trains_and_carries_its_moments(tmp_path, monkeypatch):
    scope = run(LOOP, tmp_path, monkeypatch)
    assert scope["state"].step == 2
    assert scope["moments"][0].mu["params"]["layers_2"]["bias"].any()
    assert not scope["moments"][0].mu["params"]["layers_0"]["kernel"]["left_factor"].any()


def test_the_block_from_scratch_has_one_normalisation_and_two_factors(tmp_path, monkeypatch):
    block = run(LOOP.split("\n\nmodel")[0] + "\n" + BLOCK, tmp_path, monkeypatch)["Block"](8, 2)
    outputs, variables = block.init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 3)))
    assert outputs.shape == (2, 8, 8, 8) and outputs.min() >= 0
    assert set(variables["params"]) == {"BatchNorm_0", "SeparableConv_0"}
    assert set(variables["params"]["SeparableConv_0"]) == {"kernel"}
