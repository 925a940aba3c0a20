"""Which images of a data set are read, and what was read."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Examples:
    """Images as they are stored.

    Attributes:
        images: (batch, ..., channels).
        labels: those that came with them, or None.
        rows: the number of each in the whole data set.
        total: how many the whole data set has; of batches, how many were read.
    """

    images: np.ndarray
    labels: np.ndarray | None
    rows: np.ndarray
    total: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """Which images are read.

    Attributes:
        count: how many at most; None for all.
        seed: of the choice.
        size: (height, width) to which pictures are scaled and cropped; None as they are.
        data_dir: folder of prepared data sets; None for the usual one.
    """

    count: int | None = None
    seed: int = 0
    size: tuple[int, int] | None = None
    data_dir: str | None = None

    def rows(self, total: int) -> np.ndarray:
        """The numbers of the images among so many, in ascending order.

        Example:
            >>> Choice(count=3).rows(10).tolist(), Choice(count=3).rows(2).tolist()
            ([5, 6, 9], [0, 1])
        """
        if self.count is None or self.count >= total:
            return np.arange(total)
        rng = np.random.default_rng(self.seed)
        return np.sort(rng.choice(total, self.count, replace=False))

    def of_arrays(self, images: np.ndarray, labels: np.ndarray | None) -> Examples:
        """The images chosen from arrays of all."""
        rows = self.rows(len(images))
        own = None if labels is None else labels[rows]
        return Examples(images=images[rows], labels=own, rows=rows, total=len(images))

    def refuse_size(self, path: str) -> None:
        """Raises where a size is given for images that have one shape."""
        if self.size is not None:
            raise ValueError(
                f"--size is for pictures, and {path} holds arrays of one shape; leave it out."
            )
