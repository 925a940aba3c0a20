"""A program without calls: one list of equations, with the loops over kernels written out."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from lowrank_jax.program.control_flow import handed_on
from lowrank_jax.program.interpreter import CALLS, Found, Rule, bind, interpret
from lowrank_jax.program.jaxprs import scan_parts
from lowrank_jax.program.kernel import Kernel, dense
from lowrank_jax.program.provenance import Source


def flatten(program: Any, sources: Sequence[Source | None], loops: bool = True) -> Any:
    """The same program as one list of equations.

    ``jit``, ``remat`` and functions with a derivative of their own are opened. A ``scan`` that a
    kernel enters is written out, step by step, so that each kernel of a stack has an equation of
    its own. Other loops and branches stay as they are.

    Args:
        program: a jaxpr with its constants.
        sources: for each input the kernel that it is, or None.
        loops: whether loops are written out.

    Returns:
        A jaxpr with its constants and the same inputs and outputs.
    """

    return retraced(program, sources, _Open(loops))


def retraced(program: Any, sources: Sequence[Source | None], rule: Rule) -> Any:
    """The jaxpr with its constants of what a rule makes of another one.

    Args:
        program: a jaxpr with its constants.
        sources: for each input the kernel that it is, or None.
        rule: of the equations that read a kernel; what it notes is lost.
    """

    def run(*inputs: jax.Array) -> list:
        pairs = zip(sources, inputs, strict=True)
        values = [x if source is None else Kernel.dense(source, x) for source, x in pairs]
        outputs, _ = interpret(program, values, rule)
        return [dense(value) for value in outputs]

    return jax.make_jaxpr(run)(*program.in_avals)


@dataclasses.dataclass(frozen=True)
class _Open(Rule):
    loops: bool
    opens = True

    def apply(self, eqn: Any, values: list) -> Found | None:
        name = eqn.primitive.name
        if name == "jit":
            return interpret(eqn.params["jaxpr"], values, self)
        if name in ("remat2", "checkpoint"):
            return interpret(eqn.params["jaxpr"], values, self)
        if name == "scan" and self.loops and any(isinstance(value, Kernel) for value in values):
            return self._written_out(eqn, values)
        if name in CALLS and name not in _CALLED:
            return bind(eqn, [dense(value) for value in values]), {}
        return None

    def _written_out(self, eqn: Any, values: list) -> Found:
        params, (start, end) = eqn.params, scan_parts(eqn)
        fixed, carry, parts = values[:start], values[start:end], values[end:]
        carry = [dense(value) for value in carry]
        rows, same = [], list[int | None]()
        order = range(params["length"])
        for index in reversed(order) if params["reverse"] else order:
            own = [_entry(part, index) for part in parts]
            outputs, _ = interpret(params["jaxpr"], [*fixed, *carry, *own], self)
            same = handed_on(outputs[len(carry) :], own)
            outputs = [dense(value) for value in outputs]
            carry, row = outputs[: len(carry)], outputs[len(carry) :]
            rows.append(row)
        rows = rows[::-1] if params["reverse"] else rows
        columns = zip(same, zip(*rows, strict=True), strict=True)
        stacked = [jax.numpy.stack(x) if index is None else parts[index] for index, x in columns]
        return [*carry, *stacked], {}


_CALLED = ("custom_jvp_call", "custom_vjp_call", "closed_call", "core_call")


def _entry(part: Any, index: int) -> Any:
    take = functools.partial(jax.lax.index_in_dim, index=index, axis=0, keepdims=False)
    if not isinstance(part, Kernel):
        return take(part)
    source = part.source.entry(0, index, keep=False)
    return Kernel.dense(source, take(dense(part)))
