"""The benchmarks: workers take turns, results are one format, and the guard tells a regression from
noise."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
WORKER = """
import sys
sys.path.insert(0, {folder!r})
from turns import serve

def prepare():
    print("a library says something")
    {prepare}
    return {{"version": 3}}, lambda: {run}

serve(prepare)
"""


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Makes the scripts importable, which are no package; they keep no state."""
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def worker(tmp_path):
    """Command of a worker that runs a line of Python at each turn, after one at the start."""

    def command(run="None", prepare="pass"):
        path = tmp_path / "worker.py"
        path.write_text(WORKER.format(folder=str(FOLDER), run=run, prepare=prepare))
        return [sys.executable, str(path)]

    return command


def result(seconds, name="row", base="rival"):
    """A result of one row, as `turns.write` makes it."""
    return {"benchmark": "b", "rows": [{"name": name, "seconds": seconds, "base": base}]}


def noisy(factor=1.0, seed=0, rounds=15, noise=0.01):
    """Times of a rival at 1 s and of ours at 0.5 s times the factor, on a machine whose speed
    changes."""
    rng = np.random.default_rng(seed)
    speed = rng.uniform(0.5, 2, rounds)
    ours = 0.5 * factor * speed * rng.lognormal(0, noise, rounds)
    return {"rival": speed.tolist(), "ours": ours.tolist()}


def guard(tmp_path, old, new, *more):
    """Exit status of the regression guard on two results."""
    import compare

    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, found in zip(paths, (old, new), strict=True):
        path.write_text(found if isinstance(found, str) else json.dumps(found))
    return compare.main([*map(str, paths), *more])


def test_a_worker_tells_its_facts_and_the_seconds_of_each_run(worker):
    from turns import Worker

    with Worker(worker("__import__('time').sleep(0.05)")) as program:
        assert program.facts == {"version": 3}
        assert all(0.05 <= program() < 5 for _ in range(3))


def test_a_worker_ends_with_its_context(worker):
    from turns import Worker

    with Worker(worker()) as program:
        process = program._process
    assert process.poll() == 0


def test_a_worker_runs_in_the_folder_and_the_environment_given(worker, tmp_path):
    from turns import Worker

    run = "open(__import__('os').environ['NAME'], 'w').close()"
    with Worker(worker(run), cwd=tmp_path, env={"NAME": "trace.txt"}) as program:
        program()
    assert (tmp_path / "trace.txt").exists()


@pytest.mark.parametrize("where", ["run", "prepare"])
def test_the_error_of_a_worker_is_shown(worker, where):
    from turns import Worker

    with (
        pytest.raises(RuntimeError, match="ZeroDivisionError"),
        Worker(worker(**{where: "1 / 0"})) as program,
    ):
        program()


@pytest.mark.parametrize("command", [["no-such-program"], [sys.executable, "-c", "print('[1]')"]])
def test_what_is_no_worker_is_refused(command):
    from turns import Worker

    with pytest.raises(RuntimeError, match=r"does not start|not a worker"):
        Worker(command)


def test_programs_take_turns_each_round_starting_with_the_next(worker):
    from turns import Worker, take_turns

    order = []
    with Worker(worker()) as rival:
        programs = {"a": lambda: order.append("a"), "b": lambda: order.append("b"), "rival": rival}
        seconds = take_turns(programs, rounds=3, settle=0)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "rival": 3}


def test_a_result_is_written_with_a_table_and_can_be_compared(tmp_path):
    import compare
    from turns import check, write

    rows = result(noisy())["rows"]
    rows[0]["programs"] = {"ours": {"error": 1e-9}}
    path = tmp_path / "new" / "b.json"
    write(path, "b", rows, seed=0, checks=[check("error", 1e-9, 1e-5)], notes=["AIMET: left out"])
    found = compare.read(str(path))
    assert {"benchmark", "command", "seed", "machine", "rows"} <= set(found) and found[
        "rows"
    ] == rows
    table = path.with_suffix(".md").read_text()
    assert all(
        text in table for text in ("| row | ours |", "1e-09", "| yes |", "- AIMET: left out")
    )


def test_the_interval_of_a_median_holds_it_as_often_as_it_says():
    from compare import interval

    rng = np.random.default_rng(0)
    for rounds in (7, 15, 30):
        runs = rng.exponential(size=(2000, rounds))  # its median is log 2
        inside = np.mean([low <= np.log(2) <= high for low, high in map(interval, runs)])
        assert inside >= 0.95 - 0.015  # three standard deviations of a share of 2000
    assert interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


@pytest.mark.parametrize(
    "factor, verdict, status",
    [(1.0, "same", 0), (1.2, "slower", 1), (0.8, "faster", 0), (1.01, "same", 0)],
)
def test_the_guard_tells_a_change_from_noise(tmp_path, capsys, factor, verdict, status):
    assert guard(tmp_path, result(noisy()), result(noisy(factor, seed=1))) == status
    assert f"| {verdict} |" in capsys.readouterr().out


def test_noise_alone_is_never_slower(tmp_path):
    assert not any(
        guard(tmp_path, result(noisy(seed=s)), result(noisy(seed=s + 50))) for s in range(50)
    )


def test_a_large_change_within_the_noise_is_the_same(tmp_path):
    assert guard(tmp_path, result(noisy(noise=0.5)), result(noisy(1.05, seed=1, noise=0.5))) == 0


def test_a_small_change_is_the_same_however_sure(tmp_path):
    assert guard(tmp_path, result(noisy(noise=1e-6)), result(noisy(1.015, seed=1, noise=1e-6))) == 0


