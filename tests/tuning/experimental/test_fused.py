"""The fused kernel computes what two convolutions do; Pallas interprets it here, and lowers it for
a GPU."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lowrank_jax import Separable
from lowrank_jax.tuning.experimental.fused import Tile, separable_conv
from lowrank_jax.tuning.experimental.roofline import Bound, roofline, two_convolutions

pytestmark = pytest.mark.slow

SAME = ((1, 1), (1, 1))
ORDERS = ("vertical", "horizontal")
SMALL = Tile(lines=16, positions=2, inputs=16, outputs=16)


def normal(shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def layer(
    size=(2, 7, 6),
    channels=(3, 2, 5),
    taps=(3, 2),
    first_axis="vertical",
    dtype="float32",
    integers=False,
):
    """Arrays x, first, second and bias of a layer; small integers where every sum is to be
    exact."""
    (inputs, rank, outputs), kernels = channels, [(taps[0], 1), (1, taps[1])]
    one, two = kernels if first_axis == "vertical" else kernels[::-1]
    shapes = (*size, inputs), (*one, inputs, rank), (*two, rank, outputs), (outputs,)
    arrays = [normal(shape, seed=seed) for seed, shape in enumerate(shapes)]
    return [
        jnp.round(2 * array).astype(dtype) if integers else array.astype(dtype) for array in arrays
    ]


def assert_same_as_two_convolutions(arrays, **options):
    """Equal within the bounds of the roundings of both programs."""
    found, expected = separable_conv(*arrays, **options), two_convolutions(*arrays, **options)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    x, first, second, *_ = arrays
    # With u = eps / 2: each program rounds the intermediate, the output and, in two convolutions,
    # the output with the bias, to 5 u together; and each adds up as many float32 terms as there are
    # weights for an output, in any order. All are relative to the sum of the absolute values of the
    # terms, which the same layer computes from those.
    terms = np.prod(first.shape[:3]) + np.prod(second.shape[:3]) + 1
    size = two_convolutions(*(jnp.abs(array.astype("float32")) for array in arrays), **options)
    eps = 3 * float(jnp.finfo(x.dtype).eps) + terms * float(jnp.finfo("float32").eps)
    assert np.all(
        np.abs(np.float64(found) - np.float64(expected)) <= eps * np.float64(size) + 1e-30
    )


# Every example compiles two programs, so that a failing one is not made smaller: that would take
# minutes.
@settings(max_examples=10, phases=[Phase.generate])
@given(st.data())
def test_exact_in_integers_for_every_geometry(data):
    def pair(low, high):
        return data.draw(st.tuples(*[st.integers(low, high)] * 2))

    size, channels = (
        (data.draw(st.integers(1, 3)), *pair(1, 9)),
        [data.draw(st.integers(1, 20)) for _ in range(3)],
    )
    taps, first_axis = pair(1, 3), data.draw(st.sampled_from(ORDERS))
    options = {"strides": pair(1, 4), "padding": (pair(0, 3), pair(0, 3)), "first_axis": first_axis}
    arrays = layer(size, channels, taps, first_axis, integers=True)[: data.draw(st.integers(3, 4))]
    tile = data.draw(st.sampled_from([None, SMALL]))
    found = jax.jit(lambda *arrays: separable_conv(*arrays, **options, tile=tile))(*arrays)
    chex.assert_trees_all_equal(found, two_convolutions(*arrays, **options))


ROUNDED = [("float32", "vertical", 3, True), ("bfloat16", "horizontal", 32, False),
           ("bfloat16", "vertical", 5, True), ("float16", "vertical", 17, True)]  # fmt: skip


@pytest.mark.parametrize("dtype, first_axis, inputs, bias", ROUNDED)
def test_rounds_where_two_convolutions_do(dtype, first_axis, inputs, bias):
    arrays = layer(channels=(inputs, 3, 18), first_axis=first_axis, dtype=dtype)
    assert_same_as_two_convolutions(arrays[: 3 + bias], padding=SAME, first_axis=first_axis)


@pytest.mark.parametrize("dtype, first_axis", [("float32", "vertical"), ("bfloat16", "horizontal")])
def test_compiled_within_another_program_or_not(dtype, first_axis):
    arrays, options = (
        layer(first_axis=first_axis, dtype=dtype),
        {"padding": SAME, "first_axis": first_axis},
    )
    eager = separable_conv(*arrays, **options)
    chex.assert_trees_all_equal(jax.jit(lambda *a: separable_conv(*a, **options))(*arrays), eager)


@pytest.mark.parametrize("inputs, outputs", [(16, 16), (17, 65), (48, 64)])
def test_exact_whether_blocks_divide_the_channels_or_not(inputs, outputs):
    arrays = layer((1, 5, 4), (inputs, 17, outputs), (3, 2), integers=True)
    chex.assert_trees_all_equal(
        separable_conv(*arrays, padding=SAME), two_convolutions(*arrays, padding=SAME)
    )


@pytest.mark.parametrize(
    "positions, lines, inputs, outputs", [(1, 16, 16, 64), (3, 64, 32, 16), (100, 32, 64, 32)]
)
def test_exact_for_every_tile(positions, lines, inputs, outputs):
    arrays, options = (
        layer((3, 9, 8), (20, 3, 33), integers=True),
        {"padding": SAME, "strides": (1, 2)},
    )
    found = separable_conv(*arrays, **options, tile=Tile(lines, positions, inputs, outputs))
    chex.assert_trees_all_equal(found, two_convolutions(*arrays, **options))


CUT, WIDE = ((-1, 2), (1, -2)), ((4, 0), (0, 5))


@pytest.mark.parametrize(
    "padding, first_axis", [(CUT, "vertical"), (CUT, "horizontal"), (WIDE, "vertical")]
)
def test_exact_for_padding_that_cuts_or_exceeds_the_kernel(padding, first_axis):
    arrays, options = (
        layer(first_axis=first_axis, integers=True),
        {"padding": padding, "first_axis": first_axis},
    )
    chex.assert_trees_all_equal(
        separable_conv(*arrays, **options), two_convolutions(*arrays, **options)
    )


@pytest.mark.parametrize(
    "size, taps", [((0, 7, 6), (3, 3)), ((2, 2, 6), (3, 3)), ((2, 7, 6), (1, 9))], ids=str
)
def test_an_empty_output_has_the_shape_of_two_convolutions(size, taps):
    arrays = layer(size, taps=taps)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        separable_conv(*arrays), two_convolutions(*arrays)
    )


def test_zero_factors_leave_the_bias():
    x, first, second, bias = layer(taps=(3, 3))
    found = separable_conv(x, 0 * first, 0 * second, bias, padding=SAME)
    chex.assert_trees_all_equal(found, jnp.broadcast_to(bias, (2, 7, 6, 5)))


def test_the_padding_of_the_second_factor_is_zero_and_not_what_the_first_makes_of_it():
    # A value that the first factor carried out of the image would appear in the corners.
    x, first, second = jnp.ones((1, 2, 2, 1)), jnp.ones((3, 1, 1, 1)), jnp.ones((1, 3, 1, 1))
    chex.assert_trees_all_equal(
        separable_conv(x, first, second, padding=SAME), jnp.full((1, 2, 2, 1), 4.0)
    )


@pytest.mark.parametrize("first_axis", ORDERS)
def test_a_value_that_is_no_number_spoils_only_the_outputs_that_see_it(first_axis):
    x, *others = layer(first_axis=first_axis)
    x = x.at[0, 4, 3, 1].set(jnp.nan)
    found, expected = (
        run(x, *others, first_axis=first_axis) for run in (separable_conv, two_convolutions)
    )
    chex.assert_trees_all_equal(jnp.isnan(found), jnp.isnan(expected))
    assert 0 < jnp.isnan(found).sum() < found.size / 4


def test_the_mixed_types_of_a_layer_are_promoted():
    x, first, second, bias = layer(integers=True)
    arrays = x.astype("bfloat16"), first, second.astype("float16"), bias
    found = separable_conv(*arrays, padding=SAME)
    chex.assert_trees_all_equal(found, two_convolutions(x, first, second, bias, padding=SAME))
    assert found.dtype == "float32"


def test_runs_the_factors_of_a_decomposition():
    kernel, x = normal((3, 3, 4, 6)), normal((1, 6, 6, 4))
    dense = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    for first_axis in ORDERS:
        factors = Separable(12, first=first_axis).factor(kernel)
        found = separable_conv(x, *factors, padding=SAME, first_axis=first_axis)
        # Factors of full rank give the kernel to float32; a few tens of roundings of the largest
        # output.
        chex.assert_trees_all_close(found, dense, atol=50 * 2**-23 * float(jnp.abs(dense).max()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("first_axis, count", [("vertical", 3), ("horizontal", 4)])
def test_gradients_are_those_of_two_convolutions(dtype, first_axis, count):
    arrays = layer(first_axis=first_axis, dtype=dtype)[:count]
    options = {"padding": SAME, "strides": (2, 1), "first_axis": first_axis}
    weights = normal((2, 4, 7, 5), dtype, seed=9)

    def gradient(run):
        return jax.jit(
            jax.grad(lambda *a: jnp.sum(run(*a, **options) * weights), tuple(range(count)))
        )(*arrays)

    # The same program for the same cotangents, compiled apart: float32 sums in another order, half
    # ones rounded once.
    found, expected = gradient(separable_conv), gradient(two_convolutions)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_close(found, expected, rtol=4 * float(jnp.finfo(dtype).eps), atol=1e-5)


@pytest.mark.parametrize(
    ("transform", "axes"),
    [
        (jax.jit, (0, None, None, None)),
        (jax.jit, (0, 0, None, 0)),
        (lambda run: run, (None, None, 0, None)),
    ],
)
def test_maps_over_any_argument(transform, axes):
    arrays = [
        array if axis is None else jnp.stack([array, -array])
        for array, axis in zip(layer(), axes, strict=True)
    ]

    def mapped(run):
        return transform(jax.vmap(lambda *a: run(*a, padding=SAME), axes))(*arrays)

    # Sums of 13 terms, of a size of 10 at most.
    chex.assert_trees_all_close(mapped(separable_conv), mapped(two_convolutions), atol=2e-5)


def test_gradients_of_each_of_a_batch():
    x, first, second, bias = layer()
    xs = jnp.stack([x, 2 * x])

    def gradients(run):
        loss = jax.grad(lambda x, first: jnp.sum(run(x, first, second, bias, padding=SAME)), (0, 1))
        return jax.jit(jax.vmap(loss, (0, None)))(xs, first)

    chex.assert_trees_all_close(
        gradients(separable_conv), gradients(two_convolutions), rtol=1e-5, atol=1e-4
    )


def test_forward_mode_is_refused():
    x, *kernels = layer()
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: separable_conv(x, *kernels), (x,), (x,))


def test_two_convolutions_have_groups_and_dilation():
    x, first, second = normal((1, 9, 9, 4)), normal((3, 1, 2, 6)), normal((1, 3, 3, 8))
    found = two_convolutions(
        x, first, second, groups=2, dilation=(2, 3), strides=(2, 1), padding=SAME
    )
    halves = [
        two_convolutions(
            x[..., i : i + 2],
            first[..., j : j + 3],
            second[..., k : k + 4],
            dilation=(2, 3),
            strides=(2, 1),
            padding=SAME,
        )
        for i, j, k in ((0, 0, 0), (2, 3, 4))
    ]
    chex.assert_trees_all_close(found, jnp.concatenate(halves, -1), atol=1e-4)


X, FIRST, SECOND, BIAS = layer()
REFUSED = [
    ({"groups": 2}, r"groups=2 .* only 1\. Call two_convolutions"),
    ({"dilation": (1, 2)}, r"dilation=\(1, 2\) .* only 1\. Call two_convolutions"),
    ({"dilation": 2}, r"dilation=2 .* only 1"),
    ({"padding": "SAME"}, r"padding='SAME' .* give \(before, after\)"),
    ({"padding": 1}, r"padding=1 "),
    ({"padding": ((1, 1), 1)}, r"padding=\(\(1, 1\), 1\) "),
    ({"strides": 2}, r"strides=2 .* two positive ints"),
    ({"strides": (0, 1)}, r"strides=\(0, 1\) .* two positive ints"),
    ({"first_axis": "row"}, r"first_axis='row' .* \('vertical', 'horizontal'\)"),
    (
        {"first_axis": "horizontal"},
        r"\(3, 1, 3, 2\) and \(1, 2, 2, 5\) with first_axis='horizontal' do not fit",
    ),
    ({"x": X[..., :2]}, r"do not fit x of shape \(2, 7, 6, 2\); give \(h, 1, C, K\)"),
    ({"x": X[0]}, r"do not fit x of shape \(7, 6, 3\); .* x \(N, H, W, C\)"),
    ({"second": FIRST, "bias": None}, r"\(3, 1, 3, 2\) and \(3, 1, 3, 2\) .* do not fit"),
    ({"bias": BIAS[:1]}, r"bias of shape \(1,\) .* give \(5,\)"),
    (
        {"x": X.astype("complex64")},
        r"dtype complex64 .* give one of \('float32', .* call two_convolutions",
    ),
]


@pytest.mark.parametrize("change, message", REFUSED, ids=map(str, range(len(REFUSED))))
def test_what_the_kernel_does_not_do_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        separable_conv(**{"x": X, "first": FIRST, "second": SECOND, "bias": BIAS} | change)


@pytest.mark.parametrize(
    "change", [{"padding": "SAME"}, {"strides": 2}, {"first_axis": "row"}], ids=str
)
def test_two_convolutions_and_the_counts_refuse_the_same_forms(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}="):
        two_convolutions(X, FIRST, SECOND, **change)
    with pytest.raises(ValueError, match=f"{next(iter(change))}="):
        roofline(X.shape, FIRST.shape, SECOND.shape, "float32", 1.0, 1.0, **change)


@pytest.mark.parametrize("name, size", [("lines", 8), ("inputs", 48), ("outputs", 0)])
def test_a_tile_has_sizes_that_the_tensor_cores_take(name, size):
    with pytest.raises(ValueError, match=f"{name}={size} .* power of two, at least 16"):
        Tile(**{"lines": 16, "positions": 1, "inputs": 16, "outputs": 16} | {name: size})


def on_h100():
    """Where JAX wants to know the GPU that it lowers for, names one without having it."""
    if jax.default_backend() == "gpu" or tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice("NVIDIA H100", num_cores=132, platform="cuda")
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    )


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("first_axis", ORDERS)
@pytest.mark.parametrize("channels", [(3, 10, 96), (64, 20, 192)])
def test_lowers_to_one_triton_kernel_without_a_gpu(dtype, first_axis, channels):
    arrays = [
        jax.ShapeDtypeStruct(array.shape, dtype)
        for array in layer((8, 16, 16), channels, (5, 5), first_axis)
    ]
    run = jax.jit(
        lambda *a: separable_conv(*a, strides=(2, 1), first_axis=first_axis, interpret=False)
    )
    with on_h100():
        text = run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("gpu.triton") == 1
    assert "convolution" not in text


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("first_axis", ORDERS)
@pytest.mark.parametrize("channels", [(3, 10, 96), (64, 20, 192), (96, 96, 100)])
def test_compiled_for_a_gpu_computes_the_same(dtype, first_axis, channels):
    arrays = layer((3, 17, 19), channels, (5, 3), first_axis, dtype)
    assert_same_as_two_convolutions(
        arrays, strides=(1, 2), padding=((2, 2), (1, 1)), first_axis=first_axis
    )


@pytest.mark.parametrize("first_axis", ORDERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [False, True])
def test_bytes_are_those_of_the_arrays_and_of_the_intermediate(first_axis, dtype, bias):
    arrays = layer(first_axis=first_axis, dtype=dtype)[: 3 + bias]
    options = {"strides": (2, 3), "padding": ((1, 1), (0, 2)), "first_axis": first_axis}
    out = two_convolutions(*arrays, **options)
    fused, separate = roofline(
        *(a.shape for a in arrays[:3]), dtype, 1.0, 1.0, bias=bias, **options
    )
    assert fused.bytes == sum(array.nbytes for array in (*arrays, out))
    between = (
        (4, 6) if first_axis == "vertical" else (7, 3)
    )  # (7, 6) pixels, one of the axes strided
    assert separate.bytes - fused.bytes == 2 * 2 * np.prod(between) * 2 * out.dtype.itemsize


def test_operations_are_those_that_the_compiler_counts_without_padding():
    arrays = layer()[:3]
    counted = jax.jit(two_convolutions).lower(*arrays).cost_analysis()["flops"]
    fused, separate = roofline(*(array.shape for array in arrays), "float32", 1.0, 1.0)
    assert fused.flops == separate.flops == counted


def test_bounds_are_the_slower_of_arithmetic_and_transfers():
    shapes = (1, 8, 8, 4), (1, 1, 4, 2), (1, 1, 2, 4)
    fused, separate = roofline(*shapes, "float32", flops_per_s=1e3, bytes_per_s=1e9)
    assert fused == Bound(2048, 2112, 2.048) and separate == Bound(2048, 3136, 2.048)
    fused, separate = roofline(*shapes, "float32", flops_per_s=1e9, bytes_per_s=1e3)
    assert (fused.seconds, separate.seconds) == pytest.approx((2.112, 3.136))


@given(st.integers(1, 64), st.integers(1, 5), st.floats(1e9, 1e15), st.floats(1e9, 1e13))
@settings(max_examples=15)
def test_the_fused_bound_is_never_above_that_of_two_convolutions(
    rank, taps, flops_per_s, bytes_per_s
):
    shapes = (8, 9, 9, 16), (taps, 1, 16, rank), (1, taps, rank, 24)
    fused, separate = roofline(*shapes, "bfloat16", flops_per_s, bytes_per_s)
    assert fused.flops == separate.flops
    assert fused.bytes < separate.bytes
    assert fused.seconds <= separate.seconds * (1 + 1e-12)
