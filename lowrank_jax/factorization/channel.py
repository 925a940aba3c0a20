"""The scheme of Zhang et al.: a convolution to few channels, and one of a single tap."""

import dataclasses

from lowrank_jax.factorization.forms import Form
from lowrank_jax.factorization.scheme import Scheme

FORMS = {
    "spatial": Form(keys=("spatial_first", "pointwise_second"), split=lambda axes: (axes, "")),
    "pointwise": Form(keys=("pointwise_first", "spatial_second"), split=lambda axes: ("", axes)),
}


@dataclasses.dataclass(frozen=True)
class Channel(Scheme, forms=FORMS):
    """An (h x w) kernel to K channels and a (1 x 1) one from there, or the other way round.

    The factors are the truncated singular value decomposition of the kernel as a matrix: with the
    spatial one first (h * w * in, out), as in Zhang et al., 2015 (arXiv 1505.06798); with the
    pointwise one first (in, h * w * out). No other pair of that rank has a smaller Frobenius error.

    Attributes:
        rank: number K of channels between the two convolutions, per group.
        groups: ``feature_group_count`` of the dense convolution.
        axes: the kernel's layout, one letter an axis; I and O are the channels, the others are
            spatial.
        first: "spatial", or "pointwise" where the pointwise convolution is to come first.

    Example:
        >>> import jax
        >>> kernel = jax.random.normal(jax.random.key(0), (3, 3, 64, 128))
        >>> spatial, pointwise = Channel(rank=40).factor(kernel)
        >>> spatial.shape, pointwise.shape
        ((3, 3, 64, 40), (1, 1, 40, 128))
    """

    first: str = "spatial"
