"""The file of a `Timer`: measured times by device, layer and algorithm, shared by processes."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_jax.io.atomic import locked, whole_file
from lowrank_jax.tuning.algorithms import NAMES
from lowrank_jax.tuning.device import Device
from lowrank_jax.tuning.experimental.pools import POOLS

DENSE = "dense"  # the fastest algorithm of the dense layer
TWO = "product+product"  # a matrix product by two factors
VERSION = 2
Times = dict[str, dict[str, float]]  # what was measured, as JSON, to seconds by algorithm


def key_of(device: Device, options: Mapping[str, Any], *what: Any) -> str:
    """What was measured, where, and under which compiler options, as one line of JSON."""
    return json.dumps([*dataclasses.astuple(device), sorted(options.items()), *what])


def read_times(path: Path) -> Times:
    """Reads and checks the times in a file; none where there is no file.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.exists():
        return {}
    try:
        return _checked(json.loads(path.read_text()))
    except (RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no measured times: {error}. Remove the file, or name another one."
        ) from error


def add_times(path: Path, new: Times) -> Times:
    """Adds times to a file, whatever other processes write at the same time.

    Returns:
        All times that the file holds now.
    """
    with locked(path):
        times = read_times(path) | new
        with whole_file(path) as scratch:
            scratch.write_text(json.dumps({"version": VERSION, "times": times}, indent=0) + "\n")
    return times


def _checked(found: Any) -> Times:
    if not isinstance(found, dict) or set(found) != {"version", "times"}:
        raise ValueError('it is no object of a "version" and "times"')
    if found["version"] != VERSION:
        raise ValueError(f"its version is {found['version']!r}, and this release reads {VERSION}")
    if not isinstance(found["times"], dict):
        raise ValueError('its "times" are no object')
    for key, times in found["times"].items():
        _check_key(key)
        _check_times(key, times)
    return found["times"]


def _check_key(key: str) -> None:
    kinds = [field.type for field in dataclasses.fields(Device)]
    parts = json.loads(key) if key.startswith("[") else []
    device, rest = parts[: len(kinds)], parts[len(kinds) :]
    fits = len(rest) > 1 and isinstance(rest[0], list)
    if not fits or any(type(part) is not kind for part, kind in zip(device, kinds, strict=True)):
        raise ValueError(f"the entry {key[:200]!r} does not name a device and a layer")


def _check_times(key: str, times: Any) -> None:
    known = {DENSE, TWO, *NAMES, *POOLS}
    if not isinstance(times, dict) or not times:
        raise ValueError(f"the entry {key[:200]!r} is no object of seconds by algorithm")
    for name, seconds in times.items():
        if name not in known:
            raise ValueError(f"the algorithm {name[:50]!r} of {key[:200]!r} is not known")
        number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        if not number or not math.isfinite(seconds) or seconds <= 0:
            raise ValueError(
                f"{name!r} of {key[:200]!r} is {str(seconds)[:50]}, no positive number of seconds"
            )
