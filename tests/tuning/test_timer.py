"""Measured times: remembered, kept in a file, and turned into a table that the planner takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lowrank_jax as lr
from lowrank_jax.planning.candidates import candidates
from lowrank_jax.planning.selectors import latency
from lowrank_jax.planning.spectra import spectra
from lowrank_jax.program.compiler import candidate_options
from lowrank_jax.tuning.agreement import agree
from lowrank_jax.tuning.algorithms import MERGED, PLAIN, Layer, programs
from lowrank_jax.tuning.search import fast, in_slices
from lowrank_jax.tuning.timer import DENSE, MARGIN, Timer, layer_seconds

LAYER = Layer((1, 8, 8, 4), 16, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))


class Net(nn.Module):
    """Two convolutions and a batch normalisation."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(not train)(nn.Conv(8, (3, 3))(x)))
        return nn.Conv(8, (5, 5), strides=2)(x).mean((1, 2))


@pytest.fixture(scope="module")
def net():
    model, images = Net(), jax.random.normal(jax.random.key(1), (6, 8, 8, 4))
    return model, model.init(jax.random.key(0), images), images


def small(net):
    _, variables, _ = net
    return {**variables, "params": lr.decompose(variables["params"], {"Conv_0": 2, "Conv_1": 3})}


def test_a_layer_is_measured_once(monkeypatch):
    timer, runs = Timer(rounds=2), []
    monkeypatch.setattr(
        timer, "_run", lambda *args: runs.append(args) or {PLAIN: 2.0, "merged": 1.0, DENSE: 0.5}
    )
    assert (
        timer.fastest(LAYER, lr.Separable(2)) == timer.fastest(LAYER, lr.Separable(2)) == "merged"
    )
    timer.fastest(LAYER, lr.Separable(3))
    assert len(runs) == 2


def test_what_is_measured_are_programs_that_the_layer_has():
    times = Timer(rounds=2).measure(LAYER, lr.Separable(3))
    assert {PLAIN, "padded", DENSE} <= set(times) <= {*programs(LAYER, 3), DENSE}
    assert len(set(times) & {*MERGED}) == 1  # as the dense layer is fastest
    assert all(seconds > 0 for seconds in times.values())


def test_the_programs_of_a_dense_layer_are_measured_too_and_one_program_needs_no_measuring():
    timer = Timer(rounds=2)
    times = timer.measure(LAYER, None)
    assert set(times) == {*programs(LAYER, None), DENSE} and times[DENSE] == min(times.values())
    assert times[timer.fastest(LAYER, None)] <= MARGIN * min(times.values())
    known = len(timer.times)
    groups = Layer((1, 8, 8, 4), 16, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), groups=2)
    assert timer.fastest(groups, None) == "convolve" and len(timer.times) == known


def test_times_are_kept_in_a_file_and_read_by_another_timer(tmp_path, monkeypatch):
    path = tmp_path / "times.json"
    first = Timer(rounds=2, path=path)
    found = first.measure(LAYER, lr.Separable(2))
    second = Timer(rounds=2, path=path)
    monkeypatch.setattr(second, "_run", lambda *args: pytest.fail("measured again"))
    assert second.measure(LAYER, lr.Separable(2)) == found


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 3}', '{"a": {"b": "x"}}'])
def test_a_file_that_holds_something_else_is_refused(tmp_path, text):
    (tmp_path / "times.json").write_text(text)
    with pytest.raises(ValueError, match="holds no measured times"):
        Timer(path=tmp_path / "times.json")


def test_times_under_other_compiler_options_are_measured_apart():
    keys = {
        Timer(o)._key(LAYER, lr.Separable(2))
        for o in ({}, {"xla_cpu_experimental_ynn_fusion_type": ""})
    }
    assert len(keys) == 2


def test_measuring_works_while_a_program_is_traced(net):
    model, _, images = net
    timer = Timer(rounds=2)
    run = jax.jit(lr.lowrank(model.apply, programs=timer.fastest))
    # Sums in another order, in float32.
    np.testing.assert_allclose(
        run(small(net), images), lr.lowrank(model.apply)(small(net), images), atol=1e-5
    )
    assert len(timer.times) == 4  # of each layer, decomposed and dense


