"""Arrays in a ``.safetensors`` file, with a checksum of our own among its metadata."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from lowrank_jax.io.names import natural
from lowrank_jax.io.npz import BFLOAT16

SEAL = "lowrank_jax sha256"
TYPES = {
    "BOOL": np.dtype(bool),
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "BF16": BFLOAT16,
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
}


def read_arrays(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a file by their names, in natural order, because the format keeps no order.

    The package's own reader for numpy knows bfloat16 in its newest releases only.

    Raises:
        ImportError: the package ``safetensors`` is not installed.
        ValueError: an array has an unknown type, comes twice, or is not what was written.
    """
    _need_package()
    from safetensors import deserialize

    entries = dict(deserialize(content))
    arrays = {name: _array(name, entries[name]) for name in sorted(entries, key=natural)}
    length = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + length], object_pairs_hook=_without_doubles)
    wanted = head.get("__metadata__", {}).get(SEAL)
    if wanted not in (None, _digest(arrays)):
        raise ValueError("its arrays are not those that were written into it")
    return arrays


def write_arrays(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes what `read_arrays` reads.

    Raises:
        ImportError: the package ``safetensors`` is not installed.
        ValueError: an array has a type that the format does not keep.
    """
    _need_package()
    from safetensors.numpy import save

    for name, array in arrays.items():
        if array.dtype not in TYPES.values():
            known = ", ".join(map(str, TYPES.values()))
            raise ValueError(f"{name} has type {array.dtype}; .safetensors keeps {known}.")
    file.write(save(dict(arrays), {SEAL: _digest(arrays)}))


def _array(name: str, entry: Mapping[str, Any]) -> np.ndarray:
    if entry["dtype"] not in TYPES:
        raise ValueError(f"{name} has type {entry['dtype']}; known are {', '.join(TYPES)}")
    return np.frombuffer(entry["data"], TYPES[entry["dtype"]]).reshape(entry["shape"])


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name comes twice")
    return dict(pairs)


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    whole = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        whole.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        whole.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return whole.hexdigest()


def _need_package() -> None:
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        raise ImportError(
            ".safetensors needs the extra 'safetensors': pip install 'lowrank-jax[safetensors]'."
        ) from error
