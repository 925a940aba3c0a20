"""The scheme of Tai et al.: a vertical and a horizontal convolution in place of one."""

import dataclasses

from lowrank_jax.factorization.forms import Form
from lowrank_jax.factorization.scheme import Scheme

FORMS = {
    "vertical": Form(keys=("vertical", "horizontal"), split=lambda axes: (axes[:1], axes[1:])),
    "horizontal": Form(
        keys=("horizontal_first", "vertical_second"), split=lambda axes: (axes[1:], axes[:1])
    ),
}


@dataclasses.dataclass(frozen=True)
class Separable(Scheme, forms=FORMS):
    """A vertical (h x 1) and a horizontal (1 x w) kernel in place of an (h x w) one.

    The factors are the closed-form optimum of Tai et al., 2016 (arXiv 1511.06067): with the
    singular value decomposition M = U S Q^T of the kernel's matrix, V = U_K S_K^1/2 and H = S_K^1/2
    Q_K^T. No other pair of that rank has a smaller Frobenius error.

    In one dimension the vertical kernel has all the taps and the horizontal one is pointwise; in
    three the vertical one has the first axis and the horizontal one the other two.

    Attributes:
        rank: number K of channels between the two convolutions, per group.
        groups: ``feature_group_count`` of the dense convolution; a parameter tree does not tell it.
        axes: the kernel's layout, one letter an axis; I and O are the channels, the others are
            spatial.
        first: "vertical", or "horizontal" where the horizontal convolution is to come first.

    Example:
        >>> import jax
        >>> kernel = jax.random.normal(jax.random.key(0), (5, 5, 3, 192))
        >>> vertical, horizontal = Separable(rank=10).factor(kernel)
        >>> vertical.shape, horizontal.shape
        ((5, 1, 3, 10), (1, 5, 10, 192))
    """

    first: str = "vertical"
