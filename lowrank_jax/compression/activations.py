"""What an activation hides: a layer is fitted again to what its errors leave behind it.

After a ReLU, errors of outputs that are negative in both networks are gone. So a layer that was
fitted to the dense outputs y is fitted again, as in Zhang et al., 2015 (arXiv 1505.06798), to its
own outputs p plus what the activation g shows of its error: p + g(y) - g(p). For a ReLU that is p
where both are negative, y where both are positive. Nothing proves that this lowers the errors
behind any g, so `refitting` measures them.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jaxtyping import Float

from lowrank_jax.compression.outline import Outline
from lowrank_jax.compression.scales import along, evaluate, inverse, product_of
from lowrank_jax.program.channels import SCALES, Step, moved_axis
from lowrank_jax.program.interpreter import bind

STRAIGHT = ("add", "sub", "mul", "div", "neg", "convert_element_type", "copy")
BENT = (
    "max", "min", "clamp", "select_n", "abs", "sign", "square", "sqrt", "rsqrt", "cbrt", "pow",
    "integer_pow", "exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic", "erf", "erfc",
)  # fmt: skip
COMPARED = ("gt", "ge", "lt", "le", "eq", "ne", "and", "or", "not")

Rows = Float[jax.Array, "r s g m"]


@dataclasses.dataclass(frozen=True, eq=False)
class Link:
    """An equation, with the numbers of what it reads, None for a literal, and of what it gives."""

    eqn: Any
    reads: Sequence[int | None]
    gives: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Layout:
    """How a value on the route lies: its shape, and the axis of the channels. Each has its own."""

    shape: tuple[int, ...]
    axis: int


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Activation:
    """The route from a layer's outputs to the result of an activation, alone or after a sum.

    Attributes:
        outputs: number of the layer's outputs.
        chain: the equations of the route.
        other: number of the value that is added on the route; None if none is.
        fixed: number of a value that does not depend on the images to its entries: one, or one a
            channel.
        scale: of each channel of the layer's outputs on the route; zero where it is to be left
            alone.
    """

    outputs: int
    chain: Sequence[Link]
    other: int | None
    fixed: Mapping[int, np.ndarray]
    scale: Float[np.ndarray, "n"]

    def behind(self, outputs: Rows, other: Rows | None) -> Rows:
        """What the activation makes of some outputs of the layer."""
        shape = outputs.shape
        known: dict[Any, Any] = {n: by_row(own, shape) for n, own in self.fixed.items()}
        known |= {self.outputs: outputs, self.other: other}
        for link in self.chain:
            if _moves(link.eqn):
                known[link.gives] = known[link.reads[0]]
                continue
            pairs = zip(link.reads, link.eqn.invars, strict=True)
            values = [(var.val if n is None else known[n], var.aval.dtype) for n, var in pairs]
            spread = [jnp.broadcast_to(jnp.asarray(x, dtype), shape) for x, dtype in values]
            (known[link.gives],) = bind(link.eqn, spread)
        return known[self.chain[-1].gives].astype(outputs.dtype)

    def wanted(
        self, dense: Rows, own: Rows, added: Rows | None = None, own_added: Rows | None = None
    ) -> tuple[Rows, Rows]:
        """The outputs that the layer is to give, as far as errors are seen behind the activation.

        Args:
            dense: outputs of the dense layer.
            own: those of the layer, with what is added to them on the average.
            added, own_added: what is added to them on the route in the dense and in the compressed
                network; None if nothing is.

        Returns:
            The outputs, and the errors behind the activation, in units of the outputs.
        """
        hidden = self.behind(dense, added) - self.behind(own, own_added)
        scale = by_row(self.scale, dense.shape)
        error = (hidden * inverse(scale)).astype(dense.dtype)
        return jnp.where(scale == 0, dense, own + error), error


def _moves(eqn: Any) -> bool:
    """Whether an equation on the route moves values alone, which changes none of them."""
    return eqn.primitive.name not in (*STRAIGHT, *BENT, *COMPARED)


def by_row(channels: Any, shape: Sequence[int]) -> Any:
    """Entries of channels for rows (r, S, g, m): of all S kernels or of each, or one for all."""
    return channels.reshape(() if channels.size == 1 else (-1, *shape[2:]))


def find_activations(
    outline: Outline, places: Iterable[int], values: Sequence[jax.Array]
) -> dict[int, Activation]:
    """The activations behind the layers at some equations.

    Args:
        outline: of the program.
        places: of the equations.
        values: of the program's inputs in the dense network.
    """
    routes = {place: route for place in places if (route := _Route.of(outline, place))}
    known = evaluate(outline, {place: route.wanted for place, route in routes.items()}, values)
    return {place: route.activation(known[place]) for place, route in routes.items()}


@dataclasses.dataclass
class _Route:
    """The equations from a layer to where its outputs, changed one by one, are in one value."""

    outline: Outline
    place: int
    axis: int
    chain: list[int] = dataclasses.field(default_factory=list)
    other: int | None = None
    fixed: list = dataclasses.field(default_factory=list)  # variables, their axes of the channels

    @classmethod
    def of(cls, outline: Outline, place: int) -> "_Route | None":
        """The route from a layer; None where no activation follows."""
        reading = outline.readings[place]
        if reading.channel_axis is None or reading.turns("O"):  # rows are in the order as stored
            return None
        route = cls(outline, place, reading.channel_axis)
        return route if route._goes_on() else None

    def _goes_on(self) -> bool:
        outline, last = self.outline, self.outline.last_reads
        layer, bent = outline.eqns[self.place], False
        start = _Layout(layer.outvars[0].aval.shape, self.axis)
        members = dict.fromkeys(outline.gives(layer), start)
        for index in range(self.place + 1, len(outline.eqns)):
            eqn = outline.eqns[index]
            own = {members[number] for number in outline.reads(eqn) if number in members}
            if not own:
                continue
            after = self._after(eqn, members, own.pop()) if len(own) == 1 else None
            if after is None:
                return False
            self.chain.append(index)
            members.update(dict.fromkeys(outline.gives(eqn), after))
            bent = bent or eqn.primitive.name in BENT
            ahead = [number for number in members if last.get(number, -1) > index]
            if bent and ahead == outline.gives(eqn):
                return True
        return False

    def _after(self, eqn: Any, members: Mapping[int, _Layout], layout: _Layout) -> _Layout | None:
        """The layout of what an equation gives; None where it does not change each output alone."""
        shape = eqn.outvars[0].aval.shape
        if _moves(eqn):
            axis = moved_axis(eqn, layout.axis)
            return None if axis < 0 else _Layout(shape, axis)
        return layout if shape == layout.shape and self._takes(eqn, members, layout) else None

    def _takes(self, eqn: Any, members: Mapping[int, _Layout], layout: _Layout) -> bool:
        """Whether all that an equation reads beside the outputs is fixed, or added to them."""
        outline = self.outline
        for var in eqn.invars:
            if isinstance(var, Literal) or outline.number(var) in members:
                continue
            if outline.channels.is_fixed(var):
                axis = outline.channels.varies(var, len(layout.shape))
                if axis not in (layout.axis, -1):
                    return False
                self.fixed.append((var, axis))
            elif not self._adds(eqn.primitive.name, outline.number(var)):
                return False
        return True

    def _adds(self, name: str, number: int) -> bool:
        """Whether a value is added: its rows are taken as those of the outputs, which then have
        not moved."""
        later = number > self.outline.gives(self.outline.eqns[self.place])[0]
        moved = any(_moves(self.outline.eqns[index]) for index in self.chain)
        if name != "add" or self.other is not None or later or moved:
            return False
        self.other = number
        return True

    @property
    def scales(self) -> list[Step]:
        """The scales on the route."""
        outputs = self.outline.eqns[self.place].outvars[0]
        steps, end = self.outline.channels.after(outputs, self.axis), self.chain[-1]
        return [s for s in steps if s.name in SCALES and self.outline.place(s.eqn) <= end]

    @property
    def wanted(self) -> list:
        """What has to be known: by what the scales are, then what no image changes."""
        return [*(step.by for step in self.scales), *(var for var, _ in self.fixed)]

    def activation(self, values: Sequence[jax.Array]) -> Activation:
        """The route with the values of what is wanted."""
        outline, steps, chain = self.outline, self.scales, []
        outputs, own = outline.eqns[self.place].outvars[0], values[len(steps) :]
        for eqn in (outline.eqns[index] for index in self.chain):
            reads = [None if isinstance(x, Literal) else outline.number(x) for x in eqn.invars]
            chain.append(Link(eqn, reads, outline.gives(eqn)[0]))
        pairs = zip(self.fixed, own, strict=True)
        return Activation(
            outputs=outline.number(outputs),
            chain=chain,
            other=self.other,
            fixed={outline.number(var): along(value, axis) for (var, axis), value in pairs},
            scale=product_of(steps, values[: len(steps)], outputs.aval.shape[self.axis]),
        )
