"""The times of all layers of a network: at a few ranks for a plan, and with given factors."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_jax.factorization.ranks import max_rank
from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.factorization.tucker import Tucker
from lowrank_jax.program.kernel_use import KernelUse, Trace
from lowrank_jax.tuning.algorithms import PLAIN, Layer
from lowrank_jax.tuning.products import Product
from lowrank_jax.tuning.timer import Timer
from lowrank_jax.tuning.timer_file import DENSE, TWO

# Of the rank at which the factors have as many weights as the kernel.
SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)


def layer_seconds(
    trace: Trace, timer: Timer, paths: Sequence[str] | None = None, multiple: int = 1
) -> dict[str, dict[Scheme | None, float]]:
    """Times of every layer, dense and at a few ranks in each form: the table for a latency plan.

    The time of a layer at a rank is the time of its fastest algorithm. A kernel that runs more than
    once counts each time.

    Args:
        trace: `lowrank_jax.trace` of the forward pass, at the batch size that is to be fast.
        timer: that measures.
        paths: the layers; without them all that the trace proves safe.
        multiple: ranks are restricted to multiples of this number.
    """
    found: dict[str, dict[Scheme | None, float]] = {}
    for path in trace.safe_paths() if paths is None else paths:
        rows = [_row(use, timer, _grid(use, multiple)) for use in trace.at(path)]
        if rows[0]:
            times = list(zip(rows, trace.at(path), strict=True))
            found[path] = {
                scheme: sum(use.uses * row[scheme] for row, use in times) for scheme in rows[0]
            }
    return found


def scheme_seconds(
    trace: Trace, timer: Timer, schemes: Mapping[str, Scheme | None]
) -> dict[str, tuple[float, float]]:
    """Times of layers, dense and with the factors of a table, each by its fastest algorithm.

    Args:
        trace: `lowrank_jax.trace` of the forward pass, at the batch size that is of interest.
        timer: that measures.
        schemes: layer path to its decomposition; None where it stays dense.
    """
    found = {}
    for path, scheme in schemes.items():
        uses = trace.at(path)
        pairs = [(use.uses, *_use_seconds(use, timer, scheme)) for use in uses]
        found[path] = sum(n * x for n, x, _ in pairs), sum(n * x for n, _, x in pairs)
    return found


def _use_seconds(use: KernelUse, timer: Timer, scheme: Scheme | None) -> tuple[float, float]:
    if use.kind == "product":
        times = timer.measure_product(Product.of(use), scheme or use.scheme(1))
        return times[DENSE], times[TWO if scheme else DENSE]
    layer = Layer.of(use)
    dense = timer.measure(layer, None)[DENSE]
    if scheme is None:
        return dense, dense
    if isinstance(scheme, Tucker):
        return dense, _tucker_seconds(layer, timer, scheme)
    return timer.measure(layer, scheme)[DENSE], _pair_seconds(layer, timer, scheme)


def _pair_seconds(layer: Layer, timer: Timer, scheme: Scheme) -> float:
    return timer.measure(layer, scheme)[timer.fastest(layer, scheme)]


def _tucker_seconds(layer: Layer, timer: Timer, scheme: Tucker) -> float:
    """The first 1 x 1 convolution, and the other two as the two factors of a layer of their own."""
    channels, ones = scheme.groups * scheme.rank, (1,) * len(layer.size)
    still: dict[str, Any] = dict(size=ones, strides=ones, dilation=ones, input_dilation=ones)
    padding = ((0, 0),) * len(ones)
    first = dataclasses.replace(layer, features=channels, padding=padding, **still)
    others = dataclasses.replace(layer, inputs=(*layer.inputs[:-1], channels))
    return timer.measure(first, None)[DENSE] + _pair_seconds(others, timer, scheme.core)


def _row(use: KernelUse, timer: Timer, schemes: list[Scheme]) -> dict[Scheme | None, float]:
    """Times of one layer, dense and by schemes."""
    if use.kind == "product":
        return _row_of_product(Product.of(use), timer, schemes)
    return _row_of_convolution(Layer.of(use), timer, schemes)


def _row_of_product(
    product: Product, timer: Timer, schemes: list[Scheme]
) -> dict[Scheme | None, float]:
    row: dict[Scheme | None, float] = {}
    for scheme in schemes:
        times = timer.measure_product(product, scheme)
        row[scheme] = times[TWO]
        row[None] = min(row.get(None, times[DENSE]), times[DENSE])
    return row


def _row_of_convolution(
    layer: Layer, timer: Timer, schemes: list[Scheme]
) -> dict[Scheme | None, float]:
    """The middle rank of a form tells the algorithm."""
    row: dict[Scheme | None, float] = {}
    for first in dict.fromkeys(scheme.first for scheme in schemes):
        own = [scheme for scheme in schemes if scheme.first == first]
        best = timer.fastest(layer, own[len(own) // 2])
        for scheme in own:
            times = timer.measure(layer, scheme, list(dict.fromkeys([PLAIN, best])))
            row[scheme] = min(seconds for name, seconds in times.items() if name != DENSE)
            row[None] = min(row.get(None, times[DENSE]), times[DENSE])
    return row


def _grid(use: KernelUse, multiple: int) -> list[Scheme]:
    """Schemes of a few ranks, in each form."""
    found = []
    for first in use.forms:
        unit = use.scheme(1, first)
        even = use.parameters // use.parameters_at(unit)
        limit = min(even, max_rank(use.kernel_shape, unit.groups, use.axes, first))
        ranks = {multiple * round(share * even / multiple) for share in SHARES}
        found += [use.scheme(rank, first) for rank in sorted(ranks) if 1 <= rank <= limit]
    return found