def test_the_table_has_dense_and_both_orders_and_no_rank_that_costs_more_weights(net):
    model, variables, images = net
    uses = lr.trace(model.apply, variables, images)
    table = layer_seconds(uses, Timer(rounds=2), ["Conv_1"], multiple=4)
    schemes = [scheme for scheme in table["Conv_1"] if scheme]
    assert None in table["Conv_1"] and {scheme.first for scheme in schemes} == {
        "vertical",
        "horizontal",
    }
    assert all(
        scheme.rank % 4 == 0 and uses.at("Conv_1")[0].parameters_at(scheme) <= 5 * 5 * 8 * 8
        for scheme in schemes
    )


def test_the_table_is_of_the_type_that_the_program_computes_in(monkeypatch):
    model, x = nn.Conv(6, (3, 3), dtype=jnp.bfloat16), jnp.ones((2, 8, 8, 4))
    uses = lr.trace(model.apply, model.init(jax.random.key(0), x), x)
    assert uses[0].dtype == "bfloat16"
    timer, asked = Timer(rounds=2), set()
    monkeypatch.setattr(
        timer, "_run", lambda layer, *_: asked.add(layer.dtype) or {PLAIN: 1.0, DENSE: 2.0}
    )
    layer_seconds(uses, timer)
    assert asked == {"bfloat16"}


def test_a_plan_by_latency_is_never_slower_than_dense_by_the_table(net):
    model, variables, images = net
    uses = lr.trace(model.apply, variables, images)
    table = layer_seconds(uses, Timer(rounds=2), ["Conv_1"], multiple=4)
    plan = latency(
        candidates(uses, spectra(variables["params"], uses)), table, lr.Budget("latency", 1.0)
    )
    for choice in plan:
        if choice.scheme:
            assert table[choice.path][choice.scheme] < table[choice.path][None]


@pytest.mark.parametrize("size", [None, 1, 2, 4, 6, 100])
@pytest.mark.parametrize("jitted", [False, True])
def test_slices_give_the_outputs_of_the_whole_batch(net, size, jitted):
    model, variables, images = net
    run = in_slices(model.apply, size)
    found = (jax.jit(run) if jitted else run)(variables, images)
    np.testing.assert_allclose(found, model.apply(variables, images), atol=1e-6)


class Named(Timer):
    """Finds these programs the fastest without measuring."""

    dense, low = "gather", "shift+gather"

    def fastest(self, layer, scheme):
        return self.dense if scheme is None else self.low


class Usual(Named):
    dense, low = "convolve", PLAIN


@pytest.mark.parametrize("timers", [lambda o: Timer(o, rounds=2), Named])
def test_fast_runs_any_batch_and_says_what_it_tried(net, timers):
    model, _, images = net
    tree = {**net[1], "params": lr.decompose(net[1]["params"], {"Conv_1": 3})}
    run = fast(model.apply, tree, images, slices=(2,), timers=timers, rounds=2)
    wanted = lr.lowrank(model.apply)(tree, images)
    np.testing.assert_allclose(run(tree, images), wanted, atol=1e-5)
    np.testing.assert_allclose(run(tree, images[:3]), wanted[:3], atol=1e-5)
    assert any("slices of 2" in name for name in run.seconds)
    if timers is Named:
        assert any("programs" in name for name in run.seconds)


def test_layers_that_differ_in_the_batch_alone_are_measured_at_one_size(net):
    model, _, images = net
    asked: dict[int, list] = {}

    class Asked(Named):
        def fastest(self, layer, scheme):
            asked.setdefault(id(self), []).append((layer.size, scheme))
            return super().fastest(layer, scheme)

    run = fast(model.apply, small(net), images, slices=(2, 3), timers=Asked, rounds=2)
    assert len(asked) == len(candidate_options())
    assert all(len(own) == len(set(own)) == 2 for own in asked.values())
    assert all(layer.inputs[0] == (run.size or len(images)) for layer, _ in run.programs)


def test_fast_does_not_run_a_table_of_plain_convolutions_again(net):
    model, variables, images = net
    run = fast(model.apply, variables, images, slices=(), timers=Usual, rounds=2)
    assert not any("programs" in name for name in run.seconds) and run.programs == {}


