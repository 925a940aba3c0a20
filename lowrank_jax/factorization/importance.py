"""How much errors of a layer's outputs count: F, and outputs turned so that all errors count alike.

An error e of the outputs costs e^T F e. With F = L L^T that is the square of e L. So factors that
are fitted to the outputs times L, in place of the outputs, cost the least. Blocks of neighbouring
channels stand for F, so that it stays small where a layer is wide.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lowrank_jax.factorization.layout import Array

BLOCK = 512  # channels of a block, at most
SHARE = 0.9  # of F, at most; the rest is its diagonal, which is known best
FEW = 7  # inputs; from so many, half of what is beside the diagonal counts
UNIMPORTANT = 1e-12  # of the largest entry; channels below count as this


def block_size(outputs: int) -> int:
    """The size of the blocks of so many outputs: the largest divisor that is allowed.

    Example:
        >>> block_size(64), block_size(3072)
        (64, 512)
    """
    return next(size for size in range(min(outputs, BLOCK), 0, -1) if outputs % size == 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Importance:
    """F of a layer.

    Attributes:
        roots: L of each block of its outputs, in float32, as a device has them.
    """

    roots: Float[np.ndarray, "k b b"]

    @classmethod
    def of(cls, curvature: Float[np.ndarray, "k b b"], inputs: float = math.inf) -> "Importance":
        """The importance for the blocks of F, which may be zero, and is known from some inputs."""
        own = np.asarray(curvature, np.float64)
        diagonal = np.diagonal(own, axis1=1, axis2=2)
        largest = diagonal.max(initial=0)
        if not largest > 0:
            return cls.even(diagonal.size)
        kept = np.maximum(diagonal, UNIMPORTANT * largest)
        eye = np.eye(own.shape[1])
        share = min(SHARE, 1 - FEW / (inputs + FEW))
        definite = share * own + (kept - share * diagonal)[:, :, None] * eye
        return cls(_root(definite))

    @classmethod
    def even(cls, outputs: int) -> "Importance":
        """All outputs count alike."""
        return cls(np.ones((outputs, 1, 1), np.float32))

    @property
    def outputs(self) -> int:
        """How many outputs there are."""
        return self.roots.shape[0] * self.roots.shape[1]

    @property
    def diagonal(self) -> Float[np.ndarray, "n"]:
        """The diagonal of F: what an error of each output costs, alone."""
        return np.sum(self.roots.astype(np.float64) ** 2, axis=2).ravel()

    def within(self, groups: int) -> "Importance":
        """The same with blocks that lie within one group of the outputs each."""
        size = self.roots.shape[1]
        new = math.gcd(self.outputs // groups, size)
        if new == size:
            return self
        roots = self.roots.astype(np.float64)
        whole = roots @ roots.mT
        parts = [whole[:, i : i + new, i : i + new] for i in range(0, size, new)]
        return Importance(_root(np.stack(parts, 1).reshape(-1, new, new)))

    def of_groups(self, groups: int) -> "list[Importance]":
        """The importance of the outputs of each group."""
        return [Importance(part) for part in np.split(self.within(groups).roots, groups)]

    def weighted(self, values: Float[np.ndarray, "... n"]) -> Float[np.ndarray, "... n"]:
        """Values whose last axis are the outputs, times L."""
        return times(values, self.roots.astype(np.float64))

    def restored(self, values: Float[np.ndarray, "... n"]) -> Float[np.ndarray, "... n"]:
        """What `weighted` had."""
        return times(values, np.linalg.inv(self.roots.astype(np.float64)))


def _root(definite: Float[np.ndarray, "k b b"]) -> Float[np.ndarray, "k b b"]:
    """L, in float32."""
    return np.linalg.cholesky(definite).astype(np.float32)


def times(
    values: Float[Array, "... n"], blocks: Float[jax.Array | np.ndarray, "k b b"]
) -> Float[Array, "... n"]:
    """Values times the blocks of a matrix, along the last axis.

    Example:
        >>> times(np.ones((3, 4)), 2 * np.ones((2, 2, 2))).tolist()[0]
        [4.0, 4.0, 4.0, 4.0]
    """
    count, size, _ = blocks.shape
    if size == 1:
        return values * blocks.reshape(-1)
    matmul: Any = np.matmul if isinstance(values, np.ndarray) else _precise
    if count == 1:  # a plain product runs twice as fast on the CPU as a batch of one
        return matmul(values, blocks[0])
    spread = values.reshape(-1, count, size).swapaxes(0, 1)
    return matmul(spread, blocks).swapaxes(0, 1).reshape(values.shape)


_precise = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
