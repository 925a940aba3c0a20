"""How an equation reads a kernel: one convolution or product, its letters, its geometry."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from lowrank_jax.factorization.axes import AXES, own_letters, spatial_axes
from lowrank_jax.program.provenance import Layout, Source, layout, product_layout

READERS = ("conv_general_dilated", "dot_general")


@dataclasses.dataclass(frozen=True)
class Reading:
    """A convolution or a product, one of whose operands may be a kernel.

    Attributes:
        eqn: the equation.
        operand: index of the kernel among its operands.
        source: of the kernel; None if the program computes it.
        letters: axis of the kernel to its letter; of a product to "I" where it is contracted, "O"
            where it is free and "." where it is an axis of the batch.
        layout: how the stored axes are read.
    """

    eqn: Any
    operand: int
    source: Source | None
    letters: dict[int, str]
    layout: Layout

    @classmethod
    def of(cls, eqn: Any, sources: Sequence[Source | None]) -> "Reading":
        """The reading of an equation that is one of `READERS`."""
        if eqn.primitive.name == "conv_general_dilated":
            spec, ndim = eqn.params["dimension_numbers"].rhs_spec, eqn.invars[1].aval.ndim
            letters = dict(zip(spec, "OI" + AXES.get(ndim - 2, "")[:-2], strict=False))
            return cls(eqn, 1, sources[1], letters, layout(sources[1], letters))
        operand = _kernel_of_product(sources)
        roles = _roles(eqn, operand)
        return cls(eqn, operand, sources[operand], roles, product_layout(sources[operand], roles))

    @property
    def is_convolution(self) -> bool:
        return self.eqn.primitive.name == "conv_general_dilated"

    @property
    def channel_axis(self) -> int | None:
        """The axis of the channels in what the equation gives; None if there are several."""
        if self.is_convolution:
            return self.eqn.params["dimension_numbers"].out_spec[1]
        free = [axis for axis, role in self.letters.items() if role == "O"]
        if len(free) != 1:
            return None
        ndim = self.eqn.outvars[0].aval.ndim
        batch = len(self.eqn.params["dimension_numbers"][1][0])
        return ndim - 1 if self.operand else batch

    @property
    def stack(self) -> int:
        """How many kernels of a stack run at once."""
        shape = self.source.shape if self.source else ()
        return math.prod(shape[axis] for axis in self.layout.stack)

    @property
    def shared(self) -> bool:
        """Whether all groups, and all kernels of a stack, read the same channels."""
        return not self.is_convolution or self.eqn.params["feature_group_count"] == 1

    @property
    def groups(self) -> int:
        """Feature groups of each kernel."""
        return 1 if self.shared else self.eqn.params["feature_group_count"] // self.stack

    @property
    def reason(self) -> str:
        """Why two operations cannot take the place of this one; "" if they can."""
        if self.layout.reason or not self.is_convolution:
            return self.layout.reason
        count = self.eqn.params["feature_group_count"]
        whole = self.shared or count % self.stack == 0
        plain = self.eqn.params["batch_group_count"] == 1 and len(self.letters) > 2
        if self.groups > 1 and self.turns("O"):
            return "its groups are reversed before it is used"
        return "" if whole and plain else "it is a convolution of a kind that cannot be separated"

    def turns(self, letter: str) -> bool:
        """Whether the program turns the kernel round along an axis."""
        flips = self.source.flips if self.source else ()
        return dict(self.layout.places).get(letter) in flips

    def order(self, axes: str, first: str, groups: int) -> tuple[int, int] | None:
        """Which factor of a kernel runs first and which second.

        Args:
            axes: layout of the stored kernel.
            first: name of the form of its factors.
            groups: for how many groups of channels it was decomposed.

        Returns:
            None where the kernel has to be multiplied back: its channels are taps here, or the
            other way round.
        """
        source = self.source
        if source is None or source.dims is None or not _takes_whole(source, axes):
            return None
        if not self.is_convolution:
            return self._order_of_product(axes, first, groups)
        if self.reason or groups != self.groups or not self._same_stack(source, axes):
            return None
        stored = stored_letters(source, axes)
        read = {letter: stored[axis] for letter, axis in self.layout.places}
        if (read["I"], read["O"]) == ("I", "O"):
            return 0, 1
        swapped = (read["I"], read["O"]) == ("O", "I") and self.stack == 1 and self.shared
        return (1, 0) if swapped else None

    def _same_stack(self, source: Source, axes: str) -> bool:
        """Whether what the equation reads as a stack of kernels is stored as one."""
        stored = stored_letters(source, axes)
        whole = all(stored[axis] == "." for axis in self.layout.stack)
        return whole and all(stored[axis] != "." for _, axis in self.layout.places)

    def _order_of_product(self, axes: str, first: str, groups: int) -> tuple[int, int] | None:
        """A product may contract any axes, each of which one factor has."""
        source = self.source
        if source is None or source.dims is None or source.flips or not self._names_all(source):
            return None
        stored = stored_letters(source, axes)
        owns = [own_letters(axes, first, index) for index in (0, 1)]
        parts = [{stored[axis] for axis in dim if source.shape[axis] > 1} for dim in source.dims]
        whole = all(part <= {"."} or any(part <= set(own) for own in owns) for part in parts)
        return (0, 1) if whole and (groups == 1 or self._keeps_groups(axes)) else None

    def _keeps_groups(self, axes: str) -> bool:
        """Whether the inputs and outputs of a matrix are those of the equation."""
        return not spatial_axes(axes) and self.layout.axes == axes

    def _names_all(self, source: Source) -> bool:
        named = {axis for dim in source.dims or () for axis in dim}
        return all(source.shape[axis] == 1 for axis in source.kept() if axis not in named)


def stored_letters(source: Source, axes: str) -> dict[int, str]:
    """Axis of a parameter to its letter in a layout; "." for a stack."""
    padded = "." * (len(source.shape) - len(axes)) + axes
    return dict(enumerate(padded))


def _takes_whole(source: Source, axes: str) -> bool:
    """Whether nothing was taken out of a kernel that one factor alone does not have."""
    stored = stored_letters(source, axes)
    letters = [(stored[axis], index) for axis, index in source.gone]
    return all(x == "." or (x not in "IO" and index is not None) for x, index in letters)


def _kernel_of_product(sources: Sequence[Source | None]) -> int:
    """Which operand of a product is the kernel: one that was only moved comes before a changed one.

    Activations can pass for a changed parameter, such as the bias that was added to those of one
    image.
    """

    def rank(operand: int) -> tuple[bool, bool, int]:
        source = sources[operand]
        return source is not None and source.dims is not None, source is not None, operand

    return max((0, 1), key=rank)


def _roles(eqn: Any, operand: int) -> dict[int, str]:
    contracting, batch = (dims[operand] for dims in eqn.params["dimension_numbers"])
    roles = dict.fromkeys(range(eqn.invars[operand].aval.ndim), "O")
    return roles | dict.fromkeys(contracting, "I") | dict.fromkeys(batch, ".")
