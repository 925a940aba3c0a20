"""The commands plan and compress, on a small model by import path."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax import load_weights, lowrank, save_weights
from lowrank_jax.cli.main import main
from lowrank_jax.models import CifarResNet
from lowrank_jax.planning.plans import Plan

MODEL = ["--model", "lowrank_jax.models:CifarResNet", "--model-args", '{"depth": 8}']


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Arguments that name a checkpoint and images."""
    folder = tmp_path_factory.mktemp("job")
    variables = CifarResNet(depth=8).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    save_weights(folder / "dense.npz", variables)
    np.save(
        folder / "images.npy", np.random.default_rng(0).integers(0, 255, (16, 8, 8, 3), np.uint8)
    )
    return ["--checkpoint", str(folder / "dense.npz"), "--images", str(folder / "images.npy")]


def test_compress_writes_a_checkpoint_that_runs_its_plan_and_a_report(files, tmp_path, capsys):
    out = tmp_path / "out"
    normalise = ["--mean", "0.5,0.5,0.5", "--std", "0.25"]
    assert (
        main(["compress", *files, *MODEL, *normalise, "--budget", "macs=0.5", "--out", str(out)])
        == 0
    )
    assert sorted(path.name for path in out.iterdir()) == [
        "plan.json",
        "report.json",
        "report.md",
        "variables.npz",
    ]
    small, plan = load_weights(out / "variables.npz"), Plan.load(out / "plan.json")
    dense, low = plan.total("macs")
    assert 0.4 * dense < low <= 0.5 * dense
    images = jnp.asarray((np.load(files[3]) / np.float32(255) - 0.5) / 0.25, jnp.float32)
    model = CifarResNet(depth=8)
    found, wanted = lowrank(model.apply)(small, images), model.apply(load_weights(files[1]), images)
    error = float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))
    facts = json.loads((out / "report.json").read_text())
    assert facts["output_error"] == pytest.approx(error, rel=1e-3) and 0 < error < 1
    assert "at most 0.5 of the dense macs" in capsys.readouterr().out


def test_plan_writes_a_plan_that_compress_takes(files, tmp_path):
    first, second = tmp_path / "plan", tmp_path / "compressed"
    assert (
        main(
            [
                "plan",
                *files,
                *MODEL,
                "--budget",
                "parameters=0.6",
                "--multiple",
                "4",
                "--out",
                str(first),
            ]
        )
        == 0
    )
    plan = Plan.load(first / "plan.json")
    assert plan.ranks and all(scheme.rank % 4 == 0 for scheme in plan.ranks.values())
    arguments = [
        "compress",
        *files,
        *MODEL,
        "--plan",
        str(first / "plan.json"),
        "--sweeps",
        "0",
        "--out",
        str(second),
    ]
    assert main(arguments) == 0
    assert Plan.load(second / "plan.json") == plan


def test_plan_draws_the_curve_of_agreement_or_of_accuracy(files, tmp_path, capsys):
    common = ["plan", *files, *MODEL, "--curve", "0.6,1.0"]
    assert main([*common, "--out", str(tmp_path / "one")]) == 0
    assert (tmp_path / "one" / "curve.png").stat().st_size > 1000
    facts = json.loads((tmp_path / "one" / "report.json").read_text())
    assert (
        facts["curve"][1][1] == 1.0 and facts["curve"][0][0] < facts["curve"][1][0]
    )  # all dense: all images agree
    model, images = (
        CifarResNet(depth=8),
        jnp.asarray(np.load(files[3]) / np.float32(255), jnp.float32),
    )
    labels = np.array(model.apply(load_weights(files[1]), images).argmax(-1))
    labels[:8] = 10  # no class at all
    np.save(tmp_path / "labels.npy", labels)
    assert (
        main([*common, "--labels", str(tmp_path / "labels.npy"), "--out", str(tmp_path / "two")])
        == 0
    )
    assert "macs=1.0: 50.00%" in capsys.readouterr().out


def test_labels_that_do_not_fit_the_images_are_refused(files, tmp_path, capsys):
    np.save(tmp_path / "labels.npy", np.zeros(3, np.int64))
    common = ["plan", *files, *MODEL, "--curve", "0.5", "--labels", str(tmp_path / "labels.npy")]
    assert main([*common, "--out", str(tmp_path / "out")]) == 2
    assert "not one int for each of 16 images" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, text",
    [
        (["--model", "lowrank_jax.models"], "no import path"),
        (["--model", "lowrank_jax.models:Resnet"], "has no 'Resnet'"),
        (["--model", "no_such_package:Net"], "No module named"),
        (["--model-args", '{"deep": 8}'], "deep"),
        (["--model-args", '{"depth": 14}'], "does not hold the variables of"),
        (["--checkpoint", "missing.npz"], "missing.npz"),
        (["--images", "missing.npy"], "missing.npy"),
        (["--mean", "1,2"], "--mean has 2 values for 3 channels"),
        (["--budget", "macs=0.001"], "least"),
        (["--budget", "macs=7.5"], "7.5"),
    ],
)
def test_what_cannot_be_used_ends_with_one_line_and_writes_nothing(
    files, tmp_path, capsys, change, text
):
    out = tmp_path / "out"
    assert main(["plan", *files, *MODEL, *change, "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("lowrank-jax plan: ") and text in message
    assert not out.exists()


@pytest.mark.parametrize(
    "change", [["--budget", "half"], ["--budget", "time=0.5"], ["--model-args", "{"]]
)
def test_options_that_do_not_parse_are_refused(files, change, capsys):
    with pytest.raises(SystemExit) as info:
        main(["plan", *files, *MODEL, *change])
    assert info.value.code == 2 and change[0] in capsys.readouterr().err
