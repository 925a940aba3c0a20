"""A scale of each channel after a convolution becomes part of the kernel."""

import math
import operator
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from lowrank_jax.program.rewriting import Part, Read, rewritten

_MAPS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


def folded(fn: Callable) -> Callable:
    """A function that computes what another function does, with scales multiplied into kernels.

    A batch normalisation in evaluation is a shift, a scale and a shift for each channel. After a
    convolution, ``(x * w - mean) * scale + bias`` is ``x * (w scale) + (bias - mean scale)``. What
    is left is a convolution and a bias, which oneDNN on a CPU computes as one, with the activation
    and the sum of a residual block. The numbers differ by rounding alone. A kernel that has more
    numbers than the outputs stays as it is. So does a convolution whose scale is computed in
    another type: Flax normalises half precision in float32.

    Args:
        fn: function of trees of arrays that gives a tree of arrays.

    Example:
        >>> from flax import linen as nn
        >>> import jax
        >>> norm = nn.BatchNorm(use_running_average=True)
        >>> model = nn.Sequential([nn.Conv(4, (3, 3)), norm, nn.relu])
        >>> images = jnp.ones((1, 8, 8, 3))
        >>> variables = model.init(jax.random.key(0), images)
        >>> wanted, found = (run(variables, images) for run in (model.apply, folded(model.apply)))
        >>> jnp.allclose(wanted, found, atol=1e-5).item()
        True
    """
    return rewritten(fn, _parts)


def _parts(program: Any) -> list[Part]:
    readers = defaultdict(list)
    for eqn in program.eqns:
        for var in eqn.invars:
            readers[id(var)].append(eqn)
    for var in program.outvars:
        readers[id(var)].append(None)
    convolutions = (eqn for eqn in program.eqns if eqn.primitive.name == "conv_general_dilated")
    maps = [_maps(eqn, readers) for eqn in convolutions]
    return [_part(own) for own in maps if any(eqn.primitive.name == "mul" for eqn, _ in own[1:])]


def _maps(conv: Any, readers: Any) -> list[tuple]:
    """A convolution, and the equations after it that shift or scale its channels.

    Each equation comes with the variable by which it does.
    """
    found, out, kernel = [(conv, None)], conv.outvars[0], conv.invars[1].aval
    if kernel.dtype != out.aval.dtype or kernel.size > out.aval.size:
        return found
    axis = conv.params["dimension_numbers"].out_spec[1]
    while len(after := readers[id(out)]) == 1 and (by := _by_channel(after[0], out, axis)):
        found.append((after[0], by))
        out = after[0].outvars[0]
    return found


def _by_channel(eqn: Any, var: Any, axis: int) -> Any:
    """What an equation shifts or scales an array by, if that is one number for each channel."""
    if eqn is None or eqn.primitive.name not in _MAPS:
        return None
    if eqn.primitive.name == "sub" and eqn.invars[0] is not var:
        return None
    other = eqn.invars[1] if eqn.invars[0] is var else eqn.invars[0]
    shape = other.aval.shape
    return other if not shape or math.prod(shape) == shape[axis] else None


def _part(maps: list[tuple]) -> Part:
    conv = maps[0][0]

    def run(read: Read) -> list:
        scale, shift = 1.0, 0.0
        for eqn, by in maps[1:]:
            name, value = eqn.primitive.name, read(by)
            scale = scale * value if name == "mul" else scale
            shift = _MAPS[name](shift, value)
        x, kernel = map(read, conv.invars)
        features = conv.params["dimension_numbers"].rhs_spec[0]
        along = [-1 if axis == features else 1 for axis in range(kernel.ndim)]
        scaled = kernel * jnp.reshape(scale, along)
        with conv.ctx.manager:
            return [conv.primitive.bind(x, scaled, **conv.params) + shift]

    return Part([eqn for eqn, _ in maps], run)
