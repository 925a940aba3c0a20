"""A plan as data: printed, saved, loaded, compared, drawn."""

import builtins
import dataclasses
import json
import traceback

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax import Channel, Matrix, Separable, Tucker, decompose
from lowrank_jax.planning.budget import MEASURES, Budget
from lowrank_jax.planning.curves import draw_curve
from lowrank_jax.planning.plans import Choice, Plan, Rest

SMALL = Choice(
    path="block/Conv_0",
    scheme=Separable(4, 2, "OIHW", "horizontal"),
    parameters=(600, 200),
    macs=(6000, 3000),
    bytes=(4000, 5000),
    error=0.125,
)
DENSE = Choice(
    path="block/Conv_1",
    scheme=None,
    parameters=(300, 300),
    macs=(2000, 2000),
    bytes=(900, 900),
)
PLAN = Plan(
    choices=(SMALL, DENSE),
    selector="minmax",
    budget=Budget("parameters", 0.6),
    rest=Rest(parameters=100, macs=1000, bytes=400),
)
TIMED = Plan(
    choices=(dataclasses.replace(SMALL, latency=(2e-3, 1.5e-3)),),
    selector="latency",
    budget=Budget("latency", 0.8),
)
BYTES = Plan(choices=(SMALL,), selector="ratio", budget=Budget("bytes", 9000))
BARE = Plan(choices=(SMALL,), selector="fixed")


def test_the_ranks_of_a_plan_are_a_table_for_decompose():
    conv = dataclasses.replace(SMALL, path="conv", scheme=Separable(2))
    plan = Plan(choices=(conv, DENSE), selector="fixed")
    assert plan.ranks == {"conv": Separable(2)}
    small = decompose({"conv": {"kernel": jnp.ones((3, 3, 2, 4))}}, plan.ranks)
    assert {leaf.shape for leaf in jax.tree.leaves(small)} == {(3, 1, 2, 2), (1, 3, 2, 4)}


def test_totals_are_those_of_the_whole_program():
    assert PLAN.total("parameters") == (1000, 600) and PLAN.total("macs") == (9000, 6000)
    assert PLAN.total("bytes") == (5300, 6300)
    with pytest.raises(
        ValueError, match="The plan has no latency; choose it from candidates with measured times"
    ):
        PLAN.total("latency")
    with pytest.raises(ValueError, match="The measure 'flops' is not known"):
        PLAN.total("flops")


def test_a_plan_prints_as_a_table_with_what_was_asked_and_what_was_reached():
    head, small, dense, rest, total, asked = (line.split() for line in str(PLAN).splitlines())
    assert " ".join(head) == "layer first rank parameters low-rank macs low-rank error"
    assert small[:7] == ["block/Conv_0", "horizontal", "4", "600", "200", "33.3", "%"]
    assert small[7:] == ["6,000", "3,000", "50", "%", "0.1250"]
    assert dense[:3] == ["block/Conv_1", "dense", "300"]
    assert rest[:3] == ["other", "layers", "100"]
    assert total == ["total", "1,000", "600", "60", "%", "9,000", "6,000", "66.7", "%"]
    assert " ".join(asked) == "minmax, at most 0.6 of the dense parameters: 600, 60 %"
    assert str(BARE).splitlines()[-1] == "fixed, without a budget"


def test_three_factors_print_both_of_their_ranks():
    plan = Plan(choices=(dataclasses.replace(SMALL, scheme=Tucker(4, inner=6)),), selector="fixed")
    assert str(plan).splitlines()[1].split()[:3] == ["block/Conv_0", "tucker", "4x6"]


def test_the_measure_of_the_budget_is_a_column_of_its_own():
    assert "bytes" in str(BYTES).splitlines()[0]
    assert "latency" in str(TIMED).splitlines()[0] and "0.0015" in str(TIMED)


@pytest.mark.parametrize("plan", [PLAN, TIMED, BYTES, BARE, Plan(choices=(), selector="fixed")])
def test_a_plan_is_saved_and_loaded(tmp_path, plan):
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert json.loads((tmp_path / "plan.json").read_text())["version"] == 2


COUNTS = st.integers(0, 10**15)
PAIRS = st.tuples(COUNTS, COUNTS)
SECONDS = st.floats(0, 1e3)
RANKS, GROUPS = st.integers(1, 99), st.integers(1, 9)
SCHEMES = st.one_of(
    st.builds(Tucker, RANKS, GROUPS, st.sampled_from(["HWIO", "OIW"]), inner=RANKS),
    *(
        st.builds(
            scheme,
            rank=RANKS,
            groups=GROUPS,
            axes=st.sampled_from(axes),
            first=st.sampled_from(forms),
        )
        for scheme, axes, forms in (
            (Separable, ["HWIO", "OIW"], ["vertical", "horizontal"]),
            (Channel, ["HWIO", "OIW"], ["spatial", "pointwise"]),
            (Matrix, ["IO", "OI", "IPO"], ["left", "heads"]),
        )
    ),
)
CHOICES = st.builds(
    Choice,
    path=st.text(),
    scheme=st.none() | SCHEMES,
    parameters=PAIRS,
    macs=PAIRS,
    bytes=PAIRS,
    latency=st.none() | st.tuples(SECONDS, SECONDS),
    error=st.floats(0, 1),
)
PLANS = st.builds(
    Plan,
    choices=st.lists(CHOICES, max_size=3).map(tuple),
    selector=st.text(),
    budget=st.none() | st.builds(Budget, st.sampled_from(MEASURES), st.floats(0.01, 1)),
    rest=st.builds(Rest, parameters=COUNTS, macs=COUNTS, bytes=COUNTS),
)


