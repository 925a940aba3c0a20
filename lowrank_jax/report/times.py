"""Measured times of a network and of its layers, in figures and in words."""

import dataclasses
from collections.abc import Mapping

from lowrank_jax.report.record import Highlight, Json
from lowrank_jax.report.tables import Pair
from lowrank_jax.tuning.timing import Throughput


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """What was measured on this device.

    Attributes:
        network: forward passes "dense" and "low-rank", in turn.
        layers: layer path to its seconds, dense and low-rank, each at its fastest algorithm.
    """

    network: Throughput
    layers: Mapping[str, Pair] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        low, median, high = self.network.ratio("low-rank", "dense")
        passes = len(self.network.seconds["dense"])
        return (
            f"The low-rank network gives {median:.2f} times the images/s of the dense one "
            f"(quartiles {low:.2f} to {high:.2f}), with {self.network.items} images at once, in "
            f"{passes} passes of each in turn."
        )

    def highlight(self) -> Highlight:
        """The same as a large figure."""
        return speed_highlight(self.network, "low-rank", "dense")

    def facts(self) -> dict[str, Json]:
        """The same as plain data."""
        return time_facts(self.network, "low-rank", "dense")


def speed_highlight(times: Throughput, low: str, dense: str) -> Highlight:
    """How many times as fast one program is as another, as a large figure."""
    (_, median, _), (_, rate, _) = times.ratio(low, dense), times.rate(low)
    value, note = f"{median:.2f}\N{MULTIPLICATION SIGN}", f"{rate:,.0f} images/s"
    return Highlight(label="speed", value=value, note=note)


def time_facts(times: Throughput, low: str, dense: str) -> dict[str, Json]:
    """The rates of all programs, and how many times as fast one is as another, as plain data."""
    return {
        "batch_size": times.items,
        "images_per_second": {name: _quartiles(times.rate(name)) for name in times.seconds},
        "speed_up": _quartiles(times.ratio(low, dense)),
    }


def _quartiles(values: tuple[float, float, float]) -> dict[str, Json]:
    return dict(zip(("low", "median", "high"), values, strict=True))
