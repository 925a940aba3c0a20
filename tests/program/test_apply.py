"""An unmodified Linen model runs with decomposed variables, in every form of call and
transformation."""

import collections
import re

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from lowrank_jax import Separable, SeparableConv, decompose, lowrank, reconstruct
from lowrank_jax.models import NIN

X = jnp.asarray(np.random.default_rng(1).standard_normal((2, 8, 8, 4)), jnp.float32)


def conv(rank):
    return nn.Conv(4, (3, 3)) if rank is None else SeparableConv(4, (3, 3), rank)


class Net(nn.Module):
    """Convolutions, one of them used twice, with statistics, noise and a second method."""

    rank: int | None = None

    def setup(self):
        self.shared, self.last = conv(self.rank), conv(self.rank)
        self.norm = nn.BatchNorm(momentum=0.9)
        self.noise = nn.Dropout(0.5)

    def __call__(self, x, train=False):
        x = self.features(x)
        x = self.norm(x, use_running_average=not train)
        x = self.noise(x, deterministic=not train)
        return self.last(x).mean((1, 2))

    def features(self, x):
        return nn.relu(self.shared(nn.relu(self.shared(x))))


def random_variables(model, x=X, *args):
    skeleton = jax.eval_shape(model.init, jax.random.key(0), x, *args)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.1, 0.5, leaf.shape), leaf.dtype), skeleton
    )


def small_variables(ranks, model=None, x=X):
    variables = random_variables(model or Net(), x)
    return decompose(variables, ranks)


RANKS = {"shared": 2, "last": 2}
CALLS = {
    "plain": {},
    "train with rngs": {
        "train": True,
        "rngs": {"dropout": jax.random.key(3)},
        "mutable": ["batch_stats"],
    },
    "method": {"method": "features"},
    "method function": {"method": Net.features},
    "all mutable": {"mutable": True},
    "intermediates": {
        "capture_intermediates": lambda module, _: isinstance(module, nn.BatchNorm | Net)
    },
}


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_every_form_of_call_gives_what_the_handwritten_network_gives(call):
    small, options = small_variables(RANKS), CALLS[call]
    chex.assert_trees_all_close(
        lowrank(Net().apply)(small, X, **options), Net(rank=2).apply(small, X, **options), rtol=1e-6
    )


def test_captured_intermediates_keep_the_names_of_the_dense_network():
    small = small_variables(RANKS)
    _, found = lowrank(Net().apply)(small, X, capture_intermediates=True)
    _, dense = Net().apply(reconstruct(small), X, capture_intermediates=True)
    # Outputs near 1 of a product of two factors, some roundings apart: those near 0 as well.
    same = dict(rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(found["intermediates"], dense["intermediates"], **same)


def test_frozen_variables_and_a_function_around_apply_work_too():
    small = small_variables(RANKS)
    expected = Net(rank=2).apply(small, X)
    chex.assert_trees_all_equal(lowrank(Net().apply)(flax.core.freeze(small), X), expected)
    wrapped = lowrank(
        lambda params, stats, x: Net().apply({"params": params, "batch_stats": stats}, x)
    )
    chex.assert_trees_all_equal(wrapped(small["params"], small["batch_stats"], X), expected)


def test_without_a_decomposed_layer_the_program_is_the_same():
    variables = random_variables(Net())
    programs = [
        str(jax.make_jaxpr(apply)(variables, X)) for apply in (Net().apply, lowrank(Net().apply))
    ]
    assert programs[0] == programs[1]


@pytest.mark.parametrize("transform", ["jit", "grad", "vmap", "checkpoint"])
def test_transformations_of_jax_agree_with_the_handwritten_network(transform):
    def loss(apply):
        return lambda params, x: apply({**small, "params": params}, x).sum()

    small = small_variables(RANKS)
    wrap = {
        "jit": jax.jit,
        "grad": jax.grad,
        "vmap": lambda f: jax.vmap(f, (None, 0)),
        "checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
    }[transform]
    x = X[None] if transform == "vmap" else X
    found, expected = (
        wrap(loss(apply))(small["params"], x) for apply in (lowrank(Net().apply), Net(rank=2).apply)
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


def test_a_batch_of_decomposed_networks_runs_under_vmap():
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), small_variables(RANKS))
    found = jax.vmap(lowrank(Net().apply), (0, None))(many, X)
    one = lowrank(Net().apply)(jax.tree.map(lambda leaf: leaf[1], many), X)
    np.testing.assert_allclose(found[1], one, rtol=1e-5)


def test_it_trains():
    small, apply = small_variables({"shared": 2}), lowrank(Net().apply)
    tx = optax.sgd(1e-7)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: jnp.sum(apply({**small, "params": p}, X) ** 2))(
            params
        )
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    params, state = small["params"], tx.init(small["params"])
    losses = []
    for _ in range(3):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[0] > losses[1] > losses[2]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.relu(nn.Conv(4, (3, 3), name="inner")(x)), None


