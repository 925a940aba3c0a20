"""`lowrank(f)` of a decomposed tree is `f` of the reconstructed one, for convolutions and products
drawn from the whole kind."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lowrank_jax import decompose, lowrank, max_rank, reconstruct, trace
from lowrank_jax.factorization.axes import OUTPUTS
from lowrank_jax.factorization.forms import FORMS, SCHEMES
from lowrank_jax.program.jaxprs import programs

many = settings(max_examples=25)
SPATIAL = {1: "W", 2: "HW", 3: "DHW"}
FIRST = [first for first, form in FORMS.items() if form.spatial]
MATRICES = ["IO", "JIO", "IPO", "JIPO", "KJIO"]
MOVES = ["transpose", "turn", "take", "squeeze", "call"]
# With jax 0.10 XLA's convolutions on the CPU read beyond the data where padding is negative.
LEAST = -1 if jax.__version_info__ >= (0, 11) else 0


def normal(shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def operations(function, *args):
    """How often each operation stands in a program, calls and loops included."""

    def count(program):
        found = Counter(eqn.primitive.name for eqn in program.eqns)
        for eqn in program.eqns:
            for inner in programs(eqn.params):
                found += count(inner)
        return found

    return count(jax.make_jaxpr(function)(*args).jaxpr)


def assert_same(found, expected):
    """Float32 sums of up to some hundred terms, in another order."""
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.shape == two.shape and one.dtype == two.dtype
        scale = np.abs(np.asarray(two, np.float64)).max(initial=1)
        np.testing.assert_allclose(one, two, atol=2e-5 * scale)


def assert_equivalent(function, small, x):
    """Values and derivatives, compiled together."""

    def run(apply, small, x):
        y, pullback = jax.vjp(apply, small, x)
        return y, pullback(jnp.linspace(-1, 1, y.size).reshape(y.shape))

    def both(small, x):
        rebuilt = lambda tree, x: function(reconstruct(tree), x)  # noqa: E731
        return run(lowrank(function), small, x), run(rebuilt, small, x)

    assert_same(*jax.jit(both)(small, x))


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A function of {"kernel": stored} and inputs that convolves with the kernel moved."""

    stored: tuple[int, ...]
    inputs: tuple[int, ...]
    moves: tuple[Callable, ...]
    options: tuple[tuple[str, object], ...]

    def __call__(self, tree, x):
        kernel = tree["kernel"]
        for move in self.moves:
            kernel = move(kernel)
        return jax.lax.conv_general_dilated(x, kernel, **dict(self.options))

    def __repr__(self):
        moves = [f"{m.func.__name__}{m.args}{m.keywords}" for m in self.moves]
        return f"{self.stored} {moves} {self.inputs} {dict(self.options)}"


def transposed(kernel, order):
    return kernel.transpose(order)


def turned(kernel, axes):
    return jnp.flip(kernel, axes)


def taken(kernel, index):
    return kernel[index]


def squeezed(kernel, axis):
    return kernel.squeeze(axis)


def reshaped(kernel, shape):
    return kernel.reshape(shape)


def called(kernel):
    return jax.jit(lambda kernel: kernel)(kernel)


def behind_a_barrier(kernel):
    return jax.lax.optimization_barrier((kernel, jnp.ones(2)))[0]


@st.composite
def moves(draw, shape):
    """Steps that end in a kernel of a shape, and the shape that they start from."""
    steps, shape = [], tuple(shape)
    for kind in draw(st.lists(st.sampled_from(MOVES))):
        axes = range(len(shape))
        if kind == "transpose":
            order = draw(st.permutations(axes))
            steps.append(functools.partial(transposed, order=tuple(order)))
            shape = tuple(shape[order.index(axis)] for axis in axes)
        if kind == "turn":
            steps.append(
                functools.partial(turned, axes=tuple(draw(st.sets(st.sampled_from(axes)))))
            )
        if kind == "call":
            steps.append(functools.partial(draw(st.sampled_from([called, behind_a_barrier]))))
        if kind == "take" and len(shape) < 6:
            size = draw(st.integers(1, 3))
            steps.append(functools.partial(taken, index=draw(st.integers(-size, size - 1))))
            shape = (size, *shape)
        if kind == "squeeze" and len(shape) < 6:
            axis = draw(st.integers(0, len(shape)))
            one = functools.partial(squeezed, axis=axis)
            two = functools.partial(reshaped, shape=shape)
            steps.append(draw(st.sampled_from([one, two])))
            shape = (*shape[:axis], 1, *shape[axis:])
    return shape, tuple(reversed(steps))


