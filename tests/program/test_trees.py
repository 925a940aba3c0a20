"""A tree may be of any containers and any names: what is no kernel stays what it is, and factors
are found wherever they stand."""

import collections
import dataclasses

import chex
import equinox as eqx
import flax
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from lowrank_jax import Separable, decompose, lowrank, max_rank, reconstruct, trace
from lowrank_jax.factorization.forms import FORMS, SCHEMES

X = jnp.asarray(np.random.default_rng(1).standard_normal((2, 6, 5, 4)), jnp.float32)
NHWC = ("NHWC", "HWIO", "NHWC")


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


KERNEL = normal(3, 3, 4, 4)


def conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)


def convolutions(function, *args):
    return str(jax.make_jaxpr(function)(*args)).count("conv_general_dilated[")


def assert_same(found, expected):
    """Float32 sums of some dozens of terms of the order of 1, in another order."""
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_close(found, expected, atol=1e-4)


def assert_runs(function, tree, x=X, rank=3):
    """Half of the safe kernels' parameters, and none of their products."""
    uses = trace(function, tree, x)
    table = {use.path: use.scheme(rank) for use in uses if use.safe}
    small = decompose(tree, table, uses)
    run = eqx.filter_jit(lambda s, x: (lowrank(function)(s, x), function(reconstruct(s), x)))
    assert_same(*run(small, x))
    arrays, rest = eqx.partition(small, eqx.is_array)
    low = convolutions(lambda a, x: lowrank(function)(eqx.combine(a, rest), x), arrays, x)
    assert table and low == 2 * len(table)
    return small


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array


@flax.struct.dataclass
class Struct:
    kernel: jax.Array
    bias: jax.Array


Pair = collections.namedtuple("Pair", "kernel other")

CONTAINERS = {
    "dict": lambda k: {"conv": {"kernel": k, "bias": jnp.ones(4)}},
    "bare": lambda k: k,
    "list": lambda k: [jnp.ones(4), [k]],
    "tuple": lambda k: (k, None, "text"),
    "namedtuple": lambda k: Pair(k, jnp.ones(4)),
    "dataclass": lambda k: {"layers": [Layer(k, jnp.ones(4))]},
    "FrozenDict": lambda k: flax.core.freeze({"params": {"conv": {"kernel": k}}}),
    "OrderedDict": lambda k: collections.OrderedDict(b=k, a=jnp.ones(4)),
    "boxed": lambda k: {"conv": {"kernel": nn.Partitioned(k, (None,) * 4)}},
    "NNX state": lambda k: nnx.State({"conv": {"kernel": nnx.Param(k)}}),
    "struct": lambda k: Struct(k, jnp.ones(4)),
    "another collection": lambda k: {"params": {}, "filters": {"conv": {"filters": k}}},
    "integer keys": lambda k: {"layers": {0: k, 1: jnp.ones(4)}},
    "slashes": lambda k: {"net/~/conv": {"w": k}, "net": {"b": jnp.ones(4)}},
}


def kernel_of(tree):
    leaves = jax.tree.leaves(tree)
    return next(leaf for leaf in leaves if getattr(leaf, "ndim", 0) == 4)


def path_of(tree):
    return trace(lambda t, x: conv(x, kernel_of(t)), tree, X)[0].path


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_kernel_runs_as_factors_in_any_container(name):
    def apply(tree, x):
        return conv(x, kernel_of(tree))

    tree = CONTAINERS[name](KERNEL)
    small = assert_runs(apply, tree)
    assert type(small) is type(tree) or name == "bare"
    chex.assert_trees_all_equal_structs(reconstruct(small), tree)


@pytest.mark.parametrize("name", CONTAINERS)
def test_all_other_leaves_are_the_same_objects(name):
    tree = CONTAINERS[name](KERNEL)
    small = decompose(tree, {path_of(tree): 2})
    others = {id(leaf) for leaf in jax.tree.leaves(tree) if leaf is not KERNEL}
    assert others <= {id(leaf) for leaf in jax.tree.leaves(small)}


@pytest.mark.parametrize("name", CONTAINERS)
def test_gradients_have_the_containers_of_the_tree(name):
    tree = CONTAINERS[name](KERNEL)
    small = decompose(tree, {path_of(tree): 2})
    arrays, rest = eqx.partition(small, eqx.is_array)

    def loss(arrays):
        return lowrank(lambda t, x: conv(x, kernel_of(t)))(eqx.combine(arrays, rest), X).sum()

    chex.assert_trees_all_equal_shapes_and_dtypes(jax.grad(loss)(arrays), arrays)


COLLISIONS = [
    {"a": {"kernel": KERNEL, "weight": 2 * KERNEL}},
    {"a": {"kernel": KERNEL}, "params": {"a": {"kernel": 2 * KERNEL}}},
    {"a": [KERNEL], "a/0": 2 * KERNEL},
    {"a": {"b": {"w": KERNEL}}, "a/b": {"w": 2 * KERNEL}},
    {"a": {"weight": KERNEL}, "params": {"a": {"kernel": 2 * KERNEL, "weight": {"w": -KERNEL}}}},
]


@pytest.mark.parametrize("tree", COLLISIONS)
def test_kernels_whose_names_collide_are_told_apart(tree):
    def apply(tree, x):
        for kernel in jax.tree.leaves(tree):
            x = jnp.tanh(conv(x, kernel))
        return x

    uses = trace(apply, tree, X)
    assert len({use.path for use in uses}) == len(jax.tree.leaves(tree))
    for use in uses:
        small = decompose(tree, {use.path: 12})
        leaves = [leaf.shape for leaf in jax.tree.leaves(small)]
        assert leaves.count((3, 1, 4, 12)) == 1  # this kernel and no other
        assert_same(lowrank(apply)(small, X), apply(tree, X))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("compute", ["float16", "bfloat16", "float32", "float64"])
