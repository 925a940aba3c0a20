"""Weights from a file or folder, and into a file; what is at the path decides the format."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_jax.io.atomic import whole_file
from lowrank_jax.io.formats import READERS, WRITERS
from lowrank_jax.io.missing import check_exists
from lowrank_jax.io.orbax import read_orbax, write_tree
from lowrank_jax.io.training_state import variables_in

PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")
FOLDERS = ("", ".orbax")  # ends of the names of folders of Orbax
FORMATS = ".npz, .safetensors and .msgpack files, and Orbax folders"
UNPICKLE = (
    "such a file may hold pickled code, which runs when it is read. In PyTorch, "
    "numpy.savez('weights.npz', **{name: tensor.numpy() for name, tensor in "
    "model.state_dict().items()}) writes one that is readable here"
)
EQUINOX = (
    "of an Equinox model write the arrays by their names: numpy.savez('weights.npz', "
    "**{jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in "
    "jax.tree_util.tree_leaves_with_path(arrays)})"
)
CONVERT = {**dict.fromkeys(PICKLED, UNPICKLE), ".eqx": EQUINOX}


def save_weights(path: str | os.PathLike, variables: Mapping[Any, Any]) -> None:
    """Writes a tree of weights, which `load_weights` reads; it appears whole or not at all.

    Args:
        path: its suffix chooses the format. ``.npz``, ``.safetensors`` and ``.msgpack`` are files.
            A name without a suffix, or with ``.orbax``, is a folder of Orbax, which must not exist.
            ``.npz`` and ``.safetensors`` store arrays named by their paths and so forget empty
            mappings; ``.msgpack`` keeps empty mappings, and Orbax refuses them.
        variables: nested mapping of arrays, such as the variables of Linen or the state of a model
            of NNX. Keys are strings or, except for Orbax, ints.

    Raises:
        FileExistsError: the folder of Orbax exists already.
        FileNotFoundError: the folder of the file does not exist.
        ImportError: the package ``safetensors`` is not installed.
        ValueError: the format is not known, or something in the tree cannot be written in that
            format.

    Example:
        >>> import tempfile, numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(f"{folder}/weights.npz", {"params": {"stem": np.zeros(3)}})
        ...     load_weights(f"{folder}/weights.npz")
        {'params': {'stem': array([0., 0., 0.])}}
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in FOLDERS:
        write_tree(path, variables)
        return
    if suffix not in WRITERS:
        raise ValueError(
            f"{path}: the format {path.suffix!r} is not known; end the name in "
            f"{', '.join(WRITERS)}, or .orbax for a folder."
        )
    with whole_file(path) as scratch, scratch.open("wb") as file:
        WRITERS[suffix](file, variables)


def load_weights(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a tree of weights, as nested dicts of numpy arrays.

    A ``.npz`` or ``.safetensors`` file names each array by its path, "params/Conv_0/kernel"; names
    without "/", such as PyTorch's, stay as they are, for `lowrank_jax.io.torch_names`. A
    ``.msgpack`` file is one of `flax.serialization.to_bytes`. A folder is a checkpoint of Orbax, or
    of its ``CheckpointManager``. Of all steps the last step is read. Of a step the item "default"
    is read, or the only tree, or all trees by the names of their items.

    Of the state of a training, which has "opt_state" beside "params", the variables are taken: all
    collections but "opt_state". A line of the log says so.

    Args:
        path: of the file or the folder.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ImportError: the package that reads the format is not installed.
        ValueError: the file or folder is of another format, or damaged.

    Example:
        >>> import tempfile, numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/torch.npz", **{"conv1.bias": np.zeros(3)})
        ...     load_weights(f"{folder}/torch.npz")
        {'conv1.bias': array([0., 0., 0.])}
    """
    path = Path(path)
    check_exists(path, f"give one of {FORMATS}", "file or folder")
    reader = read_orbax if path.is_dir() else READERS.get(path.suffix.lower())
    if reader is None:
        remedy = CONVERT.get(path.suffix.lower(), "rename the file if it is one of these")
        raise ValueError(
            f"{path}: the format {path.suffix!r} is not known. Readable are {FORMATS}; {remedy}."
        )
    try:
        return variables_in(reader(path), path)
    except (ImportError, PermissionError):
        raise
    except Exception as error:  # a damaged file makes each reader raise whatever it runs into
        kind = "Orbax checkpoint" if path.is_dir() else f"{path.suffix} file of plain arrays"
        raise ValueError(
            f"{path} is no whole {kind}: {error}. Give another file, or write this one anew."
        ) from error
