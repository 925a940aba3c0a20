"""Penalties on the weights of low-rank networks, as optax transformations.

Each adds the gradient of a penalty to the updates. It stands before the optimiser in `optax.chain`,
where the updates are still gradients.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping

import chex
import jax
import jax.numpy as jnp
import optax

from lowrank_jax.factorization.factors import is_factor_key, is_factors, read_factors, wide
from lowrank_jax.factorization.layout import to_pair
from lowrank_jax.factorization.scheme import Scheme, spectrum
from lowrank_jax.program.names import leaf_names
from lowrank_jax.tree.decomposing import find_schemes, reconstruct
from lowrank_jax.tree.kinds import is_number
from lowrank_jax.tree.paths import factored_leaves, named_leaves
from lowrank_jax.tree.rules import Rule, Rules, as_table


def frobenius_decay(weight: float) -> optax.GradientTransformation:
    """Weight decay on the product of two factors, in place of the factors themselves.

    Adds the gradient of weight / 2 times the squared Frobenius norm of each kernel that factors
    stand for (Khodak et al., 2021, arXiv 2105.01029). Other parameters do not decay.

    Args:
        weight: of the decay, 0 or more.

    Raises:
        ValueError: the weight is not allowed.

    Example:
        >>> import numpy as np
        >>> pair = {"left_factor": np.ones((4, 1)), "right_factor": np.ones((1, 3))}
        >>> tx, params = frobenius_decay(0.1), {"dense": pair, "bias": np.ones(3)}
        >>> updates, _ = tx.update(jax.tree.map(np.zeros_like, params), tx.init(params), params)
        >>> round(float(updates["dense"]["left_factor"][0, 0]), 3), float(updates["bias"][0])
        (0.3, 0.0)
    """

    def penalty(params: chex.ArrayTree) -> jax.Array:
        kernels = map(reconstruct, _whole_pairs(params))
        return _sum(jnp.sum(wide(kernel) ** 2) / 2 for kernel in kernels)

    return _decay(weight, penalty)


def orthogonal_decay(weight: float) -> optax.GradientTransformation:
    """Pulls the components of each pair of factors apart until they are orthogonal.

    Adds the gradient of weight times the mean squared cosine between two components of one factor,
    columns of the first and rows of the second, summed over the factors. That is the penalty of SVD
    training (Yang et al., 2020, arXiv 2004.09031) without regard to the components' length, which
    carries the singular values here. At zero the components are those of an SVD, and the smallest
    one is the one to leave out.

    Args:
        weight: of the penalty, 0 or more.

    Raises:
        ValueError: the weight is not allowed.

    Example:
        >>> import numpy as np
        >>> first = np.array([[1.0, 1.0], [0.0, 1.0]])
        >>> pair = {"left_factor": first, "right_factor": np.eye(2)}
        >>> tx, params = orthogonal_decay(1.0), {"dense": pair}
        >>> updates, _ = tx.update(jax.tree.map(np.zeros_like, params), tx.init(params), params)
        >>> updates["dense"]["left_factor"].round(3).tolist()
        [[0.0, 0.25], [0.5, -0.25]]
        >>> updates["dense"]["right_factor"].tolist()
        [[0.0, 0.0], [0.0, 0.0]]
    """

    def penalty(params: chex.ArrayTree) -> jax.Array:
        pairs = map(_components, _whole_pairs(params))
        return _sum(_mean_squared_cosine(part) for pair in pairs for part in pair)

    return _decay(weight, penalty)


def nuclear_decay(weight: float, rules: Rules) -> optax.GradientTransformation:
    """Shrinks the singular values of dense kernels, so that lower ranks do later.

    Adds the gradient of weight times the nuclear norm, the sum of the singular values, of the
    matrix that each rule's scheme decomposes (trained rank pruning: Xu et al., 2019, arXiv
    1910.04576). The ranks of the rules do not matter. A pattern leaves out what stands as factors,
    whose own decay bounds the nuclear norm.

    Args:
        weight: of the penalty, 0 or more.
        rules: a plan, or a table of paths or patterns, as `decompose` takes without a trace.

    Raises:
        ValueError: the weight is not allowed; at the first update, a rule that does not fit.

    Example:
        >>> import numpy as np
        >>> from lowrank_jax import Matrix
        >>> tx, params = nuclear_decay(0.1, {"dense": Matrix(1)}), {"dense": np.diag([3.0, 2.0])}
        >>> updates, _ = tx.update(jax.tree.map(np.zeros_like, params), tx.init(params), params)
        >>> (10 * updates["dense"]).round(3).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    def penalty(params: chex.ArrayTree) -> jax.Array:
        own = _without_frozen(params, as_table(rules))
        kernels, schemes = named_leaves(params), find_schemes(params, own) if own else {}
        return _sum(_nuclear_norm(kernels[path], scheme) for path, scheme in schemes.items())

    return _decay(weight, penalty)


