"""A read-only walk over the jaxpr of a forward pass: what becomes of every kernel."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Literal

from lowrank_jax.factorization.layout import AXES
from lowrank_jax.program.jaxprs import opened, programs, traced
from lowrank_jax.program.kernel_use import KernelUse, Trace
from lowrank_jax.program.provenance import Source, layout, moved, name, sliced

UNALTERED = ("convert_element_type", "copy", "optimization_barrier", "sharding_constraint")
LOOPS = {"scan": "exact", "while": "per iteration", "cond": "at most"}


def trace(apply: Callable, variables: Any, *args: Any, **kwargs: Any) -> Trace:
    """Lists every convolution and matrix product of a forward pass; nothing is computed.

    Follows ``jit``, ``custom_jvp``, ``custom_vjp``, ``remat``, ``scan`` (counted once an
    iteration), ``while`` (one iteration) and ``cond`` (every branch). A kernel that is converted to
    another type, transposed, or one of a stack that is scanned or vmapped still counts as
    unaltered; any other operation on it is named.

    Args:
        apply: function (variables, *args, **kwargs), such as ``model.apply``.
        variables: pytree of arrays or `jax.ShapeDtypeStruct`, in any framework's shape.
        *args, **kwargs: the other arguments; macs are for this batch size. What is no
            array, such as ``train=False``, stays as it is.

    Returns:
        One entry for each kernel and each geometry that it is used with, in program order.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> model, images = nn.Conv(16, (3, 3)), jnp.zeros((1, 8, 8, 4))
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
        >>> trace(model.apply, variables, images).macs
        36864
    """
    jaxpr, leaves, arrays = traced(apply, variables, args, kwargs)
    sources = [_source(leaves[i][0], leaf.shape) for i, leaf in arrays.items()]
    walk = _Walk()
    walk.follow(jaxpr, sources, 1, "exact")
    return Trace(tuple(walk.rows()))


def _source(path: Sequence[Any], shape: tuple[int, ...]) -> Source | None:
    index, *rest = path  # 0 for the variables, 1 and 2 for the other arguments
    return (
        Source(name(rest), shape, tuple((axis,) for axis in range(len(shape))))
        if index.idx == 0
        else None
    )


class _Walk:
    """Collects the uses of kernels, and the other operations that touch them."""

    def __init__(self) -> None:
        self.found: dict[tuple, KernelUse] = {}
        self.touched: dict[str, list[str]] = defaultdict(list)

    def rows(self) -> list[KernelUse]:
        uses = self.found.values()
        return [
            dataclasses.replace(use, reason=use.reason or self._other_use(use.path)) for use in uses
        ]

    def _other_use(self, path: str) -> str:
        names = list(dict.fromkeys(self.touched[path]))
        return f"its kernel is also used by {', '.join(names)}" if names else ""

    def follow(
        self, jaxpr, sources: Sequence[Source | None], repeats: int, count: str
    ) -> list[Source | None]:
        """Walks one program, whose inputs stem from the sources, and returns those of its
        outputs."""
        known = {var: source for var, source in zip(jaxpr.invars, sources, strict=True) if source}
        for eqn in jaxpr.eqns:
            inputs = [None if isinstance(var, Literal) else known.get(var) for var in eqn.invars]
            outputs = self._step(eqn, inputs, repeats, count)
            known |= {
                var: source for var, source in zip(eqn.outvars, outputs, strict=True) if source
            }
        return [None if isinstance(var, Literal) else known.get(var) for var in jaxpr.outvars]

    def _step(
        self, eqn, inputs: list[Source | None], repeats: int, count: str
    ) -> list[Source | None]:
        operation = eqn.primitive.name
        if operation in ("conv_general_dilated", "dot_general"):
            self._record(
                _conv if operation == "conv_general_dilated" else _product,
                eqn,
                inputs,
                repeats,
                count,
            )
            return [None] * len(eqn.outvars)
        if operation in LOOPS:
            return self._loop(eqn, inputs, repeats, LOOPS[operation] if count == "exact" else count)
        for inner in programs(eqn.params):
            if len(inner.invars) == len(inputs) and len(inner.outvars) == len(eqn.outvars):
                return self.follow(inner, inputs, repeats, count)
        if operation in UNALTERED and len(inputs) == len(eqn.outvars):
            return inputs
        if inputs and inputs[0] and inputs[0].dims and (now := moved(eqn, inputs[0])):
            return [now]
        return self._change(eqn, inputs)

    def _record(self, kind: Callable, eqn, inputs, repeats: int, count: str) -> None:
        use, operand = kind(eqn, inputs, repeats, count)
        for index, source in enumerate(inputs):
            if source and index != operand:
                self.touched[source.path].append(eqn.primitive.name)
        same = dataclasses.replace(use, uses=0, macs=0, bytes=0)
        key = (same, None if use.path else len(self.found))  # computed kernels stay apart
        if old := self.found.get(key):
            sums = {
                field: getattr(old, field) + getattr(use, field)
                for field in ("uses", "macs", "bytes")
            }
            use = dataclasses.replace(use, **sums)
        self.found[key] = use

    def _loop(self, eqn, inputs, repeats: int, count: str) -> list[Source | None]:
        params, results = eqn.params, []
        if eqn.primitive.name == "scan":
            fixed, carried = _parts(eqn, opened(params["jaxpr"]))
            inside = [x and (sliced(x) if i >= carried else x.after("the carry of a scan") if i >= fixed else x)
                      for i, x in enumerate(inputs)]  # fmt: skip
            results += self.follow(
                opened(params["jaxpr"]), inside, repeats * params["length"], count
            )
        elif eqn.primitive.name == "while":
            test, body = params["cond_nconsts"], params["body_nconsts"]
            carry = [x and x.after("the carry of a while") for x in inputs[test + body :]]
            self.follow(opened(params["cond_jaxpr"]), inputs[:test] + carry, repeats, count)
            results += self.follow(
                opened(params["body_jaxpr"]), inputs[test : test + body] + carry, repeats, count
            )
        else:
            for branch in params["branches"]:
                results += self.follow(opened(branch), inputs[1:], repeats, count)
        for source in filter(None, results):
            self.touched[source.path].append(eqn.primitive.name)
        return [None] * len(eqn.outvars)

    def _change(self, eqn, inputs) -> list[Source | None]:
        """Any other operation: what has as many entries as the parameter may be its altered
        kernel."""
        operation, outputs = eqn.primitive.name, []
        sources = [source for source in inputs if source]
        for source in sources:
            if source.dims is not None:
                self.touched[source.path].append(operation)
        for var in eqn.outvars:
            sized = [
                s
                for s in sources
                if math.prod(s.shape) == math.prod(getattr(var.aval, "shape", ()))
            ]
            outputs.append(sized[0].after(operation) if sized and len(sized[0].shape) > 1 else None)
        return outputs


def _parts(eqn, body) -> tuple[int, int]:
    """Where the carry of a scan starts and ends among its inputs.

    Only what is sliced or stacked has another number of axes inside than outside; JAX generations
    name the counts differently.
    """
    end = sum(a.aval.ndim == b.aval.ndim for a, b in zip(body.invars, eqn.invars, strict=True))
    carry = sum(a.aval.ndim == b.aval.ndim for a, b in zip(body.outvars, eqn.outvars, strict=True))
    return end - carry, end


def _conv(eqn, inputs, repeats: int, count: str) -> tuple[KernelUse, int]:
    params, spec = eqn.params, eqn.params["dimension_numbers"]
    x, kernel, out = eqn.invars[0].aval, eqn.invars[1].aval, eqn.outvars[0].aval
    source, letters = inputs[1], AXES.get(kernel.ndim - 2, "")[:-2]
    axes, stack, reason = layout(source, dict(zip(spec.rhs_spec, "OI" + letters, strict=False)))
    groups = params["feature_group_count"]
    shared = (
        groups == 1
    )  # the kernels of a stack have the same input: their outputs stand side by side
    if (groups % stack and not shared) or params["batch_group_count"] != 1 or not letters:
        reason = reason or "it is a convolution of a kind that cannot be separated"
    inputs_of_one = _channels_last(x.shape, spec.lhs_spec, 1 if shared else stack)
    adds = math.prod(out.shape) * math.prod(kernel.shape) // kernel.shape[spec.rhs_spec[0]]
    use = KernelUse(
        path=source.path if source else "",
        kind="conv_transpose" if max(params["lhs_dilation"], default=1) > 1 else "conv",
        kernel_shape=tuple(source.shape if source and not reason else kernel.shape),
        axes=axes,
        strides=tuple(params["window_strides"]),
        dilation=tuple(params["rhs_dilation"]),
        input_dilation=tuple(params["lhs_dilation"]),
        padding=tuple(map(tuple, params["padding"])),
        groups=1 if shared else groups // stack,
        inputs=inputs_of_one,
        outputs=_channels_last(out.shape, spec.out_spec, stack),
        uses=repeats * stack,
        macs=repeats * adds,
        bytes=repeats * _bytes(x, kernel, out),
        count=count,
        reason=reason,
        dtype=np.dtype(x.dtype).name,
    )
    return use, 1


def _channels_last(shape: Sequence[int], spec: Sequence[int], stack: int) -> tuple[int, ...]:
    batch, channels, *spatial = spec
    return (shape[batch], *(shape[axis] for axis in spatial), shape[channels] // stack)


def _product(eqn, inputs, repeats: int, count: str) -> tuple[KernelUse, int]:
    (contracting, _), out = eqn.params["dimension_numbers"], eqn.outvars[0].aval
    operand = next((i for i in (1, 0) if inputs[i]), 1)
    kernel, other, source = eqn.invars[operand].aval, eqn.invars[1 - operand].aval, inputs[operand]
    adds = math.prod(out.shape) * math.prod(kernel.shape[axis] for axis in contracting[operand])
    use = KernelUse(
        path=source.path if source else "",
        kind="product",
        kernel_shape=tuple(kernel.shape),
        axes="",
        strides=(),
        dilation=(),
        input_dilation=(),
        padding=(),
        groups=1,
        inputs=tuple(other.shape),
        outputs=tuple(out.shape),
        uses=repeats,
        macs=repeats * adds,
        bytes=repeats * _bytes(eqn.invars[0].aval, eqn.invars[1].aval, out),
        count=count,
        reason="it is a matrix product, not a convolution",
        dtype=np.dtype(other.dtype).name,
    )
    return use, operand


def _bytes(*avals: Any) -> int:
    return sum(math.prod(aval.shape) * np.dtype(aval.dtype).itemsize for aval in avals)
