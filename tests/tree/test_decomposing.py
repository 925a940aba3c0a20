"""A tree in, a tree out; nothing else is touched; what cannot be done is refused."""

import dataclasses
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import FrozenDict, freeze

from lowrank_jax import Channel, Matrix, Separable, decompose, reconstruct
from lowrank_jax.tree.paths import named_leaves

ROUNDING = 50 * float(np.finfo(np.float32).eps)  # a float32 SVD of entries of the order of 1


def normal(*shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), dtype)


def conv(*shape):
    return {"kernel": normal(*shape), "bias": normal(shape[-1])}


def network():
    return {
        "Conv_0": conv(3, 3, 2, 4),
        "block": {"Conv_0": conv(3, 5, 4, 6), "norm": {"scale": normal(6)}},
        "Dense_0": conv(6, 3),
        "empty": {},
    }


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


@pytest.mark.parametrize("wrap", [dict, freeze])
def test_factors_stand_in_the_place_of_the_kernel_and_containers_stay(wrap):
    params = wrap(network())
    small = decompose(params, {"block/Conv_0": 5})
    assert type(small) is type(params)
    assert shapes(small["block"]["Conv_0"]) == wrap(
        {"kernel": {"vertical": (3, 1, 4, 5), "horizontal": (1, 5, 5, 6)}, "bias": (6,)}
    )


def test_all_other_leaves_are_the_same_objects():
    params = network()
    small = decompose(params, {"block/Conv_0": 5})
    assert small["Conv_0"]["kernel"] is params["Conv_0"]["kernel"]
    assert small["Dense_0"]["bias"] is params["Dense_0"]["bias"]
    assert small["block"]["norm"]["scale"] is params["block"]["norm"]["scale"]
    assert small["block"]["Conv_0"]["bias"] is params["block"]["Conv_0"]["bias"]
    assert small["empty"] == {}


def test_the_input_is_not_changed():
    params = network()
    leaves, structure = jax.tree.flatten(params)
    reconstruct(decompose(params, {"Conv_0": 1, "block/Conv_0": 5}))
    after, structure_after = jax.tree.flatten(params)
    assert structure == structure_after
    assert all(a is b for a, b in zip(leaves, after, strict=True))


def test_the_factors_are_those_of_the_scheme():
    params = network()
    schemes = {"Conv_0": Separable(2), "block/Conv_0": Channel(3), "Dense_0": Matrix(1)}
    small = decompose(params, schemes)
    names = {
        "Conv_0": ("vertical", "horizontal"),
        "block/Conv_0": ("spatial_first", "pointwise_second"),
        "Dense_0": ("left_factor", "right_factor"),
    }
    for path, scheme in schemes.items():
        kernel, factors = (named_leaves(tree)[path] for tree in (params, small))
        found = tuple(factors[name] for name in names[path])
        chex.assert_trees_all_equal(found, scheme.factor(kernel))


def test_all_variables_are_decomposed_as_their_parameters_are():
    variables = {"params": network(), "batch_stats": {"norm": {"mean": normal(6)}}}
    small = decompose(variables, {"Conv_0": 2})
    chex.assert_trees_all_equal(small["params"], decompose(variables["params"], {"Conv_0": 2}))
    assert small["batch_stats"]["norm"]["mean"] is variables["batch_stats"]["norm"]["mean"]
    alone = decompose(network()["Conv_0"], {"kernel": 2})
    chex.assert_trees_all_equal(alone, small["params"]["Conv_0"])


@dataclasses.dataclass
class Layer:
    weights: jax.Array
    name: str


jax.tree_util.register_dataclass(Layer, data_fields=["weights"], meta_fields=["name"])


def test_kernels_of_any_name_in_any_container_are_decomposed():
    tree = [{"filters": normal(3, 3, 2, 4)}, (normal(3, 3, 4, 4), Layer(normal(3, 3, 4, 8), "c"))]
    small = decompose(tree, {"0/filters": 2, "1/0": 3, "1/1/weights": 4})
    assert small[1][1].name == "c"
    wanted = [2, 3, 4]
    found = [small[0]["filters"], small[1][0], small[1][1].weights]
    assert [factors["vertical"].shape[-1] for factors in found] == wanted


