"""A run that ended early goes on to the very parameters that it would have had."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import optax
import pytest

from lowrank_jax import load_weights, reconstruct
from lowrank_jax.io.seals import seal
from lowrank_jax.training import Loss, checkpoints, cross_entropy, distillation, finetune, order
from lowrank_jax.training.checkpoints import Checkpoints, held
from lowrank_jax.training.facts import check_facts
from lowrank_jax.training.fingerprints import fingerprint, magnitudes
from lowrank_jax.training.losses import taught
from lowrank_jax.training.metrics import read_metrics
from lowrank_jax.training.signals import TERMINATED

DRIVER = Path(__file__).with_name("killed_run.py")
KILLS = 20
OPTIONS = dict(steps=8, batch_size=16, save_every=3, average=0.9)


@pytest.fixture
def tune(plain, batch, tmp_path):
    """`finetune` of the plain network in a folder; other arguments by name."""

    def run(batches=batch, **options):
        return finetune(*plain, batches, **OPTIONS | {"folder": tmp_path / "run"} | options)

    return run


def scaled(factor):
    """A loss of the user, which has a number of the function around it."""
    return Loss.of(lambda outputs: factor * outputs.mean())


@pytest.fixture
def whole(tune):
    """What a run gives that nothing stops."""
    return tune(folder=None)


def steps(tmp_path):
    return Checkpoints(tmp_path / "run").steps()


def test_a_run_in_a_folder_is_the_run_without_one_and_is_not_repeated(tune, whole, tmp_path):
    chex.assert_trees_all_equal(tune(), whole)
    assert steps(tmp_path) == [8, 6]
    chex.assert_trees_all_equal(tune(batches=iter([])), whole)


@pytest.mark.slow
def test_a_longer_run_goes_on_where_the_shorter_one_ended(tune, tmp_path):
    sgd = dict(tx=optax.sgd(0.1, momentum=0.9), accumulate=2)
    wanted = tune(folder=None, **sgd)
    tune(**sgd | {"steps": 5})
    chex.assert_trees_all_equal(tune(**sgd), wanted)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [3, 4, 5, 6, 8]


@pytest.mark.parametrize("damage", ["changed", "cut short", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tune, whole, tmp_path, damage):
    tune()
    newest = tmp_path / "run" / "checkpoints" / "000000008"
    file = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content if damage == "changed" else content[:-1])
    with pytest.warns(UserWarning, match=f"{newest} is damaged .* and left out"):
        found = tune()
    chex.assert_trees_all_equal(found, whole)
    assert steps(tmp_path) == [8, 6]


def test_sigterm_saves_the_step_and_ends_with_its_status(tune, whole, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end, at_step(5, signal.SIGTERM, monkeypatch):
        tune()
    assert end.value.code == TERMINATED == 143
    assert steps(tmp_path) == [5, 3] and signal.getsignal(signal.SIGTERM) is before
    chex.assert_trees_all_equal(tune(), whole)


def test_ctrl_c_saves_the_step(tune, tmp_path, monkeypatch):
    with (
        pytest.raises(KeyboardInterrupt, match="step 2 is saved"),
        at_step(2, signal.SIGINT, monkeypatch),
    ):
        tune()
    assert steps(tmp_path) == [2]


@contextlib.contextmanager
def at_step(step, number, monkeypatch):
    """Within it, this process gets a signal when the batch of a step is made."""
    rows = order._Shuffled._rows

    def signalled(self, place):
        if place == step - 1:
            os.kill(os.getpid(), number)
        return rows(self, place)

    with monkeypatch.context() as patch:
        patch.setattr(order._Shuffled, "_rows", signalled)
        yield


def test_a_full_disk_loses_nothing_that_was_saved(tune, whole, tmp_path, monkeypatch):
    write = checkpoints.write_orbax

    def full(folder, items):
        write(folder, items)
        if int(items["training"]["step"]) == 6:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_orbax", full)
    with pytest.raises(OSError, match=r"step 6 was not saved.*000000003; make room"):
        tune()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["000000003"]
    monkeypatch.undo()
    chex.assert_trees_all_equal(tune(), whole)


def test_a_stream_is_read_forward_and_says_so(tune, batch, caplog):
    parts = [tuple(x[i : i + 16] for x in batch) for i in range(0, 64, 16)] * 2
    wanted = tune(iter(parts), folder=None, tx=optax.sgd(0.1))
    tune(iter(parts), steps=3, tx=optax.sgd(0.1))
    chex.assert_trees_all_equal(tune(iter(parts), tx=optax.sgd(0.1)), wanted)
    assert "the first 3 are read and dropped" in caplog.text


@pytest.mark.parametrize(
    "options, text",
    [
        ({"seed": 1}, "holds a run with seed=0, not 1"),
        ({"batch_size": 8}, "holds a run with batch_size=16, not 8"),
        (
            {"loss": "squared_error"},
            r"holds a run with loss='1 cross_entropy\(smoothing=0\)', not '1 squared_error'",
        ),
        ({"steps": 4}, "holds a run of 5 steps, more than 4"),
        ({"average": None}, "average= or accumulate=: average/bias differs"),
        ({"tx": optax.adam(0.1)}, "is of another network or optimiser, .*: optimizer/"),
    ],
)
def test_a_folder_of_another_run_is_refused(tune, options, text):
    tune(steps=5)
    with pytest.raises(ValueError, match=text):
        tune(**options)


@pytest.mark.parametrize("leaf", ["hidden", "head", "bias"])
@pytest.mark.parametrize("steps", [5, 8], ids=["unfinished", "finished"])
def test_a_folder_of_a_run_from_other_variables_is_refused(plain, batch, tmp_path, steps, leaf):
    apply, start = plain
    options = OPTIONS | {"folder": tmp_path / "run"}
    finetune(apply, start, batch, **options | {"steps": steps})
    other = {**start, leaf: jax.tree.map(lambda x: 1.01 * x, start[leaf])}
    with pytest.raises(ValueError, match=rf"began from other variables.* of {leaf}"):
        finetune(apply, other, batch, **options)


def test_a_start_with_other_last_digits_and_an_older_checkpoint_go_on(plain, batch, tmp_path):
    apply, start = plain
    options = OPTIONS | {"folder": tmp_path / "run"}
    wanted = finetune(apply, start, batch, **options)
    again = jax.tree.map(lambda x: x * (1 + 1e-5), start)
    chex.assert_trees_all_equal(finetune(apply, again, batch, **options), wanted)
    newest = tmp_path / "run" / "checkpoints" / "000000008"
    facts = json.loads((newest / "facts.json").read_text())
    assert facts.pop("start")
    (newest / "facts.json").write_text(json.dumps(facts))
    seal(newest)
    other = jax.tree.map(lambda x: 2 * x, start)
    chex.assert_trees_all_equal(finetune(apply, other, batch, **options), wanted)


def test_another_learning_rate_and_a_complete_run_are_told(tune, caplog):
    tune(steps=5)
    tune(learning_rate=0.01)
    assert "goes on after step 5" in caplog.text
    assert "The run had learning_rate=0.02 and goes on with 0.01." in caplog.text
    tune(learning_rate=0.01)
    assert "has all its 8 steps; nothing is done." in caplog.text


@pytest.mark.parametrize("part", [0, 1], ids=["inputs", "labels"])
def test_a_folder_of_a_run_on_other_data_is_refused(tune, batch, part):
    tune(steps=5)
    other = [x[::-1] if i == part else x for i, x in enumerate(batch)]
    with pytest.raises(ValueError, match="holds a run with data="):
        tune(tuple(other))


class Counted(list):
    """Batches that count how often they are read."""

    reads = 0

    def __getitem__(self, number):
        self.reads += 1
        return super().__getitem__(number)


def test_the_checkpoints_do_not_read_the_data_again(tune, batch):
    data = Counted([batch])
    tune(data, save_every=1)
    assert data.reads == 8 + 2  # the steps, a look for raw images, and the fingerprint


def test_a_folder_of_a_run_with_another_teacher_is_refused(tune, plain):
    dense = reconstruct(plain[1])
    tune(steps=5, teacher=dense)
    with pytest.raises(ValueError, match="holds a run with teacher="):
        tune(teacher=jax.tree.map(lambda x: x + 1, dense))


@pytest.mark.parametrize(
    "before, after",
    [
        (distillation(4.0), distillation(1.0)),
        (cross_entropy(), cross_entropy(0.3)),
        (cross_entropy(), 2 * cross_entropy()),
        (taught(0.5, 4.0), taught(0.5, 2.0)),
        (scaled(1.0), scaled(3.0)),
    ],
    ids=str,
)
def test_a_loss_with_other_settings_is_another_loss(before, after):
    one, two = ({"loss": str(Loss.of(given))} for given in (before, after))
    check_facts(Path("run"), one, one)
    with pytest.raises(ValueError, match="run holds a run with loss="):
        check_facts(Path("run"), two, one)


@pytest.mark.parametrize("older", ["0.5 distillation + 0.5 cross_entropy", "1 cross_entropy"])
def test_the_loss_of_an_older_version_is_known_by_its_names(older):
    own = {"loss": str(taught(0.5 if "+" in older else 0.0, 4.0))}
    check_facts(Path("run"), own, {"loss": older})
    with pytest.raises(ValueError, match="holds a run with loss="):
        check_facts(Path("run"), own, {"loss": "1 squared_error"})


def test_a_folder_is_used_by_one_run_at_a_time(tune, tmp_path):
    with held(tmp_path / "run"), pytest.raises(ValueError, match="in use by another run"):
        tune()


def test_a_file_in_the_place_of_the_folder_is_named(tune, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(FileExistsError, match="run is a file; give another path"):
        tune()


def test_a_checkpoint_is_readable_as_weights(tune, plain, batch, tmp_path):
    tune(average=None)
    found = load_weights(tmp_path / "run" / "checkpoints" / "000000008")
    chex.assert_trees_all_equal_shapes_and_dtypes(found, plain[1])
    facts = json.loads((tmp_path / "run/checkpoints/000000008/facts.json").read_text())
    assert facts.pop("data") == fingerprint(batch)
    assert facts.pop("start") == magnitudes(plain[1])
    assert facts.pop("loss") == "1 cross_entropy(smoothing=0)"
    settings = {"rate": 0.02, "clip": 1.0, "accumulate": 1, "average": None, "dtype": None}
    assert facts == {"seed": 0, "examples": 64, "batch_size": 16, **settings}


def killed(home, kills):
    """What the driver says of a run that is killed so many times and then ends."""
    given = [sys.executable, str(DRIVER), str(home), str(kills)]
    done = subprocess.run(given, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")
@pytest.mark.slow
def test_kills_at_random_moments_change_no_bit_of_the_result(tmp_path):
    *found, end = killed(tmp_path, KILLS)
    assert len(found) == KILLS and all(kill["killed"] for kill in found)
    assert all(kill["lost"] <= 4 for kill in found)  # steps between two checkpoints
    assert end == {"equal": True, "left": []}
