"""One matrix product as numbers, dense and with two factors, for the timer."""

import dataclasses

import jax
import jax.numpy as jnp

from lowrank_jax.factorization.axes import kernel_size
from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.program.kernel_use import KernelUse
from lowrank_jax.tuning.timer_file import DENSE, TWO


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of rows with a matrix, by which its measured times are found again.

    Attributes:
        rows, inputs, outputs: of the product.
        dtype: name of the type of the computation.
    """

    rows: int
    inputs: int
    outputs: int
    dtype: str

    @classmethod
    def of(cls, use: KernelUse) -> "Product":
        """The product of a traced program; of a stack of matrices, one slice."""
        inputs = kernel_size(use.axes, use.kernel_shape) // use.width
        return cls(use.positions, inputs, use.width, use.dtype)

    def runs(self, scheme: Scheme) -> dict[str, tuple]:
        """The dense product and the two of a scheme: functions with their arguments."""
        groups, rank = scheme.groups, scheme.rank
        x, dense, left, right = (
            jnp.full(shape, 0.5, self.dtype)
            for shape in (
                (self.rows, self.inputs),
                (self.inputs, self.outputs),
                (self.inputs, groups, rank),
                (rank, groups, self.outputs // groups),
            )
        )
        return {DENSE: (jnp.matmul, x, dense), TWO: (_both, x, left, right)}


def _both(x: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    between = jnp.einsum("ni,igk->ngk", x, left)
    return jnp.einsum("ngk,kgo->ngo", between, right)
