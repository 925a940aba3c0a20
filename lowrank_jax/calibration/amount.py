"""How many images a calibration needs: samples against the inputs of the widest layer.

A layer with D inputs has a covariance of D x D entries. Its relative error from M independent
samples is about the root of D / M (Vershynin, 2018, High-Dimensional Probability, theorem 4.7.1).
Neighbouring positions of an image tell nearly the same, so that at most `POSITIONS` of each count.
"""

import dataclasses
import logging
import math

from lowrank_jax.calibration.sums import POSITIONS
from lowrank_jax.program.kernel_use import Trace

LOG = logging.getLogger("lowrank_jax")

ENOUGH = 10  # samples for each input, from which the error is below a third


@dataclasses.dataclass(frozen=True, kw_only=True)
class Amount:
    """What so many images tell of the widest layer.

    Attributes:
        images: how many there are.
        samples: positions of the layer in all of them.
        inputs: entries of a patch that the layer reads.
        path: of the layer.

    Example:
        >>> Amount(images=20, samples=320, inputs=64, path="head").wanted
        40
    """

    images: int
    samples: int
    inputs: int
    path: str

    @classmethod
    def of(cls, trace: Trace, images: int) -> "Amount | None":
        """The amount for the widest of the layers that can be decomposed; None without any.

        Args:
            trace: of one image.
            images: how many there are.
        """
        uses = [use for path in trace.safe_paths() for use in trace.at(path)[:1]]
        if not uses:
            return None
        sizes = {use: math.prod(use.sizes.values()) // use.width for use in uses}
        widest = max(uses, key=lambda use: sizes[use])
        samples = images * widest.uses * min(widest.positions, POSITIONS)
        return cls(images=images, samples=samples, inputs=sizes[widest], path=widest.path)

    @property
    def wanted(self) -> int:
        """How many images give `ENOUGH` samples for each input."""
        return math.ceil(ENOUGH * self.inputs * self.images / self.samples)

    @property
    def enough(self) -> bool:
        """Whether there are as many images as `wanted` says."""
        return self.images >= self.wanted

    def __str__(self) -> str:
        advice = "enough" if self.enough else f"{self.wanted:,} images or more are recommended"
        return (
            f"{self.images:,} images give {self.samples:,} samples for the {self.inputs:,} inputs "
            f"of the widest layer, {self.path}: {self.samples / self.inputs:.2g} for each"
            f"{', which is ' if self.enough else '; '}{advice}."
        )


def tell_amount(trace: Trace, images: int) -> None:
    """Logs whether the images are enough; a warning where they are not.

    Args:
        trace: of one image.
        images: how many there are.
    """
    if amount := Amount.of(trace, images):
        LOG.log(logging.INFO if amount.enough else logging.WARNING, "%s", amount)
