"""Bad input on the command line: one line that says what is wrong, and nothing is written."""

import importlib.util
import itertools
import sys

import jax
import numpy as np
import pytest

from lowrank_jax.cli import journeys
from lowrank_jax.cli.main import main
from lowrank_jax.io.weights import load_weights, save_weights

MODELS = """
from flax import linen as nn

class Net(nn.Module):
    width: int = 8

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.width, (3, 3))(x))
        return nn.Dense(4)(x.mean((1, 2)))

class Pair(Net):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x), x

class Needs(nn.Module):
    width: int

class Raises(nn.Module):
    def __call__(self, x):
        raise RuntimeError("boom\\nand more")

class Asks(nn.Module):
    def __call__(self, x, train):
        return x

number = 3
def function():
    return 4
"""
PIXELS = np.random.default_rng(0).random((4, 8, 8, 3))
ARRAYS = {
    "empty": PIXELS[:0],
    "flat": PIXELS[:, :0],
    "long": (PIXELS * 255).astype("int64"),
    "short": (PIXELS * 255).astype("uint16"),
    "complex": PIXELS.astype("complex64"),
    "fields": np.zeros((4, 8, 8, 3), [("a", "f4")]),
    "flags": PIXELS > 0.5,
    "nan": PIXELS * np.nan,
    "high": np.array([0, 1, 2, 9]),
    "negative": np.array([0, 1, 2, -1]),
    "floats": np.zeros(4),
    "three": np.arange(3),
    "one_hot": np.eye(4, dtype=int),
}
names = itertools.count()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a model, its checkpoint, images, and files that are none of these.

    A name of its own for each test: Python keeps the modules that it has imported.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = f"models{next(names)}"
    for name, text in {
        module: MODELS,
        f"{module}_broken": "import nothing_of_this_name",
        f"{module}_syntax": "def (:",
        f"{module}_exits": "import sys; sys.exit(5)",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    spec = importlib.util.spec_from_file_location(module, tmp_path / f"{module}.py")
    spec.loader.exec_module(models := importlib.util.module_from_spec(spec))
    x = PIXELS.astype(np.float32)
    save_weights("net.npz", models.Net().init(jax.random.key(0), x))
    for name, array in {"x": x, **ARRAYS}.items():
        np.save(f"{name}.npy", array)
    np.save("objects.npy", np.array([object()]), allow_pickle=True)
    np.savez("arrays.npz", x=x)
    (tmp_path / "nothing.npy").touch()
    (tmp_path / "cut.npz").touch()
    (tmp_path / "text.npy").write_text("0 1 2 3")
    return module


def run(module, command="plan", **options):
    """The status of a command whose other options are right."""
    known = {"checkpoint": "net.npz", "model": f"{module}:Net", "images": "x.npy", "out": "out"}
    pairs = (known | options).items()
    try:
        return main([command, *(f"--{key.replace('_', '-')}={value}" for key, value in pairs)])
    except SystemExit as error:  # as argparse ends
        return error.code


def assert_refused(capsys, tmp_path, status, message):
    error = capsys.readouterr().err.strip().split("\n")
    assert status == 2 and not (tmp_path / "out").exists()
    assert message in error[-1] and len(error[-1]) < 600
    assert len(error) == 1
    assert not any("Traceback" in line for line in error)


@pytest.mark.parametrize(
    "name, message",
    [
        ("nothing", "nothing.npy is no .npy file of numbers"),
        ("text", "text.npy is no .npy file of numbers"),
        ("objects", "objects.npy is no .npy file of numbers"),
        ("missing", "There is no file or folder missing.npy"),
        ("empty", "an array (0, 8, 8, 3); give images"),
        ("flat", "an array (4, 0, 8, 3); give images"),
        ("long", "type int64; give uint8 from 0 to 255, or floats"),
        ("short", "type uint16; give uint8 from 0 to 255, or floats"),
        ("complex", "type complex64; give uint8"),
        ("fields", "give uint8 from 0 to 255, or floats"),
        ("flags", "type bool; give uint8"),
        ("nan", "NaN or infinite"),
    ],
)
def test_images(folder, name, message, capsys, tmp_path):
    assert_refused(capsys, tmp_path, run(folder, images=f"{name}.npy"), message)


@pytest.mark.parametrize(
    "name, message",
    [
        ("nothing.npy", "is no .npy file of numbers"),
        ("arrays.npz", "float32 of shape (4, 8, 8, 3); give one int for each of the 4 images"),
        ("cut.npz", "cut.npz is no .npz file of numbers"),
        ("missing.npy", "There is no file missing.npy"),
        ("high.npy", "labels from 0 to 9; give those of the network, 0 to 3"),
        ("negative.npy", "labels from -1 to 2; give those of the network, 0 to 3"),
        ("floats.npy", "float64 of shape (4,); give one int for each of the 4 images"),
        ("three.npy", "int64 of shape (3,); give one int for each of the 4 images"),
        ("one_hot.npy", "int64 of shape (4, 4); give one int"),
    ],
)
def test_labels(folder, name, message, capsys, tmp_path):
    assert_refused(capsys, tmp_path, run(folder, labels=name, curve="0.5"), message)


@pytest.mark.parametrize(
    "model, message",
    [
        ("", "is no import path; give one such as package.module:Class"),
        (":", "is no import path; give one such as package.module:Class"),
        (":number", "has no model 'number'; give a class or a function that makes a module"),
        (":function", "makes a int; give a class or a function that makes a module of Linen"),
        (":Nope", "has no model 'Nope'; give a class or a function"),
        (":nn", "has no model 'nn'; give a class or a function"),
        ("_none:Net", "cannot be imported; give a module that can: ModuleNotFoundError"),
        (
            "_broken:Net",
            "give a module that can: ModuleNotFoundError: No module named 'nothing_of",
        ),
        ("_syntax:Net", "cannot be imported; give a module that can: SyntaxError"),
        ("_exits:Net", "cannot be imported; give a module that can: SystemExit: 5"),
        (":Needs", "give --model-args that it takes, not {}: TypeError"),
        (
            ":Raises",
            "images (8, 8, 3) with --model-kwargs {}; give what its call takes: RuntimeError: boom",
        ),
        (
            ":Asks",
            "images (8, 8, 3) with --model-kwargs {}; give what its call takes: TypeError",
        ),
        (":Pair", "gives a tuple; give a module whose output is one array"),
    ],
)
def test_models(folder, model, message, capsys, tmp_path):
    assert_refused(capsys, tmp_path, run(folder, model=folder + model), message)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model_args": '{"width": "x"}'}, "does not run on images"),
        ({"model_args": '{"width": -1}'}, "does not run on images"),
        ({"model_args": '{"depth": 1}'}, 'not {"depth": 1}: TypeError'),
        ({"model_args": "[1]"}, "is no JSON object"),
        ({"model_args": "{"}, "give JSON"),
        (
            {"model_kwargs": '{"train": false}'},
            'with --model-kwargs {"train": false}; give what its call takes: TypeError',
        ),
        ({"checkpoint": "missing.npz"}, "There is no file or folder missing.npz"),
        ({"checkpoint": "arrays.npz"}, "does not hold the variables of"),
        ({"count": "0"}, "0 is not allowed; give an int of at least 1"),
        ({"size": "8"}, "--size is for pictures, and x.npy holds arrays of one shape"),
        ({"size": "8x8x8"}, "8x8x8 is not allowed; give one or two, as in 224x320"),
        ({"size": "a"}, "'a' is not allowed; give an int of at least 1"),
        ({"images": "missing"}, "There is no file or folder missing"),
        ({"images": "missing:images"}, "missing cannot be imported"),
        ({"checkpoint": "x.npy"}, "the format '.npy' is not known"),
        ({"mean": "0.5,0.5"}, "--mean has 2 values for 3 channels"),
        ({"mean": "nan"}, "nan is not allowed; give finite numbers"),
        ({"mean": "a"}, "'a' is not allowed; give numbers such as"),
        ({"std": "0"}, "0 is not allowed; give a positive number"),
        ({"batch": "0"}, "0 is not allowed; give an int of at least 1"),
        ({"multiple": "x"}, "'x' is not allowed; give an int of at least 1"),
        ({"curve": "0.5,2"}, "give shares above 0 and up to 1"),
        ({"curve": "0"}, "give shares above 0 and up to 1"),
        ({"curve": "nan"}, "give finite numbers"),
        ({"curve": ""}, "give numbers such as"),
        ({"budget": "macs=0"}, "Budget of macs: 0 is not allowed"),
        ({"budget": "macs=1e400"}, "Budget of macs: inf is not allowed"),
        ({"budget": "macs=nan"}, "is no budget; give one such as macs=0.5"),
        ({"budget": "speed=1"}, "is no budget; give one such as macs=0.5"),
        ({"budget": "macs=2"}, "cannot be met; the least possible is"),
    ],
)
def test_options(folder, options, message, capsys, tmp_path):
    assert_refused(capsys, tmp_path, run(folder, **options), message)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sweeps": "-1"}, "-1 is not allowed; give an int of at least 0"),
        ({"steps": "-1"}, "-1 is not allowed; give an int of at least 0"),
        ({"plan": "missing.json"}, "missing.json"),
        ({"plan": "x.npy"}, "x.npy is no whole plan"),
    ],
)
def test_options_of_compress(folder, options, message, capsys, tmp_path):
    assert_refused(capsys, tmp_path, run(folder, "compress", **options), message)


