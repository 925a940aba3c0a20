"""`lowrank`: a function of a tree becomes the same function of a tree that holds factors."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from lowrank_jax.factorization.factors import (
    dense_shape,
    factor_keys,
    is_factors,
    is_pair,
    read_factors,
)
from lowrank_jax.factorization.placement import dense_sharding
from lowrank_jax.program.changed import changed
from lowrank_jax.program.factored import run_factored
from lowrank_jax.program.interpreter import Notes, Rule, interpret
from lowrank_jax.program.jaxprs import check_function, is_array
from lowrank_jax.program.kernel import Kernel, dense, sources_of
from lowrank_jax.program.names import FIRST, names_in_arguments
from lowrank_jax.program.provenance import Source
from lowrank_jax.program.reading import READERS, Reading
from lowrank_jax.program.survey import Survey
from lowrank_jax.program.traced import Program


def lowrank(apply: Callable) -> Callable:
    """Makes a function take a tree that `decompose` or `compress` made, as well as a dense one.

    A function transformation like ``jax.grad``. The function is traced with the dense tree, of
    which only shapes are needed. Then its program runs with factors in the place of kernels: at a
    convolution or a product two smaller ones run. Factors pass through type conversions, moves of
    axes, ``jit``, ``remat``, ``scan``, ``cond`` and ``while``; kernels that are joined along their
    outputs are read one after the other. At any other operation they are multiplied back, once. The
    result is exact there, and no faster than the dense function; `trace` tells beforehand. Factors
    of a changed kernel, which stand as ``{"changed": factors}``, run where the program read the
    changed kernel. A factor that stands decomposed itself, as `Tucker` leaves it, runs as its own
    factors by the same transformation. So every function runs, of Linen, NNX, Haiku, Equinox or of
    no framework.

    Args:
        apply: ``model.apply``, or any function of arrays whose arguments hold the tree.

    Returns:
        A function of the same arguments. Where they hold no factors, it is the one given.

    Raises:
        ValueError: when called, if two factors in the tree do not fit together.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from lowrank_jax import decompose
        >>> model, x = nn.Sequential([nn.Conv(16, (3, 3)), nn.relu]), jnp.ones((1, 8, 8, 4))
        >>> variables = model.init(jax.random.key(0), x)
        >>> small = decompose(variables, {"layers_0": 3})
        >>> jax.jit(lowrank(model.apply))(small, x).shape
        (1, 8, 8, 16)
    """

    return with_rule(changed(apply), LowRank())


def with_rule(apply: Callable, rule: Rule, dense_too: bool = False) -> Callable:
    """A function that runs the program of another function by a rule.

    Args:
        apply: any function of arrays.
        rule: of the equations that read a kernel.
        dense_too: whether arrays of three or more axes in the first argument are kernels as well.
            Otherwise a call whose arguments hold no factors is left alone.
    """

    check_function(apply)

    @functools.wraps(apply)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not dense_too and not _has_pairs((args, kwargs)):
            return apply(*args, **kwargs)
        return _run(apply, rule, args, kwargs, _may_be_kernel if dense_too else _never)[0]

    return run


def _has_pairs(tree: Any) -> bool:
    return any(map(is_pair, jax.tree.leaves(tree, is_leaf=is_pair)))


def _has_nested(tree: Any) -> bool:
    """Whether a factor in a tree stands decomposed itself.

    Once its own factors run in its place, what is left to run is a function of the whole factor.
    """
    leaves = jax.tree.leaves(tree, is_leaf=is_factors)
    return any(is_factors(leaf) and not is_pair(leaf) for leaf in leaves)


def with_notes(
    apply: Callable, rule: Rule, paths: Collection[str], dense_too: bool = False
) -> Callable:
    """A function that gives the results of another function, and what a rule notes in its program.

    Args:
        apply: any function of arrays.
        rule: of the equations that read a kernel.
        paths: of the dense arrays in the first argument that count as kernels; factors always do.
        dense_too: whether all arrays of three or more axes in it do, too.
    """

    check_function(apply)

    def is_kernel(name: str, leaf: Any) -> bool:
        return name in paths or (dense_too and _may_be_kernel(name, leaf))

    def run(*args: Any, **kwargs: Any) -> tuple[Any, Notes]:
        return _run(changed(apply), rule, args, kwargs, is_kernel)

    return run


def _never(name: str, leaf: Any) -> bool:
    return False


def _may_be_kernel(name: str, leaf: Any) -> bool:
    return leaf.ndim > 2


def _run(
    apply: Callable,
    rule: Rule,
    args: tuple,
    kwargs: dict[str, Any],
    is_kernel: Callable[[str, Any], bool],
) -> tuple[Any, Notes]:
    """The results of a function by a rule, and the notes; some dense arrays are kernels, too.

    A factor that stands decomposed itself is whole in the function that runs the others' program.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_pair)
    values = [leaf for _, leaf in leaves]
    names = names_in_arguments([path for path, _ in leaves])
    kernels = factored_kernels(names, values)
    shapes = [abstract(kernels[i]) if i in kernels else x for i, x in enumerate(values)]
    nested = _has_nested((args, kwargs))
    whole = functools.partial(_run_all, apply, rule) if nested else apply
    for index, (path, leaf) in enumerate(leaves):
        dense_one = index not in kernels and is_array(leaf) and path[:2] == FIRST
        if dense_one and is_kernel(names[index], leaf):
            kernels[index] = Kernel.dense(Source.of(names[index], leaf.shape), leaf)
    program = Program.of(whole, tree, shapes, kernels)
    found, notes = run_kernels(program, shapes, kernels, rule)
    results = program.rebuild(found)
    return (results[0], {**results[1], **notes}) if nested else (results, notes)


