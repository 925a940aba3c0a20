"""The equations that read a kernel, run with its factors."""

import dataclasses
import math
import string
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.factorization.axes import OUTPUTS, only, split_axes
from lowrank_jax.program.kernel import Kernel
from lowrank_jax.program.reading import Reading, stored_letters


def run_factored(reading: Reading, x: jax.Array, kernel: Kernel) -> jax.Array | None:
    """Runs two operations in place of one; None where the kernel has to be multiplied back.

    Args:
        reading: of the equation.
        x: the other operand.
        kernel: the kernel, with factors.
    """
    order = reading.order(kernel.axes, kernel.first, kernel.groups)
    if order is None or kernel.factors is None:
        return None
    if reading.is_convolution:
        return _two_convolutions(reading, x, kernel, order)
    return _two_products(reading, x, kernel)


def _two_convolutions(
    reading: Reading, x: jax.Array, kernel: Kernel, order: tuple[int, int]
) -> jax.Array:
    params = reading.eqn.params
    taps = split_axes(kernel.axes, kernel.first)
    assert kernel.factors is not None
    for step, index in enumerate(order):
        last = step == 1
        factor = arranged(reading, kernel, index)
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


def _turned(kernel: Kernel, index: int) -> jax.Array:
    """A factor, turned round along the axes that the program turns the kernel round."""
    assert kernel.factors is not None
    stored, kept = stored_letters(kernel.source, kernel.axes), kernel.source.kept()
    turned = [kept.index(axis) for axis in kernel.source.flips
              if axis in kept and stored[axis] in kernel.shared(index)]  # fmt: skip
    return jnp.flip(kernel.factors[index], turned) if turned else kernel.factors[index]


def arranged(reading: Reading, kernel: Kernel, index: int) -> jax.Array:
    """A factor with the axes that an equation reads."""
    source, layout, array = kernel.source, reading.layout, _turned(kernel, index)
    places = dict(layout.places)
    letters = [reading.letters[axis] for axis in range(len(reading.letters))]
    named = [*layout.stack, *(places[x] for x in letters)]
    kept = [axis for axis in source.kept() if axis in named]
    dropped = tuple(i for i, axis in enumerate(source.kept()) if axis not in named)
    array = jnp.squeeze(array, dropped)
    array = array.transpose([kept.index(axis) for axis in named])
    count = len(layout.stack)
    if not count:
        return array
    stack, own = array.shape[:count], list(array.shape[count:])
    out = letters.index("O")
    array = jnp.moveaxis(array.reshape(math.prod(stack), *own), 0, out)
    own[out] *= math.prod(stack)
    return array.reshape(own)


def _two_products(reading: Reading, x: jax.Array, kernel: Kernel) -> jax.Array:
    """A product with one factor and then with the other, in the order of the smaller result."""
    names, params = _Names.of(reading, x.ndim, kernel), reading.eqn.params
    pairs = [_operand(kernel, names, index) for index in (0, 1)]
    orders = pairs, pairs[::-1]
    (first, one), (second, two) = min(orders, key=lambda order: _size(names, x, *order))
    between, out = names.after(first, second), names.after(first, second, last=True)
    precision = params["precision"]
    y = jnp.einsum(f"{names.x},{first}->{between}", x, one, precision=precision)
    y = jnp.einsum(
        f"{between},{second}->{out}",
        y.astype(jnp.result_type(x, one)),
        two,
        precision=precision,
        preferred_element_type=params["preferred_element_type"],
    )
    return y.reshape(names.shape(dict(zip(out, y.shape, strict=True))))


def _size(names: "_Names", x: jax.Array, first: tuple, second: tuple) -> int:
    """Entries of what a product with the first factor gives."""
    sizes = dict(zip(names.x, x.shape, strict=True))
    for term, factor in (first, second):
        sizes |= dict(zip(term, factor.shape, strict=True))
    return math.prod(sizes[name] for name in names.after(first[0], second[0]))


