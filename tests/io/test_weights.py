"""Weights survive a round trip through every format, and nothing else is taken for weights."""

import re
import string
import subprocess
import sys

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lowrank_jax import data
from lowrank_jax.io.names import natural
from lowrank_jax.io.weights import load_weights, save_weights

SUFFIXES = (".npz", ".safetensors", ".msgpack")
NAMES = st.text(string.ascii_letters + "_0123456789. é", min_size=1, max_size=6)
TYPES = ("float32", "float64", "float16", jnp.bfloat16, "int64", "int8", "uint8", "bool")
ARRAYS = st.sampled_from(TYPES).flatmap(
    lambda t: hnp.array_shapes(min_dims=0, min_side=0).map(lambda s: numbers(s, t))
)
TREES = st.dictionaries(
    NAMES,
    st.recursive(ARRAYS, lambda inner: st.dictionaries(NAMES, inner, min_size=1), max_leaves=6),
)


def numbers(shape, dtype):
    return np.random.default_rng(0).integers(0, 2, shape).astype(dtype)


def network():
    """A tree with the types and layers that people keep."""
    conv = {"kernel": jnp.arange(54, dtype=jnp.bfloat16).reshape(3, 3, 2, 3), "bias": jnp.zeros(3)}
    return {
        "params": {"Conv_0": conv, "Conv_10": {"bias": np.float32(2)}},
        "batch_stats": {"n": np.int32(3)},
    }


def same(found, expected):
    chex.assert_trees_all_equal_structs(found, expected)
    chex.assert_trees_all_equal(found, expected)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(found))
    types = jax.tree.map(lambda leaf: np.asarray(leaf).dtype, expected)
    assert jax.tree.map(lambda leaf: leaf.dtype, found) == types


def attempt(read):
    """What a function returns, or the message of its ValueError."""
    try:
        return read()
    except ValueError as error:
        return str(error)