def _run_all(apply: Callable, rule: Rule, *args: Any, **kwargs: Any) -> tuple[Any, Notes]:
    """The results of a function by a rule for factors alone, and the notes."""
    return _run(apply, rule, args, kwargs, _never)


def _given_back(value: Any, source: Source | None, stored: Mapping[str, Kernel]) -> Any:
    """A result of a program; a kernel that the function returns as it came is still factors."""
    kernel = stored.get(source.path) if source and source.as_stored else None
    if isinstance(value, Kernel):
        kernel = value
    if kernel is None or kernel.factors is None or not kernel.source.as_stored:
        return dense(value)
    keys = factor_keys(kernel.first, kernel.axes, kernel.factors[0].ndim)
    dtype = value.dtype if isinstance(value, jax.Array) else None
    factors = [x if dtype is None else x.astype(dtype) for x in kernel.factors]
    return dict(zip(keys, factors, strict=True))


def factored_kernels(names: list[str], leaves: list) -> dict[int, Kernel]:
    """The factors among the leaves of a tree, by their number."""
    found: dict[int, Kernel] = {}
    for index, leaf in enumerate(leaves):
        if is_pair(leaf):
            pair, axes, first = read_factors(leaf, names[index])
            shape = dense_shape(pair[0].shape, pair[1].shape, axes)
            found[index] = Kernel.factored(Source.of(names[index], shape), axes, first, pair)
    return found


def abstract(kernel: Kernel) -> jax.ShapeDtypeStruct:
    """The dense kernel that factors stand for, without values."""
    assert kernel.factors is not None
    dtype = jax.numpy.result_type(*kernel.factors)
    sharding = dense_sharding(kernel.factors, kernel.axes)
    return jax.ShapeDtypeStruct(kernel.source.shape, dtype, sharding=sharding)


def run_kernels(
    program: Program, leaves: list, kernels: Mapping[int, Kernel], rule: Rule
) -> tuple[list, Notes]:
    """Runs a program in which some leaves are kernels, each in the form that the program needs."""
    sources = [kernels[i].source if i in kernels else None for i in program.inputs]
    survey = Survey.of(program.jaxpr, sources)
    prepared = {index: prepare(kernel, survey) for index, kernel in kernels.items()}
    inputs = [prepared.get(i, leaves[i]) for i in program.inputs]
    outputs, notes = interpret(program.closed, inputs, rule)
    stored = {kernel.source.path: kernel for kernel in kernels.values()}
    pairs = zip(outputs, survey.outputs, strict=True)
    return [_given_back(value, source, stored) for value, source in pairs], notes


def prepare(kernel: Kernel, survey: Survey) -> Any:
    """Factors where the program runs them, their product where it does not, both where it must."""
    if kernel.factors is None:
        return kernel
    path = kernel.source.path
    readings = [
        f.reading for f in survey.found if f.reading.source and f.reading.source.path == path
    ]
    runs = [kernel.runs(reading) for reading in readings]
    if not any(runs):
        return kernel.with_value().value
    return kernel if all(runs) and not survey.touched[path] else kernel.with_value()


@dataclasses.dataclass(frozen=True)
class LowRank(Rule):
    """Runs factors at the equations that read a kernel."""

    def apply(self, eqn: Any, values: list) -> tuple[list, Notes] | None:
        if eqn.primitive.name not in READERS:
            return None
        reading = Reading.of(eqn, sources_of(values))
        kernel = values[reading.operand]
        if not isinstance(kernel, Kernel) or kernel.factors is None:
            return None
        found = run_factored(reading, dense(values[1 - reading.operand]), kernel)
        return None if found is None else ([found], {})