@pytest.mark.parametrize("size", [(), (2,)])
def test_a_frozen_network_has_its_weights_and_refuses_others(net, size):
    model, _, images = net
    run = fast(model.apply, small(net), images, slices=size, timers=Named, rounds=2, freeze=True)
    np.testing.assert_allclose(
        run(None, images), lr.lowrank(model.apply)(small(net), images), atol=1e-5
    )
    assert run(None, images[:3]).shape == (3, 8) and any("programs" in name for name in run.seconds)
    with pytest.raises(
        ValueError, match=r"variables are part of this program: give None .*without freeze"
    ):
        run(small(net), images)


def test_fast_leaves_out_ways_that_change_the_outputs(net):
    model, variables, images = net

    def apply(variables, images):  # statistics of the batch: slices have others
        return model.apply(variables, images, train=True, mutable=["batch_stats"])[0]

    run = fast(apply, variables, images, slices=(2,), rounds=2)
    assert run.size is None and not any("slices" in name for name in run.seconds)


def test_ways_are_compared_in_the_precision_that_the_network_computes_in(net):
    """Outputs in float32 of layers in bfloat16 differ by the rounding of those."""
    layers = [nn.Conv(8, (3, 3), dtype=jnp.bfloat16), nn.Conv(8, (3, 3), dtype=jnp.bfloat16)]
    model = nn.Sequential([*layers, lambda x: x.astype(jnp.float32)])
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 4))
    variables = model.init(jax.random.key(0), images)
    run = fast(model.apply, variables, images, slices=(2,), timers=Named, rounds=2)
    with_programs = [name.rpartition(", programs")[0] for name in run.seconds if "programs" in name]
    sets = {name.partition(", all at")[0].partition(", slices")[0] for name in with_programs}
    assert len(sets) == len(candidate_options())


def test_fast_takes_outputs_that_are_no_floats(net):
    model, variables, images = net
    classes = lambda variables, images: model.apply(variables, images).argmax(-1)  # noqa: E731
    run = fast(classes, variables, images, slices=(2,), timers=Usual, rounds=2)
    assert run(variables, images).dtype == jnp.int32


def test_fast_takes_bfloat16(net):
    model = nn.Sequential([nn.Conv(8, (3, 3), dtype=jnp.bfloat16)])
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 4))
    variables = model.init(jax.random.key(0), images)
    tree = {"params": lr.decompose(variables["params"], {"layers_0": 3})}
    run = fast(model.apply, tree, images, slices=(2,), timers=Named, rounds=2)
    assert run(tree, images).dtype == jnp.bfloat16


def test_fast_is_right_where_the_default_program_is_not():
    """With jax 0.12.0.1 XLA's default program of these layers returns memory that was never
    written."""
    model = lambda dtype: nn.Sequential([  # noqa: E731
        nn.Conv(64, (3, 3), dtype=dtype), nn.relu, nn.Conv(64, (3, 3), dtype=dtype), nn.relu,
        lambda x: nn.max_pool(x, (2, 2), (2, 2)),
    ])  # fmt: skip
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    variables = model(jnp.float32).init(jax.random.key(0), images)
    tree = {"params": lr.decompose(variables["params"], {"layers_2": 24})}
    for own in (variables, tree):
        run = fast(
            model(jnp.bfloat16).apply,
            own,
            images,
            slices=(),
            timers=lambda o: Timer(o, rounds=2),
            rounds=2,
        )
        wanted = lr.lowrank(model(jnp.float32).apply)(own, images)
        assert agree(
            wanted, run(own, images).astype(jnp.float32), tolerance=0.03
        )  # three roundings to 8 bits a layer


@pytest.mark.parametrize(("seconds", "chosen"), [(0.95, "shift+gather"), (0.5, "shift+winograd")])
def test_many_small_operations_have_to_win_by_a_margin(monkeypatch, seconds, chosen):
    timer = Timer()
    times = {PLAIN: 2.0, "shift+gather": 1.0, "shift+winograd": seconds, DENSE: 0.1}
    monkeypatch.setattr(timer, "measure", lambda *_: times)
    assert timer.fastest(LAYER, lr.Separable(2)) == chosen
