"""What one layer costs and loses at a rank."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float64

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
        spectra: singular values of layers, this layer in this form among them.
        first: name of the form.
        ranks: each from 1 to the kernel's largest rank.
        weight: of the layer's error in its loss.
    """
    kernel, path = calls[0], calls[0].path
    one, two = (costs_of(calls, kernel.scheme(rank, first)) for rank in (1, 2))
    error, spectral = spectra.left_out(path, first), spectra.largest_left_out(path, first)
    return [
        candidate_of(
            kernel.scheme(rank, first),
            one + (rank - 1) * (two - one),
            error=float(error[rank]),
            spectral=float(spectral[rank]),
            weight=weight,
        )
        for rank in ranks
    ]


def costs_of(calls: Sequence[KernelUse], scheme: Scheme) -> Float64[np.ndarray, "3"]:
    """Parameters, macs and bytes of one layer by a scheme, over all calls."""
    macs = sum(call.macs_at(scheme) for call in calls)
    moved = sum(call.bytes_at(scheme) for call in calls)
    return np.array([calls[0].parameters_at(scheme), macs, moved], np.float64)


def candidate_of(
    scheme: Scheme, costs: Float64[np.ndarray, "3"], error: float, spectral: float, weight: float
) -> Candidate:
    """The candidate of a scheme with these costs, as `costs_of` gives them."""
    parameters, macs, moved = (round(cost) for cost in costs.tolist())
    return Candidate(
        scheme=scheme,
        parameters=parameters,
        macs=macs,
        bytes=moved,
        error=error,
        weight=weight,
        spectral=spectral,
    )