def _decay(
    weight: float, penalty: Callable[[chex.ArrayTree], jax.Array]
) -> optax.GradientTransformation:
    if not is_number(weight) or not 0 <= weight < math.inf:
        raise ValueError(f"weight={weight!r} is not allowed; give a number of 0 or more.")

    def decayed(updates: chex.ArrayTree, params: chex.ArrayTree | None) -> chex.ArrayTree:
        if params is None:
            raise ValueError(
                "params=None is not allowed: a decay reads the parameters; give them to update."
            )
        return jax.tree.map(lambda u, g: u + weight * g, updates, jax.grad(penalty)(params))

    return optax.stateless(decayed)


def _whole_pairs(params: chex.ArrayTree) -> list[chex.ArrayTree]:
    """The factors in a tree of which all are trained.

    Raises:
        ValueError: of some factors one is trained alone, so that their product is not known here.
    """
    if halves := _names_of(params, _is_half):
        raise ValueError(
            f"{halves[0]}: one factor is trained and the other is not, so that the decay does not "
            "know their product; give both or neither to it, as by trained=."
        )
    return list(factored_leaves(params).values())


def _is_half(node: chex.ArrayTree) -> bool:
    """Whether a node is of factors some of which are left out, as frozen or masked ones are."""
    if not isinstance(node, Mapping) or len(node) != 2:
        return False
    named = all(isinstance(key, str) and is_factor_key(key) for key in node)
    parts = [part for part in node.values() if jax.tree.leaves(part)]
    halves = [part for part in parts if _is_half(part)]
    modules = [part for part in parts if isinstance(part, Mapping) and not is_factors(part)]
    return named and len(modules) == len(halves) and (len(parts) == 1 or bool(halves))


def _without_frozen(params: chex.ArrayTree, table: Mapping[str, Rule]) -> dict[str, Rule]:
    """The rules of a table without those that match frozen layers alone."""
    frozen, own = _names_of(params, _is_out), named_leaves(params)

    def idle(pattern: str) -> bool:
        return _matches(pattern, frozen) and not _matches(pattern, own)

    return {path: rule for path, rule in table.items() if not idle(path)}


def _matches(pattern: str, names: Iterable[str]) -> bool:
    try:
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error:  # which `find_schemes` tells
        return False


def _is_out(leaf: chex.ArrayTree) -> bool:
    """Whether nothing stands in the place of a parameter, as of a frozen or masked one."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def _names_of(params: chex.ArrayTree, is_meant: Callable[[chex.ArrayTree], bool]) -> list[str]:
    """The names of the nodes of a tree that are meant."""
    nodes = jax.tree.leaves(params, is_leaf=is_meant)
    names = leaf_names(params, is_leaf=is_meant)
    return [name for name, node in zip(names, nodes, strict=True) if is_meant(node)]


def _components(node: chex.ArrayTree) -> tuple[jax.Array, jax.Array]:
    """The components of two factors, (..., groups, K, entries) each."""
    pair, axes, first = read_factors(node, "factors")
    one, two = (to_pair(wide(reconstruct(factor)), axes, first) for factor in pair)
    rank, outputs = two.shape[-2:]
    groups = one.shape[-1] // rank
    left = one.reshape(*one.shape[:-1], groups, rank)  # (..., a, b, c, g, K)
    right = two.reshape(*two.shape[:-1], groups, outputs // groups)  # (..., a, b, K, g, n/g)
    left = jnp.moveaxis(left, (-2, -1), (-5, -4))
    right = jnp.moveaxis(right, (-2, -3), (-5, -4))
    one, two = (part.reshape(*part.shape[:-3], -1) for part in (left, right))
    return one, two


def _mean_squared_cosine(components: jax.Array) -> jax.Array:
    """The mean over all pairs of components, summed over the groups; a pair of the same is zero."""
    squares = jnp.sum(components**2, -1, keepdims=True)
    # A component of zeros has no direction: its cosines are zeros, not 0 / 0.
    unit = components / jnp.sqrt(jnp.where(squares > 0, squares, 1))
    cosines = jnp.einsum("...ie,...je->...ij", unit, unit, precision=jax.lax.Precision.HIGHEST)
    others = 1 - jnp.eye(cosines.shape[-1])
    return jnp.sum(jnp.mean((cosines * others) ** 2, (-2, -1)))


def _nuclear_norm(kernel: jax.Array, scheme: Scheme) -> jax.Array:
    return jnp.sum(spectrum(kernel, scheme.groups, scheme.axes, scheme.first))


def _sum(parts: Iterable[jax.Array]) -> jax.Array:
    return sum(parts, jnp.zeros(()))