def orbax(path, tree):
    with ocp.StandardCheckpointer() as saver:
        saver.save(path, tree)


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".NPZ"])
def test_a_network_survives_a_round_trip_with_its_types(suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    save_weights(path, network())
    same(load_weights(path), network())
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=25)
@given(tree=TREES)
def test_any_tree_of_arrays_survives_a_round_trip(suffix, tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("trees") / f"weights{suffix}"
    save_weights(path, tree)
    same(load_weights(path), tree)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_array_is_written_by_its_values_however_it_lies_in_memory(suffix, tmp_path):
    array = np.arange(24.0).reshape(2, 3, 4)
    tree = {
        "moved": array.transpose(2, 0, 1),
        "strided": array[:, ::2],
        "jax": jnp.asarray(array, jnp.float32).T,
    }
    save_weights(tmp_path / f"w{suffix}", tree)
    chex.assert_trees_all_equal(load_weights(tmp_path / f"w{suffix}"), tree)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_empty_tree_survives_and_empty_branches_do_in_msgpack_only(suffix, tmp_path):
    path = tmp_path / f"w{suffix}"
    save_weights(path, {})
    assert load_weights(path) == {}
    save_weights(path, {"params": {}, "n": np.ones(1)})
    assert list(load_weights(path)) == (["params", "n"] if suffix == ".msgpack" else ["n"])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_frozen_dict_comes_back_as_a_plain_one(suffix, tmp_path):
    save_weights(tmp_path / f"w{suffix}", flax.core.freeze(network()))
    assert type(load_weights(tmp_path / f"w{suffix}")["params"]) is dict


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_keys_with_slashes_come_back_as_haiku_and_spectral_norm_have_them(suffix, tmp_path):
    tree = {
        "mlp/~/linear_0": {"w": np.ones(2)},
        "a": {"Conv_0/kernel/u": np.ones(1), "/": {"": np.ones(3)}},
    }
    save_weights(tmp_path / f"w{suffix}", tree)
    same(load_weights(tmp_path / f"w{suffix}"), tree)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_dotted_names_stay_flat_and_slashes_nest(suffix, tmp_path):
    tree = {"layer1.0.conv1.weight": np.ones(2), "block/conv": np.ones(1)}
    if suffix == ".npz":
        np.savez(tmp_path / "w.npz", **tree)
    else:
        pytest.importorskip("safetensors.numpy").save_file(tree, tmp_path / "w.safetensors")
    same(
        load_weights(tmp_path / f"w{suffix}"),
        {"layer1.0.conv1.weight": np.ones(2), "block": {"conv": np.ones(1)}},
    )


def test_npz_keeps_the_order_of_the_names_and_safetensors_gives_the_natural_one(tmp_path):
    tree = {
        name: np.ones(1)
        for name in ("stem.weight", "layer.2.weight", "layer.10.weight", "layer.1.weight")
    }
    for suffix, order in ((".npz", list(tree)), (".safetensors", sorted(tree, key=natural))):
        save_weights(tmp_path / f"w{suffix}", tree)
        assert list(load_weights(tmp_path / f"w{suffix}")) == order
    assert order == ["layer.1.weight", "layer.2.weight", "layer.10.weight", "stem.weight"]


@given(st.lists(st.integers(0, 10**12), unique=True))
def test_the_natural_order_is_that_of_the_numbers(numbers):
    assert sorted((f"Conv_{n}/x" for n in numbers), key=natural) == [
        f"Conv_{n}/x" for n in sorted(numbers)
    ]


@pytest.mark.parametrize("suffix", [".safetensors", ".msgpack"])
def test_eight_bit_floats_survive_where_the_format_names_them(suffix, tmp_path):
    tree = {"a": jnp.arange(4, dtype=jnp.float8_e4m3fn)}
    save_weights(tmp_path / f"w{suffix}", tree)
    same(load_weights(tmp_path / f"w{suffix}"), tree)


@pytest.mark.parametrize(
    "suffix, tree, message",
    [
        (
            ".npz",
            {"a": jnp.zeros(2, jnp.float8_e4m3fn)},
            "a has type float8_e4m3fn, .* write .safetensors or .msgpack",
        ),
        (
            ".safetensors",
            {"p": {"a": np.zeros(2, complex)}},
            "p/a has type complex128; .safetensors keeps bool, int8",
        ),
        (
            ".npz",
            {"a": {"b\\/c": np.ones(1)}},
            r"of \('a', .*\) must be an int, or a string that has no backslash before a '/'",
        ),
        (".safetensors", {"a": {0.5: np.ones(1)}}, r"key 0.5 of \('a', 0.5\) must be an int"),
        (".npz", {"a": {"[0]": np.ones(1)}}, r"'\[0\]', which stands for an int. Rename it"),
        (".npz", {"a": jax.random.key(0)}, r"random key, key<fry>, .*nnx.Not\(nnx.RngState\)"),
        (".npz", np.ones(1), r"A ndarray is no tree of names; .* nnx.state\(model\)"),
        (".npz", {"a": [np.ones(1), np.ones(1)]}, "A leaf is a list, not an array"),
        (".msgpack", {"a": "text"}, "A leaf is a str, not an array: 'text'"),
        (".msgpack", {"a": np.array([object()])}, "Object"),
        (".npz", {"a": np.array([object()])}, "Object"),
        (
            ".pth",
            {"a": np.ones(1)},
            r"w.pth: the format '.pth' is not known; .* .npz, .safetensors, .msgpack, or .orbax",
        ),
        ("", {"a": np.ones(1)}, "w exists, and a folder is never replaced. Give another name"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_the_old_file(suffix, tree, message, tmp_path):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(b"old")
    with pytest.raises((ValueError, FileExistsError), match=message):
        save_weights(path, tree)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=40)
@given(cut=st.integers(0, 400), at=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_damaged_file_is_read_or_refused_by_name_never_anything_else(
    suffix, tmp_path_factory, cut, at, byte
):
    path = tmp_path_factory.mktemp("damaged") / f"w{suffix}"
    save_weights(path, {"a": {"b": np.arange(40, dtype=np.int16)}})
    content = bytearray(path.read_bytes())
    content[at % len(content)] = byte
    path.write_bytes(content[: -cut or None])
    found = attempt(lambda: load_weights(path))
    assert isinstance(found, dict) or f"{path} is no whole {suffix} file" in found


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 cut short", b"\x80\x04}\x94.", b"\x93\x01\x02\x03"]
)
def test_a_file_of_another_content_is_refused(suffix, content, tmp_path):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(
        ValueError,
        match=f"w{suffix} is no whole {suffix} file of plain arrays: .*write this one anew",
    ):
        load_weights(path)


def test_raw_bytes_other_than_bfloat16_are_refused(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.zeros(2, "V3"))
    with pytest.raises(ValueError, match=r"a has type \|V3, which is no number"):
        load_weights(tmp_path / "w.npz")


def test_pickled_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.array([object()]))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_weights(tmp_path / "w.npz")


def test_a_file_of_equinox_is_refused_with_the_way_out(tmp_path):
    arrays = {"layers": [np.ones((2, 3), np.float32)]}
    (tmp_path / "net.eqx").touch()
    with pytest.raises(ValueError, match="keystr") as caught:
        load_weights(tmp_path / "net.eqx")
    line = re.search(r"numpy.savez\(.*\)\}\)", str(caught.value)).group()
    exec(line.replace("weights.npz", f"{tmp_path}/net.npz"), dict(numpy=np, jax=jax, arrays=arrays))
    assert load_weights(tmp_path / "net.npz")["layers.0"].shape == (2, 3)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pkl"])
def test_a_pickled_file_is_refused_with_the_way_out(suffix, tmp_path):
    (tmp_path / f"w{suffix}").write_bytes(b"\x80\x04}\x94.")
    with pytest.raises(
        ValueError, match=r"Readable are .npz, .* pickled code.* numpy.savez\('weights.npz'"
    ):
        load_weights(tmp_path / f"w{suffix}")


def test_an_unknown_suffix_and_a_missing_file_are_refused_with_what_is_readable(tmp_path):
    (tmp_path / "w.h5").touch()
    with pytest.raises(
        ValueError,
        match=r"w.h5: the format '.h5' is not known. Readable are .npz, .* Orbax folders",
    ):
        load_weights(tmp_path / "w.h5")
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*absent.npz; give one of"):
        load_weights(tmp_path / "absent.npz")


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "w.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for use in (load_weights, lambda path: save_weights(path, network())):
        with pytest.raises(ImportError, match=r"lowrank-jax\[safetensors\]"):
            use(tmp_path / "w.safetensors")


def test_an_orbax_checkpoint_is_read_without_a_target(tmp_path):
    tree = {**network(), "empty": {}}
    orbax(tmp_path / "tree", tree)
    same(load_weights(tmp_path / "tree"), tree)


def test_a_step_of_a_checkpoint_manager_gives_its_default_item_or_its_items_by_name(tmp_path):
    with ocp.CheckpointManager(tmp_path / "plain") as manager:
        manager.save(2, args=ocp.args.StandardSave(network()))
        manager.save(10, args=ocp.args.StandardSave(network()))
    same(load_weights(tmp_path / "plain" / "10"), network())
    items = {name: ocp.args.StandardSave(tree) for name, tree in network().items()}
    with ocp.CheckpointManager(tmp_path / "items") as manager:
        manager.save(0, args=ocp.args.Composite(**items, notes=ocp.args.JsonSave({"epoch": 3})))
    same(load_weights(tmp_path / "items" / "0"), network())


def test_a_checkpoint_of_several_devices_is_read_on_one(devices, tmp_path):
    code = f"""
import jax, jax.numpy as jnp, orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
split = jax.device_put(jnp.arange(8), NamedSharding(mesh, PartitionSpec("x")))
with ocp.StandardCheckpointer() as saver:
    saver.save({str(tmp_path / "tree")!r}, {{"a": split}})
"""
    command = [sys.executable, "-c", code]
    subprocess.run(command, env=devices(4), capture_output=True, check=True)
    same(load_weights(tmp_path / "tree"), {"a": np.arange(8, dtype=np.int32)})


def test_a_folder_of_something_else_and_a_damaged_checkpoint_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint of its own; it has no folders in it"):
        load_weights(tmp_path)
    orbax(tmp_path / "tree", {"a": np.ones(3)})
    for file in (tmp_path / "tree").rglob("*"):
        if file.is_file() and file.name != "_METADATA":
            file.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"tree is no whole Orbax checkpoint: .* write this one anew"
    ):
        load_weights(tmp_path / "tree")


def test_the_embedded_network_is_that_of_the_package():
    shapes = jax.tree.map(np.shape, data.pretrained()["params"]["Conv_5"])
    assert shapes == {"kernel": (1, 1, 192, 10), "bias": (10,)}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".msgpack"])
def test_a_folder_of_results_names_the_weights_in_it(tmp_path, suffix):
    (tmp_path / f"variables{suffix}").touch()
    (tmp_path / "report.html").touch()
    with pytest.raises(ValueError, match=f"give one of these in it: variables{suffix}"):
        load_weights(tmp_path)
