"""Matrix products of every kind run with factors, as the trace says, or are multiplied back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax import Matrix, Separable, decompose, lowrank, max_rank, reconstruct, trace

many = settings(max_examples=15)
SIZES = dict(zip("ijkopab", (4, 2, 3, 6, 2, 3, 5), strict=True))


def normal(shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def assert_same(found, expected, atol=1e-4):
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.shape == two.shape and one.dtype == two.dtype
        np.testing.assert_allclose(one, two, atol=atol)  # sums of some hundred terms


@dataclasses.dataclass(frozen=True)
class Product:
    """A function of {"kernel": array} and inputs: moves of axes, then ``einsum``."""

    stored: str
    order: str
    merged: tuple[str, ...]
    x: str
    out: str
    kernel_first: bool

    def __call__(self, tree, x):
        kernel = tree["kernel"].transpose([self.stored.index(letter) for letter in self.order])
        names = dict(zip(self.merged, "VWXYZ", strict=False))
        kernel = kernel.reshape([np.prod([SIZES[k] for k in part]) for part in self.merged])
        term = "".join(names.values())
        flat = lambda letters: [part for part in self.merged if set(part) <= set(letters)]  # noqa: E731
        own = [letter for letter in self.x if letter in "ab"]
        inputs = flat(self.x)
        x = x.reshape([*(SIZES[k] for k in own), *(np.prod([SIZES[k] for k in p]) for p in inputs)])
        x_term = "".join([*own, *(names[part] for part in inputs)])
        out = "".join([*own, *(names[part] for part in flat(self.out))])
        operands = (term, kernel), (x_term, x)
        (one, a), (two, b) = operands if self.kernel_first else operands[::-1]
        return jnp.einsum(f"{one},{two}->{out}", a, b)


@st.composite
def products(draw):
    """The kernel's axes in any order, inputs and outputs merged or apart, of one or two axes."""
    inputs = draw(st.sampled_from(["i", "ij", "ijk"]))
    outputs = draw(st.sampled_from(["o", "op"]))
    merge = st.booleans()
    parts = [tuple(p) for p in ([inputs] if draw(merge) else list(inputs))]
    parts += [tuple(p) for p in ([outputs] if draw(merge) else list(outputs))]
    parts = draw(st.permutations(["".join(part) for part in parts]))
    stored = "".join(draw(st.permutations("".join(parts))))
    own = draw(st.sampled_from(["", "a", "ab"]))
    return Product(stored, "".join(parts), tuple(parts), own + inputs, own + outputs, draw(merge))


def case_of(product, seed=0):
    tree = {"kernel": normal([SIZES[k] for k in product.stored], seed)}
    own = [letter for letter in product.x if letter in "ab"]
    return tree, normal([SIZES[k] for k in [*own, *product.x[len(own) :]]], seed + 1)


def count(function, *args):
    return str(jax.make_jaxpr(function)(*args)).count("dot_general")


@many
@given(products(), st.data())
def test_a_product_runs_as_with_the_reconstructed_matrix_and_as_the_trace_says(product, data):
    tree, x = case_of(product)
    (use,) = trace(product, tree, x)
    assert use.safe and use.macs == use.positions * tree["kernel"].size
    first = data.draw(st.sampled_from(use.forms))
    unit = use.scheme(1, first)
    limit = max_rank(use.kernel_shape, unit.groups, use.axes, first)
    scheme = use.scheme(data.draw(st.sampled_from(sorted({1, limit}))), first)
    small = decompose(tree, {"kernel": scheme}, trace(product, tree, x))

    def both(small):
        """Values and derivatives, compiled together."""
        rebuilt = lambda tree: product(reconstruct(tree), x)  # noqa: E731
        loss = lambda apply: lambda tree: (jnp.sum(jnp.sin(apply(tree))), apply(tree))  # noqa: E731
        runs = (lambda tree: lowrank(product)(tree, x), rebuilt)
        return [jax.grad(loss(run), has_aux=True)(small) for run in runs]

    assert_same(*jax.jit(both)(small), atol=1e-3)
    after = trace(lowrank(product), small, x)
    whole = scheme.groups == 1 or len(after) == 2
    assert whole and len(after) in (1, 2)
    if len(after) == 2:
        assert after.macs == use.macs_at(scheme)