@st.composite
def convolutions(draw):
    spatial = SPATIAL[draw(st.sampled_from([1, 2, 2, 2, 3]))]
    count = len(spatial)
    per_axis = functools.partial(st.lists, min_size=count, max_size=count)
    taps = draw(per_axis(st.integers(1, 3)))
    groups, channels = draw(st.sampled_from([(1, 2), (1, 3), (1, 1), (2, 2), (2, 1)]))
    features = groups * draw(st.integers(1, 3))
    letters = {"I": channels, "O": features, **dict(zip(spatial, taps, strict=True))}
    data = {"N": 2, "C": channels * groups, **dict.fromkeys(spatial, 5)}
    specs = [
        "".join(draw(st.permutations(own + spatial))) if draw(st.booleans()) else usual
        for own, usual in (("NC", f"N{spatial}C"), ("IO", f"{spatial}IO"), ("NC", f"NC{spatial}"))
    ]
    options = {
        "window_strides": tuple(draw(per_axis(st.integers(1, 2)))),
        "padding": tuple(draw(per_axis(st.tuples(*[st.integers(LEAST, 2)] * 2)))),
        "lhs_dilation": tuple(draw(per_axis(st.sampled_from([1, 1, 2])))),
        "rhs_dilation": tuple(draw(per_axis(st.integers(1, 2)))),
        "feature_group_count": groups,
        "dimension_numbers": tuple(specs),
    }
    stored, steps = draw(moves([letters[letter] for letter in specs[1]]))
    inputs = tuple(data[letter] for letter in specs[0])
    found = Convolution(stored, inputs, steps, tuple(options.items()))
    arrays = [jax.ShapeDtypeStruct(shape, "float32") for shape in (stored, inputs)]
    assume(jax.eval_shape(found, {"kernel": arrays[0]}, arrays[1]).size > 0)
    return found


@st.composite
def schemes(draw, case, tree, x):
    """A scheme that fits a kernel, whether or not it fits the program."""
    (use,) = trace(case, tree, x)
    shape, first = case.stored, draw(st.sampled_from([*FIRST, "left"]))
    layouts = [*("IO" + spatial for spatial in SPATIAL.values())] if first in FIRST else MATRICES
    layout = draw(st.sampled_from([own for own in layouts if len(own) <= len(shape)]))
    axes = "".join(draw(st.permutations(layout)))
    if use.safe and first in FIRST and draw(st.booleans()):
        swapped = use.axes.translate(str.maketrans("IO", "OI"))
        axes = draw(st.sampled_from([use.axes, swapped]))
    sizes = dict(zip(axes, shape[len(shape) - len(axes) :], strict=True))
    outputs = next(sizes[letter] for letter in axes if letter in OUTPUTS)
    groups = draw(st.sampled_from([groups for groups in (1, 2) if outputs % groups == 0]))
    limit = max_rank(shape, groups, axes, first)
    return SCHEMES[first](draw(st.integers(1, limit)), groups, axes, first)


def convolutions_and_products(function, small, x):
    count = operations(lowrank(function), small, x)
    return count["conv_general_dilated"], count["dot_general"]


@many
@given(convolutions(), st.data())
def test_a_convolution_runs_as_with_the_reconstructed_kernel_and_as_the_trace_says(case, data):
    tree, x = {"kernel": normal(case.stored)}, normal(case.inputs, 1)
    (use,) = trace(case, tree, x)
    if use.safe:
        first = data.draw(st.sampled_from(FIRST))
        limit = max_rank(use.kernel_shape, use.groups, use.axes, first)
        scheme = use.scheme(data.draw(st.sampled_from([1, limit])), first)
    else:
        scheme = data.draw(schemes(case, tree, x))
    small = decompose(tree, {"kernel": scheme})
    assert_equivalent(case, small, x)
    allowed = [(2, 0)] if use.safe else [(2, 0), (1, 1)]
    assert convolutions_and_products(case, small, x) in allowed


