"""What a command prints at its end runs in a new process."""

import re
import subprocess
import sys

import pytest
from flax import nnx

from lowrank_jax import Plan, load_weights, lowrank, save_weights
from lowrank_jax.cli.main import main
from lowrank_jax.nnx import functional, rebuilt

AFTER = "print(type(outputs).__name__, *outputs.shape, float(abs(outputs).sum()))"


def write_module(user):
    model = user.Module(rngs=nnx.Rngs(5))
    save_weights("module.npz", nnx.state(model, nnx.Not(nnx.RngState)))


def run(user, command, model, *options):
    """Runs a command on a model of the user; the options of the call are those of the model."""
    write_module(user)
    path = {"Net": "net.npz", "make": "net.npz", "function": "function.npz"}.get(
        model, "module.npz"
    )
    kwargs = {"Net": '{"train": false}', "function": '{"scale": 2.0}'}.get(model, "{}")
    given = ["--checkpoint", path, "--model", f"{user.__name__}:{model}", "--images", "x.npy"]
    return main([command, *given, "--model-kwargs", kwargs, *options])


def printed_lines(text):
    """The lines of Python in what a command printed."""
    return "\n".join(re.findall(r"^  (.*)$", text.partition("In Python")[2], re.M))


def result_of(lines, tmp_path):
    """What the lines print in a new process in the current folder."""
    script = f"import numpy as np\nimages = np.load('x.npy')\n{lines}\n{AFTER}"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1:]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["Net", "Module"])
def test_the_lines_after_compress_load_and_run_the_network(model, user, tmp_path, capsys, caplog):
    assert run(user, "compress", model, "--budget", "macs=0.7") == 0
    text = capsys.readouterr().out
    lines, small = printed_lines(text), load_weights("lowrank-jax-compress/variables.npz")
    said = "6 images give 96 samples for the 72 inputs of the widest layer, "
    assert said in caplog.text and "45 images or more are recommended." in caplog.text
    if model == "Net":
        assert lines.count("\n") == 2
        wanted = lowrank(user.Net().apply)(small, user.X)
    else:
        apply, variables = functional(rebuilt(user.Module(rngs=nnx.Rngs(0)), small))
        wanted = lowrank(apply)(variables, user.X)
    *shape, total = result_of(lines, tmp_path)
    assert shape == ["6", "4"]
    assert float(total) == pytest.approx(float(abs(wanted).sum()), rel=1e-4)


@pytest.mark.parametrize("model", ["function", "make_module"])
@pytest.mark.slow
def test_the_lines_after_plan_decompose_and_run_the_network(model, user, tmp_path, capsys):
    assert run(user, "plan", model, "--budget", "macs=0.7") == 0
    lines = printed_lines(capsys.readouterr().out)
    assert Plan.load("lowrank-jax-plan/plan.json").ranks
    assert result_of(lines, tmp_path)[:2] == ["6", "4"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["make", "Module"])
def test_the_lines_after_finetune_load_and_run_the_network(model, user, tmp_path, capsys):
    write_module(user)
    options = ["--labels", "y.npy", "--steps", "2", "--batch-size", "3", "--out", "run"]
    assert run(user, "finetune", model, *options) == 0
    assert result_of(printed_lines(capsys.readouterr().out), tmp_path)[:2] == ["6", "4"]


@pytest.mark.slow
def test_a_model_of_nnx_is_compressed_by_a_plan_taught_and_runs(user, capsys):
    assert run(user, "plan", "Module", "--budget", "macs=0.7") == 0
    options = ["--plan", "lowrank-jax-plan/plan.json", "--steps", "2", "--batch-size", "3"]
    assert run(user, "finetune", "Module", *options, "--out", "run") == 0
    small = load_weights("run/variables.npz")
    apply, variables = functional(rebuilt(user.Module(rngs=nnx.Rngs(0)), small))
    assert lowrank(apply)(variables, user.X).shape == (6, 4)
    assert "drop" not in small and 0 in small["layers"]
