"""The examples of docs/training.md run."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.S)
WHOLE, LOOP, STAGES = EXAMPLES


def run(example, folder, monkeypatch):
    monkeypatch.chdir(folder)
    scope: dict = {}
    exec(example, scope)
    return scope


@pytest.mark.slow
def test_the_call_trains_and_keeps_a_checkpoint(tmp_path, monkeypatch):
    scope = run(WHOLE + STAGES, tmp_path, monkeypatch)
    dense, low = scope["plan"].total("macs")
    assert low <= 0.6 * dense
    assert (tmp_path / "run" / "checkpoints" / "000000002").is_dir()
    assert set(scope["tuned"]) == {"params", "batch_stats"}


def test_the_loop_trains_and_carries_its_moments(tmp_path, monkeypatch):
    scope = run(LOOP, tmp_path, monkeypatch)
    assert scope["state"].step == 2
    assert scope["moments"][0].mu["params"]["layers_2"]["bias"].any()
    assert not scope["moments"][0].mu["params"]["layers_0"]["kernel"]["left_factor"].any()
