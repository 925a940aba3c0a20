"""Rules by path: the first match decides, shares are kept to, and no rule is idle."""

import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import assume, given
from hypothesis import strategies as st

from lowrank_jax import Channel, Matrix, Separable, trace
from lowrank_jax.factorization.ranks import max_rank
from lowrank_jax.planning.plans import Choice, Plan
from lowrank_jax.tree.rules import as_table, resolve

SHAPE = (3, 3, 4, 8)
PATHS = ["stem", "stage1/conv1", "stage1/conv2", "stage2/conv1", "head/conv"]
LAYERS = dict.fromkeys(PATHS, SHAPE)
KEYS = st.sampled_from([*PATHS, "stage1/.*", "stage./conv1", ".*", "(stem|head).*", ".*/conv.?"])
VALUES = st.sampled_from([None, 1, 3, 0.4, 0.7, Separable(2), Channel(2)])
PARTS = st.text("ab01.*+?()[]{}|^$\\", min_size=1, max_size=4)
ONE = 1 + 1e-12  # 0.29 of 100 is 29
SIZES = st.tuples(*[st.integers(1, 5)] * 2, *[st.integers(1, 24)] * 2)


def matches(key, path):
    return key == path if key in PATHS else bool(re.fullmatch(key, path))


@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=4))
def test_the_first_rule_that_matches_decides(rules):
    first = {path: next((k for k in rules if matches(k, path)), None) for path in PATHS}
    assume(set(first.values()) >= set(rules))
    alone = {key: resolve({key: value}, LAYERS) for key, value in rules.items()}
    expected = {path: alone[key].get(path) for path, key in first.items() if key}
    assert resolve(rules, LAYERS) == {path: scheme for path, scheme in expected.items() if scheme}


@given(VALUES, st.dictionaries(KEYS, VALUES, min_size=1, max_size=4))
def test_a_rule_that_decides_no_layer_is_an_error(value, later):
    rules = {"stage1/.*|stem|.*2.*": value} | later
    first = {next((k for k in rules if matches(k, path)), None) for path in PATHS}
    idle = [key for key in rules if key not in first]
    if not idle:
        assert resolve(rules, LAYERS) is not None
        return
    with pytest.raises(ValueError, match=rf"The rule {re.escape(repr(idle[0]))} is idle.*before"):
        resolve(rules, LAYERS)


@given(st.lists(PARTS, min_size=1, max_size=3).map("/".join), st.sets(PARTS, max_size=4))
def test_a_path_matches_itself_alone_whatever_it_holds(path, others):
    layers = dict.fromkeys([path, *others], SHAPE)
    assert resolve({path: 2}, layers) == {path: Separable(2)}


@given(st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda key: key not in PATHS))
def test_a_rule_that_matches_no_layer_is_an_error_that_names_it(key):
    with contextlib.suppress(re.error):
        assume(not any(re.fullmatch(key, path) for path in PATHS))
    with pytest.raises(ValueError) as error:
        resolve({"stem": 2, key: 1}, LAYERS)
    assert repr(key) in str(error.value) and "did you mean" in str(error.value)


@given(SIZES, st.floats(1e-3, 1.0))
def test_a_share_of_the_parameters_gives_the_largest_rank_within_it(shape, share):
    dense, unit = math.prod(shape), Separable(1).parameters(shape)
    if unit > share * dense * ONE:
        with pytest.raises(
            ValueError, match=r"conv: rank 1 costs .* of the layer. Raise the share"
        ):
            resolve({"conv": share}, {"conv": shape})
        return
    (scheme,) = resolve({"conv": share}, {"conv": shape}).values()
    assert scheme.parameters(shape) <= share * dense * ONE
    assert scheme.rank == max_rank(shape) or (scheme.rank + 1) * unit > share * dense * ONE


def altered(x, kernel, *args, **options):
    """A product with a function of the kernel, which cannot run with factors."""
    return jax.lax.dot_general(x, jnp.tanh(kernel) + 0 * x.sum(), *args, **options)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="strided")(x))
        x = nn.relu(nn.Conv(8, (3, 5), feature_group_count=2, name="grouped")(x))
        shared = nn.Conv(8, (3, 3), name="shared")
        x = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(shared(shared(x)))
        x = nn.Dense(6, name="hidden")(x)
        return nn.Dense(3, dot_general=altered, name="head")(x)


X = jnp.zeros((2, 8, 6, 4))


@functools.cache
def program():
    return trace(Net().apply, jax.eval_shape(Net().init, jax.random.key(0), X), X)


@given(st.floats(0.2, 1.0), st.sampled_from(["parameters", "macs"]))
def test_shares_of_a_traced_program_are_kept_layer_by_layer(share, measure):
    for path, scheme in resolve({".*": share}, program(), measure=measure).items():
        calls = program().at(path)
        if measure == "parameters":
            dense, unit = calls[0].parameters, calls[0].parameters_at(calls[0].scheme(1))
        else:
            dense = sum(call.macs for call in calls)
            unit = sum(call.macs_at(call.scheme(1)) for call in calls)
        limit = max_rank(calls[0].kernel_shape, calls[0].groups, calls[0].axes, scheme.first)
        assert scheme.rank == max(r for r in range(1, limit + 1) if r * unit <= share * dense * ONE)


def test_what_a_pattern_cannot_decompose_stays_dense():
    found = resolve({"strided": None, "grouped": 3, ".*": 0.5}, program())
    assert found["grouped"] == Separable(3, groups=2) and found["hidden"] == Matrix(1)
    # A rank of the depthwise layer costs two thirds, and the head's kernel is changed.
    assert list(found) == ["grouped", "shared", "hidden"]


