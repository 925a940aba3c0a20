"""Calibrations in files: the moments of every layer, and which kernels they belong to."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lowrank_jax.factorization.strips import Strips
from lowrank_jax.io.atomic import whole_file
from lowrank_jax.io.missing import check_exists
from lowrank_jax.io.npz import read_arrays, write_arrays

VERSION = 4
FIELDS = ("x", "y", "yy", "strips", "offsets")
LayerMoments = dict[tuple[int, ...], Strips]


def write_moments(
    path: str | os.PathLike,
    moments: dict[str, LayerMoments],
    curvature: Mapping[str, np.ndarray],
    kernels: dict[str, Any],
    images: int,
) -> None:
    """Writes a ``.npz`` file that appears whole or not at all.

    Args:
        path: of the file.
        moments, curvature: of every layer.
        kernels: the kernel of every layer.
        images: how many images there were.
    """
    entries, arrays = [], {}  # type: ignore[var-annotated]
    for layer, slices in moments.items():
        for index, own in slices.items():
            fields = {field: getattr(own, field) for field in FIELDS}
            arrays |= flatten_dict({str(len(entries)): fields}, sep=".")
            entries.append([layer, list(index), int(own.count), own.samples])
    prints = {layer: fingerprint(kernels[layer]) for layer in moments}
    arrays |= {f"curvature.{number}": own for number, own in enumerate(curvature.values())}
    head = {"version": VERSION, "images": images, "entries": entries, "kernels": prints}
    head["curvature"] = list(curvature)
    arrays["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
    with whole_file(path) as scratch, scratch.open("wb") as file:
        write_arrays(file, arrays)


def read_moments(
    path: str | os.PathLike, kernels: dict[str, Any]
) -> tuple[dict[str, LayerMoments], dict[str, np.ndarray], int]:
    """Reads what `write_moments` wrote, and checks that it belongs to these kernels.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: the file is damaged, holds something else, or belongs to other kernels.
    """
    check_exists(path, "give what Calibration.save wrote")
    try:
        arrays = read_arrays(Path(path))
        head = json.loads(bytes(arrays["head"]))
        if head["version"] != VERSION:
            raise ValueError(f"its version is {head['version']}, not {VERSION}")
        parts, found = unflatten_dict(arrays, sep="."), dict[str, LayerMoments]()
        for number, (layer, index, count, samples) in enumerate(head["entries"]):
            fields = {field: parts[str(number)].get(field, {}) for field in FIELDS}
            found.setdefault(layer, {})[tuple(index)] = Strips(count, samples, **fields)
        layers = enumerate(head["curvature"])
        curvature = {layer: arrays[f"curvature.{number}"] for number, layer in layers}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no whole calibration: {str(error)[:80]}. Calibrate again, or give "
            "another file."
        ) from error
    _check_kernels(path, head["kernels"], kernels)
    return found, curvature, int(head["images"])


def fingerprint(kernel: Any) -> str:
    """Tells one kernel from another."""
    array = np.ascontiguousarray(kernel)
    text = f"{array.shape} {array.dtype}".encode()
    return hashlib.sha256(text + array.tobytes()).hexdigest()[:16]


def _check_kernels(path: Any, prints: dict[str, str], kernels: dict[str, Any]) -> None:
    for layer, wanted in prints.items():
        if layer not in kernels or fingerprint(kernels[layer]) != wanted:
            raise ValueError(
                f"{path} belongs to other variables: the kernel of {layer!r} differs. Give the "
                "variables that were calibrated, or calibrate again."
            )
