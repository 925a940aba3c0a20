"""Kernels that a program changes before it reads them: standardised, normalised, scaled, masked.

Where the change depends on parameters alone, the changed kernel is as good a parameter as the
stored one. It is computed once and decomposed, and its factors stand in a tree as ``{"changed":
factors}`` in the place of the stored kernel. A program for such a tree is cut: it reads the
changed kernel where it read what it had computed. So these trees are for evaluation. In training
the change would follow the stored kernel, which is gone.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import Literal, jaxpr_as_fun

from lowrank_jax.factorization.factors import is_factors, why_not_floating
from lowrank_jax.program.flat import flatten
from lowrank_jax.program.interpreter import bind
from lowrank_jax.program.jaxprs import beginning, check_function, constants, opened, values_of
from lowrank_jax.program.provenance import Source, moved
from lowrank_jax.program.reading import READERS
from lowrank_jax.program.survey import LOOPS, Survey
from lowrank_jax.program.traced import Program

KEY = "changed"
Names = frozenset[str]


def is_changed(node: Any) -> bool:
    """Whether a node of a tree stands for a kernel as the program changes it.

    Example:
        >>> is_changed({"changed": 1}), is_changed({"changed": 1, "bias": 2})
        (True, False)
        >>> is_changed({"changed": {"kernel": 1, "bias": 2}})  # a layer of that name
        False
    """
    if not isinstance(node, Mapping) or set(node) != {KEY}:
        return False
    return not isinstance(node[KEY], Mapping) or is_factors(node[KEY])


@dataclasses.dataclass(frozen=True, eq=False)
class ChangedKernels:
    """The kernels that a program computes from parameters alone, each in a parameter's place.

    Attributes:
        flat: the program as one list of equations, with its constants.
        inputs: name of a parameter to the input of the program that it is.
        roots: name of a parameter to the variable that is its changed kernel.
    """

    flat: Any
    inputs: Mapping[str, Any]
    roots: Mapping[str, Any]

    @classmethod
    def of(cls, program: Any, sources: Sequence[Source | None]) -> "ChangedKernels":
        """The changed kernels of a jaxpr with constants, whose inputs stem from these sources."""
        flat = flatten(program, sources, loops=False)
        pairs = zip(opened(flat).invars, sources, strict=True)
        inputs = {source.path: var for var, source in pairs if source is not None}
        found = cls(flat, inputs, _find_roots(flat, inputs))
        while lost := found._still_read():
            kept = {path: root for path, root in found.roots.items() if path not in lost}
            found = dataclasses.replace(found, roots=kept)
        return found

    def _still_read(self) -> set[str]:
        """The parameters whose stored kernels the cut program would read as well."""
        jaxpr = opened(self.flat)
        needed = _needed(jaxpr, jaxpr.outvars, set(self.roots.values()))
        read = {var for eqn in needed for var in _variables(eqn)}
        read.update(var for var in jaxpr.outvars if not isinstance(var, Literal))
        return {path for path in self.roots if self.inputs[path] in read}

    def cut(self, paths: Collection[str]) -> Any:
        """The program that reads the changed kernels at some paths as inputs.

        Raises:
            ValueError: the program does not change such a kernel, or not by parameters alone.
        """
        if missing := sorted(set(paths) - set(self.roots)):
            raise ValueError(
                f"{missing[0]}: the tree holds the kernel as another program changes it, and this "
                "program reads the stored kernel, or changes it by more than parameters. Call the "
                "model as it was traced, in evaluation, with arguments such as train=False."
            )
        jaxpr = opened(self.flat)
        starts = {self.roots[path]: self.inputs[path] for path in paths}
        needed = _needed(jaxpr, jaxpr.outvars, set(starts))

        def run(*inputs: jax.Array) -> list:
            known = beginning(self.flat, inputs)
            for root, stored in starts.items():
                known[root] = known[stored].astype(root.aval.dtype)
            return _run(needed, known, jaxpr.outvars)

        return jax.make_jaxpr(run)(*(var.aval for var in jaxpr.invars))

    def values(self, paths: Collection[str], leaves: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The changed kernels at some paths, in the types of the stored ones.

        Args:
            paths: of the layers.
            leaves: the parameters by name.

        Raises:
            ValueError: a parameter that a change depends on is missing.
        """
        jaxpr, roots = opened(self.flat), {path: self.roots[path] for path in paths}
        needed = _needed(jaxpr, roots.values(), set())
        read = {var for eqn in needed for var in _variables(eqn)}
        own = {name: var for name, var in self.inputs.items() if var in read or name in roots}
        if missing := sorted(set(own) - set(leaves)):
            raise ValueError(
                f"{next(iter(roots))}: the program changes this kernel by {missing[0]!r}, which "
                "the tree lacks; give all variables of the model, as they were traced."
            )

        @jax.jit
        def run(given: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            known = dict(zip(jaxpr.constvars, constants(self.flat), strict=True))
            known.update((own[name], value) for name, value in given.items())
            found = _run(needed, known, list(roots.values()))
            return {p: x.astype(given[p].dtype) for p, x in zip(roots, found, strict=True)}

        return run({name: leaves[name] for name in own})


def changed(apply: Callable) -> Callable:
    """A function of trees in which a kernel may stand as the program changes it.

    Args:
        apply: any function of arrays.

    Returns:
        A function of the same arguments. Where no kernel stands changed, it is the one given.
    """

    check_function(apply)

    @functools.wraps(apply)
    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_changed)
        if not any(is_changed(leaf) for _, leaf in leaves):
            return apply(*args, **kwargs)
        values = [leaf[KEY] if is_changed(leaf) else leaf for _, leaf in leaves]
        program = Program.of(apply, tree, values)
        trees = {path[:2] for path, leaf in leaves if is_changed(leaf)}
        sources = program.sources([path for path, _ in leaves], trees)
        kernels = ChangedKernels.of(program.closed, sources)
        pairs = zip(program.inputs, sources, strict=True)
        closed = kernels.cut([s.path for i, s in pairs if s and is_changed(leaves[i][1])])
        inputs = [values[i] for i in program.inputs]
        return program.rebuild(jaxpr_as_fun(closed)(*inputs))

    return run


