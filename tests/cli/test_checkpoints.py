"""The commands plan and compress, on a small model by import path."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax import Plan, compress, load_weights, lowrank, save_weights
from lowrank_jax.cli import compress_command, jobs
from lowrank_jax.cli.main import main
from lowrank_jax.report import writing

MODEL = """
from flax import linen as nn


class Tiny(nn.Module):
    width: int = 8

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Conv(self.width, (3, 3))(x))
        x = nn.BatchNorm(not train)(nn.Conv(self.width, (3, 3))(x))
        return nn.Dense(10)(x.mean((1, 2)))
"""
TINY = ["--model", "tiny_network:Tiny", "--model-kwargs", '{"train": false}']


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Arguments that name a checkpoint, images and a model."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "tiny_network.py").write_text(MODEL)
    sys.path.insert(0, str(folder))
    from tiny_network import Tiny

    init = functools.partial(Tiny().init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.uniform(0.1, 0.3, x.shape).astype(x.dtype), shapes)
    save_weights(folder / "dense.npz", variables)
    images = rng.integers(0, 255, (16, 8, 8, 3), np.uint8)
    np.save(folder / "images.npy", images)
    given = ["--checkpoint", str(folder / "dense.npz"), "--images", str(folder / "images.npy")]
    yield [*given, *TINY]
    sys.path.remove(str(folder))


def network(files):
    """The dense network of the arguments."""
    from tiny_network import Tiny

    return lambda variables, x: Tiny().apply(variables, x, train=False), load_weights(files[1])


def scaled(files):
    return jnp.asarray(np.load(files[3]) / np.float32(255), jnp.float32)


@pytest.fixture
def passes(monkeypatch):
    """The list of calibrations that were run."""
    found, whole = [], jobs.calibrate

    def counted(*args, **kwargs):
        found.append(kwargs)
        return whole(*args, **kwargs)

    monkeypatch.setattr(jobs, "calibrate", counted)
    return found


@pytest.mark.slow
def test_compress_writes_a_checkpoint_that_runs_its_plan_and_a_report(
    files, tmp_path, capsys, passes
):
    out, normalise = tmp_path / "out", ["--mean", "0.5,0.5,0.5", "--std", "0.25"]
    assert main(["compress", *files, *normalise, "--budget", "macs=0.5", "--out", str(out)]) == 0
    names = {"manifest.json", "plan.json", "report.html", "report.json", "report.md"}
    pictures = {f"{name}.png" for name in ("weights", "multiply_adds", "spectra", "filters")}
    assert {path.name for path in out.iterdir()} == names | pictures | {"variables.npz"}
    small, plan = load_weights(out / "variables.npz"), Plan.load(out / "plan.json")
    dense, low = plan.total("macs")
    assert 0.4 * dense < low <= 0.5 * dense
    (apply, variables), images = network(files), (scaled(files) - 0.5) / 0.25
    found, wanted = lowrank(apply)(small, images), apply(variables, images)
    error = float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))
    facts = json.loads((out / "report.json").read_text())
    assert facts["output_error"] == pytest.approx(error, rel=1e-3) and 0 < error < 1
    assert facts["held_out_error"].keys() == plan.ranks.keys()
    assert "at most 0.5 of the dense macs" in capsys.readouterr().out
    assert passes == [{"train": False}]


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without their pictures, which take long to draw."""
    monkeypatch.setattr(writing, "draw_all", lambda pictures: {})


@pytest.mark.parametrize("budget", ["parameters=0.6", "bytes=0.95"])
def test_plan_writes_a_plan_that_compress_takes(files, tmp_path, budget, undrawn):
    first, second = tmp_path / "plan", tmp_path / "compressed"
    options = ["--budget", budget, "--multiple", "2"]
    assert main(["plan", *files, *options, "--out", str(first)]) == 0
    plan = Plan.load(first / "plan.json")
    assert plan.ranks and all(scheme.rank % 2 == 0 for scheme in plan.ranks.values())
    options = ["--plan", str(first / "plan.json"), "--sweeps", "0"]
    assert main(["compress", *files, *options, "--out", str(second)]) == 0
    assert Plan.load(second / "plan.json") == plan


