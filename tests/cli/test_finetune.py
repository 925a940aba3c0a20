"""The command finetune: it learns, goes on by itself, and refuses what it cannot use."""

import json
import sys

import jax
import numpy as np
import pytest

from lowrank_jax import Plan, decompose, load_weights, plan, save_weights
from lowrank_jax.cli import finetune_command
from lowrank_jax.cli.main import main
from lowrank_jax.training import read_metrics

MODEL = """
from flax import linen as nn


class Trained(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(not train)(nn.Conv(8, (3, 3))(x))
        return nn.Dense(4)(nn.relu(x).mean((1, 2)))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a model, a dense checkpoint, a plan, images and labels."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "trained_network.py").write_text(MODEL)
    sys.path.insert(0, str(folder))
    from trained_network import Trained

    rng = np.random.default_rng(0)
    images = rng.normal(size=(32, 8, 8, 3)).astype(np.float32)
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", rng.integers(0, 4, 32))
    model = Trained()
    for name, seed in (("dense", 0), ("other", 1)):
        save_weights(folder / f"{name}.npz", made(model, images, seed))
    variables = load_weights(folder / "dense.npz")
    for name, share in (("plan", 0.6), ("low", 0.4)):
        chosen = plan(model.apply, variables, images, macs=share, train=False)
        chosen.save(folder / f"{name}.json")
    yield folder
    sys.path.remove(str(folder))


def made(model, images, seed):
    """Variables of the dense network."""
    init = jax.jit(model.init, static_argnames="train")
    return init(jax.random.key(seed), images[:1], train=False)


def command(files, out, *options, checkpoint="dense.npz"):
    given = {
        "--checkpoint": files / checkpoint,
        "--images": files / "images.npy",
        "--model": "trained_network:Trained",
        "--model-kwargs": '{"train": false}',
        "--batch-size": 16,
        "--out": out,
    }
    return ["finetune", *(str(x) for pair in given.items() for x in pair), *options]


@pytest.mark.slow
def test_a_dense_checkpoint_is_compressed_and_taught_and_a_second_call_goes_on(files, tmp_path):
    options = ["--plan", str(files / "plan.json"), "--labels", str(files / "labels.npy")]
    assert main(command(files, tmp_path / "a", *options, "--steps", "4")) == 0
    small = load_weights(tmp_path / "a" / "variables.npz")
    assert set(small["params"]["Conv_0"]["kernel"]) != {"kernel"}
    lines = read_metrics(tmp_path / "a")
    assert lines[-1]["step"] == 4 and {"distillation", "cross_entropy"} <= set(lines[-1])
    assert Plan.load(tmp_path / "a" / "plan.json") == Plan.load(files / "plan.json")
    facts = json.loads((tmp_path / "a" / "report.json").read_text())
    assert set(facts["accuracy"]) == {"dense", "before", "after"} and facts["layers"]
    assert facts["metrics"][-1]["step"] == 4 and (tmp_path / "a" / "report.html").exists()
    assert main(command(files, tmp_path / "a", *options, "--epochs", "3")) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "a")] == [2, 4, 6]


@pytest.mark.slow
def test_a_network_shrinks_in_stages_and_a_second_call_has_nothing_to_do(files, tmp_path, capsys):
    given = command(files, tmp_path, "--shrink", "0.8,0.6", "--steps", "2")
    assert main(given) == 0
    result = tmp_path / "variables.npz"
    first, plan = load_weights(result), Plan.load(tmp_path / "plan.json")
    dense, low = plan.total("macs")
    assert low <= 0.6 * dense
    assert {"0-macs-0.8", "1-macs-0.6"} <= {path.name for path in tmp_path.iterdir()}
    assert main(given) == 0
    assert jax.tree.all(
        jax.tree.map(np.array_equal, first, load_weights(tmp_path / "variables.npz"))
    )
    assert main(command(files, tmp_path, "--shrink", "0.8", "--steps", "2")) == 0
    shown = json.loads((tmp_path / "report.json").read_text())["metrics"]
    assert shown == read_metrics(tmp_path / "0-macs-0.8")
    small = str(tmp_path / "variables.npz")
    assert main(command(files, tmp_path, "--shrink", "0.5", "--steps", "2", checkpoint=small)) == 2
    assert "--shrink needs a dense checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_a_decomposed_checkpoint_is_taught_by_the_dense_one_without_labels(files, tmp_path):
    start = command(files, tmp_path / "a", "--plan", str(files / "plan.json"), "--steps", "1")
    assert main(start) == 0
    (files / "small.npz").write_bytes((tmp_path / "a" / "variables.npz").read_bytes())
    teacher = ["--teacher", str(files / "dense.npz"), "--steps", "2", "--freeze", "Conv_0"]
    assert main(command(files, tmp_path / "b", *teacher, checkpoint="small.npz")) == 0
    assert set(read_metrics(tmp_path / "b")[-1]) >= {"distillation"}
    start, tuned = (load_weights(tmp_path / run / "variables.npz")["params"] for run in "ab")
    same = {
        name: jax.tree.all(jax.tree.map(np.array_equal, start[name], tuned[name])) for name in start
    }
    assert same.pop("Conv_0") and not any(same.values())
    assert json.loads((tmp_path / "b/checkpoints/000000002/facts.json").read_text())["seed"] == 0


@pytest.mark.slow
def test_a_recipe_of_all_options_trains_and_a_second_call_goes_on(files, tmp_path):
    options = ["--plan", str(files / "plan.json"), "--labels", str(files / "labels.npy")]
    options += ["--smoothing", "0.1", "--layers", "2", "--crop", "1", "--mixup", "0.2"]
    options += ["--average", "0.9", "--accumulate", "2", "--dtype", "bfloat16"]
    options += ["--algorithms", "kn2row+im2col"]
    assert main(command(files, tmp_path, *options, "--steps", "2")) == 0
    first = load_weights(tmp_path / "variables.npz")
    assert main(command(files, tmp_path, *options, "--steps", "4")) == 0
    last = load_weights(tmp_path / "variables.npz")
    lines = read_metrics(tmp_path)
    assert {"distillation", "cross_entropy", "layers"} <= set(lines[-1])
    assert [line["step"] for line in lines] == [2, 4]
    assert {leaf.dtype for leaf in jax.tree.leaves(last["params"])} == {np.dtype("float32")}
    assert not jax.tree.all(jax.tree.map(np.array_equal, first, last))


@pytest.mark.slow
def test_an_optimiser_of_the_user_takes_the_steps(files, tmp_path):
    (files / "own_optimiser.py").write_text("import optax\n\nnone = optax.sgd(0.0)\n")
    given = ["--labels", str(files / "labels.npy"), "--optimizer", "own_optimiser:none"]
    assert main(command(files, tmp_path, *given, "--steps", "2")) == 0
    start, end = map(load_weights, (files / "dense.npz", tmp_path / "variables.npz"))
    assert jax.tree.all(jax.tree.map(np.array_equal, start["params"], end["params"]))
    assert "batches of 16, own_optimiser:none" in (tmp_path / "report.md").read_text()


def interrupted(*_, **__):
    """Ctrl-C before the first step."""
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_folder_of_another_plan_or_checkpoint_is_refused(files, tmp_path, capsys, monkeypatch):
    run = ["--labels", str(files / "labels.npy"), "--distill", "0", "--steps", "1"]
    one, low = (["--plan", str(files / name)] for name in ("plan.json", "low.json"))
    with monkeypatch.context() as patch:
        patch.setattr(finetune_command, "_trained", interrupted)
        assert main(command(files, tmp_path / "a", *run, *low)) == 130
    assert main(command(files, tmp_path / "a", *run, *one)) == 0  # nothing was trained before
    wanted, kept = Plan.load(files / "plan.json"), load_weights(tmp_path / "a" / "variables.npz")
    small = decompose(load_weights(files / "dense.npz"), wanted)
    assert jax.tree.map(np.shape, kept) == jax.tree.map(np.shape, small)
    assert main(command(files, tmp_path / "a", *run, *low)) == 2
    assert main(command(files, tmp_path / "a", *run, *one, checkpoint="other.npz")) == 2
    errors = capsys.readouterr().err
    assert "began from another plan" in errors and "began from another checkpoint" in errors
    assert Plan.load(tmp_path / "a" / "plan.json") == wanted


@pytest.mark.parametrize("option", [["--plan", "plan.json"], ["--shrink", "0.8"]])
def test_a_decomposed_checkpoint_is_not_compressed_again(files, tmp_path, capsys, option):
    dense, ranks = load_weights(files / "dense.npz"), Plan.load(files / "plan.json")
    save_weights(files / "decomposed.npz", decompose(dense, ranks))
    given = command(files, tmp_path / "a", *option, "--steps", "1", checkpoint="decomposed.npz")
    assert main(given) == 2
    assert f"{option[0]} needs a dense checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("below", ["", "run"])
def test_a_file_in_the_place_of_the_folder_is_named(files, tmp_path, capsys, below):
    (tmp_path / "a").touch()
    labels = ["--labels", str(files / "labels.npy")]
    assert main(command(files, tmp_path / "a" / below, *labels, "--steps", "1")) == 2
    assert f"{tmp_path / 'a'} is a file; give another path." in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--batch-size", "64"], ["--freeze", "Cnv_0"]])
@pytest.mark.parametrize("plan", [[], ["--plan", "plan.json"]])
def test_what_the_training_refuses_leaves_no_folder(
    files, tmp_path, capsys, monkeypatch, option, plan
):
    monkeypatch.chdir(files)
    given = ["--labels", "labels.npy", "--steps", "1", *plan, *option]
    assert main(command(files, tmp_path / "a", *given)) == 2
    assert not (tmp_path / "a").exists() and capsys.readouterr().err.count("\n") >= 1


@pytest.mark.parametrize(
    "options, text",
    [
        ([], "nothing to learn from; give --labels, --teacher"),
        (["--teacher", "none.npz"], "There is no file or folder none.npz"),
        (["--plan", "none.json"], "none.json"),
        (["--labels", "none.npy"], "There is no file none.npy"),
        (["--labels", "labels.npy", "--layers", "1"], "--layers 1 needs a teacher"),
    ],
)
def test_what_cannot_be_used_ends_with_one_line(
    files, tmp_path, capsys, monkeypatch, options, text
):
    monkeypatch.chdir(files)
    assert main(command(files, tmp_path / "a", *options, "--steps", "1")) == 2
    error = capsys.readouterr().err
    assert error.startswith("lowrank-jax finetune: ") and text in error and error.count("\n") == 1


def test_a_length_is_needed(files, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(command(files, tmp_path / "a"))
    assert "--steps --epochs is required" in capsys.readouterr().err
