"""Every convolution that Flax has runs decomposed as it does dense: the source of the page.

``python tests/program/test_convolutions.py`` writes docs/convolutions.md anew.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax import Separable, decompose, lowrank, max_rank, reconstruct, trace
from lowrank_jax.tree.paths import named_leaves

PAGE = Path(__file__).parents[2] / "docs" / "convolutions.md"


class Standardised(nn.Conv):
    """Normalises its kernel, as weight-standardised networks do."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return (value - value.mean((0, 1, 2))) / value.std((0, 1, 2)) if name == "kernel" else value


class Mapped(nn.Module):
    """Changes the kernel of an ordinary nn.Conv from outside."""

    @nn.compact
    def __call__(self, x):
        def twice(variables):
            return jax.tree.map(lambda leaf: 2 * leaf, variables)

        return nn.map_variables(nn.Conv, "params", twice, init=True)(8, (3, 3), name="inner")(x)


class Wrapped(nn.Module):
    wrapper: type

    @nn.compact
    def __call__(self, x):
        options = {"update_stats": False} if self.wrapper is nn.SpectralNorm else {}
        return self.wrapper(nn.Conv(8, (3, 3), name="inner"))(x, **options)


def to_bfloat16(*arrays, dtype=None, inexact=True):
    return nn.dtypes.promote_dtype(*arrays, dtype=jnp.bfloat16, inexact=inexact)


def own_convolution(*args, **kwargs):
    return jnp.tanh(jax.lax.conv_general_dilated(*args, **kwargs))


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, its input's shape, and whether its kernel has to be multiplied back."""

    name: str
    layer: nn.Module
    shape: tuple[int, ...] = (2, 9, 7, 4)
    back: bool = False
    dtype: str = "float32"


def conv(name, size=(3, 3), *rest, **options):
    return Case(name, nn.Conv(8, size, **options), *rest)


MASK = np.ones((3, 3, 4, 8), np.float32)
CASES = [
    conv("1-D", (3,), (2, 9, 4)),
    conv("1-D, causal padding, dilated", (4,), (2, 9, 4), padding="CAUSAL", kernel_dilation=2),
    conv("1-D, strided, groups", (3,), (2, 9, 4), strides=2, feature_group_count=2),
    conv("2-D, square"),
    conv("2-D, 3x5", (3, 5)),
    conv("2-D, 1x5", (1, 5)),
    conv("2-D, 5x1", (5, 1)),
    conv("2-D, 1x1", (1, 1)),
    conv("2-D, even: 2x4", (2, 4)),
    conv("3-D", (3, 3, 3), (2, 5, 4, 5, 4)),
    conv("3-D, strided and dilated, 2x3x1", (2, 3, 1), (2, 5, 6, 5, 4), strides=(1, 2, 2), kernel_dilation=(2, 1, 1)),  # noqa: E501
    conv("strides (2, 2)", strides=(2, 2)),
    conv("strides (2, 1)", strides=(2, 1)),
    conv("strides (1, 3)", (3, 4), strides=(1, 3)),
    *(conv(f"padding {pad!r}", (2, 4), padding=pad, strides=(2, 1)) for pad in
      ("SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", 2, (1, 2), ((1, 2), (0, 3)))),
    conv("kernel dilation (2, 3)", kernel_dilation=(2, 3)),
    conv("kernel dilation, circular padding", kernel_dilation=(2, 1), padding="CIRCULAR"),
    conv("input dilation (2, 1), asymmetric padding", input_dilation=(2, 1), padding=((1, 2), (0, 3))),  # noqa: E501
    conv("groups: 2 of 4 channels", feature_group_count=2),
    conv("groups, strided, 3x5", (3, 5), feature_group_count=2, strides=(2, 1)),
    conv("depthwise", feature_group_count=4),
    conv("no bias", use_bias=False),
    conv("no batch dimension", (3, 3), (9, 7, 4)),
    conv("several batch dimensions", (3, 3), (2, 3, 9, 7, 4)),
    *(Case(f"{param} parameters, {x} input, dtype={dtype}",
           nn.Conv(8, (3, 3), dtype=dtype, param_dtype=jnp.dtype(param)), dtype=x)
      for param, x, dtype in [("float16", "float32", None), ("bfloat16", "float32", None),
                              ("float32", "bfloat16", None), ("float32", "float32", "bfloat16"),
                              ("float32", "float32", "float16"), ("bfloat16", "bfloat16", "float32")]),  # noqa: E501
    Case("float64", nn.Conv(8, (3, 3), param_dtype=jnp.dtype("float64")), dtype="float64"),
    conv("precision 'highest'", precision="highest"),
    conv("promote_dtype of one's own", promote_dtype=to_bfloat16),
    Case("ConvTranspose, strides (2, 2)", nn.ConvTranspose(8, (3, 3), strides=(2, 2))),
    Case("ConvTranspose, VALID, 4x3, dilated", nn.ConvTranspose(8, (4, 3), (2, 1), "VALID", kernel_dilation=(1, 2))),  # noqa: E501
    Case("ConvTranspose, circular padding", nn.ConvTranspose(8, (4, 4), strides=(2, 2), padding="CIRCULAR")),  # noqa: E501
    Case("ConvTranspose, explicit padding, no bias",
         nn.ConvTranspose(8, (3, 3), (2, 2), padding=((1, 2), (0, 1)), use_bias=False)),
    Case("ConvTranspose, 1-D", nn.ConvTranspose(8, (3,), (2,)), (2, 9, 4)),
    Case("ConvTranspose, transpose_kernel", nn.ConvTranspose(8, (3, 3), transpose_kernel=True)),
    Case("mask", nn.Conv(8, (3, 3), mask=MASK), back=True),
    Case("convolution function of its own",
         nn.Conv(8, (3, 3), conv_general_dilated=own_convolution)),
    Case("ConvLocal", nn.ConvLocal(8, (3, 3)), back=True),
    Case("subclass that standardises its kernel", Standardised(8, (3, 3)), back=True),
    Case("nn.map_variables that changes the kernel", Mapped(), back=True),
    Case("WeightNorm", Wrapped(nn.WeightNorm), back=True),
    Case("SpectralNorm", Wrapped(nn.SpectralNorm), back=True),
]  # fmt: skip


