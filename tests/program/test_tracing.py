"""What a program does with its kernels, read from the program."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax import Matrix, Separable, SeparableConv, compress, decompose, lowrank, plan, trace
from lowrank_jax.factorization.forms import FORMS
from lowrank_jax.models import NIN

X = jnp.zeros((2, 8, 8, 4))
NHWC = ("NHWC", "HWIO", "NHWC")
SPATIAL = [first for first, form in FORMS.items() if form.spatial]


def traced(model, x=X, **options):
    return trace(model.apply, jax.eval_shape(model.init, jax.random.key(0), x), x, **options)


def conv(x, kernel, layout=NHWC, **options):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=layout, **options
    )


def weights(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
    "options, adds",
    [
        ({}, 2 * 64 * 9 * 4 * 6),
        ({"strides": 2}, 2 * 16 * 9 * 4 * 6),
        ({"padding": "VALID"}, 2 * 36 * 9 * 4 * 6),
        ({"feature_group_count": 2}, 2 * 64 * 9 * 2 * 6),
        ({"kernel_dilation": 2}, 2 * 64 * 9 * 4 * 6),
        ({"dtype": jnp.bfloat16}, 2 * 64 * 9 * 4 * 6),
    ],
)
def test_macs_of_a_convolution(options, adds):
    (use,) = traced(nn.Conv(6, (3, 3), **options))
    assert use.macs == adds and use.safe and use.kind == "conv"


def test_every_fact_of_a_convolution_is_read():
    options = {
        "strides": (2, 1),
        "kernel_dilation": (1, 2),
        "padding": [(1, 0), (2, 2)],
        "feature_group_count": 2,
    }
    (use,) = traced(nn.Conv(6, (3, 3), **options))
    assert (use.axes, use.kernel_shape, use.parameters, use.groups) == (
        "HWIO",
        (3, 3, 2, 6),
        108,
        2,
    )
    assert (use.strides, use.dilation, use.input_dilation, use.padding) == (
        (2, 1),
        (1, 2),
        (1, 1),
        ((1, 0), (2, 2)),
    )
    assert (use.inputs, use.outputs, use.positions, use.uses) == ((2, 8, 8, 4), (2, 4, 8, 6), 64, 1)
    assert use.bytes == 4 * (2 * 64 * 4 + 108 + 2 * 32 * 6)


def test_a_transposed_convolution_and_a_dense_layer_are_told_apart():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5)(nn.ConvTranspose(6, (3, 3), strides=(2, 2))(x))

    transposed, dense = traced(Model())
    assert (transposed.kind, transposed.input_dilation, transposed.safe) == (
        "conv_transpose",
        (2, 2),
        True,
    )
    assert (dense.kind, dense.path, dense.macs, dense.safe) == (
        "product",
        "Dense_0",
        2 * 256 * 6 * 5,
        True,
    )
    assert (dense.axes, dense.kernel_shape, dense.positions) == ("IO", (6, 5), 2 * 256)


def test_a_strided_separable_layer_runs_its_vertical_part_at_full_width():
    vertical, horizontal = traced(SeparableConv(6, (3, 3), 5, strides=2))
    assert (vertical.path, vertical.macs) == ("kernel/vertical", 2 * 4 * 8 * 3 * 4 * 5)
    assert (horizontal.path, horizontal.macs) == ("kernel/horizontal", 2 * 4 * 4 * 3 * 5 * 6)


@pytest.mark.parametrize("first", SPATIAL)
@pytest.mark.parametrize(
    "options",
    [{}, {"strides": (2, 1)}, {"strides": (1, 2), "padding": "VALID"}, {"feature_group_count": 2}],
)
def test_the_cost_predicted_for_a_rank_is_that_of_the_decomposed_program(options, first):
    model = nn.Conv(6, (3, 5), **options)
    (use,) = traced(model)
    scheme = use.scheme(2, first)
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    small = jax.eval_shape(lambda tree: decompose(tree, {"kernel": scheme}), shapes)
    after = trace(lowrank(model.apply), small, X)
    assert len(after) == 2
    assert use.macs_at(scheme) == after.macs
    assert use.parameters_at(scheme) == after.parameters


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.jit(nn.Conv)(4, (3, 3), name="inner")(x), None


def loop(block=Block, axis=0, **options):
    class Loop(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.scan(block, length=3, **options)(name="loop")(x, None)[0]

    return Loop()


STACKED = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}


def test_convolutions_in_nested_calls_and_scans_are_found():
    (use,) = traced(loop(nn.remat(Block), **STACKED))
    assert (use.path, use.macs, use.uses) == ("loop/inner", 3 * 2 * 64 * 9 * 4 * 4, 3)
    assert (use.axes, use.kernel_shape, use.safe) == ("HWIO", (3, 3, 3, 4, 4), True)
    assert use.macs_at(use.scheme(2)) == 3 * 2 * 64 * 2 * 3 * (4 + 4)


def test_a_kernel_shared_by_all_iterations_counts_each_use():
    (use,) = traced(loop(variable_broadcast="params", split_rngs={"params": False}))
    assert (use.uses, use.kernel_shape, use.safe) == (3, (3, 3, 4, 4), True)


def handing_on(tree, x):
    """Two scans over one stack of kernels; the body of the first gives each kernel back."""

    def step(carry, kernel):
        return jnp.tanh(conv(carry, kernel)), (kernel, carry.sum())

    carry, (kernels, sums) = jax.lax.scan(step, x, tree["stack"])
    return jax.lax.scan(step, carry, kernels)[0] + sums.sum()


def test_a_kernel_that_the_body_of_a_scan_hands_on_is_still_the_kernel():
    tree = {"stack": weights(3, 3, 3, 4, 4)}
    (use,) = trace(handing_on, tree, X)
    assert (use.path, use.uses, use.safe) == ("stack", 6, True)
    small = decompose(tree, {"stack": 12})
    program = str(jax.make_jaxpr(lowrank(handing_on))(small, weights(*X.shape)))
    assert program.count("conv_general_dilated[") == 4
    found, expected = (f(t, X + 1) for f, t in ((lowrank(handing_on), small), (handing_on, tree)))
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-4)
    fitted = compress(handing_on, tree, weights(4, 8, 8, 4), {"stack": 12})
    np.testing.assert_allclose(lowrank(handing_on)(fitted, X + 1), expected, atol=1e-2)


def test_the_kernels_of_a_vmapped_layer_are_a_stack():
    many = nn.vmap(nn.Conv, in_axes=0, variable_axes={"params": 0}, split_rngs={"params": True})
    (use,) = traced(many(6, (3, 3), feature_group_count=2), jnp.zeros((5, 2, 8, 8, 4)))
    assert (use.axes, use.kernel_shape, use.groups, use.uses, use.safe) == (
        "HWIO",
        (5, 3, 3, 2, 6),
        2,
        5,
        True,
    )
    assert (use.inputs, use.outputs) == ((2, 8, 8, 4), (2, 8, 8, 6))
    assert use.macs == 5 * 2 * 64 * 9 * 2 * 6


def test_a_layer_used_twice_is_one_entry_and_its_weights_count_once():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Conv(4, (3, 3))
            return layer(layer(x))

    uses = traced(Twice())
    assert len(uses) == 1 and uses[0].uses == 2 and uses.parameters == 9 * 16
    assert uses.macs == 2 * 2 * 64 * 9 * 4 * 4


def test_a_layer_used_at_two_sizes_is_two_entries():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Conv(4, (3, 3))
            return layer(x).sum() + layer(x[:, ::2]).sum()

    assert [use.inputs for use in traced(Twice())] == [(2, 8, 8, 4), (2, 4, 8, 4)]


def test_products_of_groups_of_rows_are_counted_and_stay_dense():
    tree, x = {"experts": weights(4, 8, 32), "last": weights(32, 8)}, weights(64, 8)
    sizes = jnp.array([20, 20, 14, 10])

    def apply(tree, x):
        return jax.lax.ragged_dot(x, tree["experts"], sizes) @ tree["last"]

    found = trace(apply, tree, x)
    assert [use.path for use in found] == ["experts", "last"]
    assert found.at("experts")[0].macs == found.at("last")[0].macs == 64 * 8 * 32
    assert "groups of rows" in found.at("experts")[0].reason and found.safe_paths() == ["last"]
    with pytest.raises(ValueError, match="experts: cannot be decomposed: it is a product of"):
        decompose(tree, {"experts": 2}, trace=found)
    small = decompose(tree, {"experts": Matrix(8), "last": 8})
    np.testing.assert_allclose(lowrank(apply)(small, x), apply(tree, x), rtol=1e-3, atol=1e-3)


def test_a_kernel_without_entries_says_so_and_the_others_are_planned():
    tree = {"a": weights(8, 8), "none": jnp.zeros((8, 0))}

    def apply(tree, x):
        return x @ tree["a"] + (x @ tree["none"]).sum()

    found = trace(apply, tree, weights(64, 8))
    assert found.at("none")[0].reason == "its kernel has no entries" and str(found)
    assert plan(apply, tree, weights(64, 8), macs=0.5).total("macs") == (64, 32)


def test_branches_are_listed_as_at_most_and_while_loops_per_iteration():
    def apply(kernel, x):
        x = jax.lax.cond(x.sum() > 0, lambda x: conv(x, kernel), lambda x: x, x)
        return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: conv(x, kernel), x)

    uses = trace(apply, {"kernel": jnp.ones((3, 3, 4, 4))}["kernel"], X)
    assert [use.count for use in uses] == ["at most", "per iteration"]
    assert all(use.safe and use.macs == 2 * 64 * 9 * 16 for use in uses)


@pytest.mark.parametrize(
    "change, operation",
    [
        (lambda k, x: k * x.mean(), "mul"),
        (lambda k, x: (k - x.mean()) / k.std((0, 1, 2)), "sub"),
        (lambda k, x: jnp.where(x.mean() > 0, k, 0), "select_n"),
        (lambda k, x: jax.lax.stop_gradient(k) + x.mean(), "add"),
        (lambda k, x: k.reshape(3, 3, 2, 2, 4).sum(3).repeat(2, 2) + x.mean(), "computed"),
        (lambda k, x: jax.lax.fori_loop(0, 2, lambda _, k: k * x.mean(), k), "computed"),
        (lambda k, x: jax.jit(lambda k: jnp.tanh(k) * x.mean())(k), "tanh"),
        (lambda k, x: jax.lax.cond(x.sum() > 0, lambda k: k, lambda k: -k, k), "computed"),
    ],
)
def test_a_kernel_that_data_change_on_its_way_is_not_safe(change, operation):
    params = {"layer": {"kernel": weights(3, 3, 4, 4)}}
    program = trace(lambda p, x: conv(x, change(p["layer"]["kernel"], x)), params, X)
    assert not program[0].safe and operation in program[0].reason
    with pytest.raises(ValueError, match=r"No layer of the traced program|no kernel"):
        decompose(params, trace=program)


def test_a_kernel_that_is_also_used_elsewhere_is_not_safe():
    params = {"layer": {"kernel": weights(3, 3, 4, 4)}}
    (use,) = trace(
        lambda p, x: (conv(x, p["layer"]["kernel"]), jnp.sum(p["layer"]["kernel"])), params, X
    )
    assert not use.safe and "also used by reduce_sum" in use.reason


@pytest.mark.parametrize(
    "move, stored, axes, layout",
    [
        (lambda k: k, (3, 5, 4, 6), "HWIO", NHWC),
        (lambda k: k, (6, 4, 3, 5), "OIHW", ("NHWC", "OIHW", "NHWC")),
        (lambda k: jnp.transpose(k, (2, 3, 1, 0)), (6, 4, 3, 5), "OIHW", NHWC),
        (lambda k: jax.jit(jnp.transpose)(k).astype(jnp.float32), (6, 4, 5, 3), "OIWH", NHWC),
        (lambda k: k[None].squeeze(0).reshape(3, 1, 5, 4, 6)[:, 0], (3, 5, 4, 6), "HWIO", NHWC),
    ],
)
def test_a_kernel_that_is_only_moved_is_safe_and_its_layout_is_read(move, stored, axes, layout):
    params = {"weight": weights(*stored).astype(jnp.bfloat16)}

    def apply(params, x):
        return conv(x, move(params["weight"].astype(jnp.float32)), layout)

    (use,) = trace(apply, params, X)
    assert (use.axes, use.kernel_shape, use.reason) == (axes, stored, "")
    chex.assert_equal(use.macs, 2 * 64 * 15 * 24)


@pytest.mark.parametrize("size", [(3,), (3, 3, 3)])
def test_one_and_three_dimensions_are_read(size):
    x = jnp.zeros((2, *(8,) * len(size), 4))
    (use,) = traced(nn.Conv(6, size), x)
    assert use.axes == {1: "WIO", 3: "DHWIO"}[len(size)] and use.safe
    assert use.macs == 2 * 8 ** len(size) * 3 ** len(size) * 24


def test_what_is_no_array_stays_as_it_is():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Conv(4, (3, 3))(x)
            return nn.BatchNorm(use_running_average=not train)(x) if train else x

    variables = Model().init(jax.random.key(0), X, train=True)
    assert len(trace(Model().apply, variables, X, train=True, mutable=["batch_stats"])) == 1
    assert trace(Model().apply, variables, X, train=False)[0].path == "Conv_0"


def test_an_error_of_the_function_has_a_note_that_says_what_is_needed():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Conv(4, (3, 3))(x)

    with pytest.raises(TypeError, match="'train'") as caught:
        trace(Net().apply, {"params": {"Conv_0": {"kernel": weights(3, 3, 4, 4)}}}, X)
    assert "train=False" in caught.value.__notes__[-1]


def test_a_module_in_place_of_its_function_is_refused_for_that_alone():
    with pytest.raises(ValueError, match="apply") as told:
        trace(nn.Dense(3), {"params": {}}, X)
    assert not getattr(told.value, "__notes__", [])


def test_without_a_table_decompose_takes_half_of_the_weights_of_every_safe_layer():
    class Standardised(nn.Conv):
        def param(self, name, *args, **kwargs):
            value = super().param(name, *args, **kwargs)
            return value - value.mean() if name == "kernel" else value

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(16, (3, 3), name="plain")(x)
            x = nn.Conv(16, (3, 3), feature_group_count=4, name="grouped")(x)
            x = Standardised(16, (3, 3), name="standardised")(x)
            return nn.Dense(3, name="dense")(x)

    params = Model().init(jax.random.key(0), X)["params"]
    small = decompose(params, trace=traced(Model()))
    factored = {name for name, layer in small.items() if isinstance(layer["kernel"], dict)}
    assert factored == {"plain", "grouped", "standardised", "dense"}
    assert set(small["standardised"]["kernel"]) == {"changed"}
    assert small["dense"]["kernel"]["left_factor"].shape == (16, 1)  # 16 + 3 <= 48 / 2 < 2 * 19
    assert small["plain"]["kernel"]["vertical"].shape == (
        3,
        1,
        4,
        4,
    )  # 4 * 3 * (4 + 16) <= 576 / 2 < 5 * 60
    assert small["grouped"]["kernel"]["vertical"].shape == (
        3,
        1,
        4,
        12,
    )  # 3 * (3 * 4 * 4 + 3 * 16) = 576 / 2


def test_a_trace_tells_decompose_the_groups():
    model = nn.Conv(8, (3, 3), feature_group_count=4)
    params = {"layer": model.init(jax.random.key(0), X)["params"]}
    uses = trace(lambda params, x: model.apply({"params": params["layer"]}, x), params, X)
    chex.assert_trees_all_equal(
        decompose(params, {"layer": 2}, uses), decompose(params, {"layer": Separable(2, 4)})
    )
    with pytest.raises(
        ValueError, match=r"layer: Separable\(rank=2, groups=2.* does not fit .*groups=4"
    ):
        decompose(params, {"layer": Separable(2, 2)}, uses)


@pytest.mark.parametrize("padding", ["VALID"])
@pytest.mark.parametrize(
    "options", [{}, {"strides": 2}, {"feature_group_count": 4}, {"kernel_dilation": 2}]
)
def test_macs_agree_with_the_compilers_count(options, padding):
    model = nn.Conv(8, (3, 3), use_bias=False, padding=padding, **options)
    variables = model.init(jax.random.key(0), X)
    analysis = jax.jit(model.apply).lower(variables, X).cost_analysis()
    assert 2 * traced(model).macs == analysis["flops"]


def test_the_experiments_network_costs_what_its_layers_add_up_to():
    uses = traced(NIN(), jnp.zeros((1, 32, 32, 3)))
    assert [use.path for use in uses] == [f"Conv_{i}" for i in range(6)]
    assert uses[2].macs == 25 * 96 * 192 * 16 * 16
    assert uses.parameters == 14400 + 18432 + 460800 + 36864 + 331776 + 1920


def test_a_trace_prints_as_a_table():
    lines = str(traced(NIN(), jnp.zeros((1, 32, 32, 3)))).splitlines()
    assert lines[0].split()[:3] == ["layer", "kind", "kernel"] and len(lines) == 8
    assert "5x5x96x192" in lines[3] and "117,964,800" in lines[3] and lines[3].endswith("yes")
    assert lines[-1].startswith("total") and "182,378,496" in lines[-1]


@pytest.mark.parametrize("size", [(3, 3), (4, 4), (2, 5)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (3, 1)])
def test_a_transposed_convolution_multiplies_each_input_by_each_tap(size, strides):
    model, x = nn.ConvTranspose(6, size, strides), jnp.ones((2, 6, 6, 5))
    [use] = trace(model.apply, model.init(jax.random.key(0), x), x)
    inputs, taps = 2 * 6 * 6, size[0] * size[1]
    assert use.macs == inputs * taps * 5 * 6
    first = inputs * size[0] * 5 * 4  # a column of taps, from each input
    second = inputs * strides[0] * size[1] * 4 * 6
    assert use.macs_at(Separable(4)) == first + second


def test_an_error_of_factors_has_a_note_that_says_how_they_run():
    model = nn.Conv(8, (3, 3))
    small = decompose(model.init(jax.random.key(0), X), {"kernel": 2})
    with pytest.raises(Exception, match="kernel") as caught:
        trace(model.apply, small, X)
    assert "give lowrank(apply) as the function" in caught.value.__notes__[-1]
