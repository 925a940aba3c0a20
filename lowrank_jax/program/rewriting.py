"""A function whose program runs as it is, but for equations that are found and computed in another
way."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lowrank_jax.program.interpreter import bind
from lowrank_jax.program.jaxprs import beginning, opened, programs, values_of

Read = Callable[[Any], Any]  # the value of a variable


@dataclasses.dataclass(frozen=True)
class Part:
    """Equations of a program that are computed together in another way.

    Attributes:
        eqns: in their order; only equations of the part read the results of all but the last.
        run: function of `Read` that gives the outputs of the last equation.
    """

    eqns: Sequence[Any]
    run: Callable[[Read], list]


Find = Callable[[Any], list[Part]]  # the parts of a jaxpr, without those of the jaxprs inside


def rewritten(fn: Callable, find: Find) -> Callable:
    """A function that computes what another function does, with parts of the program computed in
    another way.

    The other function is traced, and the equations of its program run as they are, except for the
    parts. Parts in a nested ``jax.jit`` are found. Equations inside loops and branches stay as they
    are.

    Args:
        fn: function of trees of arrays that gives a tree of arrays.
        find: gives the parts, none of which share an equation.
    """

    @functools.wraps(fn)
    def run(*args: Any) -> Any:
        program, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        outputs = _evaluate(program, jax.tree.leaves(args), find)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return run


def _evaluate(program: Any, inputs: list, find: Find) -> list:
    own, known = opened(program), beginning(program, inputs)
    parts = find(own)
    last = {id(part.eqns[-1]): part for part in parts}
    skipped = {id(eqn) for part in parts for eqn in part.eqns[:-1]}

    def read(var: Any) -> Any:
        return values_of([var], known)[0]

    for eqn in own.eqns:
        if id(eqn) not in skipped:
            part = last.get(id(eqn))
            found = part.run(read) if part else _run(eqn, values_of(eqn.invars, known), find)
            known |= zip(eqn.outvars, found, strict=True)
    return values_of(own.outvars, known)


def _run(eqn: Any, inputs: list, find: Find) -> list:
    if eqn.primitive.name == "jit" and _any(eqn, find):
        return _evaluate(eqn.params["jaxpr"], inputs, find)
    return bind(eqn, inputs)


def _any(eqn: Any, find: Find) -> bool:
    """Whether a nested jit holds a part."""
    return any(
        bool(find(inner)) or any(_any(e, find) for e in inner.eqns if e.primitive.name == "jit")
        for inner in programs(eqn.params)
    )