def test_steps_and_sweeps_are_those_of_compress(files, tmp_path, undrawn, monkeypatch):
    given = {}

    def spy(*args, **options):
        given.update(options)
        return compress(*args, **options)

    monkeypatch.setattr(compress_command, "compress", spy)
    options = ["--budget", "macs=0.6", "--steps", "2", "--sweeps", "0"]
    assert main(["compress", *files, *options, "--out", str(tmp_path / "out")]) == 0
    assert (given["steps"], given["sweeps"]) == (2, 0)


@pytest.mark.slow
def test_plan_draws_the_curve_of_agreement_from_one_calibration(files, tmp_path, passes):
    out = tmp_path / "out"
    assert main(["plan", *files, "--curve", "0.6,1.0", "--out", str(out)]) == 0
    assert (out / "curve.png").stat().st_size > 1000
    facts = json.loads((out / "report.json").read_text())
    (low, kept), (dense, agreement) = facts["curve"]
    assert low < dense and agreement == 1.0  # all dense: all images agree
    assert len(passes) == 1
    apply, variables = network(files)
    small, images = load_weights(out / "curve-0.6.npz"), scaled(files)
    same = lowrank(apply)(small, images).argmax(-1) == apply(variables, images).argmax(-1)
    assert float(same.mean()) == kept
    assert Plan.load(out / "curve-0.6-plan.json").total("macs")[1] == low


def test_with_labels_compress_sets_both_accuracies_beside_each_other(
    files, tmp_path, capsys, undrawn
):
    apply, variables = network(files)
    labels = np.array(apply(variables, scaled(files)).argmax(-1))
    labels[:4] = (labels[:4] + 1) % 10
    np.save(tmp_path / "labels.npy", labels)
    given = ["--labels", str(tmp_path / "labels.npy"), "--budget", "macs=1.0"]
    assert main(["compress", *files, *given, "--out", str(tmp_path / "out")]) == 0
    assert "Accuracy: 75.0 %, of the dense network 75.0 %" in capsys.readouterr().out
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert facts["accuracy"] == {"dense": 0.75, "low-rank": 0.75}
    assert "Accuracy: 75.0&nbsp;%" in (tmp_path / "out" / "report.html").read_text()


def test_a_curve_of_a_network_without_classes_is_refused(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jobs.Job, "class_count", 1)
    assert main(["plan", *files, "--curve", "0.5", "--out", str(tmp_path / "out")]) == 2
    assert "this one gives one number; leave --curve out" in capsys.readouterr().err


def test_labels_without_a_curve_are_refused_by_plan(files, tmp_path, capsys):
    assert main(["plan", *files, "--labels", "l.npy", "--out", str(tmp_path / "out")]) == 2
    assert "--labels needs --curve" in capsys.readouterr().err


def test_with_labels_the_curve_is_of_accuracy(files, tmp_path, capsys, undrawn):
    apply, variables = network(files)
    logits = np.array(apply(variables, scaled(files)))
    labels = logits.argmax(-1)
    labels[:8] = logits[:8].argmin(-1)
    np.save(tmp_path / "labels.npy", labels)
    given = ["--curve", "1.0", "--labels", str(tmp_path / "labels.npy")]
    assert main(["plan", *files, *given, "--out", str(tmp_path / "out")]) == 0
    assert "macs=1.0: Accuracy: 50.0 %, of the dense network 50.0 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, text",
    [
        (["--model-args", '{"width": 14}'], "does not hold the variables of"),
        (["--model-kwargs", "{}"], "train"),
        (["--model-kwargs", '{"train": true}'], "train=False"),
        (["--budget", "macs=0.001"], "least"),
        (["--budget", "macs=7.5"], "7.5"),
    ],
)
def test_what_cannot_be_used_ends_with_one_message_and_writes_nothing(
    files, tmp_path, capsys, change, text
):
    out = tmp_path / "out"
    assert main(["plan", *files, *change, "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("lowrank-jax plan: ") and text in message
    assert not out.exists()


@pytest.mark.parametrize(
    "change",
    [
        ["--budget", "half"],
        ["--budget", "time=0.5"],
        ["--model-args", "{"],
        ["--model-kwargs", "[1]"],
        ["--batch", "0"],
    ],
)
def test_options_that_do_not_parse_are_refused(files, change, capsys):
    with pytest.raises(SystemExit) as info:
        main(["plan", *files, *change])
    assert info.value.code == 2 and change[0] in capsys.readouterr().err
