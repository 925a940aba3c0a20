"""The JSON file of what `fast` found: how the network runs, where that was measured, the times."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_jax.factorization.forms import SCHEMES
from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.io.atomic import whole_file
from lowrank_jax.io.missing import check_exists
from lowrank_jax.tuning.algorithms import NAMES, Layer
from lowrank_jax.tuning.candidate import Candidate, Choices, Configuration
from lowrank_jax.tuning.device import Device
from lowrank_jax.tuning.experimental.pools import POOLS, Pool

VERSION = 1


def write_result(path: str | os.PathLike, facts: Mapping[str, Any]) -> None:
    """Writes the attributes of a `Fast`, but its function; the file appears whole or not at all."""
    candidate: Candidate = facts["candidate"]
    record = {
        "version": VERSION,
        "device": dataclasses.asdict(facts["device"]),
        "options": dict(candidate.configuration.options),
        "size": candidate.configuration.size,
        "frozen": facts["frozen"],
        "algorithms": [
            {"layer": dataclasses.asdict(layer), "scheme": _as_dict(scheme), "name": name}
            for (layer, scheme), name in candidate.choices.algorithms.items()
        ],
        "pools": [
            {"pool": dataclasses.asdict(pool), "name": name}
            for pool, name in candidate.choices.pools.items()
        ],
        "seconds": dict(facts["seconds"]),
        "left_out": dict(facts["left_out"]),
    }
    text = json.dumps(record, indent=1, allow_nan=False)
    with whole_file(path) as scratch:
        scratch.write_text(text + "\n")


def read_result(path: str | os.PathLike) -> dict[str, Any]:
    """Reads the attributes of a `Fast`, but its function.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: the file holds something else.
    """
    check_exists(path, "give what Fast.save wrote")
    try:
        return _facts(json.loads(Path(path).read_text()))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no result of fast: {error!r:.300}. Give another file, or save it anew."
        ) from error


def _facts(record: dict[str, Any]) -> dict[str, Any]:
    if record["version"] != VERSION:
        raise ValueError(f"its version is not {VERSION}, which this release reads")
    algorithms = {
        (Layer(**_tuples(entry["layer"])), _scheme(entry["scheme"])): _known(entry["name"], NAMES)
        for entry in record["algorithms"]
    }
    pools = {
        Pool(**_tuples(entry["pool"])): _known(entry["name"], POOLS) for entry in record["pools"]
    }
    configuration = Configuration(dict(record["options"]), _size(record["size"]))
    return {
        "candidate": Candidate(configuration, Choices(algorithms, pools)),
        "device": Device(**record["device"]),
        "seconds": {name: _seconds(value) for name, value in record["seconds"].items()},
        "left_out": dict(record["left_out"]),
        "frozen": record["frozen"] is True,
    }


def _as_dict(scheme: Scheme | None) -> dict[str, Any] | None:
    return None if scheme is None else dataclasses.asdict(scheme)


def _scheme(entry: dict[str, Any] | None) -> Scheme | None:
    return None if entry is None else SCHEMES[entry["first"]](**entry)


def _size(size: Any) -> int | None:
    if size is None or (type(size) is int and size > 0):
        return size
    raise ValueError(f"the size of slices {size!r} is no positive int")


def _seconds(value: Any) -> float:
    if type(value) is float and math.isfinite(value) and value > 0:
        return value
    raise ValueError(f"{value!r} is no positive number of seconds")


def _known(name: str, names: Sequence[str]) -> str:
    if name in names:
        return name
    raise ValueError(f"the algorithm {name!r} is not known")


def _tuples(value: Any) -> Any:
    """Lists of JSON as tuples, which are hashable."""
    if isinstance(value, dict):
        return {name: _tuples(entry) for name, entry in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