def _find_roots(flat: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Name of a parameter to the one changed kernel that may stand in its place."""
    jaxpr = opened(flat)
    made_of = _made_of(jaxpr, inputs)
    producers = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    found: dict[str, set] = {}
    for operand in _operands(jaxpr, made_of):
        for root in _before_moves(operand, producers)[::-1]:
            if root in producers and (path := _stored_as(root, made_of[root], inputs)):
                found.setdefault(path, set()).add(root)
                break
    return {path: roots.pop() for path, roots in found.items() if len(roots) == 1}


def _made_of(jaxpr: Any, inputs: Mapping[str, Any]) -> dict[Any, Names]:
    """The variables that parameters and constants alone decide, and the parameters of each."""
    known: dict[Any, Names] = {var: frozenset() for var in jaxpr.constvars}
    known |= {var: frozenset([name]) for name, var in inputs.items()}
    for eqn in jaxpr.eqns:
        variables = _variables(eqn)
        if all(var in known for var in variables):
            own = frozenset[str]().union(*(known[var] for var in variables))
            known.update(dict.fromkeys(eqn.outvars, own))
    return known


def _operands(jaxpr: Any, made_of: Mapping[Any, Names]) -> list[Any]:
    """What convolutions and products of data read that parameters alone decide, be it in a loop."""
    found = []
    for eqn in jaxpr.eqns:
        if all(var in made_of for var in eqn.outvars):
            continue
        fixed = [var for var in _variables(eqn) if made_of.get(var)]
        if eqn.primitive.name in READERS:
            found += fixed if len(fixed) == 1 else []
        if eqn.primitive.name in LOOPS:
            found += [var for var in fixed if _is_read(eqn, var)]
    return found


def _is_read(eqn: Any, var: Any) -> bool:
    """Whether convolutions or products in a loop read a value, and nothing else does."""
    sources = [Source.of("", own.aval.shape) if own is var else None for own in eqn.invars]
    survey = Survey.of_equation(eqn, sources)
    read = [found.reading for found in survey.found if found.reading.source is not None]
    return bool(read) and not any(own.reason for own in read) and not survey.touched


def _before_moves(var: Any, producers: Mapping[Any, Any]) -> list[Any]:
    """The variables whose entries were moved, and not changed, to give this one, which is first."""
    found = [var]
    while (eqn := producers.get(var)) is not None and len(_variables(eqn)) == 1:
        own = eqn.invars[0]
        if isinstance(own, Literal) or moved(eqn, Source.of("", own.aval.shape)) is None:
            break
        var = own
        found.append(var)
    return found


def _stored_as(root: Any, names: Names, inputs: Mapping[str, Any]) -> str | None:
    """The parameter in whose place a changed kernel may stand: one of its shape."""
    fitting = [
        name
        for name in inputs
        if name in names
        and inputs[name].aval.shape == root.aval.shape
        and not why_not_floating(inputs[name].aval.dtype)
    ]
    # A mask or a scale of the kernel's own shape has the longer name.
    return min(fitting, key=len, default=None)


def _needed(jaxpr: Any, results: Collection[Any], given: set) -> list[Any]:
    """The equations that some results need where some variables are given."""
    wanted = {var for var in results if not isinstance(var, Literal)} - given
    found = []
    for eqn in reversed(jaxpr.eqns):
        if not wanted.isdisjoint(eqn.outvars):
            found.append(eqn)
            wanted.update(var for var in _variables(eqn) if var not in given)
    return found[::-1]


def _variables(eqn: Any) -> list[Any]:
    return [var for var in eqn.invars if not isinstance(var, Literal)]


def _run(eqns: Sequence[Any], known: dict[Any, Any], results: Sequence[Any]) -> list:
    """Runs equations as they stand; what is given of their results stays."""
    for eqn in eqns:
        found = zip(eqn.outvars, bind(eqn, values_of(eqn.invars, known)), strict=True)
        known.update((var, value) for var, value in found if var not in known)
    return values_of(results, known)