@pytest.mark.slow
@settings(max_examples=15)
@given(convolutions(), st.data())
def test_factors_of_any_layout_and_groups_give_what_their_product_gives(case, data):
    """Factors that were made without a trace may not be those that the program can run."""
    tree, x = {"kernel": normal(case.stored)}, normal(case.inputs, 1)
    small = decompose(tree, {"kernel": data.draw(schemes(case, tree, x))})
    run = jax.jit(lambda small, x: (lowrank(case)(small, x), case(reconstruct(small), x)))
    low, dense = run(small, x)
    assert_same(low, dense)
    if data.draw(st.integers(0, 3)) == 0:
        assert_same(lowrank(case)(small, x), dense)
    assert convolutions_and_products(case, small, x) in [(2, 0), (1, 1)]


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """A convolution of each of three kernels, by ``vmap``, of shared or of own inputs."""

    one: Convolution
    kernels: int
    data: int | None

    def __call__(self, tree, x):
        return jax.vmap(self.one, ({"kernel": self.kernels}, self.data))(tree, x)

    @property
    def stored(self):
        shape = self.one.stored
        return (*shape[: self.kernels], 3, *shape[self.kernels :])

    @property
    def inputs(self):
        shape = self.one.inputs
        return shape if self.data is None else (*shape[: self.data], 3, *shape[self.data :])


ensembles = st.builds(
    Ensemble, convolutions(), st.sampled_from([0, 0, 0, 1]), st.sampled_from([None, 0, 1])
)


@pytest.mark.slow
@many
@given(ensembles, st.data())
def test_an_ensemble_runs_as_with_the_reconstructed_kernels_and_as_the_trace_says(case, data):
    tree, x = {"kernel": normal(case.stored)}, normal(case.inputs, 1)
    (use,) = trace(case, tree, x)
    rank, first = data.draw(st.integers(1, 2)), data.draw(st.sampled_from(FIRST))
    if use.safe:
        limit = max_rank(use.kernel_shape, use.groups, use.axes, first)
        scheme = use.scheme(min(rank, limit), first)
    else:
        scheme = data.draw(schemes(case, tree, x))
    small = decompose(tree, {"kernel": scheme})
    run = jax.jit(lambda small, x: (lowrank(case)(small, x), case(reconstruct(small), x)))
    assert_same(*run(small, x))
    allowed = [(2, 0)] if use.safe else [(2, 0), (1, 1)]
    assert convolutions_and_products(case, small, x) in allowed


@dataclasses.dataclass(frozen=True)
class Product:
    """A function of {"kernel": (h, w, c, n)} and inputs, by ``jnp.einsum``."""

    formula: str
    inputs: tuple[int, ...]
    kernel_first: bool

    def __call__(self, tree, x):
        operands = (tree["kernel"], x) if self.kernel_first else (x, tree["kernel"])
        return jnp.einsum(self.formula, *operands)


@st.composite
def products(draw):
    """Each axis of the kernel is contracted, kept, or one of a batch."""
    sizes = dict(zip("hwcnab", (3, 2, 4, 5, 2, 3), strict=True))
    roles = {letter: draw(st.sampled_from(["sum", "keep", "batch"])) for letter in "hwcn"}
    own = draw(st.sampled_from(["", "a", "ab"]))
    shared = [letter for letter, role in roles.items() if role != "keep"]
    x = "".join(draw(st.permutations([*own, *shared])))
    out = "".join(draw(st.permutations([*own, *(k for k, role in roles.items() if role != "sum")])))
    first = draw(st.booleans())
    formula = f"hwcn,{x}->{out}" if first else f"{x},hwcn->{out}"
    return Product(formula, tuple(sizes[letter] for letter in x), first)


@many
@given(products(), st.integers(1, 8), st.sampled_from(FIRST))
def test_a_product_with_a_kernel_runs_as_with_the_reconstructed_one(case, rank, first):
    scheme = SCHEMES[first](min(rank, max_rank((3, 2, 4, 5), first=first)), first=first)
    small = decompose({"kernel": normal((3, 2, 4, 5))}, {"kernel": scheme})
    x = normal(case.inputs, 1)
    run = jax.jit(lambda small, x: (lowrank(case)(small, x), case(reconstruct(small), x)))
    assert_same(*run(small, x))
    if operations(case, {"kernel": jnp.ones((3, 2, 4, 5))}, x)["dot_general"]:
        count = operations(lowrank(case), small, x)["dot_general"]
        assert count == 2  # one with each factor, or their product and one with that