@settings(max_examples=50)
@given(PLANS)
def test_any_plan_comes_back_from_json(tmp_path_factory, plan):
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan


def test_a_plan_with_nan_is_not_written(tmp_path):
    (tmp_path / "plan.json").write_text("before")
    broken = dataclasses.replace(SMALL, error=float("nan"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        Plan(choices=(broken,), selector="fixed").save(tmp_path / "plan.json")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def damaged(change):
    return lambda data: change(data) or data


@pytest.mark.parametrize(
    "change",
    [
        damaged(lambda d: d.update(version=1)),
        damaged(lambda d: d.pop("version")),
        damaged(lambda d: d.pop("choices")),
        damaged(lambda d: d.update(unknown=1)),
        damaged(lambda d: d.update(selector=3)),
        damaged(lambda d: d.update(rest=[1, 2])),
        damaged(lambda d: d.update(rest={"weights": 1})),
        damaged(lambda d: d.update(rest={"macs": -1})),
        damaged(lambda d: d.update(budget={"measure": "flops", "amount": 1})),
        damaged(lambda d: d["choices"][0].pop("parameters")),
        damaged(lambda d: d["choices"][0].update(parameters=[1, -1])),
        damaged(lambda d: d["choices"][0].update(parameters=["1", "2"])),
        damaged(lambda d: d["choices"][0].update(parameters=[1])),
        damaged(lambda d: d["choices"][0].update(error=2)),
        damaged(lambda d: d["choices"][0].update(path=1)),
        damaged(lambda d: d["choices"][0].update(error=float("nan"))),
        damaged(lambda d: d["choices"][0]["scheme"].update(rank=0)),
        damaged(lambda d: d["choices"][0]["scheme"].update(rank=True)),
        damaged(lambda d: d["choices"][0]["scheme"].update(groups="two")),
        damaged(lambda d: d["choices"][0]["scheme"].update(inner=0)),
        damaged(lambda d: d["choices"][0]["scheme"].update(inner=2)),
        damaged(lambda d: d["choices"][0]["scheme"].update(first="diagonal")),
        damaged(lambda d: d["choices"][0]["scheme"].update(axes="HHIO")),
        lambda d: [d],
        lambda d: None,
    ],
)
def test_damaged_json_is_refused(tmp_path, change):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(
        ValueError,
        match=r"plan\.json is no whole plan \(.*\)\. Give another file, or save the plan anew",
    ):
        Plan.load(path)


FILES = {
    "empty": b"",
    "an open brace": b"{",
    "binary": b"\xff\xfe\x00" * 10**6,
    "text": b"no plan " * 10**6,
    "deep": b"[" * 10**6,
    "a long name": b'{"version": 2, "' + b"x" * 10**6 + b'": 1}',
    "a long version": b'{"version": "' + b"x" * 10**6 + b'"}',
    "a long number": b'{"version": ' + b"1" * 10**6 + b"}",
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_plan_is_refused_in_a_few_words(tmp_path, name):
    path = tmp_path / "plan.json"
    path.write_bytes(FILES[name])
    with pytest.raises(ValueError, match=r"plan\.json is no whole plan") as error:
        Plan.load(path)
    assert len(str(error.value)) < len(str(path)) + 200
    assert len("".join(traceback.format_exception(error.value))) < 10**4


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        Plan.load(tmp_path / "nothing.json")


def test_two_plans_are_compared_side_by_side():
    costs = dict(parameters=(50, 40), macs=(500, 400), bytes=(1, 1), error=0.5)
    new = Choice(path="new", scheme=Separable(7), **costs)
    rest = Rest(parameters=100, macs=1000, bytes=4)
    other = Plan(choices=(DENSE, new), selector="ratio", rest=rest)
    lines = [line.split() for line in PLAN.compare(other).splitlines()]
    assert lines[1][:6] == ["block/Conv_0", "horizontal", "4", "-", "200", "-"]
    assert lines[1][6:] == ["3,000", "-", "0.1250", "-"]
    assert lines[2][:5] == ["block/Conv_1", "dense", "dense", "300", "300"]
    assert lines[2][5:] == ["2,000", "2,000", "0.0000", "0.0000"]
    assert lines[3][:4] == ["new", "-", "vertical", "7"]
    assert lines[4] == ["total", "600", "440", "6,000", "3,400"]
    lines = [" ".join(line) for line in lines]
    assert lines[5:] == [
        "A: minmax, at most 0.6 of the dense parameters: 600, 60 %",
        "B: ratio, without a budget",
    ]


def test_the_curve_has_a_line_for_each_selector_sorted_by_cost(tmp_path):
    full = Plan(choices=(DENSE,), selector="fixed")
    points = {"minmax": [(full, 0.9), (PLAN, 0.8)], "ratio": [(PLAN, 0.7)]}
    figure = draw_curve(points, "parameters", dense=0.9)
    first, second, level = figure.axes[0].get_lines()
    assert first.get_xdata().tolist() == [0.6, 1.0] and first.get_ydata().tolist() == [80, 90]
    assert second.get_label() == "ratio" and level.get_label() == "dense"
    figure.savefig(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_a_curve_without_points_or_without_matplotlib_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="no points to draw"):
        draw_curve({"minmax": []})
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'lowrank-jax\[demo\]'"):
        draw_curve({"minmax": [(PLAN, 0.8)]})
