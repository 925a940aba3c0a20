"""The truncated decomposition under the transformations of JAX, with a derivative that is finite.

The derivative of a singular vector has the differences of all singular values in its denominators,
so that it is infinite where two of them are equal. The best approximation of rank K does not depend
on the basis of the space that it keeps. Its derivative needs only the gaps between the values kept
and those left out. So does the derivative of the factors, if no rotation within that space is
counted. With M = U S V^T and A = U_K^T dM V_K, the factors L = U_K S_K^1/2 and R = S_K^1/2 V_K^T
change within the space by U_K X and Y V_K^T, where X_ij = A_ij s_j^1/2 / (s_i + s_j) and Y_ij =
A_ij s_i^1/2 / (s_i + s_j). Then d(L R) is A there, and L^T L = R R^T stays. Out of the space they
change by first-order perturbation theory (Stewart, 1990, "Perturbation theory for the singular
value decomposition").
"""

import functools

import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def by_jax(matrix: jax.Array, rank: int) -> Pair:
    """Factors U_K S_K^1/2 and S_K^1/2 V_K^T of a matrix, or of each of a stack.

    The derivative is right for every function of the product of the factors, and of their norms,
    where the kept singular values are apart from the others and from zero. Elsewhere it is finite.
    A second derivative needs singular values that are all different.

    Args:
        matrix: array of shape (..., m, n), float32 or float64.
        rank: K, from 1 to min(m, n).

    Returns:
        Arrays of shapes (..., m, K) and (..., K, n).

    Example:
        >>> product = lambda x: jnp.vdot(jnp.ones((2, 2)), jnp.matmul(*by_jax(x, 2)))
        >>> jax.jit(jax.grad(product))(jnp.eye(2)).round(3).tolist()  # two equal singular values
        [[1.0, 1.0], [1.0, 1.0]]
    """
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return _balanced(u, s, vt, rank)


@by_jax.defjvp
def _derivative(rank: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple:
    (matrix,), (change,) = primals, tangents
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    kept, root = s[..., :rank], jnp.sqrt(s[..., :rank])
    right = change @ _t(vt[..., :rank, :])  # (..., m, K)
    left = _t(change) @ u[..., :rank]  # (..., n, K)
    u_out, v_out = _out_of_space(u, s, vt, rank, left, right)
    within = _t(u[..., :rank]) @ right
    share = _inverse(kept[..., :, None] + kept[..., None, :], jnp.zeros_like(s[..., :1]))
    x, y = within * root[..., None, :] * share, within * root[..., :, None] * share
    first = u[..., :rank] @ x + u_out * root[..., None, :]
    second = y @ vt[..., :rank, :] + root[..., :, None] * _t(v_out)
    return _balanced(u, s, vt, rank), (first, second)


def _out_of_space(
    u: jax.Array, s: jax.Array, vt: jax.Array, rank: int, left: jax.Array, right: jax.Array
) -> Pair:
    """The change of the kept singular vectors, (..., m, K) and (..., n, K), out of their space."""
    kept, others = s[..., None, :rank], s[..., rank:, None]
    largest = s[..., :1]
    b, c = _t(u[..., rank:]) @ right, vt[..., rank:, :] @ left
    gaps = _inverse((kept - others) * (kept + others), largest**2)
    inside_u = u[..., rank:] @ ((b * kept + c * others) * gaps)
    inside_v = _t(vt[..., rank:, :]) @ ((c * kept + b * others) * gaps)
    per_value = _inverse(kept, largest)  # beyond the smaller side all other values are zero
    beyond_u = (right - u @ (_t(u) @ right)) * per_value
    beyond_v = (left - _t(vt) @ (vt @ left)) * per_value
    return inside_u + beyond_u, inside_v + beyond_v


def _inverse(gaps: jax.Array, scale: jax.Array) -> jax.Array:
    """1 / gap, and zero where a gap is rounding of the scale (..., 1)."""
    least = scale[..., None] * jnp.finfo(gaps.dtype).eps
    size = gaps**2 + least**2
    return jnp.where(size > 0, gaps / jnp.where(size > 0, size, 1), 0)


def _balanced(u: jax.Array, s: jax.Array, vt: jax.Array, rank: int) -> Pair:
    root = jnp.sqrt(s[..., :rank])
    return u[..., :rank] * root[..., None, :], root[..., :, None] * vt[..., :rank, :]


def _t(matrix: jax.Array) -> jax.Array:
    return jnp.swapaxes(matrix, -1, -2)