def normal(shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


def variables_of(case, x):
    skeleton = jax.eval_shape(case.layer.init, jax.random.key(0), x)
    return jax.tree.map(lambda leaf: normal(leaf.shape, leaf.dtype) / 4, skeleton)


def traced(case, variables, x):
    """How the program reads the one kernel of the case."""
    named = [each for each in trace(case.layer.apply, variables, x) if each.path]
    return named[0]


def cut(case, variables, rank=None, first="vertical"):
    """The variables with the one kernel of the case at a rank, by default the full one."""
    leaves = named_leaves(variables)
    path = max(leaves, key=lambda name: (leaves[name].ndim, name))
    kernel, groups = leaves[path], getattr(case.layer, "feature_group_count", 1)
    axes = {3: "WIO", 4: "HWIO", 5: "DHWIO"}[kernel.ndim]
    scheme = Separable(rank or max_rank(kernel.shape, groups, axes, first), groups, axes, first)
    return decompose(variables, {path: scheme})


def assert_close(found, expected, variables):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    # Sums of tens of terms, both factors and the channels between them rounded to the type of the
    # computation
    # or of the storage, whichever is coarser: a few tens of roundings of the largest value.
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in (expected, *jax.tree.leaves(variables)))
    scale = np.abs(np.asarray(expected, np.float64)).max()
    assert scale > 0.1
    np.testing.assert_allclose(np.float64(found), np.float64(expected), atol=20 * eps * scale)


@pytest.mark.parametrize("first", ["vertical", "horizontal"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_at_full_rank_it_computes_what_the_dense_layer_does(case, first):
    with jax.enable_x64(case.dtype == "float64"):
        x = normal(case.shape, case.dtype)
        variables = variables_of(case, x)
        small = cut(case, variables, first=first)
        dense, low = jax.jit(
            lambda v, s, x: (case.layer.apply(v, x), lowrank(case.layer.apply)(s, x))
        )(variables, small, x)
        assert_close(low, dense, variables)


@pytest.mark.parametrize("case", CASES[::3], ids=lambda case: case.name)
def test_below_full_rank_it_computes_the_dense_layer_with_the_reconstructed_kernel(case):
    x = normal(case.shape, case.dtype)
    variables = variables_of(case, x)
    small = cut(case, variables, rank=1)
    found, wanted = lowrank(case.layer.apply)(small, x), case.layer.apply(reconstruct(small), x)
    assert_close(found, wanted, variables)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.dtype != "float64"], ids=lambda case: case.name
)
def test_factors_run_as_two_convolutions_unless_the_kernel_is_multiplied_back(case):
    x = jnp.zeros(case.shape, "float32")
    variables = variables_of(case, x)
    program = str(jax.make_jaxpr(lowrank(case.layer.apply))(cut(case, variables, rank=1), x))
    dense = str(jax.make_jaxpr(case.layer.apply)(variables, x))
    more = program.count("conv_general_dilated[") - dense.count("conv_general_dilated[")
    products = program.count("dot_general[") - dense.count("dot_general[")
    assert (more, products) == ((0, 1) if case.back else (1, 0))


def page():
    """The table of the documentation."""
    rows = [f"| {case.name} | {answer(case)} |" for case in CASES]
    head = [
        "# What runs decomposed",
        "",
        "Every kind of convolution that Flax Linen has, through `lowrank(model.apply)`: exact at",
        "full rank against the dense layer, in both orders of the factors. A factored layer runs",
        "as two convolutions. Where the program changes a kernel first, its factors are",
        "multiplied back, once, and the layer is as fast as the dense one. This page is written by",
        "`python tests/program/test_convolutions.py` from the cases that the tests run.",
        "",
        "| convolution | decomposed |",
        "| --- | --- |",
    ]
    return "\n".join(head + rows) + "\n"


def answer(case):
    """What the trace says of a case."""
    if not case.back:
        return "factored"
    x = normal(case.shape)
    reason = traced(case, variables_of(case, x), x).reason
    return f"multiplied back: {reason}"


def test_the_page_of_the_documentation_says_what_the_tests_prove():
    assert PAGE.read_text() == page(), "run: python tests/program/test_convolutions.py"


if __name__ == "__main__":
    PAGE.write_text(page())