def test_keys_need_not_be_strings():
    small = decompose({"layers": {0: conv(3, 3, 2, 4)}}, {"layers/0": 1})
    assert set(small["layers"][0]["kernel"]) == {"vertical", "horizontal"}


def test_names_that_would_be_the_same_are_whole_paths():
    tree = {"a": {"kernel": normal(3, 3, 2, 4), "weight": normal(3, 3, 2, 4)}}
    small = decompose(tree, {"a/weight": 2})
    assert small["a"]["kernel"] is tree["a"]["kernel"] and set(small["a"]["weight"]) > {"vertical"}


def test_layouts_of_other_frameworks_are_written_in_the_keys():
    tree = {"conv": {"weight": normal(8, 4, 3, 3)}}
    small = decompose(tree, {"conv": 5}, axes="OIHW")
    assert set(small["conv"]["weight"]) == {"vertical_OIHW", "horizontal_OIHW"}
    chex.assert_trees_all_equal_shapes(reconstruct(small), tree)
    full = reconstruct(decompose(tree, {"conv": 12}, axes="OIHW"))
    chex.assert_trees_all_close(full, tree, atol=ROUNDING)


@pytest.mark.parametrize("shape", [(64, 3, 7, 7), (8, 4, 3, 3), (64, 64, 3, 3), (2, 32, 16, 5, 5)])
def test_a_kernel_that_looks_like_one_of_pytorch_is_told(shape):
    with pytest.warns(UserWarning, match=r"conv: the kernel of shape .* axes=\"OIHW\""):
        decompose({"conv": normal(*shape)}, {"conv": 2})


@pytest.mark.parametrize(
    "shape",
    [(3, 3, 3, 3), (7, 7, 3, 64), (1, 5, 3, 3), (5, 5, 3, 3), (16, 16, 3, 64)],
)
def test_a_kernel_of_flax_is_not_taken_for_one_of_pytorch(shape):
    decompose({"conv": normal(*shape)}, {"conv": 1})  # a warning is an error here


def test_groups_are_given_in_the_table():
    params = {"Conv_0": conv(3, 3, 2, 8)}
    small = decompose(params, {"Conv_0": Separable(3, groups=4)})
    assert shapes(small["Conv_0"]["kernel"]["vertical"]) == (3, 1, 2, 12)
    assert shapes(small["Conv_0"]["kernel"]["horizontal"]) == (1, 3, 3, 8)
    full = reconstruct(decompose(params, {"Conv_0": Separable(6, groups=4)}))
    chex.assert_trees_all_close(full, params, atol=ROUNDING)


def test_it_can_be_jitted():
    ranks = {"Conv_0": 2, "block/Conv_0": 5}
    jitted = jax.jit(lambda tree: decompose(tree, ranks))(network())
    # Compare products: the sign of a pair of singular vectors is free.
    chex.assert_trees_all_close(
        reconstruct(jitted), reconstruct(decompose(network(), ranks)), atol=ROUNDING
    )


def test_it_can_be_evaluated_on_shapes_alone():
    ranks = {"Conv_0": 2, "block/Conv_0": 5}
    skeleton = jax.eval_shape(lambda tree: decompose(tree, ranks), jax.eval_shape(network))
    chex.assert_trees_all_equal_shapes_and_dtypes(skeleton, decompose(network(), ranks))
    dense = jax.eval_shape(reconstruct, skeleton)
    chex.assert_trees_all_equal_shapes_and_dtypes(dense, network())


def test_an_ensemble_is_decomposed_by_vmap_or_as_a_stack():
    params = {"Conv_0": {"kernel": normal(2, 3, 3, 2, 4), "bias": normal(2, 4)}}
    mapped = jax.vmap(lambda tree: decompose(tree, {"Conv_0": 2}))(params)
    stacked = decompose(params, {"Conv_0": 2})
    chex.assert_trees_all_equal_shapes_and_dtypes(mapped, stacked)
    chex.assert_trees_all_close(reconstruct(mapped), reconstruct(stacked), atol=ROUNDING)
    for index in range(2):
        member, found = (
            jax.tree.map(operator.itemgetter(index), tree)
            for tree in (params, reconstruct(stacked))
        )
        chex.assert_trees_all_close(
            found, reconstruct(decompose(member, {"Conv_0": 2})), atol=ROUNDING
        )


