"""How well a compressed network does beside the dense one, in figures and in words."""

import dataclasses

from lowrank_jax.report.record import Highlight, Json
from lowrank_jax.report.tables import percent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """On which images networks are compared.

    Attributes:
        count: how many there are.
        held_out: whether no factor was fitted to them.
        labelled: whether their classes are known.
    """

    count: int
    held_out: bool
    labelled: bool

    def __str__(self) -> str:
        if self.held_out:
            return f"{self.count:,} images that nothing was fitted to"
        return f"the {self.count:,} images given, to which the factors were fitted"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """A compressed network beside the dense one.

    Attributes:
        images: on which both ran.
        error: norm of the change of the outputs over the norm of the dense network's outputs.
        dense, small: share of the images that each classifies as wanted: as labelled, or without
            labels as the dense network does; None where the outputs are no classes.

    Example:
        >>> images = Images(count=64, held_out=True, labelled=True)
        >>> print(Score(images=images, error=0.1, dense=0.92, small=0.9))
        Accuracy: 90.0 %, of the dense network 92.0 %, on 64 images that nothing was fitted to.
    """

    images: Images
    error: float
    dense: float | None = None
    small: float | None = None

    def __str__(self) -> str:
        where = f"on {self.images}."
        if self.small is None or self.dense is None:
            return f"The outputs differ by {percent(self.error)} of their size, {where}"
        if self.images.labelled:
            both = f"{percent(self.small)}, of the dense network {percent(self.dense)}"
            return f"Accuracy: {both}, {where}"
        return f"{percent(self.small)} have the class that the dense network gives, {where}"

    def highlight(self) -> Highlight:
        """The same as a large figure."""
        if self.small is None or self.dense is None:
            return Highlight(label="change of the outputs", value=percent(self.error))
        if self.images.labelled:
            return Highlight(
                label="accuracy", value=percent(self.small), note=f"dense {percent(self.dense)}"
            )
        return Highlight(label="same class as dense", value=percent(self.small))

    def facts(self) -> dict[str, Json]:
        """The same as plain data."""
        images = dataclasses.asdict(self.images)
        own: dict[str, Json] = {"output_error": self.error, "scored_images": images}
        if self.small is None:
            return own
        if self.images.labelled:
            return {**own, "accuracy": {"dense": self.dense, "low-rank": self.small}}
        return {**own, "agreement": self.small}
