"""What a plan needs of a layer, summed on the device: see `lowrank_jax.factorization.strips`."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.calibration.sums import (
    POSITIONS,
    AnyGeometry,
    geometry_of,
    summed_products,
    summed_squares,
)
from lowrank_jax.factorization.axes import forms_of, patch_axes, split_axes, width_of
from lowrank_jax.factorization.strips import needed
from lowrank_jax.program.reading import Reading

PART = 32  # outputs whose covariance with all others tells how many samples are independent


@dataclasses.dataclass(frozen=True)
class StripGeometry:
    """How a layer cuts its inputs into patches, and a patch into strips.

    Attributes:
        rows: gives the patches.
        axes: the kernel's layout.
        shape: of one kernel.
        groups: of feature groups.
    """

    rows: AnyGeometry
    axes: str
    shape: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, reading: Reading) -> "StripGeometry":
        """The geometry of a reading whose layout is known."""
        source, axes = reading.source, reading.layout.axes
        assert source is not None
        return cls(geometry_of(reading), axes, source.shape[-len(axes) :], reading.groups)

    @property
    def sizes(self) -> dict[str, int]:
        """Letter of an axis to its size."""
        return dict(zip(self.axes, self.shape, strict=True))

    @property
    def outputs(self) -> int:
        """Of one group."""
        return width_of(self.axes, self.shape) // self.groups

    def in_taps(self, patches: jax.Array, first: str) -> jax.Array:
        """Patches (rows, S, g, p) as (rows, S, g, taps of the second factor, strip)."""
        _, two = split_axes(self.axes, first)
        stored, order = patch_axes(self.axes, first)
        spread = patches.reshape(*patches.shape[:3], *(self.sizes[letter] for letter in stored))
        moved = spread.transpose(0, 1, 2, *(3 + stored.index(letter) for letter in order))
        return moved.reshape(*patches.shape[:3], math.prod(self.sizes[x] for x in two), -1)


def strip_sums(
    geometry: StripGeometry, x: jax.Array, y: jax.Array, turn: jax.Array | int
) -> dict[str, Any]:
    """The sums of `Strips`, each with a leading axis for the kernels that run at once.

    And for `independent` "part", sums of the products of the first outputs with all, and "even",
    what it reads of the even batches.

    Args:
        geometry: of the layer.
        x, y: what it reads and gives.
        turn: number of the batch; see `patch_sums`.
    """
    patches, outputs = geometry.rows.rows(x, y, turn, POSITIONS)
    outputs = outputs.astype(patches.dtype)
    # Without a barrier XLA compiles the gathering into each of the sums.
    patches, outputs = jax.lax.optimization_barrier((patches, outputs))
    rows, stack = outputs.shape[:2]
    forms = forms_of(geometry.axes, geometry.shape)
    cut = [f for f in forms if needed(geometry.axes, geometry.sizes, f, geometry.outputs)]
    pairs = {first: _sums_of(geometry.in_taps(patches, first)) for first in cut}
    whole = set(cut) < set(forms)
    found = {
        "count": jnp.full(stack, rows, patches.dtype),
        "x": patches.sum(0),
        "y": outputs.sum(0),
        "yy": summed_squares(outputs) if whole else (outputs**2).sum(0),
        "part": summed_products(outputs[..., :PART], outputs),
        "strips": {first: pair[0] for first, pair in pairs.items()},
        "offsets": {first: pair[1] for first, pair in pairs.items()},
    }
    found["even"] = {name: (1 - turn % 2) * found[name] for name in ("count", "y", "part")}
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (stack, *a.shape[1:])), found)


def _sums_of(taps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the products of one strip (rows, S, g, b, r) of each patch, and of those of its taps."""
    rows, *_, count, _ = taps.shape
    # At random, because neighbouring rows are neighbouring places of an image.
    turn = np.random.default_rng(0).integers(count, size=(rows, 1, 1, 1, 1))
    strip = jnp.take_along_axis(taps, turn, axis=3)[:, :, :, 0]
    offsets = jnp.einsum("nsgxr,nsgXr->sgxX", taps, taps, precision=jax.lax.Precision.HIGHEST)
    return summed_squares(strip), offsets
