"""The outputs of single layers of a network, dense or decomposed."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax

from lowrank_jax.program.interpreter import Found, Rule, bind
from lowrank_jax.program.kernel import dense, sources_of
from lowrank_jax.program.reading import READERS, Reading
from lowrank_jax.program.transform import LowRank, with_notes
from lowrank_jax.tuning.algorithms import Choose
from lowrank_jax.tuning.running import Algorithms

Layers = Mapping["Place", jax.Array]


class Place(NamedTuple):
    """Where a layer runs: its path, and the shape of what it gives there."""

    path: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Noted(Rule):
    """Runs another rule, and notes what the layers at some paths give."""

    rule: Rule
    paths: frozenset[str]

    def apply(self, eqn: Any, values: list) -> Found | None:
        found = self.rule.apply(eqn, values)
        if eqn.primitive.name not in READERS:
            return found
        source = Reading.of(eqn, sources_of(values)).source
        if source is None or source.path not in self.paths:
            return found
        [outputs] = found[0] if found else bind(eqn, [dense(value) for value in values])
        return [outputs], {Place(source.path, outputs.shape): outputs}


def with_layers(apply: Callable, paths: Collection[str], choose: Choose | None = None) -> Callable:
    """A function that gives the outputs of another one, and those of its layers at some paths.

    The outputs of a layer are those of its convolution or product, before the bias. A layer that
    runs several times has the sum of them for each shape. A layer whose kernel the program changes
    first has none.

    Args:
        apply: any function of arrays, whose first argument holds the kernels.
        paths: of the layers.
        choose: of the algorithms of convolutions, as `with_algorithms` takes it; None for plain
            ones.

    Example:
        >>> import jax.numpy as jnp
        >>> run = with_layers(lambda tree, x: (x @ tree["dense"]).sum(), ["dense"])
        >>> outputs, layers = run({"dense": jnp.ones((3, 2))}, jnp.ones((4, 3)))
        >>> outputs.item(), {place.path: y.shape for place, y in layers.items()}
        (24.0, {'dense': (4, 2)})
    """
    rule = LowRank() if choose is None else Algorithms(choose)
    return with_notes(apply, _Noted(rule, frozenset(paths)), paths, dense_too=choose is not None)
