"""How an `interpret` enters loops, branches and calls: each is built anew around the same rule.

Kernels pass through calls as they are. A loop takes a stack of kernels apart; what a loop carries,
and what a loop or a branch gives, are arrays.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.program.interpreter import CALLS, Found, Notes, Rule, bind, interpret
from lowrank_jax.program.jaxprs import scan_parts
from lowrank_jax.program.kernel import Kernel, dense, sources_of, unstack
from lowrank_jax.program.survey import Survey


def _call(eqn: Any, values: list, rule: Rule, name: str) -> Found:
    """A call without effect on what is computed."""
    return interpret(eqn.params[name], values, rule)


def _jit(eqn: Any, values: list, rule: Rule) -> Found:
    params = eqn.params
    placed = [*params["in_shardings"], *params["out_shardings"]]
    plain = not any(isinstance(x, jax.sharding.Sharding) for x in placed)
    if plain and any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(values)):
        return interpret(params["jaxpr"], values, rule)
    options = _options(params, values)
    if type(rule).__eq__ is object.__eq__:
        # A rule that is equal to itself alone would stay in the cache with all its arrays.
        return _compiled.__wrapped__(params["jaxpr"], rule, options)(*values)
    return _compiled(params["jaxpr"], rule, options)(*values)


def _options(params: dict[str, Any], values: list) -> tuple:
    """Arguments of ``jax.jit``, hashable. A kernel's shardings do not fit its factors."""
    donated = tuple(i for i, given in enumerate(params["donated_invars"]) if given)
    results = Survey.of(params["jaxpr"], sources_of(values)).outputs
    ins = _shardings(params["in_shardings"], sources_of(values))
    outs = _shardings(params["out_shardings"], results)
    options = tuple(params.get("compiler_options_kvs", ()))
    return donated, ins, outs, params["keep_unused"], options, params["name"]


def _shardings(given: Sequence[Any], sources: Sequence[Any]) -> tuple:
    return tuple(
        sharding if isinstance(sharding, jax.sharding.Sharding) and source is None else None
        for sharding, source in zip(given, sources, strict=True)
    )


@functools.lru_cache(maxsize=128)  # a new function for each call would be compiled anew
def _compiled(program: Any, rule: Rule, options: tuple) -> Callable:
    donated, ins, outs, keep_unused, compiler, name = options

    def run(*values: Any) -> Found:
        return interpret(program, values, rule)

    run.__name__ = name
    given: dict[str, Any] = {"compiler_options": dict(compiler)} if compiler else {}
    given |= {"in_shardings": ins} if any(ins) else {}
    given |= {"out_shardings": (list(outs), None)} if any(outs) else {}
    return jax.jit(run, donate_argnums=donated, keep_unused=keep_unused, **given)


def _remat(eqn: Any, values: list, rule: Rule) -> Found:
    params = eqn.params

    def run(*values: Any) -> Found:
        return interpret(params["jaxpr"], values, rule)

    again = jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])
    return again(*values)


def _custom(eqn: Any, values: list, rule: Rule) -> Found:
    """A function with a derivative of its own, which holds for the kernel, not for its factors.

    It is entered where a kernel is read inside it. Elsewhere its derivative is kept.
    """
    program = eqn.params["call_jaxpr"]
    if not rule.opens and not _reads(program, values):
        return bind(eqn, [dense(value) for value in values]), {}
    outputs, notes = interpret(program, values, rule)
    return [dense(value) for value in outputs], notes


def _reads(program: Any, values: list) -> bool:
    """Whether a program runs the kernels among its inputs as they are."""
    kernels = {value.source.path: value for value in values if isinstance(value, Kernel)}
    found = Survey.of(program, sources_of(values)).found
    readings = [f.reading for f in found if f.reading.source is not None]
    return any(kernels[r.source.path].runs(r) for r in readings if r.source is not None)


def _scan(eqn: Any, values: list, rule: Rule) -> Found:
    params, (start, end) = eqn.params, scan_parts(eqn)
    fixed, init = values[:start], [dense(value) for value in values[start:end]]
    parts = [_unstacked(value) for value in values[end:]]
    same: list[int | None] = []

    def step(carry: list, part: list) -> tuple[list, tuple[list, Notes]]:
        outputs, notes = interpret(params["jaxpr"], [*fixed, *carry, *part], rule)
        rest = outputs[len(init) :]
        same[:] = handed_on(rest, part)
        own = [dense(x) if index is None else None for x, index in zip(rest, same, strict=True)]
        return [dense(value) for value in outputs[: len(init)]], (own, notes)

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, (stacked, notes) = jax.lax.scan(step, init, parts, **options)
    pairs = zip(stacked, same, strict=True)
    rest = [x if index is None else values[end + index] for x, index in pairs]
    return [*carry, *rest], _over_steps(notes, parts)


