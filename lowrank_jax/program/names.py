"""Names of the leaves of a tree: a layer's path, as tables of ranks and plans write it."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lowrank_jax.factorization.factors import is_factor_key, is_factors

KERNELS = ("kernel", "weight", "w")  # of Flax and Keras, of PyTorch and Equinox, of Haiku
COLLECTION = "params"
FIRST = (jax.tree_util.SequenceKey(0),) * 2  # path of the first argument in (args, kwargs)


def leaf_names(tree: Any, is_leaf: Callable[[Any], bool] = is_factors) -> list[str]:
    """The name of every leaf, in the order in which JAX flattens the tree.

    A name is the leaf's path without the collection "params" and without a last part that says
    "kernel", "weight" or "w"; an array alone is named "kernel". Where two leaves would have the
    same name, both have their whole path. A box or a variable around an array leaves no trace.

    Example:
        >>> leaf_names({"params": {"stem": {"kernel": 1, "bias": 2}}, "state": {"mean": 3}})
        ['stem/bias', 'stem', 'state/mean']
    """
    paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return names_of([path for path, _ in paths])


def names_of(paths: Sequence[Sequence[Any]]) -> list[str]:
    """The names of leaves at some paths; see `leaf_names`.

    Example:
        >>> key = jax.tree_util.DictKey
        >>> names_of([(key("a"), key("kernel")), (key("a"), key("weight"))])
        ['a/kernel', 'a/weight']
    """
    names = [_short(parts_of(path)) for path in paths]
    for longer in (lambda path: "/".join(parts_of(path)), _exact):
        count = Counter(names)
        names = [
            longer(path) if count[name] > 1 else name
            for path, name in zip(paths, names, strict=True)
        ]
    return names


def names_in_arguments(paths: Sequence[Sequence[Any]]) -> list[str]:
    """The names of the leaves of (args, kwargs), each as in the argument that it stands in.

    Leaves of two arguments that would have the same name have their whole path.
    """
    names = names_of([path[2:] for path in paths])
    count = Counter(names)
    return [
        _exact(path[1:]) if count[name] > 1 else name
        for path, name in zip(paths, names, strict=True)
    ]


def _exact(path: Sequence[Any]) -> str:
    return jax.tree_util.keystr(tuple(path))


def parts_of(path: Sequence[Any]) -> list[str]:
    """The parts of a path as texts, without what a box around the array adds."""
    parts = [_text(key) for key in path]
    boxed = (
        len(path) > 1 and parts[-1] == "value" and not isinstance(path[-1], jax.tree_util.DictKey)
    )
    return parts[:-1] if boxed else parts


def _text(key: Any) -> str:
    for name in ("key", "name", "idx"):
        if hasattr(key, name):
            return str(getattr(key, name)).lstrip(".")
    return str(key)


def _short(parts: list[str]) -> str:
    own = parts[1:] if len(parts) > 1 and parts[0] == COLLECTION else list(parts)
    end = next((i for i in range(len(own), 0, -1) if not is_factor_key(own[i - 1])), 0)
    if end > 1 and own[end - 1] in KERNELS:
        del own[end - 1]
    return "/".join(own) or KERNELS[0]