@pytest.mark.parametrize(
    "paths", [["Conv_0"], ["block/Conv_0"], ["Dense_0"], ["block/Conv_0", "Conv_0", "Dense_0"]]
)
def test_reconstruct_undoes_decompose_at_full_rank(paths):
    full = {"Conv_0": 6, "block/Conv_0": 12, "Dense_0": 3}
    params = network()
    found = reconstruct(decompose(params, {path: full[path] for path in paths}))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, params)
    chex.assert_trees_all_close(found, params, atol=ROUNDING)
    assert found["block"]["Conv_0"]["bias"] is params["block"]["Conv_0"]["bias"]


def test_reconstruct_gives_the_best_approximation_below_full_rank():
    kernel = normal(3, 3, 2, 4)
    found = reconstruct(decompose({"c": {"kernel": kernel}}, {"c": 2}))["c"]["kernel"]
    values = np.linalg.svd(np.swapaxes(kernel, 1, 2).reshape(6, 12), compute_uv=False)
    np.testing.assert_allclose(
        np.linalg.norm(found - kernel), np.linalg.norm(values[2:]), rtol=ROUNDING
    )


@pytest.mark.parametrize("wrap", [dict, freeze])
def test_reconstruct_passes_a_dense_tree_on(wrap):
    params = network()
    found = reconstruct(wrap(params))
    assert jax.tree.structure(found) == jax.tree.structure(wrap(params))
    assert all(a is b for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True))


def test_a_bias_of_none_survives_the_round_trip():
    params = {"Conv_0": {"kernel": normal(3, 3, 2, 4), "bias": None}}
    assert reconstruct(decompose(params, {"Conv_0": 2}))["Conv_0"]["bias"] is None


@pytest.mark.parametrize(
    "module",
    [
        {"vertical": conv(3, 1, 2, 4), "horizontal": conv(1, 3, 4, 5)},
        {"vertical": normal(3, 1, 2, 4)},
        {"vertical": normal(3), "horizontal": normal(3)},
        {"vertical": normal(2, 4), "horizontal": normal(4, 5)},
        {"vertical": normal(3, 1, 2, 4), "horizontal": normal(1, 3, 4, 5), "norm": normal(5)},
    ],
)
def test_reconstruct_leaves_other_modules_that_have_the_names_of_factors(module):
    found = reconstruct({"user": module})
    assert jax.tree.structure(found) == jax.tree.structure({"user": module})
    assert all(a is b for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(module), strict=True))


def refuse(params, ranks):
    with pytest.raises(ValueError) as info:
        decompose(params, ranks)
    return str(info.value)


@pytest.mark.parametrize("ranks", [{}, FrozenDict()])
def test_an_empty_table_is_refused(ranks):
    assert "name at least one layer" in refuse(network(), ranks)


@pytest.mark.parametrize("path", ["Conv0", "conv_0", "Conv_0/kernel", "params/Conv_0"])
def test_an_unknown_path_is_refused_with_the_nearest_one(path):
    message = refuse(network(), {path: 1})
    assert repr(path) in message and "did you mean" in message and "'Conv_0'" in message


def test_an_unknown_path_that_is_near_to_nothing_is_refused_with_the_paths_there_are():
    names = "'Conv_0' or 'Dense_0' or 'block/Conv_0'"
    assert names in refuse(network(), {"zzzzzzzz": 1})
    assert "there are no layers" in refuse({"norm": {"scale": normal(3)}}, {"norm": 1})


def test_one_bad_path_among_good_ones_is_refused():
    assert "'Conv_9'" in refuse(network(), {"Conv_0": 1, "Conv_9": 1})


def test_a_kernel_that_is_not_of_a_layer_is_refused():
    message = refuse({"Dense_0": conv(3)}, {"Dense_0": 1})
    assert "Dense_0" in message and "(3,)" in message and "Leave it out of the table" in message


