"""Every kind of layer of Flax, Equinox, Haiku and of one's own runs with factors or is multiplied
back, as the trace says: the source of docs/programs.md.

``python tests/program/test_programs.py`` writes the page anew.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from lowrank_jax import Matrix, decompose, lowrank, max_rank, trace
from lowrank_jax.factorization.axes import fit_axes
from lowrank_jax.factorization.forms import FORMS, SCHEMES
from lowrank_jax.program.jaxprs import programs
from lowrank_jax.program.joined import apart
from lowrank_jax.tree.paths import named_leaves

PAGE = Path(__file__).parents[2] / "docs" / "programs.md"
NHWC, SHAPE = ("NHWC", "HWIO", "NHWC"), (2, 9, 7, 4)
MASK = np.arange(288).reshape(3, 3, 4, 8) % 3 > 0


def normal(shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer.

    Attributes:
        framework: that wrote it.
        name: what is special of it.
        make: gives a function of (tree, inputs) and the tree, whose values do not matter.
        shape, dtype: of the inputs.
        axes: of the kernel, where the trace does not tell.
        others: products of the program that do not read the kernel.
    """

    framework: str
    name: str
    make: Callable[[jax.Array], tuple[Callable, Any]]
    shape: tuple[int, ...] = SHAPE
    dtype: str = "float32"
    axes: str = "HWIO"
    others: int = 0


def linen(name, layer, shape=SHAPE, dtype="float32", **facts):
    make = lambda x: (layer.apply, jax.eval_shape(layer.init, jax.random.key(0), x))  # noqa: E731
    return Case("Linen", name, make, shape, dtype, **facts)


def conv(name, size=(3, 3), shape=SHAPE, **options):
    return linen(name, nn.Conv(8, size, **options), shape)


def of_nnx(name, build, shape=SHAPE, **facts):
    def make(x):
        graph, state = nnx.split(build(nnx.Rngs(0)))  # shapes in its dicts would be static
        return lambda state, x: nnx.merge(graph, state)(x), state

    return Case("NNX", name, make, shape, **facts)


def equinox(name, build, shape=(4, 9, 7), axes="OIHW", **facts):
    def make(x):
        model = eqx.filter_eval_shape(build, key=jax.random.key(0))
        arrays, static = eqx.partition(model, lambda leaf: hasattr(leaf, "shape"))
        return lambda arrays, x: eqx.combine(arrays, static)(x), arrays

    return Case("Equinox", name, make, shape, axes=axes, **facts)


def haiku(name, build, shape=SHAPE, **facts):
    def make(x):
        model = hk.without_apply_rng(hk.transform(lambda x: build()(x)))
        return model.apply, jax.eval_shape(model.init, jax.random.key(0), x)

    return Case("Haiku", name, make, shape, **facts)


def own(name, apply, kernel=(3, 3, 4, 8), shape=SHAPE, axes="HWIO", **facts):
    tree = {"kernel": jax.ShapeDtypeStruct(kernel, "float32")}
    make = lambda x: (lambda p, x: apply(p["kernel"], x), tree)  # noqa: E731
    return Case("one's own", name, make, shape, axes=axes, **facts)


def convolve(kernel, x, layout=NHWC, **options):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=layout, **options
    )


