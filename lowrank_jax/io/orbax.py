"""Folders of Orbax: a tree, a step of a `CheckpointManager`, or all its steps."""

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lowrank_jax.io.names import natural, plain

WEIGHTS = (".msgpack", ".npz", ".safetensors")  # files that `load_weights` reads
LOG = logging.getLogger("lowrank_jax")
STEP = re.compile(r"([A-Za-z_-]*?)_?(\d+)")  # "10", "000010", "step_10" and "checkpoint_10"


def read_orbax(path: Path) -> dict[str, Any]:
    """Reads a tree, a step of a `CheckpointManager`, or the newest step of its folder.

    Returns:
        The tree. For a step, the tree is the item "default", or the only tree, or a dict of all
        trees by the names of their items.

    Raises:
        ValueError: the folder holds none of these.
    """
    if _is_tree(path):
        return _restore(path)
    if _is_step(path):
        return _read_step(path)
    steps = _steps(path)
    if not steps:
        raise ValueError(f"it holds no checkpoint of its own; {_advice(path)}")
    if len(steps) > 1:
        LOG.info("%s holds %d steps, of which the last, %s, is read.", path, len(steps), steps[-1])
    return read_orbax(path / steps[-1])


def write_orbax(folder: Path, items: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes trees of numpy arrays by their names, as a step of a `CheckpointManager` holds them.

    `read_orbax` reads the tree named "default". The folder must not exist.
    """
    import orbax.checkpoint as ocp

    trees = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
    checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    try:
        checkpointer.save(folder.resolve(), args=ocp.args.Composite(**trees))
    finally:
        checkpointer.close()


def write_tree(folder: Path, variables: Mapping[str, Any]) -> None:
    """Writes one tree, which `read_orbax` and a ``StandardCheckpointer`` read.

    Raises:
        FileExistsError: there is something at the path.
        ValueError: the tree is empty, or a key is no string, as Orbax makes strings of all keys.
    """
    import orbax.checkpoint as ocp

    if folder.exists():
        raise FileExistsError(
            f"{folder} exists, and a folder is never replaced. Give another name, or remove it."
        )
    tree = plain(variables)
    _check_keys(tree, str(folder))
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve(), args=ocp.args.PyTreeSave(tree))


def _check_keys(tree: Mapping[Any, Any], name: str) -> None:
    if not tree:
        raise ValueError(
            f"{name} is an empty mapping, which Orbax does not keep; leave it out, or write "
            ".msgpack."
        )
    for key, value in tree.items():
        if not isinstance(key, str):
            raise ValueError(
                f"The key {key!r} is a {type(key).__name__}, of which Orbax makes a string; write "
                ".npz, .safetensors or .msgpack, which keep ints."
            )
        if isinstance(value, dict):
            _check_keys(value, key)


def _read_step(path: Path) -> dict[str, Any]:
    items = _items(path)
    if "default" in items:
        return _restore(path / "default")
    if len(items) == 1 and items != ["params"]:
        return _restore(path / items[0])
    return {name: _restore(path / name) for name in items}


def _is_tree(folder: Path) -> bool:
    return (folder / "_METADATA").exists()


def _is_step(folder: Path) -> bool:
    return (folder / "_CHECKPOINT_METADATA").exists() and bool(_items(folder))


def _items(folder: Path) -> list[str]:
    """The names of the trees in a folder."""
    return [name for name in _folders(folder) if _is_tree(folder / name)]


def _folders(folder: Path) -> list[str]:
    return sorted((own.name for own in folder.iterdir() if own.is_dir()), key=natural)


def _steps(folder: Path) -> list[str]:
    """The names of the steps in a folder, the newest last; none where their prefixes differ."""
    found = dict(_numbered(folder))
    prefixes = {prefix for prefix, _ in found.values()}
    return sorted(found, key=lambda name: found[name][1]) if len(prefixes) == 1 else []


def _numbered(folder: Path) -> Iterator[tuple[str, tuple[str, int]]]:
    for name in _folders(folder):
        match = STEP.fullmatch(name)
        if match and (_is_tree(folder / name) or _is_step(folder / name)):
            yield name, (match[1], int(match[2]))


def _advice(path: Path) -> str:
    files = sorted(own.name for own in path.iterdir() if own.suffix in WEIGHTS)
    names = [*files, *_folders(path)]
    if not names:
        return "it has no folders in it"
    return f"give one of these in it: {', '.join(names[:20])}"


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