def test_a_pattern_leaves_tables_of_embeddings_as_they_are():
    params = {"Embed_0": {"embedding": normal(8, 6)}, "Dense_0": conv(6, 3)}
    small = decompose(params, {".*": 1})
    assert small["Embed_0"]["embedding"] is params["Embed_0"]["embedding"]
    assert set(small["Dense_0"]["kernel"]) == {"left_factor", "right_factor"}


@pytest.mark.parametrize("layer", ["embedding", "patch_embedding"])
def test_a_convolution_may_have_any_name(layer):
    small = decompose({layer: conv(3, 3, 2, 4)}, {layer: 1})
    assert set(small[layer]["kernel"]) == {"vertical", "horizontal"}


def test_a_boxed_kernel_is_decomposed_within_its_box():
    tree = {"c": {"kernel": nn.Partitioned(normal(3, 3, 2, 4), (None,) * 4)}}
    small = decompose(tree, {"c": 2})
    assert set(small["c"]["kernel"].value) == {"vertical", "horizontal"}
    chex.assert_trees_all_equal_shapes(reconstruct(small), tree)


@pytest.mark.parametrize("dtype", ["int8", "int32", "bool", "complex64", "float8_e4m3fn"])
def test_a_kernel_that_is_not_floating_point_is_refused(dtype):
    message = refuse({"c": {"kernel": jnp.ones((3, 3, 2, 4), dtype)}}, {"c": 1})
    assert message.startswith("c: ") and dtype in message and "Convert the kernel" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_kernel_with_values_that_are_not_finite_is_refused(value):
    params = {"a": {"b": {"kernel": normal(3, 3, 2, 4).at[1, 2, 0, 3].set(value)}}}
    message = refuse(params, {"a/b": 1})
    assert message.startswith("a/b: ") and "NaN" in message and "repair" in message


def test_a_layer_that_is_decomposed_already_is_refused():
    message = refuse(decompose(network(), {"block/Conv_0": 5}), {"block/Conv_0": 3})
    assert "'block/Conv_0' is decomposed already" in message and "reconstruct(tree)" in message


@pytest.mark.parametrize("rank", [0, -1, 13, True, "3"])
@pytest.mark.parametrize(
    "scheme", [lambda rank: rank, Separable, lambda rank: Separable(rank, groups=2)]
)
def test_a_bad_rank_is_refused_with_its_path_and_the_limit(rank, scheme):
    message = refuse(network(), {"block/Conv_0": scheme(rank)})
    assert (
        message.startswith("block/Conv_0: ")
        and f"rank {rank!r}" in message
        and "from 1 to 12" in message
    )


@pytest.mark.parametrize("groups", [0, -2, 4])
def test_groups_that_do_not_divide_the_outputs_are_refused_with_the_path(groups):
    message = refuse(network(), {"block/Conv_0": Separable(1, groups)})
    assert (
        message.startswith("block/Conv_0: ")
        and f"groups={groups}" in message
        and "6 outputs" in message
    )


def test_bad_ranks_are_refused_while_tracing_too():
    with pytest.raises(ValueError, match=r"Conv_0: rank 7 .* 1 to 6"):
        jax.eval_shape(lambda tree: decompose(tree, {"Conv_0": 7}), network())


@pytest.mark.parametrize("stack", [(), (5,)])
def test_ranks_that_make_a_network_grow_are_logged(stack, caplog):
    tree = {"conv": np.ones((*stack, 3, 3, 16, 16), np.float32)}
    decompose(tree, {"conv": 24})  # as many weights as the kernel
    assert not caplog.messages
    decompose(tree, {"conv": 25})
    (message,) = caplog.messages
    assert "conv: Separable(rank=25" in message
    assert "2400 weights, the dense kernel 2304" in message


@pytest.mark.parametrize("committed", [False, True])
def test_factors_are_as_free_to_move_as_their_kernel(committed):
    kernel = jnp.ones((3, 3, 4, 8))
    kernel = jax.device_put(kernel, jax.devices()[0]) if committed else kernel
    tree = {"conv": {"kernel": kernel}}
    small = decompose(tree, {"conv": 2})
    leaves = [*jax.tree.leaves(small), *jax.tree.leaves(reconstruct(small))]
    assert {leaf.committed for leaf in leaves} == {committed}