@pytest.mark.parametrize(
    "option, value, allowed",
    [
        ("seed", "99999999999999999999", "an int from 0 to 4294967295"),
        ("seed", "-1", "an int from 0 to 4294967295"),
        ("epochs", "-1", "an int of at least 0"),
        ("batch-size", "0", "an int of at least 1"),
        ("learning-rate", "nan", "a positive number"),
        ("learning-rate", "-0.1", "a positive number"),
        ("finetune-learning-rate", "inf", "a positive number"),
        ("finetune-epochs", "1.5", "an int of at least 1"),
        ("padding", "-1", "an int of at least 0"),
        ("crop", "99", "an int from 1 to 32"),
    ],
)
def test_options_of_training(option, value, allowed, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        main(["cifar10", f"--{option}={value}", "--out", str(tmp_path / "out")])
    assert_refused(capsys, tmp_path, error.value.code, f"is not allowed; give {allowed}")


@pytest.mark.parametrize(
    "command, option, near", [("plan", "buget", "--budget"), ("finetune", "epoch_s", "--epochs")]
)
def test_an_option_that_is_not_known_is_refused_with_the_nearest(
    folder, command, option, near, capsys, tmp_path
):
    status = run(folder, command, **{option: 1} | ({"steps": 1} if command == "finetune" else {}))
    assert_refused(capsys, tmp_path, status, f"did you mean {near}?")


@pytest.mark.parametrize("names", [("plan", "budget"), ("budget", "plan")])
def test_a_plan_and_a_budget_exclude_each_other(folder, capsys, tmp_path, names):
    options = {"plan": "plan.json", "budget": "macs=0.5"}
    status = run(folder, "compress", **{name: options[name] for name in names})
    assert_refused(capsys, tmp_path, status, "not allowed with argument")


def test_a_plan_has_its_ranks_already(folder, capsys, tmp_path):
    status = run(folder, "compress", plan="plan.json", multiple=8)
    assert_refused(capsys, tmp_path, status, "leave --multiple out")


def test_a_checkpoint_is_read_before_the_images(folder, capsys, tmp_path):
    status = run(folder, checkpoint="missing.npz", images="missing.npy")
    assert_refused(capsys, tmp_path, status, "missing.npz")


def test_a_budget_of_the_whole_network_is_valid(folder, capsys):
    assert run(folder, "compress", budget="macs=1.0") == 0
    assert "There is nothing to do" in capsys.readouterr().out
    dense, kept = load_weights("net.npz"), load_weights("out/variables.npz")
    assert jax.tree.all(jax.tree.map(np.array_equal, dense, kept))


def test_an_error_of_more_lines_is_one_line_and_status_2(monkeypatch, capsys, tmp_path):
    def fail(*_):
        raise ValueError("the first\n  and the second")

    monkeypatch.setattr(journeys, "_run", fail)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "lowrank-jax demo: the first and the second\n"


def test_ctrl_c_is_one_line_and_status_130(monkeypatch, capsys, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(journeys, "_run", stop)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "lowrank-jax demo: stopped; nothing was written\n"
    assert not list(tmp_path.iterdir())
