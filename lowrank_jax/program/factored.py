"""The equations that read a kernel, run with its factors."""

import math
import string
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.program.kernel import Kernel
from lowrank_jax.program.provenance import Source
from lowrank_jax.program.reading import Reading, factor_axes, stored_letters


def run_factored(reading: Reading, x: jax.Array, kernel: Kernel) -> jax.Array | None:
    """Runs two operations in place of one; None where the kernel has to be multiplied back.

    Args:
        reading: of the equation.
        x: the other operand.
        kernel: has factors.
    """
    order = reading.order(kernel.axes, kernel.groups)
    if order is None or kernel.factors is None:
        return None
    if reading.is_convolution:
        return _two_convolutions(reading, x, kernel, order)
    return _two_products(reading, x, kernel)


def _two_convolutions(
    reading: Reading, x: jax.Array, kernel: Kernel, order: tuple[int, int]
) -> jax.Array:
    params = reading.eqn.params
    taps = factor_axes(kernel.axes, kernel.first)
    assert kernel.factors is not None
    for step, index in enumerate(order):
        last = step == 1
        factor = arranged(reading, kernel.factors[index])
        own = own_axes(reading, kernel, taps[index])
        x = jax.lax.conv_general_dilated(
            x,
            factor,
            window_strides=_only(own, params["window_strides"], 1),
            padding=_only(own, params["padding"], (0, 0)),
            lhs_dilation=_only(own, params["lhs_dilation"], 1),
            rhs_dilation=_only(own, params["rhs_dilation"], 1),
            dimension_numbers=params["dimension_numbers"] if last else _kept_order(params),
            feature_group_count=_groups(reading, last),
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"] if last else None,
            **({"out_sharding": params["out_sharding"]} if last and _placed(params) else {}),
        )
    return x


def _placed(params: dict[str, Any]) -> bool:
    return params.get("out_sharding") is not None


def _kept_order(params: dict[str, Any]) -> Any:
    """The first convolution gives its outputs in the order of the inputs."""
    numbers = params["dimension_numbers"]
    return jax.lax.ConvDimensionNumbers(numbers.lhs_spec, numbers.rhs_spec, numbers.lhs_spec)


def _groups(reading: Reading, last: bool) -> int:
    """Kernels of a stack that read the same channels have an input each from the first one on."""
    count: int = reading.eqn.params["feature_group_count"]
    return reading.stack if last and reading.shared else count


def _only(own: Sequence[bool], values: Sequence, other: Any) -> tuple:
    return tuple(value if mine else other for mine, value in zip(own, values, strict=True))


def own_axes(reading: Reading, kernel: Kernel, taps: str) -> list[bool]:
    """Which of the operation's spatial axes a factor with these taps has."""
    stored = stored_letters(kernel.source, kernel.axes)
    places = dict(reading.layout.places)
    spatial = [reading.letters[axis] for axis in _spatial(reading)]
    return [stored[places[letter]] in taps for letter in spatial]


def _spatial(reading: Reading) -> Sequence[int]:
    return reading.eqn.params["dimension_numbers"].rhs_spec[2:]


def arranged(reading: Reading, array: jax.Array) -> jax.Array:
    """A stored kernel, or a factor of it, with the axes that an equation reads."""
    source, layout = reading.source, reading.layout
    assert source is not None
    kept, places = source.kept(), dict(layout.places)
    for axis in source.flips:
        if array.shape[kept.index(axis)] == source.shape[axis]:
            array = jnp.flip(array, kept.index(axis))
    letters = [reading.letters[axis] for axis in range(len(reading.letters))]
    order = [kept.index(axis) for axis in (*layout.stack, *(places[x] for x in letters))]
    array = array.transpose(order)
    count = len(layout.stack)
    if not count:
        return array
    stack, own = array.shape[:count], list(array.shape[count:])
    out = letters.index("O")
    array = jnp.moveaxis(array.reshape(math.prod(stack), *own), 0, out)
    own[out] *= math.prod(stack)
    return array.reshape(own)


