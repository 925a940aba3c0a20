"""Candidates narrowed to what was measured: times on a device, or divergences of the outputs."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.planning.candidates import Candidate, Candidates
from lowrank_jax.planning.spectra import known_use

Times = Mapping[str, Mapping[Scheme | None, float]]
Divergences = Mapping[str, Mapping[tuple[str, int], float]]


def timed(candidates: Candidates, times: Times) -> Candidates:
    """The candidates that were measured faster than dense, with their times.

    A plan chosen from them is never slower than dense, whatever its budget.

    Args:
        candidates: of every layer.
        times: path, then scheme, to the time of the layer in seconds; None stands for the dense
            layer. A layer that is not in the table stays dense.

    Raises:
        ValueError: a path is unknown, a time is no finite number above 0, or the time of the dense
            layer is missing.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import lowrank_jax as lr
        >>> from lowrank_jax.planning.candidates import candidates
        >>> from lowrank_jax.planning.spectra import Spectra
        >>> from flax import linen as nn
        >>> model, images = nn.Sequential([nn.Conv(8, (3, 3))]), jnp.ones((1, 8, 8, 4))
        >>> program = lr.trace(model.apply, model.init(jax.random.key(0), images), images)
        >>> spectra = Spectra({"layers_0": {"vertical": list(range(12, 0, -1))}})
        >>> times = {"layers_0": {None: 1.0, lr.Separable(2): 0.5, lr.Separable(4): 2.0}}
        >>> table = timed(candidates(program, spectra), times)
        >>> [(each.scheme and each.scheme.rank, each.latency) for each in table.layers["layers_0"]]
        [(None, 1.0), (2, 0.5)]
    """
    _check(candidates, times, "times", lambda key: key is None or isinstance(key, Scheme))
    for path, row in times.items():
        if None not in row or min(row.values()) <= 0:
            raise ValueError(
                f"times: {path}: give times above 0, with that of the dense layer under None."
            )

    def latency(path: str, scheme: Scheme | None) -> float:
        return times[path].get(scheme, math.inf) if path in times else 0.0

    def faster(path: str, layer: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
        found = [dataclasses.replace(c, latency=latency(path, c.scheme)) for c in layer]
        return (found[0], *(each for each in found[1:] if each.latency < found[0].latency))

    layers = {path: faster(path, layer) for path, layer in candidates.layers.items()}
    return dataclasses.replace(candidates, layers=layers)


def listed(candidates: Candidates, divergences: Divergences) -> Candidates:
    """Dense, and the candidates that a table of divergences lists by (first, rank).

    Raises:
        ValueError: a path is unknown, a divergence is no finite number, or nothing in the table is
            a candidate.
    """
    is_pair = lambda key: isinstance(key, tuple) and len(key) == 2  # noqa: E731
    _check(candidates, divergences, "divergences", is_pair)

    def kept(path: str, layer: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
        row = divergences.get(path, {})
        return (layer[0], *(c for c in layer[1:] if c.scheme and order_and_rank(c.scheme) in row))

    layers = {path: kept(path, layer) for path, layer in candidates.layers.items()}
    if all(len(layer) == 1 for layer in layers.values()):
        raise ValueError(
            "divergences: nothing in the table is a candidate; measure ranks that are in "
            "candidates.layers."
        )
    return dataclasses.replace(candidates, layers=layers)


def order_and_rank(scheme: Scheme) -> tuple[str, int]:
    """The key of a scheme in a table of divergences.

    Example:
        >>> from lowrank_jax import Separable
        >>> order_and_rank(Separable(4, first="horizontal"))
        ('horizontal', 4)
    """
    return scheme.name, scheme.rank


def _check(
    candidates: Candidates,
    table: Mapping[str, Mapping[Any, float]],
    name: str,
    is_key: Callable[[Any], bool],
) -> None:
    for path, row in table.items():
        known_use(candidates.trace, path)
        if path not in candidates.layers:
            raise ValueError(
                f"{name}: {path} has no spectrum; add one, or leave it out of the table."
            )
        for key, value in row.items():
            if not is_key(key) or not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise ValueError(
                    f"{name}: {path}: {key!r} has {value!r}; give a finite number for each scheme."
                )
