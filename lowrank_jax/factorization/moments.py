"""Second moments of what one kernel sees: patches x, and the outputs y that it is to give."""

import dataclasses

import numpy as np
from jaxtyping import Float64


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Sums over patches and outputs, for each group of the channels.

    A patch is flat. Its order is that in which the kernel stores its axes, without the outputs: for
    HWIO the taps, then the channels. Moments of disjoint sets of images add up to the moments of
    both.

    Attributes:
        count: number of patches.
        x: sum of the patches.
        y: sum of the outputs.
        xx: sum of the products of a patch with itself.
        xy: sum of the products of a patch with its outputs.
        yy: sum of the squares of the outputs.

    Example:
        >>> x, y = np.ones((1, 2)), np.ones((1, 3))
        >>> one = Moments(4, x, y, np.ones((1, 2, 2)), np.ones((1, 2, 3)), y)
        >>> (one + one).count, one.covariance.shape, one.cross.shape, one.variance.shape
        (8, (1, 2, 2), (1, 2, 3), (1, 3))
    """

    count: int
    x: Float64[np.ndarray, "g p"]
    y: Float64[np.ndarray, "g m"]
    xx: Float64[np.ndarray, "g p p"]
    xy: Float64[np.ndarray, "g p m"]
    yy: Float64[np.ndarray, "g m"]

    def __add__(self, other: "Moments") -> "Moments":
        fields = [field.name for field in dataclasses.fields(self)]
        return Moments(*(getattr(self, name) + getattr(other, name) for name in fields))

    def about_zero(self) -> "Moments":
        """The same where nothing takes up the means: variances and covariances are about zero."""
        return dataclasses.replace(self, x=np.zeros_like(self.x), y=np.zeros_like(self.y))

    @property
    def mean_x(self) -> Float64[np.ndarray, "g p"]:
        """Mean patch."""
        return self.x / self.count

    @property
    def mean_y(self) -> Float64[np.ndarray, "g m"]:
        """Mean of the outputs."""
        return self.y / self.count

    @property
    def covariance(self) -> Float64[np.ndarray, "g p p"]:
        """Covariance of the patches."""
        found = self.xx / self.count
        found -= self.mean_x[:, :, None] * self.mean_x[:, None, :]
        return found

    @property
    def cross(self) -> Float64[np.ndarray, "g p m"]:
        """Covariance of patches and outputs."""
        return self.xy / self.count - self.mean_x[:, :, None] * self.mean_y[:, None, :]

    @property
    def variance(self) -> Float64[np.ndarray, "g m"]:
        """Variance of each output; rounding makes it no less than zero."""
        return np.maximum(self.yy / self.count - self.mean_y**2, 0)

    @property
    def total_variance(self) -> Float64[np.ndarray, "g"]:
        """Variance of the outputs of each group, summed over them."""
        return self.variance.sum(-1)
