"""A plan as data: printed, saved, loaded, compared, drawn."""

import builtins
import json

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax import Separable, decompose
from lowrank_jax.planning.budget import Budget
from lowrank_jax.planning.curves import draw_curve
from lowrank_jax.planning.plans import Choice, Plan

SMALL = Choice(
    "block/Conv_0",
    Separable(4, 2, "OIHW", "horizontal"),
    (600, 200),
    (6000, 3000),
    (4000, 5000),
    0.125,
)
DENSE = Choice("block/Conv_1", None, (300, 300), (2000, 2000), (900, 900), 0.0)
PLAN = Plan((SMALL, DENSE), "minmax", Budget("parameters", 0.6), (100, 1000, 400))


def timed_plan():
    choice = Choice(
        "c", Separable(4), (600, 200), (6000, 3000), (4000, 5000), 0.125, latency=(2e-3, 1.5e-3)
    )
    return Plan((choice,), "latency", Budget("latency", 0.8))


def test_the_ranks_of_a_plan_are_a_table_for_decompose():
    plan = Plan((Choice("conv", Separable(2), (18, 12), (18, 12), (1, 1), 0.1), DENSE), "fixed")
    assert plan.ranks == {"conv": Separable(2)}
    small = decompose({"conv": {"kernel": jnp.ones((3, 3, 2, 4))}}, plan.ranks)
    assert small["conv"]["vertical"]["kernel"].shape == (3, 1, 2, 2)


def test_totals_are_those_of_the_whole_program():
    assert PLAN.total("parameters") == (1000, 600) and PLAN.total("macs") == (9000, 6000)
    assert PLAN.total("bytes") == (5300, 6300)
    with pytest.raises(
        ValueError, match="The plan has no latency; choose it from options with measured times"
    ):
        PLAN.total("latency")
    with pytest.raises(ValueError, match="The measure 'flops' is not known"):
        PLAN.total("flops")


def test_a_plan_prints_as_a_table_with_what_was_asked_and_what_was_reached():
    head, small, dense, rest, total, asked = str(PLAN).splitlines()
    assert head.split() == [
        "layer",
        "first",
        "rank",
        "parameters",
        "low-rank",
        "macs",
        "low-rank",
        "error",
    ]
    assert small.split() == ["block/Conv_0", "horizontal", "4", "600", "200", "33.3", "%", "6,000", "3,000", "50", "%",
                             "0.1250"]  # fmt: skip
    assert dense.split()[:3] == ["block/Conv_1", "dense", "300"] and rest.split()[:3] == [
        "other",
        "layers",
        "100",
    ]
    assert total.split() == ["total", "1,000", "600", "60", "%", "9,000", "6,000", "66.7", "%"]
    assert asked == "minmax, at most 0.6 of the dense parameters: 600, 60 %"
    assert str(Plan((SMALL,), "fixed")).splitlines()[-1] == "fixed, without a budget"


def test_the_measure_of_the_budget_is_a_column_of_its_own():
    assert "bytes" in str(Plan((SMALL,), "minmax", Budget("bytes", 9000))).splitlines()[0]
    assert "latency" in str(timed_plan()).splitlines()[0] and "0.0015" in str(timed_plan())


@pytest.mark.parametrize(
    "plan", [PLAN, timed_plan(), Plan((), "fixed"), Plan((SMALL,), "ratio", Budget("bytes", 7))]
)
def test_a_plan_is_saved_and_loaded(tmp_path, plan):
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert json.loads((tmp_path / "plan.json").read_text())["version"] == 2


PAIRS = st.tuples(st.integers(0, 10**15), st.integers(0, 10**15))
SCHEMES = st.builds(
    Separable,
    st.integers(1, 99),
    st.integers(1, 9),
    st.sampled_from(["HWIO", "OIW"]),
    st.sampled_from(["vertical"]),
)
CHOICES = st.builds(Choice, st.text(), st.none() | SCHEMES, PAIRS, PAIRS, PAIRS, st.floats(0, 1))


@settings(deadline=None, max_examples=50)
@given(st.lists(CHOICES, max_size=3), st.text(), st.tuples(*[st.integers(0, 10**15)] * 3))
def test_any_plan_comes_back_from_json(tmp_path_factory, choices, selector, rest):
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    plan = Plan(tuple(choices), selector, None, rest)
    plan.save(path)
    assert Plan.load(path) == plan


def test_a_plan_with_nan_is_not_written(tmp_path):
    (tmp_path / "plan.json").write_text("before")
    with pytest.raises(ValueError, match="not JSON compliant"):
        Plan((Choice("c", None, (1, 1), (1, 1), (1, 1), float("nan")),), "fixed").save(
            tmp_path / "plan.json"
        )
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
        damaged(lambda d: d.update(budget={"measure": "flops", "amount": 1})),
        damaged(lambda d: d["choices"][0].pop("parameters")),
        damaged(lambda d: d["choices"][0].update(parameters=[1, -1])),
        damaged(lambda d: d["choices"][0].update(parameters=["1", "2"])),
        damaged(lambda d: d["choices"][0].update(error=2)),
        damaged(lambda d: d["choices"][0].update(path=1)),
        damaged(lambda d: d["choices"][0].update(error=float("nan"))),
        damaged(lambda d: d["choices"][0]["scheme"].update(rank=0)),
        damaged(lambda d: d["choices"][0]["scheme"].update(rank=True)),
        damaged(lambda d: d["choices"][0]["scheme"].update(groups="two")),
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
        ValueError, match=r"plan\.json is no whole plan: .*Give another file, or save the plan anew"
    ):
        Plan.load(path)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe\x00"])
def test_what_is_no_json_is_refused(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"plan\.json is no whole plan"):
        Plan.load(path)
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "nothing.json")


def test_two_plans_are_compared_side_by_side():
    other = Plan(
        (DENSE, Choice("new", Separable(7), (50, 40), (500, 400), (1, 1), 0.5)),
        "ratio",
        None,
        (100, 1000, 4),
    )
    lines = PLAN.compare(other).splitlines()
    assert lines[1].split() == [
        "block/Conv_0",
        "horizontal",
        "4",
        "-",
        "200",
        "-",
        "3,000",
        "-",
        "0.1250",
        "-",
    ]
    assert lines[2].split() == [
        "block/Conv_1",
        "dense",
        "dense",
        "300",
        "300",
        "2,000",
        "2,000",
        "0.0000",
        "0.0000",
    ]
    assert lines[3].split()[:4] == ["new", "-", "vertical", "7"]
    assert lines[4].split() == ["total", "600", "440", "6,000", "3,400"]
    assert lines[5:] == [
        "A: minmax, at most 0.6 of the dense parameters: 600, 60 %",
        "B: ratio, without a budget",
    ]


def test_the_curve_has_a_line_for_each_selector_sorted_by_cost(tmp_path):
    full = Plan((DENSE,), "fixed")
    figure = draw_curve(
        {"minmax": [(full, 0.9), (PLAN, 0.8)], "ratio": [(PLAN, 0.7)]}, "parameters", dense=0.9
    )
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
