"""The leaves of a dense tree as plain data, from which a plan gives the tree of its network."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from lowrank_jax.factorization.factors import is_factors, shape_of
from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.program.changed import KEY, is_changed
from lowrank_jax.program.names import leaf_names
from lowrank_jax.tree.decomposing import factored, find_schemes
from lowrank_jax.tree.paths import named_leaves

if TYPE_CHECKING:
    from lowrank_jax.planning.plans import Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One array of a tree of nested dicts.

    Attributes:
        path: its keys.
        shape: of the dense array.
        dtype: name of its type.

    Example:
        >>> Leaf(path=("params", "conv", "bias"), shape=(8,), dtype="float32").abstract
        ShapeDtypeStruct(shape=(8,), dtype=float32)
    """

    path: tuple[str | int, ...]
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        keys = isinstance(self.path, tuple) and all(isinstance(key, str | int) for key in self.path)
        sizes = all(type(size) is int and size >= 0 for size in self.shape)
        if not keys or not self.path or not sizes:
            raise ValueError(f"the leaf {self.path!r} has the shape {self.shape!r}")
        math.prod(self.abstract.shape)  # refuses what is no type

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype))


def leaves_of(tree: Any) -> tuple[Leaf, ...]:
    """The leaves of nested dicts of arrays; none of any other tree, which plain data cannot hold.

    Example:
        >>> [leaf.path for leaf in leaves_of({"params": {"w": jnp.ones(3)}})]
        [('params', 'w')]
        >>> leaves_of([jnp.ones(3)])
        ()
    """
    if not isinstance(tree, Mapping):
        return ()
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    paths = [tuple(getattr(key, "key", None) for key in path) for path, _ in pairs]
    keyed = all(isinstance(key, str | int) for path in paths for key in path)
    shapes = [x if hasattr(x, "dtype") else jax.eval_shape(jnp.asarray, x) for _, x in pairs]
    if not keyed or any(jnp.issubdtype(x.dtype, jax.dtypes.extended) for x in shapes):
        return ()
    return tuple(
        Leaf(path=path, shape=tuple(x.shape), dtype=str(x.dtype))  # type: ignore[arg-type]
        for path, x in zip(paths, shapes, strict=True)
    )


def skeleton(plan: "Plan", variables: Any = None) -> Any:
    """The tree of a plan's network without values, for a checkpoint to be read into.

    Neither the dense checkpoint nor its model is needed where the plan was made of nested dicts,
    such as the trees of Linen and of `load_weights`.

    Args:
        plan: as `plan`, or `Plan.load`, gives it.
        variables: the dense tree, abstract or not, for a plan that does not hold its leaves.

    Returns:
        The tree with a `jax.ShapeDtypeStruct` for each array, factors among them.

    Raises:
        ValueError: the plan does not hold the leaves, and no variables are given; or the variables
            do not fit the plan.

    Example:
        >>> from flax import linen as nn
        >>> import lowrank_jax as lr
        >>> model, x = nn.Sequential([nn.Conv(8, (3, 3))]), jnp.ones((2, 8, 8, 8))
        >>> variables = model.init(jax.random.key(0), x)
        >>> chosen = lr.plan(model.apply, variables, x, macs=0.5, forms=["vertical"])
        >>> tree = skeleton(chosen)
        >>> tree["params"]["layers_0"]["kernel"]["vertical"]
        ShapeDtypeStruct(shape=(3, 1, 8, 6), dtype=float32)
    """
    if variables is None and not plan.leaves:
        raise ValueError(
            "The plan has no leaves of its tree; give the variables of the dense "
            "network, such as jax.eval_shape(model.init, jax.random.key(0), x)."
        )
    dense = variables
    if dense is None:
        dense = unflatten_dict({leaf.path: leaf.abstract for leaf in plan.leaves})
    if not plan.ranks:
        return jax.eval_shape(lambda tree: tree, dense)

    def decomposed(tree: Any) -> Any:
        leaves = named_leaves(tree)  # a changed kernel has the shape of the stored one
        changed = {path: leaves[path] for path in plan.changed}
        return factored(tree, find_schemes(tree, plan), changed)

    return jax.eval_shape(decomposed, dense)


def check_plan(plan: "Plan", variables: Any) -> None:
    """Refuses a plan by which variables were not decomposed.

    Args:
        plan: of the ranks.
        variables: hold the factors.

    Raises:
        ValueError: a layer has factors and no rank in the plan, or the reverse, or other ranks.

    Example:
        >>> import lowrank_jax as lr
        >>> tree, x = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}, jnp.ones((4, 8))
        >>> chosen = lr.plan(lambda tree, x: x @ tree["a"], tree, x, macs=0.5)
        >>> check_plan(chosen, lr.decompose(tree, chosen))
    """
    nodes = _nodes(variables)
    for path in {**nodes, **plan.ranks}:
        if text := _other(plan, path, nodes):
            raise ValueError(
                f"{path}: {text}; give the plan by which the variables were decomposed, or none."
            )


def _other(plan: "Plan", path: str, nodes: Mapping[str, Any]) -> str:
    """What of a layer is not as a plan says; "" if all is."""
    if path not in plan.ranks:
        return "the variables hold factors, and the plan has no rank"
    if path not in nodes:
        return f"the plan has {plan.ranks[path]}, and the variables hold no factors"
    same = _is_of(nodes[path], plan.ranks[path])
    return "" if same else f"the plan has {plan.ranks[path]}, and the factors are others"


def _nodes(variables: Any) -> dict[str, Any]:
    """Path of every layer to its factors, be they of the stored kernel or of the changed one."""

    def stands(node: Any) -> bool:
        return is_factors(node) or (is_changed(node) and is_factors(node[KEY]))

    names = leaf_names(variables, is_leaf=stands)
    leaves = jax.tree.leaves(variables, is_leaf=stands)
    pairs = [pair for pair in zip(names, leaves, strict=True) if stands(pair[1])]
    return {path: node[KEY] if is_changed(node) else node for path, node in pairs}


def _is_of(node: Any, scheme: Scheme) -> bool:
    """Whether factors have the keys and the shapes that a scheme gives them."""
    shape = shape_of(node)
    if len(shape) < len(scheme.axes):
        return False
    stack = shape[: len(shape) - len(scheme.axes)]
    wanted = [(*stack, *own) for own in scheme.shapes(shape)]
    made = scheme.node([jax.ShapeDtypeStruct(own, jnp.float32) for own in wanted])
    return jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, node)
