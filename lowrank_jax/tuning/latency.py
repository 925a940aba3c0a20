"""The times of all layers of a network, dense and at a few ranks, for a plan with a latency."""

from collections.abc import Sequence

from lowrank_jax.factorization.separable import FACTORS, Separable, max_rank
from lowrank_jax.program.kernel_use import KernelUse, Trace
from lowrank_jax.tuning.algorithms import PLAIN, Layer
from lowrank_jax.tuning.timer import Timer
from lowrank_jax.tuning.timer_file import DENSE

# Of the rank at which the factors have as many weights as the kernel.
SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)


def layer_seconds(
    trace: Trace, timer: Timer, paths: Sequence[str] | None = None, multiple: int = 1
) -> dict[str, dict[Separable | None, float]]:
    """Times of every layer, dense and at a few ranks in both orders: the table for a latency plan.

    The time of a layer at a rank is the time of its fastest algorithm. A kernel that runs more than
    once counts each time.

    Args:
        trace: `lowrank_jax.trace` of the forward pass, at the batch size that is to be fast.
        timer: that measures.
        paths: the layers; without them all that the trace proves safe.
        multiple: ranks are restricted to multiples of it.
    """
    found: dict[str, dict[Separable | None, float]] = {}
    for path in trace.safe_paths() if paths is None else paths:
        rows = [_row(Layer.of(use), timer, _grid(use, multiple)) for use in trace.at(path)]
        if rows[0]:
            times = list(zip(rows, trace.at(path), strict=True))
            found[path] = {
                scheme: sum(use.uses * row[scheme] for row, use in times) for scheme in rows[0]
            }
    return found


def _row(layer: Layer, timer: Timer, schemes: list[Separable]) -> dict[Separable | None, float]:
    """Times of one layer, dense and by schemes; the middle rank of an order tells the algorithm."""
    row: dict[Separable | None, float] = {}
    for first in dict.fromkeys(scheme.first for scheme in schemes):
        own = [scheme for scheme in schemes if scheme.first == first]
        best = timer.fastest(layer, own[len(own) // 2])
        for scheme in own:
            times = timer.measure(layer, scheme, list(dict.fromkeys([PLAIN, best])))
            row[scheme] = min(seconds for name, seconds in times.items() if name != DENSE)
            row[None] = min(row.get(None, times[DENSE]), times[DENSE])
    return row


def _grid(use: KernelUse, multiple: int) -> list[Separable]:
    """Schemes of a few ranks, in each order that differs."""
    sizes = zip(use.axes, use.kernel_shape[-len(use.axes) :], strict=True)
    size = max(size for letter, size in sizes if letter not in "IO")
    found = []
    for first in FACTORS if size > 1 else ["vertical"]:
        even = use.parameters // use.parameters_at(use.scheme(1, first))
        limit = min(even, max_rank(use.kernel_shape, use.groups, use.axes, first))
        ranks = {multiple * round(share * even / multiple) for share in SHARES}
        found += [use.scheme(rank, first) for rank in sorted(ranks) if 1 <= rank <= limit]
    return found
