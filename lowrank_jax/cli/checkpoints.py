"""The variables of a model in a checkpoint, wherever they stand in it."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from lowrank_jax.tree.decomposing import reconstruct

PARAMS = "params"
DEPTH = 2  # levels of a checkpoint that are searched


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Found:
    """The variables in a checkpoint.

    Attributes:
        variables: as the model takes them, dense or decomposed.
        source: Python that makes them of ``{}``, what `load_weights` gives; "" where that is long.
    """

    variables: Any
    source: str


def find_variables(
    tree: Any,
    path: str,
    shapes: Any,
    network: str,
    optional: Collection[str] = (),
    runs: Callable[[Any], bool] = lambda _: True,
) -> Found:
    """The part of a checkpoint that has the variables of a model.

    They may be the whole, stand under one or two names, as in ``{"model": variables}``, or be
    parameters without the name "params". Keys of NNX that were made strings are ints again.

    Args:
        tree: what `load_weights` gave of it.
        path: of the checkpoint, for the message.
        shapes: of the dense variables; None takes the whole.
        network: what it is, for the message.
        optional: names of leaves that the checkpoint may have or lack.
        runs: whether the network runs without the collections that the checkpoint lacks.

    Raises:
        ValueError: there is none of this network; a difference is named.
    """
    if shapes is None:
        return Found(variables=_on_device(tree), source="{}")
    closest: list[str] = []
    for source, part in _candidates(tree, shapes):
        variables = _keyed(part, shapes)
        lost = _differences(variables, shapes, optional)
        if not lost or (_only_collections(lost, variables, shapes) and runs(variables)):
            same = _keys(part) == _keys(variables)
            return Found(variables=_on_device(variables), source=source if same else "")
        if not closest or len(lost) < len(closest):
            closest = lost
    raise ValueError(
        f"{path} does not hold the variables of {network}: {'; '.join(closest[:3])}. It holds "
        f"{[str(name) for name in tree][:12]}. Give the checkpoint of this model, or --model-args "
        "that it had."
    )


def _on_device(tree: Any) -> Any:
    return jax.tree.map(jax.numpy.asarray, tree)


def _candidates(tree: Mapping, shapes: Mapping) -> Iterator[tuple[str, Mapping]]:
    """Parts of a checkpoint that may be the variables, with the Python that makes each."""
    for source, part in itertools.chain(*(_parts("{}", tree, depth) for depth in range(DEPTH + 1))):
        own = {name: value for name, value in part.items() if _is_of(name, shapes)}
        yield source if len(own) == len(part) else "", own
        if PARAMS in shapes and PARAMS not in part:
            others = {name: part[name] for name in shapes if name in part}
            params = {name: value for name, value in part.items() if name not in others}
            yield "" if others else f'{{{{"params": {source}}}}}', {PARAMS: params, **others}


def _is_of(name: Any, shapes: Mapping) -> bool:
    """Whether a collection of Linen is of the model; parts of other trees all count."""
    return PARAMS not in shapes or name in shapes


def _parts(source: str, tree: Mapping, depth: int) -> Iterator[tuple[str, Mapping]]:
    """The mappings at a depth of a tree."""
    if not depth:
        yield source, tree
        return
    for name, own in tree.items():
        if isinstance(own, Mapping):
            yield from _parts(f"{source}[{name!r}]", own, depth - 1)


def _keyed(tree: Any, shapes: Any) -> Any:
    """A tree with the keys of another one, where they are the same as strings.

    The state of NNX in a checkpoint of Orbax may have one more key, "value".
    """
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    if not isinstance(tree, Mapping):
        return tree
    if not isinstance(shapes, Mapping):
        return tree["value"] if set(tree) == {"value"} else tree
    known = {str(key): key for key in shapes}
    found = {known.get(str(key), key): own for key, own in tree.items()}
    return {key: _keyed(own, shapes[key]) if key in shapes else own for key, own in found.items()}


def _keys(tree: Any) -> Any:
    """The nested keys of a tree, with their types."""
    return {k: _keys(own) for k, own in tree.items()} if isinstance(tree, Mapping) else None


def _differences(variables: Any, shapes: Any, optional: Collection[str]) -> list[str]:
    """What variables have other than a model, in words."""
    try:
        dense = _named(jax.eval_shape(reconstruct, variables))
    except (AttributeError, TypeError, ValueError):  # of something else than arrays
        return [f"{', '.join(map(str, list(variables)[:5])) or 'nothing'} is no tree of arrays"]
    wanted = _named(shapes)
    for name in optional:
        dense.pop(name, None)
        wanted.pop(name, None)
    missing = [f"{name} is missing" for name in wanted if name not in dense]
    others = [f"{name} is not of the model" for name in dense if name not in wanted]
    pairs = [(name, dense[name], wanted[name]) for name in wanted if name in dense]
    changed = [f"{name} has the shape {one}, not {two}" for name, one, two in pairs if one != two]
    return changed + missing + others


def _named(tree: Any) -> dict[str, tuple[int, ...]]:
    flat = flatten_dict(dict(tree))
    return {"/".join(map(str, path)): tuple(leaf.shape) for path, leaf in flat.items()}


def _only_collections(lost: list[str], variables: Mapping, shapes: Mapping) -> bool:
    """Whether whole collections of Linen, such as of sown values, are all that is missing."""
    absent = [name for name in shapes if name not in variables]
    leaves = sum(len(jax.tree.leaves(shapes[name])) for name in absent)
    return PARAMS in variables and len(lost) == leaves > 0