class Lifted(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        split = {"split_rngs": {"params": True}, "variable_axes": {"params": 0}}
        shared = {"split_rngs": {"params": False}, "variable_broadcast": "params"}
        if self.kind == "vmap":
            many = nn.vmap(nn.Conv, in_axes=None, out_axes=0, axis_size=3, **split)
            return many(4, (3, 3), name="block")(x)
        block = {
            "remat": lambda: nn.remat(Block),
            "jit": lambda: nn.jit(Block),
            "scan stacked": lambda: nn.scan(Block, length=3, **split),
            "scan shared": lambda: nn.scan(Block, length=3, **shared),
            "scan of remat": lambda: nn.scan(nn.remat(Block), length=3, **split),
        }[self.kind]()
        return block(name="block")(x, None)[0]


KINDS = ["remat", "jit", "scan stacked", "scan shared", "scan of remat", "vmap"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiled", [True, False])
def test_lifted_transformations_of_flax_run_decomposed(kind, compiled):
    model = Lifted(kind)
    small = small_variables({"block" if kind == "vmap" else "block/inner": 2}, model)
    apply = lowrank(model.apply)
    found = (jax.jit(apply) if compiled else apply)(small, X)
    # A few sums of 36 positive terms, each rounded, in another order.
    np.testing.assert_allclose(found, model.apply(reconstruct(small), X), rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_equal(apply(small, X), apply(small, X))


def operations(program):
    """How often each operation occurs in the optimised program."""
    return collections.Counter(re.findall(r"= \S+ ([a-z-]+)\(", program.as_text()))


@pytest.mark.parametrize("ranks", [{"Conv_0": 10, "Conv_2": 20}, {"Conv_4": 7}])
def test_the_compiled_program_is_that_of_the_handwritten_network(ranks):
    x = jnp.zeros((2, 32, 32, 3))
    skeleton = jax.eval_shape(NIN(ranks=ranks).init, jax.random.key(0), x)
    wrapped, written = (
        jax.jit(apply).lower(skeleton, x).compile()
        for apply in (lowrank(NIN().apply), NIN(ranks=ranks).apply)
    )
    assert operations(wrapped) == operations(written) and operations(wrapped)["convolution"] >= 0
    assert wrapped.cost_analysis()["flops"] == written.cost_analysis()["flops"] > 0
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (wrapped, written)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("first", ["vertical", "horizontal"])
def test_the_order_of_the_factors_is_read_from_the_tree(first):
    variables = random_variables(nn.Conv(4, (3, 3)))
    scheme = Separable(4, first=first)  # at rank 4 of 4 channels the shapes alone would not tell
    small = decompose(variables, {"kernel": scheme})
    found = lowrank(nn.Conv(4, (3, 3)).apply)(small, X)
    written = SeparableConv(4, (3, 3), 4, first=first).apply(small, X)
    chex.assert_trees_all_equal(found, written)
    dense = nn.Conv(4, (3, 3)).apply(reconstruct(small), X)
    np.testing.assert_allclose(found, dense, rtol=1e-4)  # two sums of positive terms, reordered


def test_a_users_own_layers_named_like_factors_are_left_alone():
    class Cross(nn.Module):
        @nn.compact
        def __call__(self, x):
            one, two = nn.Conv(4, (3, 1), name="vertical"), nn.Conv(4, (1, 3), name="horizontal")
            return one(x) + two(x)

    variables = random_variables(Cross())
    chex.assert_trees_all_equal(lowrank(Cross().apply)(variables, X), Cross().apply(variables, X))


def test_the_plain_model_does_not_take_decomposed_variables():
    with pytest.raises((TypeError, ValueError, flax.errors.FlaxError)):
        Net().apply(small_variables(RANKS), X)


def test_a_tree_of_another_model_keeps_the_error_of_flax():
    small = small_variables({"shared": 2})
    with pytest.raises(flax.errors.FlaxError, match="Conv_0"):
        lowrank(NIN().apply)({"params": small["params"]}, jnp.zeros((1, 32, 32, 3)))


@pytest.mark.parametrize(
    "shapes",
    [
        [(3, 1, 4, 3), (1, 3, 2, 4)],  # the rank of one is not that of the other
        [(3, 3, 4, 2), (1, 3, 2, 4)],  # taps along one axis in both
        [(3, 1, 4, 2), (1, 3, 2, 4, 1)],
    ],
)
def test_factors_that_do_not_fit_together_are_refused_or_no_factors(shapes):
    small = small_variables(RANKS)
    names = ("vertical", "horizontal")
    for name, shape in zip(names, shapes, strict=True):
        small["params"]["shared"]["kernel"][name] = jnp.ones(shape)
    if len({len(shape) for shape in shapes}) == 1:
        with pytest.raises(ValueError, match=r"shared: factors of shapes .* do not fit together"):
            lowrank(Net().apply)(small, X)
    else:
        with pytest.raises((TypeError, ValueError, flax.errors.FlaxError)):
            lowrank(Net().apply)(small, X)


def test_factors_of_a_kernel_of_another_shape_keep_the_error_of_flax():
    small = small_variables(RANKS)
    small["params"]["shared"]["kernel"]["horizontal"] = jnp.ones((1, 5, 2, 4))
    with pytest.raises(flax.errors.ScopeParamShapeError, match="shared"):
        lowrank(Net().apply)(small, X)


def test_factors_cut_without_the_layers_groups_are_multiplied_back():
    model = nn.Sequential([nn.Conv(8, (3, 3), feature_group_count=4)])
    small = small_variables({"layers_0": 2}, model)
    found, dense = lowrank(model.apply)(small, X), model.apply(reconstruct(small), X)
    chex.assert_trees_all_close(found, dense, rtol=1e-5)


def test_a_users_layer_with_a_kernel_of_its_own_runs_factored():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("filters", nn.initializers.ones, (3, 3, 4, 4))
            numbers = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=numbers
            )

    small = small_variables({"filters": 2}, Own())
    program = str(jax.make_jaxpr(lowrank(Own().apply))(small, X))
    assert program.count("conv_general_dilated[") == 2 and "dot_general" not in program
    dense = Own().apply(reconstruct(small), X)
    np.testing.assert_allclose(lowrank(Own().apply)(small, X), dense, rtol=1e-4)