def test_the_machines_speed_cancels(tmp_path):
    slow = {name: [3 * x for x in times] for name, times in noisy(seed=1).items()}
    assert guard(tmp_path, result(noisy()), result(slow)) == 0


def test_rows_and_programs_of_one_file_are_named_not_judged(tmp_path, capsys):
    old, new = result(noisy()), result(noisy(seed=1))
    old["rows"] += result(noisy(), "old row")["rows"]
    new["rows"] += result(noisy(9.0), "new row")["rows"]
    new["rows"][0]["seconds"]["other"] = new["rows"][0]["seconds"]["ours"]
    assert guard(tmp_path, old, new) == 0
    lines = capsys.readouterr().out.splitlines()
    verdicts = {
        tuple(cell.strip() for cell in line.split("|")[1:3]): line.split("|")[-2].strip()
        for line in lines[2:]
    }
    others = {("old row", "ours"): "gone", ("new row", "ours"): "new", ("row", "other"): "new"}
    assert verdicts == {("row", "ours"): "same", **others}


def test_another_base_can_be_asked_for(tmp_path, capsys):
    old, new = (result(noisy(factor), base="ours") for factor in (1.0, 1.5))
    assert guard(tmp_path, old, new) == 0  # against itself only the rival can have moved
    assert guard(tmp_path, old, new, "--base", "rival") == 1
    assert "| row | ours |" in capsys.readouterr().out


BAD = {
    "not json": "{",
    "no result": {"rows": 3},
    "no base": result({"ours": [1.0]}),
    "uneven": result({"ours": [1.0], "rival": [1.0, 2.0]}),
    "no number": result({"ours": ["1"], "rival": [1.0]}),
    "no time": result({"ours": [0.0], "rival": [1.0]}),
    "other rows": result(noisy(), "another"),
    "other base": result(noisy(), base="ours"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_files_end_with_one_line(tmp_path, capsys, bad):
    assert guard(tmp_path, result(noisy()), bad) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("compare: ") and said.err.count("\n") == 1


def test_a_missing_file_ends_with_one_line(tmp_path, capsys):
    import compare

    assert compare.main([str(tmp_path / "none.json"), str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_decomposed_layers_are_those_with_taps():
    import decompose

    from lowrank_jax.models.imagenet import VGG16, ResNet50

    channels = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    vgg = sorted(decompose.shapes(VGG16(num_classes=None)).values())
    assert vgg == sorted((3, 3, *pair) for pair in itertools.pairwise(channels))
    resnet = sorted(decompose.shapes(ResNet50()).values())
    assert len(resnet) == 17 and resnet[-1] == (7, 7, 3, 64)
    assert {shape[:2] for shape in resnet[:-1]} == {(3, 3)}


@pytest.mark.parametrize("shape", [(3, 3, 512, 512), (7, 7, 3, 64), (11, 11, 3, 64), (3, 3, 3, 64)])
def test_the_rank_is_the_largest_of_half_the_weights(shape):
    from rival_svd import half_rank

    from lowrank_jax import Separable

    rank, weights = half_rank(shape), np.prod(shape)
    assert Separable(rank).parameters(shape) <= weights / 2 < Separable(rank + 1).parameters(shape)


@pytest.mark.parametrize("program", ["ours", "numpy"])
def test_a_program_reaches_the_least_error(tmp_path, program):
    import decompose
    from rival_svd import prepare

    kernels = {
        f"layer_{i}": np.random.default_rng(i).standard_normal((3, 5, 4, 6), np.float32)
        for i in (2, 10, 1)
    }
    np.savez(tmp_path / "kernels.npz", **kernels)
    facts, _ = prepare(program, str(tmp_path / "kernels.npz"), cold=False)
    np.testing.assert_allclose(
        facts["errors"], decompose.optima(kernels), rtol=1e-5
    )  # float32 roundings


@pytest.mark.slow
def test_growth_measures_every_kind_at_two_sizes(tmp_path, capsys):
    import growth

    growth.main(["--quick", "--rounds", "1", "--out", str(tmp_path / "growth.json")])
    found = json.loads((tmp_path / "growth.json").read_text())
    assert [row["name"] for row in found["rows"]] == [
        f"{kind} {n}" for kind, sizes in growth.QUICK.items() for n in sizes
    ]
    assert {"decompose", "SVD"} == set(found["rows"][0]["seconds"])
    assert any("exponent of spectra" in check["what"] for check in found["checks"])
    assert "exponent" in capsys.readouterr().out


def test_a_compressed_network_has_a_column_for_each_scheme():
    import compress

    row = {"selector": "ratio", "factors": "plain", "budget": 0.5, "interval": [0.7, 0.9]}
    both = [("separable", 0.81, 0.5), ("mixed", 0.82, 0.4)]
    rows = [
        row | {"scheme": scheme, "accuracy": kept, "reached": reached}
        for scheme, kept, reached in both
    ]
    rows.append(rows[0] | {"budget": None})
    *_, head, _, first, last = compress.markdown(rows).splitlines()
    assert head == "| selector | factors | macs asked | separable | mixed |"
    assert "| 50% | 81.00% (50.0%; 70.00% to 90.00%) | 82.00% (40.0%; " in first
    assert last.startswith("| ratio | plain | none | 81.00%") and last.endswith(" |  |")


def test_the_schemes_of_the_benchmark_are_forms_of_the_library():
    import compress

    from lowrank_jax.planning.spectra import check_forms

    assert all(check_forms(forms) == forms for forms in compress.SCHEMES.values())
