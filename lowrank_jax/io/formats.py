"""The file formats of weights, each with its reader; nothing here runs pickled code."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

BFLOAT16 = np.dtype(jnp.bfloat16)
SAFETENSORS_TYPES = {
    "BOOL": np.dtype(bool),
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "BF16": BFLOAT16,
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
}


def read_npz(path: Path) -> dict[str, Any]:
    """Reads arrays named by their paths, the parts joined by "/".

    numpy stores bfloat16 as two raw bytes without the type's name; nothing else that JAX computes
    with is two raw bytes, so these are bfloat16 again.
    """
    with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:
        return nest({name: _from_raw(name, array) for name, array in archive.items()})


def _from_raw(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind != "V":
        return array
    if array.dtype != np.dtype("V2"):
        raise ValueError(f"{name} has type {array.dtype}, which is no number")
    return array.view(BFLOAT16)


def write_npz(file: BinaryIO, variables: Mapping[str, Any]) -> None:
    """Writes what `read_npz` reads."""
    arrays = named(variables)
    for name, array in arrays.items():
        nameless = array.dtype.isbuiltin == 2  # a type that numpy stores without its name
        if nameless and array.dtype != BFLOAT16:
            raise ValueError(
                f"{name} has type {array.dtype}, which .npz does not keep; write .safetensors or "
                ".msgpack."
            )
    np.savez(file, allow_pickle=False, **arrays)


def read_safetensors(path: Path) -> dict[str, Any]:
    """Reads arrays named by their paths, in the natural order of the names.

    The format keeps no order. The package's own reader for numpy knows bfloat16 in its newest
    releases only, hence the bytes.
    """
    _need_safetensors()
    from safetensors import deserialize

    entries = dict(deserialize(path.read_bytes()))
    return nest({name: _from_entry(name, entries[name]) for name in sorted(entries, key=natural)})


def _from_entry(name: str, entry: Mapping[str, Any]) -> np.ndarray:
    if entry["dtype"] not in SAFETENSORS_TYPES:
        raise ValueError(
            f"{name} has type {entry['dtype']}; known are {', '.join(SAFETENSORS_TYPES)}"
        )
    return np.frombuffer(entry["data"], SAFETENSORS_TYPES[entry["dtype"]]).reshape(entry["shape"])


def write_safetensors(file: BinaryIO, variables: Mapping[str, Any]) -> None:
    """Writes what `read_safetensors` reads."""
    _need_safetensors()
    from safetensors.numpy import save

    arrays = named(variables)
    for name, array in arrays.items():
        if array.dtype not in SAFETENSORS_TYPES.values():
            known = ", ".join(map(str, SAFETENSORS_TYPES.values()))
            raise ValueError(f"{name} has type {array.dtype}; .safetensors keeps {known}.")
    file.write(save(arrays))


def _need_safetensors() -> None:
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        raise ImportError(
            ".safetensors needs the extra 'safetensors': pip install 'lowrank-jax[safetensors]'."
        ) from error


def read_msgpack(path: Path) -> dict[str, Any]:
    """Reads the format of `flax.serialization`."""
    tree = flax.serialization.msgpack_restore(path.read_bytes())
    if not isinstance(tree, dict):
        raise ValueError(f"it holds a {type(tree).__name__}, not a mapping of names to arrays")
    return jax.tree.map(np.asarray, tree)


def write_msgpack(file: BinaryIO, variables: Mapping[str, Any]) -> None:
    """Writes what `read_msgpack` reads."""
    file.write(flax.serialization.to_bytes(jax.tree.map(_array, variables)))


def read_orbax(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of a tree, or the trees that a step of a `CheckpointManager` holds.

    Returns:
        The tree; of a step its item "default", or else all its trees by the names of their items.
    """
    if _is_tree(path):
        return _restore(path)
    folders = sorted((folder.name for folder in path.iterdir() if folder.is_dir()), key=natural)
    items = [name for name in folders if _is_tree(path / name)]
    if not items or not (path / "_CHECKPOINT_METADATA").exists():
        advice = (
            f"give one of the folders in it: {', '.join(folders[:20])}"
            if folders
            else "it has no folders in it"
        )
        raise ValueError(f"it holds no checkpoint of its own; {advice}")
    return (
        _restore(path / "default")
        if "default" in items
        else {name: _restore(path / name) for name in items}
    )


def _is_tree(folder: Path) -> bool:
    return (folder / "_METADATA").exists()


def _restore(folder: Path) -> dict[str, Any]:
    """Restores to numpy, which works whatever devices the arrays were on when they were saved."""
    import orbax.checkpoint as ocp

    handler, folder = ocp.PyTreeCheckpointHandler(), folder.resolve()
    try:
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(folder).tree
        )
        return handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    finally:
        handler.close()


def named(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a tree by their paths, as `nest` takes them apart.

    An empty mapping leaves no trace.

    Example:
        >>> list(named({"params": {"Conv_0": {"kernel": np.ones(3), "bias": np.ones(1)}}}))
        ['params/Conv_0/kernel', 'params/Conv_0/bias']
    """
    flat = flatten_dict(variables)
    for key in flat:
        if wrong := [part for part in key if not isinstance(part, str) or "/" in part]:
            raise ValueError(
                f"The key {wrong[0]!r} of {key} must be a string without '/', the separator of the "
                "names."
            )
    return {"/".join(key): _array(leaf) for key, leaf in flat.items()}


def nest(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Nested dicts by the parts of the names between "/".

    Names without it, as PyTorch's, stay as they are.

    Example:
        >>> nest({"params/Conv_0/kernel": 1, "layer1.0.conv1.weight": 2})
        {'params': {'Conv_0': {'kernel': 1}}, 'layer1.0.conv1.weight': 2}
    """
    return unflatten_dict(dict(arrays), sep="/")


def _array(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, np.ndarray | np.generic | jax.Array | int | float | complex):
        raise ValueError(f"A leaf is a {type(leaf).__name__}, not an array: {leaf!r:.60}.")
    return np.asarray(leaf, order="C")  # safetensors writes memory as it lies


def natural(name: str) -> list[str | int]:
    """A sorting key by which "Conv_2" comes before "Conv_10".

    Example:
        >>> sorted(["Conv_10", "Conv_2"], key=natural)
        ['Conv_2', 'Conv_10']
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".npz": read_npz,
    ".safetensors": read_safetensors,
    ".msgpack": read_msgpack,
}
WRITERS: dict[str, Callable[[BinaryIO, Mapping[str, Any]], None]] = {
    ".npz": write_npz,
    ".safetensors": write_safetensors,
    ".msgpack": write_msgpack,
}