def test_a_table_without_a_trace_takes_the_layout_that_it_is_told():
    shapes = {"one": (8, 4, 3), "two": (8, 4, 3, 5), "linear": (8, 4)}
    found = resolve({".*": 0.5}, shapes, axes="OIHW")
    axes = {"one": "OIW", "two": "OIHW", "linear": "OI"}
    assert {path: scheme.axes for path, scheme in found.items()} == axes
    assert found["linear"] == Matrix(1, axes="OI")
    grouped = Separable(1, groups=2, axes="OIHW")
    assert resolve({"two": grouped}, shapes, axes="OIHW") == {"two": grouped}


def test_groups_and_layouts_may_be_known_without_a_trace():
    shapes = {"conv": (3, 3, 2, 8), "cube": (3, 3, 3, 2, 8)}
    units = {"conv": Separable(1, 2), "cube": Separable(1, axes="DHWIO")}
    found = resolve({"conv": 3, "cube": 0.5}, shapes, units=units)
    assert found["conv"] == Separable(3, 2)
    assert found["cube"].axes == "DHWIO"
    with pytest.raises(ValueError, match=r"fit the program; give Separable\(rank=3, groups=2"):
        resolve({"conv": Separable(3)}, shapes, units=units)


def test_a_plan_is_a_table():
    costs = dict(parameters=(288, 66), macs=(9, 6), bytes=(9, 6), error=0.1)
    layers = (Choice(path="stem", scheme=Separable(2), **costs),)
    plan = Plan(choices=layers, selector="fixed")
    assert as_table(plan) == {"stem": Separable(2)}
    assert resolve(plan, LAYERS) == {"stem": Separable(2)}
    assert resolve(Plan(choices=(), selector="fixed"), LAYERS) == {}  # all is in the budget


def test_ranks_of_numpy_are_ranks_and_shares_too():
    found = resolve({"stem": np.int64(2), "head/conv": np.float32(0.5)}, LAYERS)
    assert found == {"stem": Separable(2), "head/conv": Separable(4)}
    assert type(found["stem"].rank) is int


@pytest.mark.parametrize(
    "rules, message",
    [
        ({}, "The table of ranks is empty; name at least one layer"),
        ([("stem", 2)], "A list is no table of ranks; give {path: rank} or a plan"),
        ({0: 2}, "The key 0 is no path; give a str"),
        ({"stage3/.*": 2}, "The rule 'stage3/.*' matches no layer; did you mean 'stage"),
        ({"stem(": 2}, r"'stem(' is neither a layer nor a regular expression (missing ), "),
        ({"stem": 99}, "stem: rank 99 is not allowed; give an int from 1 to 12"),
        ({".*": True}, "stem: rank True is not allowed"),
        ({"stem": "half"}, "stem: rank 'half' is not allowed"),
        ({"stem": 2.0}, "stem: the share 2.0 is not allowed; give a float above 0 and up to 1"),
        ({"stem": math.nan}, "stem: the share nan is not allowed"),
        (
            {"stem": Separable(2, groups=3)},
            "stem: groups=3 is not allowed; give an int of 1 or more that divides the 8",
        ),
        ({"vector": 2}, "vector: cannot be decomposed: (8,) is no kernel of a layer."),
        ({"vector|empty": 0.5}, "Leave the rule out: 'vector|empty': 0.5"),
        ({"linear": 5}, "linear: rank 5 is not allowed; give an int from 1 to 4"),
        ({"stem": 0.01}, "stem: rank 1 costs 0.125 of the layer. Raise the share, or give None"),
    ],
)
def test_tables_that_cannot_be_are_refused(rules, message):
    shapes = LAYERS | {"vector": (8,), "linear": (8, 4), "empty": (3, 3, 0, 8)}
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(rules, shapes)


@pytest.mark.parametrize(
    "rules, layers, options, message",
    [
        ({"grouped": Separable(2)}, program, {}, "the program; give Separable(rank=2, groups=2"),
        ({"hidden": Separable(2)}, program, {}, "the program; give Matrix(rank=2, groups=1"),
        ({"head": 2}, program, {}, "head: cannot be decomposed: its kernel is changed by tanh"),
        ({"head": 2}, program, {"measure": "bytes"}, "measure='bytes' is not allowed; give 'param"),
        ({"stem": 2}, lambda: LAYERS, {"measure": "macs"}, "measure='macs' needs a trace"),
        ({"stem": 2}, dict, {}, "The rule 'stem' matches no layer; there are no layers"),
    ],
)
def test_rules_that_do_not_fit_the_program_are_refused(rules, layers, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(rules, layers(), **options)


def test_a_plan_of_another_network_says_so():
    plan = Plan(
        choices=tuple(
            Choice(path=path, scheme=Separable(1), parameters=(9, 6), macs=(9, 6), bytes=(9, 6))
            for path in ("other/0", "other/1")
        ),
        selector="fixed",
    )
    with pytest.raises(ValueError, match=r"another network: 2 of its 2 layers, such as 'other/0'"):
        resolve(plan, {"stem": (3, 3, 3, 8)})


def test_a_plan_for_kernels_of_other_sizes_says_so():
    choice = Choice(path="stem", scheme=Separable(1), parameters=(9, 6), macs=(9, 6), bytes=(9, 6))
    plan = Plan(choices=(choice,), selector="fixed")
    with pytest.raises(ValueError, match="stem has 9 weights in the plan and 216 here"):
        resolve(plan, {"stem": (3, 3, 3, 8)})
