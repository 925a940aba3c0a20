"""Runs a program with another rule at the equations that use a kernel.

Everything in this library that runs a network is this one pass: `lowrank` runs factors, calibration
adds up moments, `fast` runs another algorithm. A rule sees each equation first and may compute it
in its own way. An equation that the rule declines runs as it stands.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from lowrank_jax.program.jaxprs import beginning, opened, values_of
from lowrank_jax.program.kernel import Kernel, dense, follow, follow_each
from lowrank_jax.program.provenance import EACH

Notes = dict[Any, Any]  # what a rule adds up: a key to a tree of arrays, which are sums
Found = tuple[list, Notes]


class Rule:
    """What happens at the equations of a program; must be hashable, and equal for equal behaviour.

    Attributes:
        opens: whether to enter loops and calls that no kernel enters.
    """

    opens: bool = False

    def apply(self, eqn: Any, values: list) -> Found | None:
        """Computes an equation in its own way; None to run the equation as it stands.

        Args:
            eqn: the equation.
            values: of its operands: arrays, or a `Kernel` where one stems from a kernel.

        Returns:
            Its results, and what is to be added up.
        """
        raise NotImplementedError


# How calls, loops and branches are entered, by primitive; `control_flow` fills it in.
CALLS: dict[str, Callable[[Any, list, Rule], Found]] = {}


def interpret(program: Any, inputs: Sequence[Any], rule: Rule) -> Found:
    """Runs a jaxpr on arrays and kernels.

    Returns:
        The results, each an array or a `Kernel`, and the notes of all equations.
    """
    jaxpr, notes, known = opened(program), Notes(), beginning(program, inputs)
    for eqn in jaxpr.eqns:
        outputs, new = step(eqn, values_of(eqn.invars, known), rule)
        notes = added(notes, new)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return values_of(jaxpr.outvars, known), notes


def step(eqn: Any, values: list, rule: Rule) -> Found:
    """Runs one equation on arrays and kernels."""
    with context(eqn):
        return _step(eqn, values, rule)


def _step(eqn: Any, values: list, rule: Rule) -> Found:
    entered = rule.opens or any(isinstance(value, Kernel) for value in values)
    if not entered:
        return _bind(eqn, values), {}
    own = rule.apply(eqn, values)
    if own is not None:
        return own
    if eqn.primitive.name in CALLS:
        return CALLS[eqn.primitive.name](eqn, values, rule)
    if eqn.primitive.name in EACH:
        return follow_each(eqn, values, _bind), {}
    kernel = follow(eqn, values, _bind)
    if kernel is not None:
        return [kernel], {}
    return _bind(eqn, [dense(value) for value in values]), {}


@contextlib.contextmanager
def context(eqn: Any) -> Iterator[None]:
    """The names, the mesh and the settings under which an equation was traced."""
    names = str(eqn.source_info.name_stack)
    scope = jax.named_scope(names) if names else contextlib.nullcontext()
    with eqn.ctx.manager, scope:
        yield


def bind(eqn: Any, values: Sequence[Any]) -> list:
    """Runs an equation as it stands, under its own names."""
    with context(eqn):
        return _bind(eqn, values)


def _bind(eqn: Any, values: Sequence[Any], params: dict[str, Any] | None = None) -> list:
    given = eqn.primitive.get_bind_params(params or eqn.params)
    found = eqn.primitive.bind(*values, **given)
    return list(found) if eqn.primitive.multiple_results else [found]


def added(one: Notes, two: Notes) -> Notes:
    """The sums of two sets of notes."""
    if not one or not two:
        return one or two
    both = {
        key: jax.tree.map(lambda a, b: a + b, one[key], two[key]) if key in one else two[key]
        for key in two
    }
    return {**one, **both}
