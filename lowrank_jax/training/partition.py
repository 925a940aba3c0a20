"""Which leaves of a tree are trained, and which stay as they are."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.program.jaxprs import is_array
from lowrank_jax.program.names import COLLECTION, leaf_names
from lowrank_jax.tree.suggest import suggest

Rules = Mapping[str, bool]


def trained_leaves(
    variables: Any, rules: Rules | None = None, renewed: Collection[str] = ()
) -> Any:
    """For each leaf of a tree whether it is trained.

    Without rules these are the floating leaves of the collection "params" of Linen variables, and
    all floating leaves of any other tree.

    Args:
        variables: the tree.
        rules: regular expressions to whether what they match is trained: ``{"stem": False}``
            freezes one layer, ``{"head": True, ".*": False}`` trains one alone. A rule matches a
            leaf by its name, such as "stage1/conv" for a kernel or its factors and
            "stage1/conv/bias", or by the name of anything that holds the leaf, such as "stage1".
            The first rule that matches a leaf decides it. A leaf that no rule matches is trained.
        renewed: collections that a call in training gives anew, which are not trained.

    Returns:
        A tree of bools of the same structure.

    Raises:
        ValueError: a leaf is no array, a rule is idle or no regular expression, or no leaf is left
            to train.

    Example:
        >>> tree = {"stem": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}, "head": jnp.ones(4)}
        >>> trained_leaves(tree, {"stem/bias": True, "stem": False})
        {'head': True, 'stem': {'bias': True, 'kernel': False}}
    """
    leaves, structure = jax.tree.flatten(variables)
    names = leaf_names(variables, is_leaf=lambda _: False)
    for name, leaf in zip(names, leaves, strict=True):
        if not is_array(leaf):
            raise ValueError(
                f"{name}: a {type(leaf).__name__} is not allowed; give a tree of arrays, and keep "
                "all else in the function."
            )
    free = _free(variables, renewed)
    candidates = [name for name, own in zip(names, free, strict=True) if own]
    frozen = _frozen(candidates, names, rules or {})
    found = [own and name not in frozen for name, own in zip(names, free, strict=True)]
    if not any(found):
        raise ValueError(
            "No leaf is left to train: give variables with floating arrays, and rules that leave "
            "some of them."
        )
    return jax.tree.unflatten(structure, found)


def split(tree: Any, trained: Any) -> tuple[Any, Any]:
    """The trained leaves of a tree, and the others; each tree has None in place of the rest."""
    mine = jax.tree.map(lambda leaf, own: leaf if own else None, tree, trained)
    rest = jax.tree.map(lambda leaf, own: None if own else leaf, tree, trained)
    return mine, rest


def joined(params: Any, rest: Any) -> Any:
    """The tree that `split` took apart.

    Example:
        >>> joined({"a": 1, "b": None}, {"a": None, "b": 2})
        {'a': 1, 'b': 2}
    """
    return jax.tree.map(
        lambda one, other: other if one is None else one, params, rest, is_leaf=_is_none
    )


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _free(variables: Any, renewed: Collection[str]) -> list[bool]:
    """For each leaf whether it is trained without rules."""
    paths = jax.tree_util.tree_leaves_with_path(variables)
    linen = isinstance(variables, Mapping) and COLLECTION in variables
    holders = [getattr(path[0], "key", None) if path else None for path, _ in paths]
    inside = [own == COLLECTION if linen else own not in renewed for own in holders]
    floats = [jnp.issubdtype(leaf.dtype, jnp.floating) for _, leaf in paths]
    return [mine and floating for mine, floating in zip(inside, floats, strict=True)]


def _frozen(candidates: Collection[str], names: Collection[str], rules: Rules) -> set[str]:
    """Which candidates the rules freeze; a rule may also freeze what is never trained."""
    decided: dict[str, bool] = {}
    for key, value in rules.items():
        if not isinstance(value, bool):
            raise ValueError(
                f"The rule {key!r}: {value!r} is not allowed; give True to train what it matches, "
                "False to freeze it."
            )
        found = _matched(key, candidates)
        if not found and (value or not _matched(key, names)):
            paths = list(dict.fromkeys(path for name in candidates for path in _holders(name)))
            advice = suggest(key, paths, "no leaf can be trained.")
            raise ValueError(f"The rule {key!r} matches nothing that can be trained; {advice}")
        fresh = [name for name in found if name not in decided]
        if found and not fresh:
            raise ValueError(
                f"The rule {key!r} is idle: rules before it decide all that it matches. Put it "
                "before them, or leave it out."
            )
        decided |= dict.fromkeys(fresh, value)
    return {name for name, value in decided.items() if not value}


def _matched(key: str, names: Collection[str]) -> list[str]:
    try:
        pattern = re.compile(key)
    except re.error as error:
        raise ValueError(
            f"The rule {key!r} is no regular expression ({error}); give a path, or one that is."
        ) from error
    return [name for name in names if any(map(pattern.fullmatch, _holders(name)))]


def _holders(name: str) -> Iterator[str]:
    """A name and the names of all that holds it.

    Example:
        >>> list(_holders("stage1/conv/bias"))
        ['stage1/conv/bias', 'stage1/conv', 'stage1']
    """
    while name:
        yield name
        name = name.rpartition("/")[0]