def test_every_type_of_storage_and_of_computation(dtype, compute):
    with jax.enable_x64("float64" in (dtype, compute)):
        tree = {"kernel": normal(3, 3, 4, 4, dtype=dtype)}

        def apply(tree, x):
            return conv(x.astype(compute), tree["kernel"].astype(compute))

        small = decompose(tree, {"kernel": 12})
        found, expected = jax.jit(lambda s, x: (lowrank(apply)(s, x), apply(tree, x)))(small, X)
        assert found.dtype == expected.dtype == compute
        assert small["kernel"]["vertical"].dtype == dtype
        eps = max(float(jnp.finfo(name).eps) for name in (dtype, compute))
        scale = float(jnp.abs(expected).max())
        # Both factors and the channels between them are rounded: some tens of roundings.
        np.testing.assert_allclose(np.float64(found), np.float64(expected), atol=20 * eps * scale)


def test_an_equinox_model_is_its_own_tree():
    keys = jax.random.split(jax.random.key(0), 3)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(4, 8, (3, 5), stride=(2, 1), key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Conv2d(8, 8, 3, groups=2, key=keys[1]),
            eqx.nn.ConvTranspose2d(8, 4, 3, key=keys[2]),
        ]
    )
    x = normal(4, 9, 9)
    arrays, static = eqx.partition(model, eqx.is_array)

    def apply(arrays, x):
        return eqx.combine(arrays, static)(x)

    uses = trace(apply, arrays, x)
    assert [(use.path, use.axes, use.strides, use.groups) for use in uses] == [
        ("layers/0", "OIHW", (2, 1), 1),
        ("layers/2", "OIHW", (1, 1), 2),
        ("layers/3", "OIHW", (1, 1), 1),
    ]
    small = assert_runs(apply, arrays, x)
    assert isinstance(small, eqx.nn.Sequential)
    assert small.layers[0].weight["vertical_OIHW"].shape == (3, 4, 3, 1)
    whole = {use.path: use.scheme(max_rank(use.kernel_shape, use.groups, use.axes)) for use in uses}
    assert_same(lowrank(apply)(decompose(arrays, whole, uses), x), model(x))
    batch = eqx.filter_jit(lowrank(lambda model, x: jax.vmap(model)(x)))
    assert_same(batch(decompose(model, whole, uses), x[None])[0], model(x))


def test_a_haiku_model_runs_with_its_own_tree():
    def forward(x):
        x = jax.nn.relu(hk.Conv2D(6, 3, stride=(2, 1), padding="VALID")(x))
        return hk.Conv2DTranspose(4, 3)(hk.Conv2D(6, 3, feature_group_count=2, rate=2)(x))

    model = hk.without_apply_rng(hk.transform(forward))
    params = model.init(jax.random.key(0), X)
    small = assert_runs(model.apply, params)
    assert set(small["conv2_d"]["w"]) == {"vertical", "horizontal"}
    assert small["conv2_d"]["b"] is params["conv2_d"]["b"]


def test_an_nnx_state_runs_with_its_graph():
    model = nnx.Sequential(nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
    graph, state = nnx.split(model)
    small = assert_runs(lambda state, x: nnx.merge(graph, state)(x), state)
    assert isinstance(small, nnx.State)


def test_a_boxed_linen_model_keeps_its_boxes():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None, None, "model"))
    model = nn.Sequential([nn.Conv(6, (3, 3), kernel_init=init), nn.relu])
    variables = model.init(jax.random.key(0), X)
    small = assert_runs(model.apply, variables)
    box = small["params"]["layers_0"]["kernel"]
    assert isinstance(box, nn.Partitioned) and set(box.value) == {"vertical", "horizontal"}


def test_kernels_named_and_laid_out_as_in_pytorch():
    tensors = {"layer1.0.conv1.weight": normal(6, 4, 3, 5), "layer1.0.conv1.bias": normal(6)}

    def apply(tensors, x):
        y = jax.lax.conv(x.transpose(0, 3, 1, 2), tensors["layer1.0.conv1.weight"], (2, 1), "SAME")
        return y + tensors["layer1.0.conv1.bias"][:, None, None]

    small = assert_runs(apply, tensors)
    assert set(small["layer1.0.conv1.weight"]) == {"vertical_OIHW", "horizontal_OIHW"}
    declared = decompose(tensors, {"layer1.0.conv1.weight": 3}, axes="OIHW")
    assert_same(declared, small)


@pytest.mark.parametrize("first", [first for first, form in FORMS.items() if form.spatial])
@pytest.mark.parametrize(
    "axes, shape", [("OIHW", (6, 4, 3, 5)), ("OIW", (6, 4, 3)), ("OIDHW", (6, 2, 2, 3, 2))]
)
def test_full_rank_gives_the_kernel_back_in_every_layout(axes, shape, first):
    tree = {"conv": {"weight": normal(*shape)}}
    scheme = SCHEMES[first](max_rank(shape, 2, axes, first), 2, axes, first)
    small = jax.jit(lambda tree: decompose(tree, {"conv": scheme}))(tree)
    assert_same(reconstruct(small), tree)


@pytest.mark.parametrize("axes", ["HW", "HHIO", "HWI", "IO", ""])
def test_a_layout_that_does_not_name_every_axis_once_is_refused(axes):
    with pytest.raises(ValueError, match="axes="):
        decompose({"conv": {"kernel": KERNEL}}, {"conv": Separable(2, axes=axes)})
