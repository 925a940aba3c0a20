"""Second moments of what a layer reads, summed on the device: patches x and outputs y."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lowrank_jax.calibration.patches import Geometry
from lowrank_jax.calibration.products import ProductGeometry
from lowrank_jax.factorization.importance import times
from lowrank_jax.program.reading import Reading

WIDE, BLOCKS = 512, 4  # rows from which a product with itself is computed in blocks, and how many
POSITIONS = 16  # of each image; neighbours tell nearly the same, and the cost is proportional

AnyGeometry = Geometry | ProductGeometry
Sums = dict[str, jax.Array]


def geometry_of(reading: Reading) -> AnyGeometry:
    """How a convolution or a product whose layout is known takes its inputs apart."""
    return Geometry.of(reading) if reading.is_convolution else ProductGeometry.of(reading)


def patch_sums(
    geometry: AnyGeometry,
    x: jax.Array,
    y: jax.Array,
    turn: jax.Array | int,
    roots: Float[jax.Array, "k b b"] | None = None,
) -> tuple[Sums, jax.Array]:
    """Sums over patches of the inputs and over outputs, for each kernel and each of its groups.

    Args:
        geometry: of the convolution or product.
        x: inputs, as it reads them.
        y: outputs that it is to give, as it gives them.
        turn: number of the batch; the positions lie on a grid, which starts elsewhere in each.
        roots: of the outputs' importance, which weigh them; see `Importance`.

    Returns:
        count (S,), x (S, g, p), y (S, g, m), xx (S, g, p, p), xy (S, g, p, m), yy (S, g, m) in
        float32 or wider: S kernels that run at once, g groups, p entries of a patch in the stored
        order of the kernel's axes without the outputs, m outputs of a group. And the patches.
    """
    rows, outputs = geometry.rows(x, y, turn, POSITIONS)
    x, y = rows, outputs.astype(rows.dtype)
    # Without a barrier XLA compiles the gathering into each of the five sums.
    x, y = jax.lax.optimization_barrier((x, y))
    xx = summed_squares(x)
    whole = {"xx": jnp.broadcast_to(xx, (y.shape[1], *xx.shape[1:]))}
    return row_sums(x, y, roots) | whole, x


def row_sums(x: jax.Array, y: jax.Array, roots: Float[jax.Array, "k b b"] | None) -> Sums:
    """The sums of `patch_sums` but xx, of rows of patches and of outputs."""
    rows, stack = y.shape[:2]
    if roots is not None:
        y = times(y.reshape(rows, stack, -1), roots).reshape(y.shape)
    every = jnp.broadcast_to(x, (rows, stack, *x.shape[2:]))
    return {
        "count": jnp.full(stack, rows, x.dtype),
        "x": jnp.broadcast_to(x.sum(0), (stack, *x.shape[2:])),
        "y": y.sum(0),
        "xy": summed_products(every, y),
        "yy": (y * y).sum(0),
    }


def summed_squares(x: jax.Array) -> jax.Array:
    """Sums (S, g, p, p) of the products of the rows of (rows, S, g, p) with themselves.

    They are symmetric: of wide rows only the blocks on and above the diagonal are computed.
    """
    width = x.shape[-1]
    if width < WIDE:
        return summed_products(x, x)
    starts = [width * block // BLOCKS for block in range(BLOCKS)]
    rows = [
        summed_products(x[..., start:end], x[..., start:])
        for start, end in zip(starts, [*starts[1:], width], strict=True)
    ]
    missing = [((0, 0), (0, 0), (0, 0), (start, 0)) for start in starts]
    upper = jnp.concatenate(
        [jnp.pad(row, pad) for row, pad in zip(rows, missing, strict=True)], axis=2
    )
    return jnp.triu(upper) + jnp.triu(upper, 1).mT


def summed_products(x: jax.Array, y: jax.Array) -> jax.Array:
    """Sums (S, g, p, m) of the products of the rows of (rows, S, g, p) and (rows, S, g, m)."""
    if x.shape[1:3] == (1, 1):  # a plain product runs twice as fast on the CPU as a batch of one
        flat = jnp.matmul(x[:, 0, 0].T, y[:, 0, 0], precision=jax.lax.Precision.HIGHEST)
        return flat[None, None]
    return jnp.einsum("rsgp,rsgm->sgpm", x, y, precision=jax.lax.Precision.HIGHEST)
