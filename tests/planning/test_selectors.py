"""The selectors, each proven on cases small enough to try every choice."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax import Separable, trace
from lowrank_jax.factorization.ranks import max_rank
from lowrank_jax.planning.budget import MEASURES, Budget
from lowrank_jax.planning.candidates import candidates
from lowrank_jax.planning.knapsack import lower_hull
from lowrank_jax.planning.measured import order_and_rank, timed
from lowrank_jax.planning.selectors import (
    energy,
    evbmf,
    fixed,
    latency,
    log_energy,
    minmax,
    ratio,
    sensitivity,
    total_energy,
)
from lowrank_jax.planning.spectra import Spectra, spectra

X = jnp.zeros((1, 8, 6, 4))
PATHS = ("strided", "grouped", "last")
BUDGETS = [
    Budget(measure, amount) for measure in ("parameters", "macs") for amount in (0.3, 0.5, 0.8)
]
SELECTORS = {"total_energy": total_energy, "log_energy": log_energy, "minmax": minmax}


def altered(x, kernel, *args, **options):
    """A product with a function of the kernel, which cannot run with factors."""
    return jax.lax.dot_general(x, jnp.tanh(kernel) + 0 * x.sum(), *args, **options)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), strides=2, name="strided")(x)
        x = nn.Conv(8, (3, 3), feature_group_count=2, name="grouped")(x)
        x = nn.Conv(6, (3, 3), name="last")(x)
        return nn.Dense(2, dot_general=altered, name="head")(x)


@functools.cache
def table(multiple=1, decay=0.7):
    """Candidates of made-up spectra, so that no kernel is needed."""
    program = trace(CNN().apply, jax.eval_shape(CNN().init, jax.random.key(0), X), X)
    rng, values = np.random.default_rng(0), {}
    for use in program:
        if use.safe:
            sizes = {
                first: max_rank(use.kernel_shape, use.groups, use.axes, first)
                for first in use.forms
            }
            drop = {
                first: rng.uniform(decay, 1, (use.groups, size)) for first, size in sizes.items()
            }
            values[use.path] = {first: np.cumprod(step, axis=1) for first, step in drop.items()}
    return candidates(program, Spectra(values), multiple)


def every_choice(found, budget):
    """All combinations of candidates that meet the budget."""
    limit = budget.limit(found.dense(budget.measure)) - found.rest(budget.measure)
    for choice in itertools.product(*found.layers.values()):
        if sum(each.cost(budget.measure) for each in choice) <= limit:
            yield choice


def chosen(found, plan):
    return [
        found.layers[c.path][0] if c.scheme is None else found.at(c.path, c.scheme) for c in plan
    ]


def log_loss(each):
    return -math.log1p(-each.error)


def steps(found, budget, loss):
    """What each step along the hull of a layer gains."""
    for layer in found.layers.values():
        costs, losses = (
            np.array([f(o) for o in layer]) for f in (lambda o: o.cost(budget.measure), loss)
        )
        yield from -np.diff(losses[lower_hull(costs, losses)])


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize(
    "name, loss", [("total_energy", lambda each: each.error), ("log_energy", log_loss)]
)
def test_a_sum_is_smallest_to_one_step_among_all_choices(name, loss, budget):
    found = table(multiple=2)
    best = min(sum(map(loss, choice)) for choice in every_choice(found, budget))
    mine = sum(map(loss, chosen(found, SELECTORS[name](found, budget))))
    assert best - 1e-12 <= mine <= best + max(steps(found, budget, loss))


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
def test_the_largest_error_is_the_smallest_among_all_choices(norm, budget):
    found = table(multiple=2)
    errors = {"spectral": lambda o: o.spectral, "frobenius": lambda o: o.error}
    best = min(max(map(errors[norm], choice)) for choice in every_choice(found, budget))
    assert max(map(errors[norm], chosen(found, minmax(found, budget, norm)))) == best


@settings(max_examples=30)
@given(st.sampled_from(sorted(SELECTORS)), st.sampled_from(MEASURES[:3]), st.floats(0.75, 1.0))
def test_no_plan_exceeds_its_budget(name, measure, amount):
    plan = SELECTORS[name](table(), Budget(measure, amount))
    dense, low = plan.total(measure)
    assert low <= math.ceil(amount * dense) and all(c.error <= 1 for c in plan)


@pytest.mark.parametrize("select", SELECTORS.values())
def test_with_the_whole_cost_every_layer_stays_dense(select):
    assert select(table(), Budget("macs", 1.0)).ranks == {}


@pytest.mark.parametrize("select", SELECTORS.values())
def test_an_absolute_budget_is_the_same_as_its_share(select):
    found = table()
    half = math.floor(0.5 * found.dense("parameters"))
    assert (
        select(found, Budget("parameters", half)).choices
        == select(found, Budget("parameters", 0.5)).choices
    )


def test_the_least_share_that_an_error_names_can_be_asked_for():
    with pytest.raises(ValueError, match="cannot be met") as error:
        total_energy(table(), Budget("macs", 1e-3))
    share = float(re.search(r"\((0\.\d+) of the dense", str(error.value))[1])
    assert total_energy(table(), Budget("macs", share)).total("macs")[1] > 0


def test_a_smaller_budget_never_loses_less():
    losses = [
        sum(c.error for c in total_energy(table(), Budget("parameters", a)))
        for a in np.linspace(0.2, 1, 30)
    ]
    assert losses == sorted(losses, reverse=True)


def test_fixed_ranks_are_taken_as_they_are():
    plan = fixed(table(multiple=4), {"strided": 3, "grouped": Separable(2, 2, first="horizontal")})
    assert plan.ranks == {"strided": Separable(3), "grouped": Separable(2, 2, first="horizontal")}
    assert [choice.path for choice in plan] == list(PATHS)
    assert plan.choices[2].parameters == (3 * 3 * 8 * 6,) * 2


@pytest.mark.parametrize(
    "ranks, message",
    [
        ({"nothing": 3}, "The rule 'nothing' matches no layer; did you mean"),
        ({"head": 3}, "head: cannot be decomposed: its kernel is changed by tanh"),
        ({"last": 0}, "last: rank 0 is not allowed; give an int from 1 to 18"),
        ({"last": 2.5}, "last: the share 2.5 is not allowed"),
    ],
)
def test_fixed_ranks_that_cannot_be_are_refused(ranks, message):
    with pytest.raises(ValueError, match=message):
        fixed(table(), ranks)


@pytest.mark.parametrize("measure", ["parameters", "macs", "bytes"])
def test_a_ratio_holds_in_every_layer_that_can_meet_it(measure):
    found, budget = table(), Budget(measure, 0.6)
    for choice, layer in zip(ratio(found, budget), found.layers.values(), strict=True):
        dense, low = getattr(choice, measure)
        within = [each.error for each in layer if each.cost(measure) <= 0.6 * dense]
        assert (
            (choice.error == min(within) and low <= 0.6 * dense)
            if within
            else choice.scheme is None
        )


def test_a_ratio_that_no_layer_meets_or_that_is_absolute_is_refused():
    with pytest.raises(
        ValueError, match=r"ratio: no layer can have at most 0.0001 .*the least possible is 0\.\d+"
    ):
        ratio(table(), Budget("parameters", 1e-4))
    with pytest.raises(ValueError, match="ratio: at most 5 parameters is absolute; give a share"):
        ratio(table(), Budget("parameters", 5))


def test_energy_takes_the_cheapest_that_keeps_enough():
    found = table()
    for choice, layer in zip(energy(found, 0.9, "macs"), found.layers.values(), strict=True):
        assert choice.error <= 0.1
        assert choice.macs[1] == min(each.macs for each in layer if each.error <= 0.1)
    assert energy(found, 1).ranks == {}


@pytest.mark.parametrize("share", [0, 1.5, -1, math.nan, True, "0.9", None])
def test_a_share_of_energy_out_of_range_is_refused(share):
    with pytest.raises(
        ValueError, match=r"energy: the share .* is not allowed; give a number above 0 and up to 1"
    ):
        energy(table(), share)


def test_the_variational_ranks_are_rounded_up_to_a_multiple():
    program = table().trace
    rows = np.array([[9.0, 8.0, 7.0] + [0.1] * 9])
    values = {"strided": {"vertical": rows}, "grouped": {"vertical": rows.repeat(2, axis=0)}}
    for multiple, rank in ((1, 3), (4, 4)):
        plan = evbmf(candidates(program, Spectra(values), multiple))
        assert plan.ranks["strided"] == Separable(rank) and plan.budget is None
    flat = {"last": {"vertical": np.ones((1, 18))}}
    assert evbmf(candidates(program, Spectra(flat))).ranks["last"].rank == 1


def test_the_variational_rank_of_heads_is_that_of_one_head():
    rng = np.random.default_rng(0)
    heads = rng.normal(size=(6, 96, 3)) @ rng.normal(size=(6, 3, 32))
    noise = 0.1 * rng.normal(size=heads.shape)
    tree = {"w": jnp.asarray(np.moveaxis(heads + noise, 0, 1), "float32")}
    apply = functools.partial(jnp.einsum, "ipo,bi->bpo")
    program = trace(lambda tree, x: apply(tree["w"], x), tree, jnp.ones((2, 96)))
    values = {"w": {"heads": spectra(tree, program).values["w"]["heads"]}}
    assert evbmf(candidates(program, Spectra(values))).ranks["w"].rank == 3


def divergences(found):
    rng = np.random.default_rng(1)
    return {path: {order_and_rank(o.scheme): float(rng.random()) for o in layer[1:]}
            for path, layer in found.layers.items()}  # fmt: skip


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_sensitivity_is_smallest_to_one_step_among_all_choices(budget):
    found = table(multiple=2)
    rows = list((losses := divergences(found)).values())

    def loss(choice):
        return sum(
            row[order_and_rank(o.scheme)] for row, o in zip(rows, choice, strict=True) if o.scheme
        )

    best = min(map(loss, every_choice(found, budget)))
    mine = loss(chosen(found, sensitivity(found, losses, budget)))
    assert best <= mine < best + 1  # every step gains less than 1, the largest divergence


def test_sensitivity_chooses_only_from_what_was_measured():
    found = table()
    plan = sensitivity(
        found,
        {"strided": {("vertical", 2): 0.1, ("horizontal", 3): 0.2}},
        Budget("parameters", 0.9),
    )
    assert plan.ranks in ({"strided": Separable(2)}, {"strided": Separable(3, first="horizontal")})


def times(found, factor):
    return {
        path: {o.scheme: factor(o) * o.macs for o in layer} for path, layer in found.layers.items()
    }


def test_latency_drops_what_is_not_faster_than_dense():
    found = table()
    slow = times(
        found,
        lambda each: 1e-9 if each.scheme is None or each.scheme.first == "vertical" else 1e-3,
    )
    plan = latency(found, slow, Budget("latency", 0.6))
    assert plan.selector == "latency" and {scheme.first for scheme in plan.ranks.values()} == {
        "vertical"
    }
    assert all(choice.latency[1] <= choice.latency[0] for choice in plan)
    dense, low = plan.total("latency")
    assert low <= 0.6 * dense * (1 + 1e-9) and "latency" in str(plan)
    assert latency(found, slow, Budget("latency", 1.0)).ranks == {}


def test_another_budget_can_be_met_without_getting_slower():
    found = table()
    plan = minmax(timed(found, times(found, lambda each: 1e-9)), Budget("parameters", 0.7))
    assert all(choice.latency[1] <= choice.latency[0] for choice in plan)
    only = timed(found, {"last": times(found, lambda each: 1e-9)["last"]})
    assert set(total_energy(only, Budget("latency", 0.5)).ranks) == {"last"}


@pytest.mark.parametrize(
    "row, message",
    [
        ({Separable(2): 1.0}, "last: give times above 0, with that of the dense layer under None"),
        ({None: 0.0}, "last: give times above 0"),
        ({None: math.nan}, "last: None has nan; give a finite number"),
        ({None: 1.0, 4: 1.0}, "last: 4 has 1.0"),
    ],
)
def test_times_that_cannot_be_are_refused(row, message):
    with pytest.raises(ValueError, match=f"times: {message}"):
        latency(table(), {"last": row}, Budget("latency", 0.5))


@pytest.mark.parametrize(
    "losses, message",
    [
        ({"nothing": {}}, "'nothing' is no layer of the traced program"),
        (
            {"last": {("vertical", 2): math.nan}},
            r"divergences: last: \('vertical', 2\) has nan; give a finite number",
        ),
        ({"last": {2: 0.5}}, "divergences: last: 2 has 0.5"),
        ({"last": {("vertical", 999): 0.5}}, "nothing in the table is a candidate"),
    ],
)
def test_divergences_that_cannot_be_are_refused(losses, message):
    with pytest.raises(ValueError, match=message):
        sensitivity(table(), losses, Budget("parameters", 0.5))


@pytest.mark.parametrize("select", SELECTORS.values())
def test_a_budget_below_what_is_possible_says_the_least(select):
    found = table()
    least = int(found.least("parameters"))
    assert select(found, Budget("parameters", least)).total("parameters")[1] == least
    with pytest.raises(
        ValueError, match=rf"cannot be met; the least possible is {least} \(0\.\d+ of the dense"
    ):
        select(found, Budget("parameters", least - 1))
    with pytest.raises(ValueError, match=r"An int is absolute; a share is a float, 1\.0 for"):
        select(found, Budget("parameters", 1))
    with pytest.raises(ValueError, match=r"a share is a float, 0\.5 for 50 %"):
        select(found, Budget("parameters", 50))


def test_an_unknown_measure_norm_or_budget_is_refused():
    with pytest.raises(
        ValueError, match="The measure 'flops' is not known; give one of 'parameters', 'macs'"
    ):
        Budget("flops", 0.5)
    with pytest.raises(
        ValueError, match="norm 'nuclear' is not known; give 'spectral' or 'frobenius'"
    ):
        minmax(table(), Budget("parameters", 0.5), "nuclear")
    for select in (*SELECTORS.values(), ratio):
        with pytest.raises(
            ValueError, match=r"The budget 0\.5 is not allowed; give one such as Budget"
        ):
            select(table(), 0.5)
    with pytest.raises(ValueError, match="have no latency; call timed"):
        total_energy(table(), Budget("latency", 0.5))
    with pytest.raises(
        ValueError,
        match="latency: 2 is not allowed; give a float above 0 and up to 1 for a share of ",
    ):
        Budget("latency", 2)


def test_a_layer_that_loses_nothing_at_a_rank_is_decomposed_for_free():
    found = table()
    values = {path: dict(orders) for path, orders in found.spectra.values.items()}
    values["last"]["vertical"] = np.where(np.arange(18) < 2, 1.0, 0.0)[None]
    plan = total_energy(candidates(found.trace, Spectra(values)), Budget("parameters", 1.0))
    assert plan.ranks == {"last": Separable(2)} and sum(choice.error for choice in plan) == 0


def test_the_selectors_are_pure():
    found = table()
    before = dataclasses.replace(found, layers=dict(found.layers))
    total_energy(found, Budget("parameters", 0.5))
    assert found.layers == before.layers
    assert str(total_energy(found, Budget("parameters", 0.5))) == str(
        total_energy(before, Budget("parameters", 0.5))
    )
