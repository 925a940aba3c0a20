"""The scheme of a matrix product: two thin matrices in place of one."""

import dataclasses

from lowrank_jax.factorization.forms import Form
from lowrank_jax.factorization.scheme import Scheme

KEYS = ("left_factor", "right_factor")
FORMS = {
    "left": Form(keys=KEYS, split=lambda axes: ("", ""), spatial=False),
    "heads": Form(keys=KEYS, split=lambda axes: ("", ""), spatial=False),
}


@dataclasses.dataclass(frozen=True)
class Matrix(Scheme, forms=FORMS):
    """Matrices (in, K) and (K, out) in place of one (in, out): the truncated SVD.

    No other pair of that rank has a smaller Frobenius error (Eckart and Young, 1936). With groups
    each block of the outputs, such as a head of attention, has factors of its own. These are
    (in, groups * K) and (K, out), of which each block reads its own K channels.

    Attributes:
        rank: number K of channels between the two products, per group.
        groups: number of blocks of the outputs; it divides the first axis of the outputs.
        axes: the kernel's layout, one letter an axis: "IO" of a dense layer, "OI" of PyTorch's. I,
            J, K, L are inputs and O, P, Q, R outputs: attention stores its queries as "IPO", its
            output projection as "JIO".
        first: "left"; "heads" is the same form for factors of many groups.

    Example:
        >>> import jax
        >>> kernel = jax.random.normal(jax.random.key(0), (384, 6, 64))
        >>> [factor.shape for factor in Matrix(rank=96, axes="IPO").factor(kernel)]
        [(384, 1, 96), (96, 6, 64)]
        >>> [factor.shape for factor in Matrix(rank=27, groups=6, axes="IPO").factor(kernel)]
        [(384, 1, 162), (27, 6, 64)]
    """

    axes: str = "IO"
    first: str = "left"
