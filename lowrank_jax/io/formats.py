"""The file formats of weights, each with its reader; nothing here runs pickled code."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import flax
import jax
import numpy as np

from lowrank_jax.io import npz, safetensors
from lowrank_jax.io.names import as_array, check_tree, named, natural, nest


def read_npz(path: Path) -> dict[str, Any]:
    """Reads arrays named by their paths, the parts joined by "/"."""
    return nest(npz.read_arrays(path))


def write_npz(file: BinaryIO, variables: Mapping[str, Any]) -> None:
    """Writes what `read_npz` reads."""
    npz.write_arrays(file, named(variables))


def read_safetensors(path: Path) -> dict[str, Any]:
    """Reads arrays named by their paths, in the natural order of the names."""
    return nest(safetensors.read_arrays(path.read_bytes()))


def write_safetensors(file: BinaryIO, variables: Mapping[str, Any]) -> None:
    """Writes what `read_safetensors` reads."""
    safetensors.write_arrays(file, named(variables))


def read_msgpack(path: Path) -> dict[str, Any]:
    """Reads the format of `flax.serialization`."""
    tree = flax.serialization.msgpack_restore(path.read_bytes())
    if not isinstance(tree, dict):
        raise ValueError(f"it holds a {type(tree).__name__}, not a mapping of names to arrays")
    return jax.tree.map(np.asarray, tree)


def write_msgpack(file: BinaryIO, variables: Mapping[str, Any]) -> None:
    """Writes what `read_msgpack` reads."""
    check_tree(variables)
    file.write(flax.serialization.to_bytes(jax.tree.map(as_array, variables)))


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


def write_orbax(folder: Path, items: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes trees of numpy arrays by their names, as a step of a `CheckpointManager` holds them.

    `read_orbax` reads the one named "default". The folder must not exist.
    """
    import orbax.checkpoint as ocp

    trees = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
    checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    try:
        checkpointer.save(folder.resolve(), args=ocp.args.Composite(**trees))
    finally:
        checkpointer.close()


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
