"""The commands, their reports and the weights they write."""

import json

import jax
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax import data
from lowrank_jax.cli import main as cli
from lowrank_jax.experiments import cifar10 as experiment
from lowrank_jax.experiments import journey
from lowrank_jax.io import weights as checkpoint
from lowrank_jax.models import NIN


@pytest.fixture
def tiny(monkeypatch):
    """A part of the sample that every machine runs in seconds."""
    whole = data.sample

    def part(split, data_dir=None):
        found = whole(split)
        return data.Dataset(found.images[:50], found.labels[:50])

    monkeypatch.setattr(data, "sample", part)
    monkeypatch.setattr(data, "cifar10", part)
    quick = {"images": 25, "batch_size": 4, "rounds": 2, "limit": 0.1}
    monkeypatch.setattr(journey.run, "__kwdefaults__", journey.run.__kwdefaults__ | quick)


@pytest.mark.slow
def test_the_demo_writes_a_whole_report(tiny, tmp_path, capsys):
    out = tmp_path / "report"
    assert cli.main(["demo", "--out", str(out), "--finetune-epochs", "1"]) == 0
    pictures = {"accuracy.png", "weights.png", "multiply_adds.png", "spectra.png", "filters.png"}
    others = {"report.html", "report.md", "report.json", "lowrank.npz", "dense.npz"}
    assert {path.name for path in out.iterdir()} == pictures | others | {"manifest.json"}
    printed = capsys.readouterr().out
    rows = [line for line in (out / "report.md").read_text().splitlines() if "| Conv_" in line]
    assert len(rows) == 6 and all(row in printed for row in rows)
    stages = json.loads((out / "report.json").read_text())["stages"]
    given, planned = stages["tuned"], stages["planned"]
    assert given["layers"]["Conv_0"][0] == [14400, 9750]  # 1.48 times fewer weights
    assert given["layers"]["Conv_2"][0] == [460800, 28800]  # 16 times
    assert planned["macs"][1] <= given["macs"][1]
    small = checkpoint.load_weights(out / "lowrank.npz")
    images = np.zeros((1, 32, 32, 3), np.float32)
    assert np.isfinite(lr.lowrank(NIN().apply)(small, images)).all()


@pytest.mark.slow
def test_the_experiment_trains_and_then_starts_from_its_own_weights(tiny, tmp_path, monkeypatch):
    options = ["--batch-size", "50", "--crop", "24", "--padding", "0", "--finetune-epochs", "1"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli.main(["cifar10", *options, "--epochs", "1", "--out", str(first)]) == 0
    stages = json.loads((first / "report.json").read_text())["stages"]
    assert stages["tuned"]["ranks"] == {"Conv_0": 10, "Conv_2": 20}
    assert len(stages["planned and tuned"]["curve"]) == 1

    def stop(model, variables, ranks, train, test, recipe, **options):
        given.append((variables, ranks, recipe.distill))
        raise ValueError("Far enough; stop here.")

    given = []
    monkeypatch.setattr(journey, "run", stop)
    again = [*options, "--ranks", "Conv_4=30", "--distill", "0"]
    again += ["--weights", str(first / "dense.npz"), "--out", str(second)]
    assert cli.main(["cifar10", *again]) == 2
    [(variables, ranks, distill)] = given
    dense = checkpoint.load_weights(first / "dense.npz")
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, dense))
    assert ranks == {"Conv_4": 30} and not distill


@pytest.mark.parametrize(
    "options, message",
    [
        (["--ranks", "Conv_9=3"], "The rule 'Conv_9' matches no layer; did you mean"),
        (["--ranks", "Conv_0=16"], "Conv_0: rank 16 is not allowed; give an int from 1 to 15"),
    ],
)
def test_a_bad_rank_ends_with_one_line_and_nothing_written(options, message, tmp_path, capsys):
    assert cli.main(["demo", "--out", str(tmp_path / "new"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [["--ranks", "Conv_0"], ["--ranks", "Conv_0=x"], ["--finetune-epochs", "0"]]
)
def test_options_that_do_not_parse_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", *options])
    assert "allowed" in (error := capsys.readouterr().err) or "is not layer=rank" in error


def test_a_folder_with_other_files_is_never_replaced(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "is no folder of results that an earlier run wrote" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


def test_missing_data_is_one_line_with_the_remedy(tmp_path, capsys):
    assert cli.main(["cifar10", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "--data-dir" in capsys.readouterr().err


def test_weights_survive_a_round_trip(tmp_path):
    tree = {
        "params": {"Conv_0": {"kernel": np.arange(6.0).reshape(2, 3)}},
        "batch_stats": {"n": np.int32(3)},
    }
    checkpoint.save_weights(tmp_path / "w.npz", tree)
    back = checkpoint.load_weights(tmp_path / "w.npz")
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, tree, back)))
    assert [path.name for path in tmp_path.iterdir()] == ["w.npz"]


def test_weights_that_cannot_be_written_leave_nothing_and_keep_the_old(tmp_path):
    checkpoint.save_weights(tmp_path / "w.npz", {"a": np.ones(2)})
    with pytest.raises(ValueError, match="Object arrays"):
        checkpoint.save_weights(tmp_path / "w.npz", {"a": np.array([object()])})
    assert [path.name for path in tmp_path.iterdir()] == ["w.npz"]
    assert checkpoint.load_weights(tmp_path / "w.npz")["a"].tolist() == [1, 1]


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 cut short"])
def test_a_damaged_weight_file_is_refused_by_name(content, tmp_path):
    (tmp_path / "w.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"w.npz is no whole .npz file"):
        checkpoint.load_weights(tmp_path / "w.npz")


def test_weights_of_another_network_are_refused(tmp_path):
    checkpoint.save_weights(
        tmp_path / "w.npz", {"params": {"Conv_0": {"kernel": np.ones((5, 5, 3, 8))}}}
    )
    with pytest.raises(ValueError, match=r"w.npz does not hold the weights of this network"):
        experiment.load(NIN(), tmp_path / "w.npz")


def test_pickled_weights_are_refused(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.array([object()]))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        checkpoint.load_weights(tmp_path / "w.npz")


def test_the_embedded_network_classifies_its_sample():
    variables, test = data.pretrained(), data.sample("test")
    part = data.Dataset(test.images[::4], test.labels[::4])
    assert (
        experiment.accuracy(NIN(), variables, part) > 0.8
    )  # 85 % on all; 250 images: 2.3 % standard deviation
