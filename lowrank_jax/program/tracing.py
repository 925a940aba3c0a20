"""`trace`: what becomes of every kernel, read from the program of a forward pass."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lowrank_jax.factorization.factors import is_factors, why_not_floating
from lowrank_jax.program.changed import ChangedKernels
from lowrank_jax.program.jaxprs import check_function
from lowrank_jax.program.kernel_use import KernelUse, Trace
from lowrank_jax.program.provenance import Source
from lowrank_jax.program.survey import CountedReading, OtherProduct, Survey
from lowrank_jax.program.traced import Program, traced

NEEDED = (
    "Give inputs of the shape and the type that the model is for, the variables of this model, and "
    "the arguments of its call for evaluation, such as train=False. A model of Equinox goes "
    "through eqx.nn.inference_mode first."
)
FACTORS = (
    "The variables hold factors; give lowrank(apply) as the function, or reconstruct(variables)."
)


def trace(apply: Callable, variables: Any, *args: Any, **kwargs: Any) -> Trace:
    """Lists every convolution and matrix product of a forward pass; nothing is computed.

    Follows ``jit``, ``custom_jvp``, ``custom_vjp``, ``remat``, ``shard_map``, ``scan`` (counted
    once an iteration), ``while`` (one iteration) and ``cond`` (every branch). A kernel that is
    converted to another type, transposed, reversed, one of a stack that is scanned, sliced or
    vmapped, or joined with others along the outputs still counts as unaltered. So does one that the
    program changes by parameters alone, as weight standardisation, weight and spectral norm, masks
    and scales do: then the changed kernel is decomposed, for evaluation. Any other operation on a
    kernel is named.

    Args:
        apply: function (variables, *args, **kwargs), such as ``model.apply``. If the function has a
            true attribute ``stored_kernels``, a kernel that its program changes first counts as
            altered.
        variables: pytree of arrays or `jax.ShapeDtypeStruct`, of any framework's shape.
        *args, **kwargs: the other arguments; macs are for this batch size. What is no array, such
            as ``train=False``, stays as it is.

    Returns:
        One entry for each kernel and each geometry that it is used with, in program order.

    Raises:
        Exception: the function's own, with a note, where it does not run on the arguments.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> model, images = nn.Conv(16, (3, 3)), jnp.zeros((1, 8, 8, 4))
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
        >>> trace(model.apply, variables, images).macs
        36864
    """
    check_function(apply, variables)
    try:
        program, leaves, arrays = traced(apply, variables, args, kwargs)
    except Exception as error:
        needed = FACTORS if any(map(is_factors, _kernels(variables))) else NEEDED
        error.add_note(f"The function did not run while lowrank_jax.trace followed it. {needed}")
        raise
    sources = program.sources([path for path, _ in leaves])
    pairs = zip(sources, arrays.values(), strict=True)
    types = {source.path: why_not_floating(x.dtype) for source, x in pairs if source}
    survey = Survey.of(program.jaxpr, sources)
    stored = getattr(apply, "stored_kernels", False)
    kernels = None if stored else _changed(survey, program, sources)
    if kernels is None:
        return Trace(tuple(_rows(survey, types)))
    cut = Survey.of(kernels.cut(kernels.roots), sources)
    return Trace(tuple(_rows(cut, types, kernels.roots)), kernels)


def _kernels(variables: Any) -> list:
    """The leaves of a tree, factors of a kernel as one."""
    return jax.tree.leaves(variables, is_leaf=is_factors)


def _changed(
    survey: Survey, program: Program, sources: Sequence[Source | None]
) -> ChangedKernels | None:
    """The kernels that the program changes first by parameters alone; None if it has none."""
    if not any(found.reading.reason and found.reading.source for found in survey.found):
        return None
    kernels = ChangedKernels.of(program.closed, sources)
    return kernels if kernels.roots else None


def _rows(
    survey: Survey, types: Mapping[str, str], changed: Collection[str] = ()
) -> list[KernelUse]:
    uses: dict[tuple, KernelUse] = {}
    for use in map(_use, survey.products):
        use = dataclasses.replace(use, changed=use.path in changed)
        same = dataclasses.replace(use, uses=0, macs=0, bytes=0)
        key = (same, None if use.path else len(uses))  # computed kernels stay apart
        uses[key] = _sum(uses[key], use) if key in uses else use
    layouts: dict[str, set[str]] = defaultdict(set)
    for use in uses.values():
        layouts[use.path].add(use.axes)
    return [
        dataclasses.replace(use, reason=_reason(use, survey, types) or _two_layouts(use, layouts))
        for use in uses.values()
    ]


def _two_layouts(use: KernelUse, layouts: Mapping[str, set[str]]) -> str:
    """Why a matrix that is contracted along other axes elsewhere has no one set of factors."""
    own = sorted(layouts[use.path]) if use.path else []
    mixed = len(own) > 1 and any("W" not in axes for axes in own)
    return f"its kernel is read in the layouts {' and '.join(own)}" if mixed else ""


def _reason(use: KernelUse, survey: Survey, types: Mapping[str, str]) -> str:
    empty = "" if math.prod(use.kernel_shape) else "its kernel has no entries"
    own = types.get(use.path, "") or use.reason or empty
    return own or other_use(survey.touched[use.path])


def _sum(one: KernelUse, two: KernelUse) -> KernelUse:
    fields = ("uses", "macs", "bytes")
    sums = {field: getattr(one, field) + getattr(two, field) for field in fields}
    return dataclasses.replace(one, **sums)


def other_use(operations: Sequence[str]) -> str:
    """Why a kernel that other operations touch cannot be decomposed; "" if there are none."""
    names = list(dict.fromkeys(operations))
    return f"its kernel is also used by {', '.join(names)}" if names else ""


def _use(found: CountedReading | OtherProduct) -> KernelUse:
    if isinstance(found, OtherProduct):
        return _other_product(found)
    return _convolution(found) if found.reading.is_convolution else _product(found)


def _convolution(found: CountedReading) -> KernelUse:
    reading, repeats = found.reading, found.repeats
    params, spec = reading.eqn.params, reading.eqn.params["dimension_numbers"]
    x, kernel, out = (v.aval for v in (*reading.eqn.invars, *reading.eqn.outvars))
    source, layout, reason = reading.source, reading.layout, reading.reason
    stored = source.shape if source and not reason else kernel.shape
    macs = math.prod(out.shape) * math.prod(kernel.shape) // kernel.shape[spec.rhs_spec[0]]
    macs //= math.prod(params["lhs_dilation"])  # zeros between the inputs are not multiplied
    together = 1 if reading.shared else reading.stack
    return KernelUse(
        path=source.path if source else "",
        kind="conv_transpose" if max(params["lhs_dilation"], default=1) > 1 else "conv",
        kernel_shape=tuple(stored),
        axes=layout.axes,
        strides=tuple(params["window_strides"]),
        dilation=tuple(params["rhs_dilation"]),
        input_dilation=tuple(params["lhs_dilation"]),
        padding=tuple(map(tuple, params["padding"])),
        groups=reading.groups if not reason else params["feature_group_count"],
        inputs=_channels_last(x.shape, spec.lhs_spec, together),
        outputs=_channels_last(out.shape, spec.out_spec, reading.stack),
        uses=repeats * reading.stack,
        macs=repeats * macs,
        bytes=repeats * _bytes(x, kernel, out),
        count=found.count,
        reason=reason,
        dtype=np.dtype(x.dtype).name,
    )


def _channels_last(shape: Sequence[int], spec: Sequence[int], stack: int) -> tuple[int, ...]:
    batch, channels, *spatial = spec
    return (shape[batch], *(shape[axis] for axis in spatial), shape[channels] // stack)


def _product(found: CountedReading) -> KernelUse:
    reading, repeats = found.reading, found.repeats
    eqn, operand, source = reading.eqn, reading.operand, reading.source
    (contracting, _), out = eqn.params["dimension_numbers"], eqn.outvars[0].aval
    kernel, other = eqn.invars[operand].aval, eqn.invars[1 - operand].aval
    macs = math.prod(out.shape) * math.prod(kernel.shape[axis] for axis in contracting[operand])
    return _use_of_product(
        found,
        source,
        (other, kernel, out),
        kernel_shape=tuple(source.shape if source and not reading.reason else kernel.shape),
        axes=reading.layout.axes,
        uses=repeats * reading.stack,
        macs=repeats * macs,
        reason=reading.reason,
    )


def _other_product(found: OtherProduct) -> KernelUse:
    numbers = found.eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    x, kernel = (var.aval for var in found.eqn.invars[:2])
    known = {*contracted, *batch, *numbers.rhs_group_dimensions}
    width = math.prod(size for axis, size in enumerate(kernel.shape) if axis not in known)
    return _use_of_product(
        found,
        found.source,
        (x, kernel, found.eqn.outvars[0].aval),
        kernel_shape=tuple(kernel.shape),
        axes="",
        uses=found.repeats,
        macs=found.repeats * math.prod(x.shape) * width,
        reason="it is a product of groups of rows, which factors cannot run in",
    )


def _use_of_product(
    found: CountedReading | OtherProduct, source: Source | None, avals: Sequence[Any], **facts: Any
) -> KernelUse:
    """The use of a matrix, which has no taps; the avals are those of x, of the matrix and of y."""
    x, _, out = avals
    return KernelUse(
        path=source.path if source else "",
        kind="product",
        strides=(),
        dilation=(),
        input_dilation=(),
        padding=(),
        groups=1,
        inputs=tuple(x.shape),
        outputs=tuple(out.shape),
        bytes=found.repeats * _bytes(*avals),
        count=found.count,
        dtype=np.dtype(x.dtype).name,
        **facts,
    )


def _bytes(*avals: Any) -> int:
    return sum(math.prod(aval.shape) * np.dtype(aval.dtype).itemsize for aval in avals)