class Standardised(nn.Conv):
    """Normalises its kernel, as weight-standardised networks do."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return (value - value.mean((0, 1, 2))) / value.std((0, 1, 2)) if name == "kernel" else value


class Subclass(nn.Conv): ...


class Mapped(nn.Module):
    """Changes the kernel of an ordinary nn.Conv from outside."""

    @nn.compact
    def __call__(self, x):
        twice = functools.partial(jax.tree.map, lambda leaf: 2 * leaf)
        return nn.map_variables(nn.Conv, "params", twice, init=True)(8, (3, 3), name="inner")(x)


class Wrapped(nn.Module):
    wrapper: type

    @nn.compact
    def __call__(self, x):
        options = {"update_stats": False} if self.wrapper is nn.SpectralNorm else {}
        return self.wrapper(nn.Conv(8, (3, 3), name="inner"))(x, **options)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.Conv(4, (3, 3), name="inner")(x), None


class DenseBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(4, name="inner")(x), None


class Lifted(nn.Module):
    """A block under a transformation of Flax."""

    lift: Callable
    block: type = Block

    @nn.compact
    def __call__(self, x):
        return self.lift(self.block)(name="block")(x, None)[0]


SPLIT = {"split_rngs": {"params": True}, "variable_axes": {"params": 0}}
SHARED = {"split_rngs": {"params": False}, "variable_broadcast": "params"}
LIFTS = {
    "nn.remat": nn.remat,
    "nn.jit": nn.jit,
    "nn.scan, a kernel each": functools.partial(nn.scan, length=3, **SPLIT),
    "nn.scan, one kernel": functools.partial(nn.scan, length=3, **SHARED),
    "nn.vmap, a kernel each": functools.partial(nn.vmap, in_axes=None, axis_size=3, **SPLIT),
}


def to_bfloat16(*arrays, dtype=None, inexact=True):
    return nn.dtypes.promote_dtype(*arrays, dtype=jnp.bfloat16, inexact=inexact)


def own_convolution(*args, **kwargs):
    return jnp.tanh(jax.lax.conv_general_dilated(*args, **kwargs))


def by_taps(kernel, x):
    """The sum over the taps of products with shifted inputs."""
    parts = [x[:, i : i + 7, j : j + 5] @ kernel[i, j] for i in range(3) for j in range(3)]
    return sum(parts[1:], parts[0])


def by_patches(kernel, x):
    patches = jax.lax.conv_general_dilated_patches(
        x, (3, 3), (1, 1), "SAME", dimension_numbers=NHWC
    )
    return patches @ kernel.transpose(2, 0, 1, 3).reshape(-1, 8)


def by_windows(kernel, x):
    rows = jnp.stack([x[:, i : i + 7] for i in range(3)], -2)
    windows = jnp.stack([rows[:, :, j : j + 5] for j in range(3)], -2)
    return jnp.einsum("bhwvuc,vucn->bhwn", windows.swapaxes(-2, -3), kernel)


def attend(kernel, x):
    """Queries, keys and values by one kernel (d, 3, heads, head_dim)."""
    q, k, v = jnp.moveaxis(jnp.einsum("...td,dphk->...pthk", x, kernel), -4, 0)
    weights = jax.nn.softmax(jnp.einsum("...thk,...shk->...hts", q, k))
    return jnp.einsum("...hts,...shk->...thk", weights, v)


def embedded(table, x):
    return (x + table[jnp.arange(7)]) @ table.T


def by_spectrum(kernel, x):
    spectra = jnp.einsum(
        "bhwc,hwcn->bhwn", jnp.fft.fft2(x, axes=(1, 2)), jnp.fft.fft2(kernel, (9, 7), (0, 1))
    )
    return jnp.fft.ifft2(spectra, axes=(1, 2)).real


@jax.custom_vjp
def rounded(kernel):
    return jnp.round(8 * kernel) / 8


rounded.defvjp(lambda kernel: (rounded(kernel), None), lambda _, g: (g,))


def gradient(kernel, x):
    return jax.grad(lambda x: jnp.sum(jnp.sin(convolve(kernel, x))))(x)


def indexed(kernels, x):
    return jax.lax.fori_loop(0, 3, lambda i, x: convolve(kernels[i], x), x)


PADDINGS = ["SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", 2, (1, 2), ((1, 2), (0, 3))]


def linen_cases():
    yield conv("1-D", (3,), (2, 9, 4))
    yield conv("1-D, causal padding, dilated", (4,), (2, 9, 4), padding="CAUSAL", kernel_dilation=2)
    yield conv("1-D, strided, groups", (3,), (2, 9, 4), strides=2, feature_group_count=2)
    for size in ((3, 3), (3, 5), (1, 5), (5, 1), (1, 1), (2, 4)):
        yield conv(f"2-D, {size[0]}x{size[1]}", size)
    yield conv("3-D", (3, 3, 3), (2, 5, 4, 5, 4))
    deep = {"strides": (1, 2, 2), "kernel_dilation": (2, 1, 1)}
    yield conv("3-D, strided and dilated, 2x3x1", (2, 3, 1), (2, 5, 6, 5, 4), **deep)
    for strides in ((2, 2), (2, 1), (1, 3)):
        yield conv(f"strides {strides}", (3, 4), strides=strides)
    for padding in PADDINGS:
        yield conv(f"padding {padding!r}", (2, 4), padding=padding, strides=(2, 1))
    yield conv("kernel dilation (2, 3)", kernel_dilation=(2, 3))
    spread = {"input_dilation": (2, 1), "padding": ((1, 2), (0, 3))}
    yield conv("input dilation (2, 1), asymmetric padding", **spread)
    yield conv("groups: 2 of 4 channels", feature_group_count=2)
    yield conv("depthwise", feature_group_count=4)
    yield conv("no batch dimension", (3, 3), (9, 7, 4))
    yield conv("more batch dimensions", (3, 3), (2, 3, 9, 7, 4))
    half = nn.Conv(8, (3, 3), dtype="bfloat16")
    yield linen("float32 parameters, computed in bfloat16", half)
    yield linen("float64", nn.Conv(8, (3, 3), param_dtype=jnp.dtype("float64")), dtype="float64")
    yield conv("precision 'highest'", precision="highest")
    yield conv("promote_dtype of one's own", promote_dtype=to_bfloat16)
    yield linen("ConvTranspose, strides (2, 2)", nn.ConvTranspose(8, (3, 3), (2, 2)))
    wide = nn.ConvTranspose(8, (4, 3), (2, 1), "VALID", kernel_dilation=(1, 2))
    yield linen("ConvTranspose, VALID, 4x3, dilated", wide)
    ring = nn.ConvTranspose(8, (4, 4), (2, 2), "CIRCULAR")
    yield linen("ConvTranspose, circular padding", ring)
    turned = nn.ConvTranspose(8, (3, 3), transpose_kernel=True)
    yield linen("ConvTranspose, transpose_kernel", turned)
    yield linen("mask", nn.Conv(8, (3, 3), mask=MASK.astype(np.float32)))
    odd = nn.Conv(8, (3, 3), conv_general_dilated=own_convolution)
    yield linen("convolution function of its own", odd)
    yield linen("ConvLocal", nn.ConvLocal(8, (3, 3)))
    yield linen("empty subclass", Subclass(8, (3, 3)))
    yield linen("subclass that standardises its kernel", Standardised(8, (3, 3)))
    yield linen("nn.map_variables that changes the kernel", Mapped())
    yield linen("WeightNorm", Wrapped(nn.WeightNorm))
    yield linen("SpectralNorm", Wrapped(nn.SpectralNorm))
    yield from (linen(name, Lifted(lift)) for name, lift in LIFTS.items())
    yield linen("Dense", nn.Dense(8))
    yield linen("Dense, float32 parameters, computed in bfloat16", nn.Dense(8, dtype="bfloat16"))
    yield linen("DenseGeneral, to heads", nn.DenseGeneral((2, 4)))
    yield linen("DenseGeneral, from heads", nn.DenseGeneral(8, axis=(-2, -1)))
    gates = nn.RNN(nn.OptimizedLSTMCell(8))
    yield linen("OptimizedLSTMCell", gates, (2, 5, 4), others=3)
    yield linen("DenseGeneral, of each row", nn.DenseGeneral(8, batch_dims=(0, 1)))
    yield linen("Einsum", nn.Einsum((2, 4, 8), "...d,hdk->...hk", use_bias=False))
    yield linen("MultiHeadDotProductAttention", nn.MultiHeadDotProductAttention(2), others=5)
    for name, lift in LIFTS.items():
        yield linen(f"{name}, of Dense", Lifted(lift, DenseBlock))


def other_cases():
    layer = functools.partial(nnx.Conv, 4, 8, (3, 3))
    yield of_nnx("Conv", lambda rngs: layer(strides=2, rngs=rngs))
    groups = {"feature_group_count": 2, "padding": "CIRCULAR"}
    yield of_nnx("Conv, groups, circular padding", lambda rngs: layer(**groups, rngs=rngs))
    up = functools.partial(nnx.ConvTranspose, 4, 8, (3, 3), strides=(2, 2))
    yield of_nnx("ConvTranspose", lambda rngs: up(rngs=rngs))
    yield of_nnx("WeightNorm", lambda rngs: nnx.WeightNorm(layer(rngs=rngs), rngs=rngs))
    yield of_nnx("SpectralNorm", lambda rngs: nnx.SpectralNorm(layer(rngs=rngs), rngs=rngs))
    yield of_nnx("Linear", lambda rngs: nnx.Linear(4, 8, rngs=rngs))
    general = functools.partial(nnx.LinearGeneral, (7, 4), 8, axis=(-2, -1))
    yield of_nnx("LinearGeneral", lambda rngs: general(rngs=rngs))
    attention = functools.partial(nnx.MultiHeadAttention, 2, 4, decode=False)
    yield of_nnx("MultiHeadAttention", lambda rngs: attention(rngs=rngs), others=5)
    yield equinox("Conv1d", lambda key: eqx.nn.Conv1d(4, 8, 3, key=key), (4, 9), "OIW")
    yield equinox("Conv2d", lambda key: eqx.nn.Conv2d(4, 8, (3, 5), 2, 1, key=key))
    yield equinox("Conv2d, groups", lambda key: eqx.nn.Conv2d(4, 8, 3, groups=2, key=key))
    ring = {"padding": 1, "padding_mode": "CIRCULAR"}
    yield equinox("Conv2d, circular padding", lambda key: eqx.nn.Conv2d(4, 8, 3, **ring, key=key))
    deep = functools.partial(eqx.nn.Conv3d, 4, 8, 3)
    yield equinox("Conv3d", lambda key: deep(key=key), (4, 5, 4, 5), "OIDHW")
    yield equinox("ConvTranspose2d", lambda key: eqx.nn.ConvTranspose2d(4, 8, 3, 2, key=key))
    normed = functools.partial(eqx.nn.WeightNorm, weight_name="weight")
    yield equinox("WeightNorm", lambda key: normed(eqx.nn.Conv2d(4, 8, 3, key=key)))
    yield equinox("Linear", lambda key: eqx.nn.Linear(4, 8, key=key), (4,), "OI")
    to_itself = lambda model: lambda x: model(x, x, x)  # noqa: E731
    yield haiku("Linear", lambda: hk.Linear(8))
    heads = functools.partial(hk.MultiHeadAttention, 2, 4, w_init=hk.initializers.Constant(1))
    yield haiku("MultiHeadAttention", lambda: to_itself(heads()), (2, 9, 4), others=5)
    yield haiku("Conv1D", lambda: hk.Conv1D(8, 3), (2, 9, 4))
    yield haiku("Conv2D", lambda: hk.Conv2D(8, (3, 5), stride=2, rate=1))
    yield haiku("Conv2D, NCHW", lambda: hk.Conv2D(8, 3, data_format="NCHW"), (2, 4, 9, 7))
    yield haiku("Conv2D, mask", lambda: hk.Conv2D(8, 3, mask=MASK))
    yield haiku("Conv3D", lambda: hk.Conv3D(8, 3), (2, 5, 4, 5, 4))
    yield haiku("Conv2DTranspose", lambda: hk.Conv2DTranspose(8, 3, stride=2))
    yield haiku("DepthwiseConv2D", lambda: hk.DepthwiseConv2D(2, 3))
    yield own("jax.lax.conv, OIHW", lambda k, x: jax.lax.conv(x, k, (2, 1), "SAME"),
              (8, 4, 3, 3), (2, 4, 9, 7), "OIHW")  # fmt: skip
    yield own("kernel transposed", lambda k, x: convolve(k.transpose(2, 3, 1, 0), x), (8, 4, 3, 5))
    yield own("kernel turned round", lambda k, x: convolve(k[::-1, ::-1], x))
    yield own("kernel converted", lambda k, x: convolve(k.astype("bfloat16"), x.astype("bfloat16")))
    yield own("kernel taken from a stack", lambda k, x: convolve(k[1], x), (3, 3, 3, 4, 8))
    yield own("kernel taken from a stack in a loop", indexed, (3, 3, 3, 4, 4))
    yield own("gradient of a convolution", gradient)
    yield own("kernel reshaped, depth multiplier", lambda k, x: convolve(
        k.reshape(3, 3, 1, 8), x, feature_group_count=4), (3, 3, 4, 2))  # fmt: skip
    yield own("kernel scaled", lambda k, x: convolve(0.5 * k, x))
    yield own("kernel rounded, gradient passed", lambda k, x: convolve(rounded(k), x))
    yield own("kernel also penalised", lambda k, x: convolve(k, x) + jnp.sum(k**2))
    yield own("product, kernel transposed", lambda k, x: x @ k.T, (8, 4))
    yield own("product, kernel from the left", lambda k, x: jnp.matmul(k, x), (8, 9), (2, 9, 4))
    yield own("product, kernel scaled", lambda k, x: x @ (0.5 * k), (4, 8))
    yield own("product, part of the kernel", lambda k, x: x @ k[:, :8], (4, 9))
    yield own("product, kernels of a stack side by side", lambda k, x: x @ jnp.hstack(list(k)),
              (2, 4, 8))  # fmt: skip
    yield own("product, kernel beside its double", lambda k, x: x @ jnp.hstack([k, 2 * k]), (4, 8))
    yield own("product, kernel split into heads", lambda k, x: jnp.einsum(
        "bhwd,dnk->bhwnk", x, k.reshape(4, 2, 4)), (4, 8))  # fmt: skip
    yield own("product of each expert", lambda k, x: jnp.einsum(
        "bhwd,edn->bhwen", x, k), (3, 4, 8))  # fmt: skip
    yield own("embeddings, looked up and attended", embedded, (8, 4))
    yield own("attention, one kernel", attend, (4, 3, 2, 4), others=2)
    yield own("product, 1x1", lambda k, x: x @ k[0, 0], (1, 1, 4, 8))
    yield own("product with each tap", by_taps)
    yield own("product with windows", by_windows)
    yield own("product with flat patches", by_patches)
    yield own("product of spectra", by_spectrum)


CASES = {f"{case.framework}: {case.name}": case for case in (*linen_cases(), *other_cases())}


def built(case):
    """The function, its tree with values, and inputs."""
    x = normal(case.shape, case.dtype)
    apply, skeleton = case.make(x)
    fill = functools.partial(jax.tree.map, lambda leaf: normal(leaf.shape, leaf.dtype) / 4)
    return apply, fill(skeleton), x


def schemes_of(case, apply, tree, x):
    """The path of the kernel, and schemes of its full rank: those of the trace, and those of a
    convolution where the trace has none."""
    kernels = {name: leaf for name, leaf in named_leaves(tree).items() if np.ndim(leaf) > 1}
    path, kernel = max(kernels.items(), key=lambda item: item[1].size)
    safe = [use for use in trace(apply, tree, x) if use.path == path and use.safe]
    units = [safe[0].scheme(1, first) for first in safe[0].forms] if safe else []
    if not units and kernel.ndim == 2:
        units = [Matrix(1)]
    elif kernel.ndim > 2 and not any(FORMS[own.first].spatial for own in units):
        axes = fit_axes(case.axes, kernel.ndim)
        units += [SCHEMES[first](1, 1, axes, first) for first in FORMS if FORMS[first].spatial]
    return path, [
        dataclasses.replace(own, rank=max_rank(kernel.shape, own.groups, own.axes, own.first))
        for own in units
    ]


def operations(program):
    """How often each operation stands in a program, calls and loops included; products of two
    factors, which alone have the highest precision, are told apart from the others."""

    def name_of(eqn):
        merges = eqn.params.get("precision") == (jax.lax.Precision.HIGHEST,) * 2
        name = eqn.primitive.name
        return "merge" if merges and name == "dot_general" else name

    def count(program):
        inner = [body for eqn in program.eqns for body in programs(eqn.params)]
        return sum(map(count, inner), Counter(map(name_of, program.eqns)))

    return count(program.jaxpr)


def verdict(case):
    """ "factored", or "multiplied back" with the reason; read from the program that runs."""
    with jax.enable_x64(case.dtype == "float64"):
        apply, tree, x = built(case)
        path, (scheme, *_) = schemes_of(case, apply, tree, x)
        program = trace(apply, tree, x)
        uses = [use for use in program if use.path in (path, "")]
        changed = program if any(use.changed for use in uses) else None
        small = jax.eval_shape(lambda tree: decompose(tree, {path: scheme}, changed), tree)
        names = [*named_leaves(tree), ""]  # the last input is x
        wanted = [name == path for name in names]
        read_alone = apart(jax.make_jaxpr(apply)(tree, x), list(map(bool, names)), wanted)
        dense, low = operations(read_alone), operations(jax.make_jaxpr(lowrank(apply))(small, x))
    readers = ("conv_general_dilated", "dot_general")
    extra = [low[name] - dense[name] for name in (*readers, "merge")]
    own = [use for use in uses if use.path] or uses
    use = min(own, key=lambda use: use.kind == "product")
    reason = use.reason if use.path else "its kernel is computed by the program"
    own = [dense[readers[0]], 0] if use.kind != "product" else [0, dense[readers[1]] - case.others]
    if use.safe:
        if not use.changed:
            assert extra == [*own, 0]
            return "factored"
        # Products that the change is made of are gone.
        assert (extra[0], extra[2]) == (own[0], 0) and extra[1] <= own[1]
        return "factored, as the program changes it"
    both = reason.startswith("its kernel is also used")
    assert extra == [*(own if both else (0, 0)), 1]  # one product makes the kernel
    return f"{'both' if both else 'multiplied back'}: {reason}"


@pytest.mark.parametrize("name", CASES)
def test_at_full_rank_it_computes_what_the_dense_layer_does(name):
    case = CASES[name]
    with jax.enable_x64(case.dtype == "float64"):
        apply, tree, x = built(case)
        path, schemes = schemes_of(case, apply, tree, x)
        trees = [tree, *(decompose(tree, {path: scheme}) for scheme in schemes)]
        program = trace(apply, tree, x)
        if any(use.changed for use in program.at(path)):
            trees += [decompose(tree, {path: scheme}, program) for scheme in schemes]
        run = jax.jit(lambda *all, x: [lowrank(apply)(t, x) for t in all])
        dense, *low = run(*trees, x=x)
        # Sums of tens of terms, both factors and the channels between them rounded to the type of
        # the computation or of the storage, whichever is coarser: a few tens of roundings.
        types = [dense.dtype, *(leaf.dtype for leaf in jax.tree.leaves(tree))]
        floating = [dtype for dtype in types if jnp.issubdtype(dtype, jnp.floating)]
        eps = max(float(jnp.finfo(dtype).eps) for dtype in floating)
        scale = np.abs(np.asarray(dense, np.float64)).max()
        assert scale > 0.1
        for found in low:
            assert found.shape == dense.shape and found.dtype == dense.dtype
            limit = 20 * eps * scale
            np.testing.assert_allclose(np.float64(found), np.float64(dense), atol=limit)


def page():
    """The table of the documentation."""
    rows = [f"| {case.framework} | {case.name} | {verdict(case)} |" for case in CASES.values()]
    head = [
        "# What runs decomposed",
        "",
        "Every kind of layer runs by `lowrank(function)`. Where the program lets factors run, two",
        "smaller operations take the place of one. Elsewhere factors are multiplied back, once:",
        "the layer is exact, and no faster than the dense one. `trace` tells beforehand.",
        "",
        "Some programs change a kernel by parameters alone before they read it: weight",
        "standardisation, weight and spectral norm, equalised learning rates, masks. Verbs that",
        "are given the trace, or trace themselves, decompose the changed kernel. Its factors",
        'stand as `{"changed": factors}` in the tree. Such a tree is for evaluation, because the',
        "stored kernel is gone. Without a trace `decompose` takes the stored kernel, and its",
        "factors are multiplied back.",
        "",
        "`python tests/program/test_programs.py` writes this page from the cases of the tests.",
        "",
        "| framework | layer | what runs |",
        "| --- | --- | --- |",
    ]
    return "\n".join(head + rows) + "\n"


@pytest.mark.slow
def test_the_page_of_the_documentation_says_what_runs():
    assert PAGE.read_text() == page(), "run: python tests/program/test_programs.py"


if __name__ == "__main__":
    PAGE.write_text(page())