@dataclasses.dataclass(frozen=True)
class _Names:
    """One letter for each axis of a product; the axis that groups divide has two.

    Attributes:
        x: of the axes of the other operand.
        kernel: of each axis of the kernel.
        out: of each axis of the result: those of the batch, of the left operand, of the other.
        between: of the channels between two factors.
        group: of the groups; "" if there is one.
        divided: the axis of the kernel that they divide.
    """

    x: str
    kernel: list[str]
    out: list[str]
    between: str
    group: str
    divided: int

    @classmethod
    def of(cls, reading: Reading, ndim: int, used: Kernel) -> "_Names":
        names = iter(string.ascii_letters)
        x = [next(names) for _ in range(ndim)]
        kernel = [next(names) for _ in range(reading.eqn.invars[reading.operand].aval.ndim)]
        contracting, batch = (
            (dims[reading.operand], dims[1 - reading.operand])
            for dims in reading.eqn.params["dimension_numbers"]
        )
        for own, other in (contracting, batch):
            for a, b in zip(own, other, strict=True):
                kernel[a] = x[b]
        between, group, divided = next(names), "", -1
        if used.groups > 1:
            group, leading = next(names), _leading(reading, used)
            divided = next(i for i, dim in enumerate(used.source.dims or ()) if leading in dim)
            own = (used.source.dims or ())[divided]
            kernel[divided] = "".join([group * (a == leading) + next(names) for a in own])
        gone = {x[axis] for axis in (*contracting[1], *batch[1])}
        free = [[name for name in own if name not in gone] for own in (x, kernel)]
        left, right = free[::-1] if reading.operand == 0 else free
        out = [*(x[axis] for axis in batch[1]), *left, *right]
        return cls("".join(x), kernel, out, between, group, divided)

    def after(self, first: str, second: str, last: bool = False) -> str:
        """The axes after the product with the first factor, or after that with both."""
        given, out = dict.fromkeys(self.x + first), "".join(self.out)
        if last:
            return "".join(name for name in out if name in {*given, *second})
        return "".join(name for name in given if name in out + second)

    def shape(self, sizes: dict[str, int]) -> list[int]:
        """The shape of the result; an axis that no operand has is of size 1."""
        return [math.prod(sizes.get(name, 1) for name in names) for names in self.out]


def _leading(reading: Reading, kernel: Kernel) -> int:
    """The stored axis that groups divide, the first of the outputs."""
    return dict(reading.layout.places)[only(kernel.axes, OUTPUTS)[0]]


def _operand(kernel: Kernel, names: _Names, index: int) -> tuple[str, jax.Array]:
    """A factor with the axes that the product reads, and the channels between the factors.

    An axis of which the other factor has the entries is left out.
    """
    assert kernel.factors is not None and kernel.source.dims is not None
    kept, own, groups = kernel.source.kept(), kernel.shared(index), kernel.groups
    channels = kernel.letters.index("OI"[index])
    factor = jnp.expand_dims(jnp.moveaxis(kernel.factors[index], channels, -1), channels)
    term, sizes, places = "", list[int](), list[int]()
    for axis, (name, dim) in enumerate(zip(names.kernel, kernel.source.dims, strict=True)):
        mine = [kept.index(part) for part in dim]
        if not mine or not {kernel.letters[place] for place in mine} & set(own):
            continue
        own_sizes = [factor.shape[place] for place in mine]
        term, places = term + name, places + mine
        if axis == names.divided:
            at = name.index(names.group)
            sizes += [*own_sizes[:at], groups, own_sizes[at] // groups, *own_sizes[at + 1 :]]
        else:
            sizes.append(math.prod(own_sizes))
    others = [place for place in range(len(kept)) if place not in places]
    flat = factor.transpose(*places, *others, len(kept))
    grouped = names.group if index == 0 else ""
    last = [groups, -1] if grouped else [factor.shape[-1]]
    return term + grouped + names.between, flat.reshape(*sizes, *last)