class Attention(nn.Module):
    """A block of a transformer."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
        y = nn.Dense(32, name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(16, name="down")(nn.gelu(y))


LAYERS = {
    "attention": (Attention(), (2, 5, 16), 6),
    "DenseGeneral": (nn.DenseGeneral((3, 4), axis=(-2, -1)), (2, 4, 5), 1),
    "Einsum": (nn.Einsum((4, 3, 5), "bld,dhk->bhlk"), (2, 6, 4), 1),
    "remat": (nn.remat(nn.Dense)(6), (3, 4), 1),
    "scan": (nn.RNN(nn.SimpleCell(5)), (2, 7, 4), 2),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_of_flax_run_with_two_products_in_place_of_one(name, dtype):
    layer, shape, number = LAYERS[name]
    x = normal(shape, dtype=dtype)
    variables = jax.tree.map(lambda v: v.astype(dtype), layer.init(jax.random.key(0), x))
    program = trace(layer.apply, variables, x)
    safe = program.safe_paths()
    assert len(safe) == number
    table = {path: program.at(path)[0].scheme(2) for path in safe}
    small = decompose(variables, table, program)
    found = jax.jit(lowrank(layer.apply))(small, x)
    expected = layer.apply(reconstruct(small), x)
    atol = 1e-4 if dtype == "float32" else 0.2  # eight bits of values of order one, added up
    assert_same(jnp.asarray(found), jnp.asarray(expected), atol)
    after = trace(lowrank(layer.apply), small, x)
    assert after.macs == program.macs + sum(
        use.macs_at(table[path]) - use.macs for path in safe for use in program.at(path)
    )


@pytest.mark.slow
def test_the_heads_of_attention_have_factors_of_their_own():
    layer, x = nn.MultiHeadDotProductAttention(4), normal((2, 5, 16))
    variables = layer.init(jax.random.key(0), x)
    program = trace(layer.apply, variables, x)
    assert program.at("query")[0].forms == ("left", "heads")
    scheme = program.at("query")[0].scheme(3, "heads")
    assert scheme == Matrix(3, 4, "IPO", "heads")
    small = decompose(variables, {"query": scheme, "out": Matrix(2, 4, "JIO")}, program)
    found, expected = lowrank(layer.apply)(small, x), layer.apply(reconstruct(small), x)
    assert_same(found, expected)
    after = trace(lowrank(layer.apply), small, x)
    saved = sum(
        program.at(p)[0].macs - program.at(p)[0].macs_at(s)
        for p, s in {"query": scheme, "out": Matrix(2, 4, "JIO")}.items()
    )
    assert after.macs == program.macs - saved


def test_a_stack_of_matrices_is_one_layer_and_its_slices_are_decomposed_each():
    def experts(tree, x):
        return jnp.einsum("ebi,eio->ebo", x, tree["w"])

    tree, x = {"w": normal((3, 4, 6))}, normal((3, 5, 4))
    (use,) = trace(experts, tree, x)
    assert (use.axes, use.uses, use.positions) == ("IO", 3, 5)
    small = decompose(tree, {"w": 2}, trace(experts, tree, x))
    assert [f.shape for f in jax.tree.leaves(small)] == [(3, 4, 2), (3, 2, 6)]
    assert_same(lowrank(experts)(small, x), experts(reconstruct(small), x))
    assert trace(lowrank(experts), small, x).macs == use.macs_at(use.scheme(2))


def test_a_tied_matrix_runs_transposed_and_a_table_that_is_read_by_row_is_multiplied_back():
    def tied(tree, x):
        return jnp.tanh(x @ tree["w"]) @ tree["w"].T

    def looked_up(tree, x):
        return tree["w"][:2].sum() + x @ tree["w"]

    tree, x = {"w": normal((4, 6))}, normal((5, 4))
    small = decompose(tree, {"w": 2})
    for function, runs in ((tied, 4), (looked_up, 3)):  # one of the three multiplies back
        assert_same(lowrank(function)(small, x), function(reconstruct(small), x))
        assert count(lowrank(function), small, x) == runs
    assert not trace(looked_up, tree, x)[0].safe


def test_factors_of_groups_are_multiplied_back_where_their_outputs_are_contracted():
    def transposed(tree, x):
        return x @ tree["w"].T

    tree, x = {"w": normal((4, 6))}, normal((5, 6))
    small = decompose(tree, {"w": Matrix(1, groups=2)})
    assert_same(lowrank(transposed)(small, x), transposed(reconstruct(small), x))


def test_a_vector_is_no_matrix():
    (use,) = trace(lambda tree, x: x @ tree["w"], {"w": normal((4,))}, normal((5, 4)))
    assert use.reason == "its kernel is no matrix"


def test_a_rule_names_matrices_without_a_trace():
    params = {"Dense_0": {"kernel": normal((8, 6)), "bias": normal((6,))}}
    small = decompose(params, {"Dense_.*": 0.5})
    assert [x.shape for x in jax.tree.leaves(small["Dense_0"]["kernel"])] == [(8, 1), (1, 6)]
    tree = {"Embed_0": {"embedding": normal((50, 6))}, **params}
    assert set(decompose(tree, {".*": 0.5})["Embed_0"]) == {"embedding"}
    assert decompose(tree, {".*": 0.5})["Embed_0"]["embedding"] is tree["Embed_0"]["embedding"]


def test_kernels_of_convolutions_run_in_products_of_any_axes():
    """A pointwise convolution that is written as a product, whose factors are separable."""
    tree, x = {"kernel": normal((1, 1, 4, 6))}, normal((2, 5, 4))
    apply = lambda tree, x: x @ tree["kernel"].reshape(4, 6)  # noqa: E731
    small = decompose(tree, {"kernel": Separable(2)})
    assert_same(lowrank(apply)(small, x), apply(reconstruct(small), x))
    assert count(lowrank(apply), small, x) == 2


WRITINGS = {  # a layer of inputs (n, i), a kernel (i, o) or (o, i), and a bias (o,)
    "x @ w": lambda w, b, x: x @ w + b,
    "x @ w.T": lambda w, b, x: x @ w.T + b,
    "(w @ x.T).T": lambda w, b, x: (w @ x.T).T + b,
    "(w.T @ x.T + b).T": lambda w, b, x: (w.T @ x.T + b[:, None]).T,
    "vmap w @ x": lambda w, b, x: jax.vmap(lambda row: w @ row + b)(x),
    "vmap x @ w": lambda w, b, x: jax.vmap(lambda row: row @ w + b)(x),
    "einsum": lambda w, b, x: jnp.einsum("oi,ni->no", w, x) + b,
    "bias of two axes": lambda w, b, x: x @ w + b[None],
    "scaled and shifted": lambda w, b, x: (x * b[0] @ w) * jnp.exp(b) + b,
}
TRANSPOSED = ("x @ w.T", "(w @ x.T).T", "vmap w @ x", "einsum")


@many
@given(
    st.lists(st.sampled_from(sorted(WRITINGS)), min_size=2, max_size=4),
    st.lists(st.sampled_from([1, 2, 3, 8]), min_size=5, max_size=5),
    st.sampled_from([1, 2, 3, 8]),
)
def test_every_layer_is_found_for_every_number_of_images_and_no_bias_is_one(names, sizes, images):
    def shape(number, name):
        pair = sizes[number : number + 2]
        return pair[::-1] if name in TRANSPOSED else pair

    tree = {
        f"layer{number}": {"w": normal(shape(number, name)), "b": normal(sizes[number + 1])}
        for number, name in enumerate(names)
    }

    def network(tree, x):
        for layer, name in zip(tree.values(), names, strict=True):
            x = jax.nn.relu(WRITINGS[name](layer["w"], layer["b"], x))
        return x

    uses = trace(network, tree, jnp.ones((images, sizes[0])))
    assert [use.path for use in uses] == list(tree)
    assert all(use.safe and use.macs == images * tree[use.path]["w"].size for use in uses)
