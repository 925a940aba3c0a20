"""Jaxprs, the programs inside their equations, and the functions that they are traced from."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

NEAR = 0.85  # of two names, as difflib measures: above that of trained and training


def is_array(leaf: Any) -> bool:
    """Whether a leaf is computed with; its values need not be known."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def check_function(apply: Any, variables: Any = ()) -> None:
    """Refuses what is no function of variables.

    Raises:
        ValueError: ``apply`` is a module or no function, or the variables are None.
    """
    if not callable(apply):
        raise ValueError(
            f"apply={apply!r:.80} is not allowed; give a function of (variables, inputs), such as "
            "model.apply."
        )
    if all(callable(getattr(apply, name, None)) for name in ("init", "apply")):
        raise ValueError(
            f"apply={type(apply).__name__}(...) is a module, no function of (variables, inputs); "
            "give its method, as in model.apply."
        )
    if variables is None:
        raise ValueError(
            "variables=None is not allowed; give the tree that the function takes first, such as "
            "those of model.init."
        )


def check_options(verb: Callable, apply: Any, given: Iterable[str]) -> None:
    """Refuses an argument that neither a verb nor the model names, before the model runs.

    Args:
        verb: the function that was called.
        apply: that gets what the verb does not take.
        given: names of these arguments.

    Raises:
        ValueError: the model does not name such an argument.
    """
    options = inspect.signature(verb).parameters.values()
    own = [option.name for option in options if option.kind is option.KEYWORD_ONLY]
    for name in given:
        if _takes(apply, name):
            continue
        near = difflib.get_close_matches(name, own, n=1, cutoff=NEAR)
        if near or not hasattr(apply, "__self__"):  # a module's method has arguments of its own
            known = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(own)}."
            raise ValueError(
                f"{verb.__name__} has no argument {name!r}; {known} What the verb does not know "
                "goes to the model, which does not name it either."
            )


def _takes(apply: Any, name: str) -> bool:
    """Whether a function, or the module whose method it is, has an argument of this name."""
    module = getattr(apply, "__self__", None)
    called = type(module).__call__ if callable(module) else apply
    options = inspect.signature(called).parameters if callable(called) else {}
    return name in options or any(own.kind is own.VAR_KEYWORD for own in options.values())


def programs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among the parameters of an equation, without their constants."""
    values = jax.tree.leaves(
        list(params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    )
    return [program for program in map(opened, values) if hasattr(program, "eqns")]


def opened(program: Any) -> Any:
    """A jaxpr without its constants, whichever of the two a JAX generation stores."""
    return getattr(program, "jaxpr", program)


def constants(program: Any) -> list:
    """The constants of a jaxpr; a JAX generation stores them in one of two places."""
    return list(getattr(program, "consts", ()))


def beginning(program: Any, inputs: Iterable[Any]) -> dict[Any, Any]:
    """What is known before the first equation of a jaxpr: variable to value."""
    jaxpr = opened(program)
    variables = [*jaxpr.constvars, *jaxpr.invars]
    return dict(zip(variables, [*constants(program), *inputs], strict=True))


def values_of(variables: Iterable[Any], known: Mapping[Any, Any]) -> list:
    """The values of variables and literals."""
    return [var.val if isinstance(var, Literal) else known[var] for var in variables]


def scan_parts(eqn: Any) -> tuple[int, int]:
    """Where the carry of a scan starts and ends among its inputs.

    Only an array that the scan takes apart has another number of axes inside than outside. The axes
    tell, because JAX generations name the counts differently.
    """
    body = opened(eqn.params["jaxpr"])
    end = sum(a.aval.ndim == b.aval.ndim for a, b in zip(body.invars, eqn.invars, strict=True))
    carry = sum(a.aval.ndim == b.aval.ndim for a, b in zip(body.outvars, eqn.outvars, strict=True))
    return end - carry, end


def coarsest_eps(program: Any) -> float:
    """The machine epsilon of the coarsest floating type that a program computes in; 0 if it
    computes in none.

    Example:
        >>> program = jax.make_jaxpr(lambda x: x.astype("bfloat16").astype("float32"))
        >>> coarsest_eps(program(1.0))
        0.0078125
    """
    types = {var.aval.dtype for var in _results(opened(program)) if hasattr(var.aval, "dtype")}
    floating = [dtype for dtype in types if jnp.issubdtype(dtype, jnp.floating)]
    return max((float(jnp.finfo(dtype).eps) for dtype in floating), default=0.0)


def _results(program: Any) -> Iterator[Any]:
    for eqn in program.eqns:
        yield from eqn.outvars
        for inner in programs(eqn.params):
            yield from _results(inner)
