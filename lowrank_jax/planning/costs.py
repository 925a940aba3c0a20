"""What one layer costs and loses at a rank."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.planning.budget import check_measure
from lowrank_jax.planning.spectra import Spectra
from lowrank_jax.program.kernel_use import KernelUse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """What one layer may become.

    Attributes:
        scheme: the decomposition; None if the layer stays dense.
        parameters: of the kernel or of both factors, of all kernels of a stack.
        macs, bytes: of all calls of the layer in one run of the program.
        error: share of the squared singular values that is left out.
        weight: how much the error counts in a sum over the layers; a calibration tells it.
        spectral: the largest singular value left out, over the largest, of the worst group or
            slice.
        latency: measured time in seconds; NaN if it is not known.

    Example:
        >>> Candidate(scheme=None, parameters=9, macs=90, bytes=900).cost("macs")
        90
    """

    scheme: Scheme | None
    parameters: int
    macs: int
    bytes: int
    error: float = 0.0
    weight: float = 1.0
    spectral: float = 0.0
    latency: float = math.nan

    def cost(self, measure: str) -> float:
        """The cost by one of `lowrank_jax.planning.budget.MEASURES`."""
        return getattr(self, check_measure(measure))

    @property
    def loss(self) -> float:
        """What a sum over the layers adds up."""
        return self.weight * self.error


def at_ranks(
    calls: Sequence[KernelUse],
    spectra: Spectra,
    first: str,
    ranks: Iterable[int],
    weight: float = 1.0,
) -> list[Candidate]:
    """The candidates of some ranks of one layer; all costs are linear in the rank.

    Args:
        calls: all calls of the layer in the program.
        spectra: that hold the layer, with this order of the factors.
        first: name of the form.
        ranks: from 1 to that of the kernel.
        weight: of the layer's error in its loss.
    """
    kernel, path = calls[0], calls[0].path
    unit = kernel.scheme(1, first)
    parameters, macs = kernel.parameters_at(unit), sum(call.macs_at(unit) for call in calls)
    fixed, moved = np.sum([_bytes(call, unit) for call in calls], axis=0).tolist()
    error, spectral = spectra.left_out(path, first), spectra.largest_left_out(path, first)
    return [
        Candidate(
            scheme=kernel.scheme(rank, first),
            parameters=rank * parameters,
            macs=rank * macs,
            bytes=round(fixed + rank * moved),
            error=float(error[rank]),
            weight=weight,
            spectral=float(spectral[rank]),
        )
        for rank in ranks
    ]


def _bytes(call: KernelUse, unit: Scheme) -> tuple[float, float]:
    """Bytes that move at any rank, and those that each rank adds.

    A rank adds its parameters, and the array between the factors, which is written and read.
    """
    between = call.between(unit) * unit.groups
    kernel = math.prod(call.kernel_shape[-len(unit.axes) :])
    entries = math.prod(call.inputs) + kernel + math.prod(call.outputs)
    entry = call.bytes / entries  # of all the calls; the mean if the types of the arrays differ
    added = unit.parameters(call.kernel_shape) + 2 * between
    return call.bytes - entry * kernel, entry * added
