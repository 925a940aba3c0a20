"""One read-only pass over a program: the equations that read a kernel, and what else touches it."""

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from jax.extend.core import Literal

from lowrank_jax.program.interpreter import CALLS
from lowrank_jax.program.jaxprs import opened, programs, scan_parts
from lowrank_jax.program.provenance import EACH, UNALTERED, Source, moved
from lowrank_jax.program.reading import READERS, Reading

LOOPS = {"scan": "exact", "while": "per iteration", "cond": "at most"}
RAGGED = "ragged_dot_general"
TRANSPARENT = ("jit", "closed_call", "core_call", "remat2", "checkpoint")  # a kernel passes
Sources = list[Source | None]


@dataclasses.dataclass(frozen=True)
class CountedReading:
    """A reading, how often it runs in one call of the program, and how sure that count is."""

    reading: Reading
    repeats: int
    count: str


@dataclasses.dataclass(frozen=True)
class OtherProduct:
    """A product of groups of rows, each with a matrix of its own; factors cannot run in it."""

    eqn: Any
    source: Source | None
    repeats: int
    count: str


class Survey:
    """What a program does with its kernels.

    Attributes:
        products: the readings, and products of other kinds, in program order.
        touched: path of a kernel to the operations that use it in another way.
        outputs: sources of what the program gives.
    """

    def __init__(self) -> None:
        self.products: list[CountedReading | OtherProduct] = []
        self.touched: dict[str, list[str]] = defaultdict(list)
        self.outputs: Sources = []

    @functools.cached_property
    def found(self) -> list[CountedReading]:
        """The readings in program order."""
        return [each for each in self.products if isinstance(each, CountedReading)]

    @classmethod
    def of(cls, program: Any, sources: Sequence[Source | None]) -> "Survey":
        """The survey of a jaxpr whose inputs stem from these sources."""
        survey = cls()
        survey.outputs = survey._follow(program, sources, 1, "exact")
        moved = [s for s in survey.outputs if s is not None and not s.as_stored]
        survey._touch(moved, "the output of the program")
        return survey

    @classmethod
    def of_equation(cls, eqn: Any, sources: Sources) -> "Survey":
        """The survey of one equation, such as a loop, whose operands stem from these sources."""
        survey = cls()
        survey._step(eqn, sources, 1, "exact")
        return survey

    def _follow(self, program: Any, sources: Sequence, repeats: int, count: str) -> Sources:
        """Passes one program, and returns the sources of its outputs."""
        jaxpr = opened(program)
        known = dict(zip(jaxpr.invars, sources, strict=True))

        def read(var: Any) -> Source | None:
            return None if isinstance(var, Literal) else known.get(var)

        for eqn in jaxpr.eqns:
            inputs = [read(var) for var in eqn.invars]
            outputs = self._step(eqn, inputs, repeats, count)
            known.update(zip(eqn.outvars, outputs, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def _step(self, eqn: Any, inputs: Sources, repeats: int, count: str) -> Sources:
        operation = eqn.primitive.name
        if operation in READERS:
            return self._read(eqn, inputs, repeats, count)
        if operation == RAGGED:
            self.products.append(OtherProduct(eqn, inputs[1], repeats, count))
        if operation in LOOPS:
            return self._loop(eqn, inputs, repeats, LOOPS[operation] if count == "exact" else count)
        for inner in programs(eqn.params):
            if len(inner.invars) == len(inputs) and len(inner.outvars) == len(eqn.outvars):
                results = self._follow(inner, self._entering(eqn, inputs), repeats, count)
                return results if operation in TRANSPARENT else self._as_numbers(results, operation)
        if operation in EACH:
            return inputs
        now = moved(eqn, inputs[0]) if inputs and inputs[0] else None
        if now is not None:
            self._touch(inputs[1:], operation)
            return [now]
        return self._change(eqn, inputs)

    def _read(self, eqn: Any, inputs: Sources, repeats: int, count: str) -> Sources:
        reading = Reading.of(eqn, inputs)
        self._touch([s for i, s in enumerate(inputs) if i != reading.operand], eqn.primitive.name)
        self.products.append(CountedReading(reading, repeats, count))
        return [None] * len(eqn.outvars)

    def _entering(self, eqn: Any, inputs: Sources) -> Sources:
        """Devices may have parts of a kernel, which are other kernels."""
        operation = eqn.primitive.name
        if operation not in CALLS:
            return self._as_numbers(inputs, operation)
        if operation != "shard_map":
            return inputs
        specs = zip(inputs, eqn.params["in_specs"], strict=True)
        return [self._as_numbers([s], operation)[0] if any(spec) else s for s, spec in specs]

    def _loop(self, eqn: Any, inputs: Sources, repeats: int, count: str) -> Sources:
        params, results = eqn.params, []
        if eqn.primitive.name == "scan":
            return self._scan(eqn, inputs, repeats, count)
        if eqn.primitive.name == "while":
            test, body = params["cond_nconsts"], params["body_nconsts"]
            carry = self._as_numbers(inputs[test + body :], "the carry of a while")
            self._follow(params["cond_jaxpr"], inputs[:test] + carry, repeats, count)
            fixed = inputs[test : test + body]
            results += self._follow(params["body_jaxpr"], fixed + carry, repeats, count)
        else:
            for branch in params["branches"]:
                results += self._follow(branch, inputs[1:], repeats, count)
        self._touch(results, eqn.primitive.name)
        return [None] * len(eqn.outvars)

    def _scan(self, eqn: Any, inputs: Sources, repeats: int, count: str) -> Sources:
        """What the body hands on of each part of a stack is the stack again."""
        params, (start, end) = eqn.params, scan_parts(eqn)
        carry = self._as_numbers(inputs[start:end], "the carry of a scan")
        parts = [self._entry(s) for s in inputs[end:]]
        inside = [*inputs[:start], *carry, *parts]
        results = self._follow(params["jaxpr"], inside, repeats * params["length"], count)
        pairs = zip(parts, inputs[end:], strict=True)
        whole = {part: s for part, s in pairs if part is not None and part.dims is not None}
        outputs = [*[None] * len(carry), *map(whole.get, results[len(carry) :])]  # type: ignore[arg-type]
        changed = [s for s, same in zip(results, outputs, strict=True) if same is None]
        self._touch(changed, "scan")
        return outputs

    def _as_numbers(self, sources: Sources, operation: str) -> Sources:
        """What an operation gives that takes numbers, not a kernel."""
        self._touch(sources, operation)
        return [source and source.after(operation) for source in sources]

    def _entry(self, source: Source | None) -> Source | None:
        """One entry along the first axis, as a scan hands it to its body."""
        if source is None or (source.dims and len(source.dims[0]) == 1):
            return source and source.entry(0, None, keep=False)
        return self._as_numbers([source], "scan")[0]

    def _touch(self, sources: Sequence[Source | None], operation: str) -> None:
        for source in sources:
            if source is not None and source.dims is not None:
                self.touched[source.path].append(operation)

    def _change(self, eqn: Any, inputs: Sources) -> Sources:
        """Any other operation: what is as large as a kernel may be that kernel, altered."""
        operation = eqn.primitive.name
        self._touch(inputs, operation)
        known = [(v, s) for v, s in zip(eqn.invars, inputs, strict=True) if s is not None]
        return [_altered(var, known, operation) for var in eqn.outvars]


def _altered(var: Any, known: list[tuple[Any, Source]], operation: str) -> Source | None:
    size, ndim = _size(var), len(getattr(var.aval, "shape", ()))
    matrices = [pair for pair in known if ndim > 1 and len(pair[1].shape) > 1]
    same = [source for operand, source in matrices if _size(operand) == size]
    if not same:
        return None
    return same[0] if operation in UNALTERED and same[0].dims is None else same[0].after(operation)


def _size(var: Any) -> int:
    return math.prod(getattr(var.aval, "shape", ()))