def _two_products(reading: Reading, x: jax.Array, kernel: Kernel) -> jax.Array | None:
    """A product with one factor, which contracts what it has, and then with the other."""
    source, eqn = reading.source, reading.eqn
    assert source is not None and source.dims is not None and kernel.factors is not None
    names = iter(string.ascii_letters)
    contracting, batch = eqn.params["dimension_numbers"]
    mine, others = contracting[reading.operand], contracting[1 - reading.operand]
    mine_batch, others_batch = batch[reading.operand], batch[1 - reading.operand]
    x_names = [next(names) for _ in range(x.ndim)]
    k_names = [next(names) for _ in source.dims]
    for a, b in (*zip(mine, others, strict=True), *zip(mine_batch, others_batch, strict=True)):
        k_names[a] = x_names[b]
    between = next(names)
    terms = _terms(source, kernel, k_names, between)
    if terms is None:
        return None
    out = _output(reading, x_names, k_names, mine, others, mine_batch, others_batch)
    one, two = kernel.factors
    arrays = [_without_ones(one, terms[0]), _without_ones(two, terms[1])]
    first = "".join(name for name in dict.fromkeys([*x_names, *_names(terms[0])])
                    if name in {*out, between, *_names(terms[1])})  # fmt: skip
    options = {"precision": eqn.params["precision"]}
    y = jnp.einsum(f"{''.join(x_names)},{_names(terms[0])}->{first}", x, arrays[0], **options)
    y = y.astype(x.dtype)
    wide = eqn.params["preferred_element_type"]
    options |= {"preferred_element_type": wide}
    return jnp.einsum(f"{first},{_names(terms[1])}->{out}", y, arrays[1], **options)


def _names(term: Sequence[str]) -> str:
    return "".join(name for name in term if name)


def _terms(
    source: Source, kernel: Kernel, k_names: list[str], between: str
) -> tuple[list[str], list[str]] | None:
    """For each factor the name of each stored axis, "" for one of size 1; None if they have none."""
    assert kernel.factors is not None and source.dims is not None
    stored, kept = stored_letters(source, kernel.axes), source.kept()
    named = {dim[0]: name for dim, name in zip(source.dims, k_names, strict=True) if dim}
    taps = factor_axes(kernel.axes, kernel.first)
    found: tuple[list[str], list[str]] = [], []
    for index, (factor, term) in enumerate(zip(kernel.factors, found, strict=True)):
        own = {*taps[index], ".", "IO"[index]}
        for place, axis in enumerate(kept):
            letter = stored[axis]
            linked = letter == "OI"[index]
            term.append(between if linked else named.get(axis, "") if letter in own else "")
            if not term[-1] and factor.shape[place] != 1:
                return None
    one, two = kernel.factors
    channels = [kept.index(axis) for axis, letter in stored.items() if letter in ("O", "I")]
    sizes = {stored[kept[place]]: place for place in channels}
    return found if one.shape[sizes["O"]] == two.shape[sizes["I"]] else None


def _without_ones(factor: jax.Array, term: Sequence[str]) -> jax.Array:
    return factor.squeeze(tuple(place for place, name in enumerate(term) if not name))


def _output(reading, x_names, k_names, mine, others, mine_batch, others_batch) -> str:
    """The names of the result's axes: those of the batch, of the left operand, of the right."""
    del mine_batch
    gone, k_gone = {*others, *others_batch}, {k_names[axis] for axis in mine}
    shared = [x_names[axis] for axis in others_batch]
    x_free = [name for axis, name in enumerate(x_names) if axis not in gone]
    k_free = [name for name in k_names if name not in k_gone and name not in shared]
    left, right = (k_free, x_free) if reading.operand == 0 else (x_free, k_free)
    return "".join([*shared, *left, *right])
