"""Runs a program with another rule at the equations that use a kernel.

Everything in this library that runs a network is this one pass: `lowrank` runs factors, calibration
adds up moments, `fast` runs another algorithm. A rule sees each equation first and may compute it
in its own way. What it declines runs as it stands.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Literal

from lowrank_jax.program.jaxprs import constants, opened
from lowrank_jax.program.kernel import Kernel, dense, follow

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
    jaxpr, notes = opened(program), Notes()
    variables = [*jaxpr.constvars, *jaxpr.invars]
    known = dict(zip(variables, [*constants(program), *inputs], strict=True))

    def read(var: Any) -> Any:
        return var.val if isinstance(var, Literal) else known[var]

    for eqn in jaxpr.eqns:
        values = [read(var) for var in eqn.invars]
        outputs, new = step(eqn, values, rule)
        notes = added(notes, new)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(var) for var in jaxpr.outvars], notes


def step(eqn: Any, values: list, rule: Rule) -> Found:
    entered = rule.opens or any(isinstance(value, Kernel) for value in values)
    if not entered:
        return bind(eqn, values), {}
    own = rule.apply(eqn, values)
    if own is not None:
        return own
    if eqn.primitive.name in CALLS:
        return CALLS[eqn.primitive.name](eqn, values, rule)
    if eqn.primitive.name == "optimization_barrier":
        return values, {}
    kernel = follow(eqn, values, bind)
    if kernel is not None:
        return [kernel], {}
    return bind(eqn, [dense(value) for value in values]), {}


def bind(eqn: Any, values: Sequence[Any]) -> list:
    """Runs an equation as it stands, under its own names."""
    names = str(eqn.source_info.name_stack)
    with eqn.ctx.manager, jax.named_scope(names):
        params = eqn.primitive.get_bind_params(eqn.params)
        found = eqn.primitive.bind(*values, **params)
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