def handed_on(outputs: Sequence[Any], parts: Sequence[Any]) -> list[int | None]:
    """For each output of a loop's body the part of a stack that it is, if that is a kernel."""
    places = {x.source: i for i, x in enumerate(parts) if isinstance(x, Kernel)}
    return [places.get(x.source) if isinstance(x, Kernel) else None for x in outputs]


def _unstacked(value: Any) -> Any:
    if not isinstance(value, Kernel):
        return value
    found = unstack(value)
    return dense(value) if found is None else found


def _over_steps(notes: Notes, parts: Sequence[Any]) -> Notes:
    """Notes of all steps: one for each kernel of a stack, the sum for a kernel that stays."""
    own = {part.source.path for part in parts if isinstance(part, Kernel)}
    return {
        key: value if key.path in own else jax.tree.map(lambda x: x.sum(0), value)
        for key, value in notes.items()
    }


def _while(eqn: Any, values: list, rule: Rule) -> Found:
    params = eqn.params
    first, second = params["cond_nconsts"], params["body_nconsts"]
    test, body, init = values[:first], values[first : first + second], values[first + second :]
    start = [dense(value) for value in init]

    def step(carry: list) -> Found:
        outputs, notes = interpret(params["body_jaxpr"], [*body, *carry], rule)
        return [dense(value) for value in outputs], notes

    def go_on(state: tuple) -> Any:
        return interpret(params["cond_jaxpr"], [*test, *state[0]], rule)[0][0]

    def advance(state: tuple) -> tuple:
        outputs, notes = step(state[0])
        return outputs, jax.tree.map(jnp.add, state[1], notes)

    zeros = jax.tree.map(_zeros, jax.eval_shape(step, start)[1])
    return jax.lax.while_loop(go_on, advance, (start, zeros))


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype)


def _cond(eqn: Any, values: list, rule: Rule) -> Found:
    index, operands = values[0], values[1:]

    def branch(program: Any) -> Callable:
        def run(*operands: Any) -> Found:
            outputs, notes = interpret(program, operands, rule)
            return [dense(value) for value in outputs], notes

        return run

    branches = [branch(program) for program in eqn.params["branches"]]
    shapes = [jax.eval_shape(run, *operands)[1] for run in branches]
    union = {key: value for notes in shapes for key, value in notes.items()}
    same = [_with_all(run, union) for run in branches]
    return jax.lax.switch(index, same, *operands)


def _with_all(run: Callable, union: Notes) -> Callable:
    """A branch that gives zeros for what other branches note."""

    def filled(*operands: Any) -> Found:
        outputs, notes = run(*operands)
        zeros = {key: jax.tree.map(_zeros, union[key]) for key in union if key not in notes}
        ordered = {key: {**zeros, **notes}[key] for key in union}
        return outputs, ordered

    return filled


def _shard_map(eqn: Any, values: list, rule: Rule) -> Found:
    """Kernels that every device has whole pass; others are multiplied back."""
    params = eqn.params
    axes = params["newly_manual_axes"]
    given = [
        value if not isinstance(value, Kernel) or not any(spec) else dense(value)
        for value, spec in zip(values, params["in_specs"], strict=True)
    ]

    def run(*values: Any) -> Found:
        outputs, notes = interpret(params["jaxpr"], values, rule)
        total = jax.tree.map(lambda x: jax.lax.psum(x, tuple(axes)), notes)
        return [dense(value) for value in outputs], total

    mapped = jax.shard_map(
        run,
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=(list(params["out_specs"]), jax.sharding.PartitionSpec()),
        axis_names=axes,
        check_vma=params["check_vma"],
    )
    return mapped(*given)


CALLS |= {
    "jit": _jit,
    "closed_call": functools.partial(_call, name="call_jaxpr"),
    "core_call": functools.partial(_call, name="call_jaxpr"),
    "custom_jvp_call": _custom,
    "custom_vjp_call": _custom,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
