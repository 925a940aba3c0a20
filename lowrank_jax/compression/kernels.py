"""The factors of the layers that are being fitted, slice by slice of each stack.

While layers are fitted, a factor that is to be decomposed itself is held whole.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.calibration.network import Network
from lowrank_jax.factorization.factors import wide
from lowrank_jax.factorization.merging import multiplied
from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.program.kernel import Kernel
from lowrank_jax.program.provenance import Source

Slice = tuple[int, ...]
Parts = tuple[jax.Array, ...]  # the factors of one kernel, each by its scheme


class Factors:
    """Factors of the layers of a table, which a fit fills in.

    Args:
        network: the dense network.
        schemes: layer path to its scheme.
        kept: the layers that stay dense, whose first factor is the kernel, beside an identity.

    Attributes:
        stored: path to the dense kernel, or stack of kernels.
    """

    def __init__(
        self, network: Network, schemes: Mapping[str, Scheme], kept: Collection[str] = ()
    ) -> None:
        self.schemes, self.kept = schemes, kept
        leaves = network.named()
        self.stored = {path: np.asarray(leaves[path]) for path in schemes}
        self._pairs = {path: self._empty(path) for path in schemes}

    def _empty(self, path: str) -> tuple[np.ndarray, np.ndarray]:
        kernel, scheme = self.stored[path], self.schemes[path]
        stack = kernel.shape[: kernel.ndim - len(scheme.axes)]
        one, two = scheme.outer.shapes(kernel.shape)
        return np.zeros((*stack, *one), kernel.dtype), np.zeros((*stack, *two), kernel.dtype)

    def slices(self, path: str) -> Iterator[Slice]:
        """The index of every kernel of a stack; () where there is none."""
        kernel = self.stored[path]
        return np.ndindex(*kernel.shape[: kernel.ndim - len(self.schemes[path].axes)])

    def fill(self, path: str, index: Slice, first: np.ndarray, second: np.ndarray) -> None:
        """Sets the factors of one kernel."""
        for pair, new in zip(self._pairs[path], (first, second), strict=True):
            pair[index] = np.asarray(new).astype(pair.dtype)

    def fill_plain(self, missing: Iterable[tuple[str, Slice]]) -> None:
        """Sets the closed-form factors of some kernels."""
        for path, index in missing:
            kernel = jnp.asarray(self.stored[path][index])
            scheme = self.schemes[path]
            first, second = scheme.joined(scheme.factor(kernel))
            self.fill(path, index, np.asarray(first), np.asarray(second))

    def whole(self, path: str, new: Mapping[Slice, Parts] | None = None) -> Kernel:
        """The factors of a layer as a value of a program, with new ones of some of its kernels."""
        scheme = self.schemes[path]
        source = Source.of(path, self.stored[path].shape)
        one, two = self.arrays(path)
        for index, parts in (new or {}).items():
            first, second = self.joined(path, index, parts)
            one = one.at[index].set(first.astype(one.dtype))
            two = two.at[index].set(second.astype(two.dtype))
        return Kernel.factored(source, scheme.axes, scheme.first, (one, two))

    def parts(self, path: str, index: Slice) -> Parts:
        """What gradient steps change of one kernel, in float32 or wider: its factors, or itself."""
        one, two = (wide(jnp.asarray(pair[index])) for pair in self._pairs[path])
        return (one,) if path in self.kept else self.schemes[path].parted((one, two))

    def joined(self, path: str, index: Slice, parts: Parts) -> tuple[jax.Array, jax.Array]:
        """The two factors that some `parts` of a kernel make."""
        if path in self.kept:
            return parts[0], wide(jnp.asarray(self._pairs[path][1][index]))
        return self.schemes[path].joined(parts)

    def part(self, source: Source) -> Kernel:
        """The factors of the kernels of a stack that a program has at some place."""
        scheme, own = self.schemes[source.path], self.arrays(source.path)
        fixed = dict(source.gone)
        taken = tuple(fixed.get(axis, slice(None)) for axis in range(len(source.shape)))
        one, two = (x[taken] for x in own)
        return Kernel.factored(source, scheme.axes, scheme.first, (one, two))

    def all_factors(self, path: str) -> tuple[jnp.ndarray, ...]:
        """All factors of a layer, by its scheme."""
        return tuple(map(jnp.asarray, self.schemes[path].parted(self._pairs[path])))

    def dense(self, path: str) -> jax.Array:
        """The kernel of a layer that stays dense."""
        one, two = (x.astype(np.float64) for x in self._pairs[path])
        return jnp.asarray(multiplied(one, two, self.schemes[path].axes), self.stored[path].dtype)

    def arrays(self, path: str) -> tuple[jnp.ndarray, jnp.ndarray]:
        """The two arrays of a layer that run while others are fitted."""
        one, two = self._pairs[path]
        return jnp.asarray(one), jnp.asarray(two)
