"""What a program does with its kernels, as data: `KernelUse` and the table of them, `Trace`."""

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lowrank_jax.factorization.axes import (
    forms_of,
    heads_of,
    kernel_size,
    sizes_of,
    spatial_axes,
    width_of,
)
from lowrank_jax.factorization.forms import SCHEMES, form_of
from lowrank_jax.factorization.scheme import Scheme

if TYPE_CHECKING:
    from lowrank_jax.program.changed import ChangedKernels


@dataclasses.dataclass(frozen=True)
class KernelUse:
    """One way in which a program uses one kernel.

    Attributes:
        path: the kernel's path in the variables without "params/" and "/kernel"; "" if it is
            computed.
        kind: "conv", "conv_transpose" (dilated input) or "product" (dense layers and other matrix
            products).
        kernel_shape: as stored; axes before those named by ``axes`` are a stack of kernels.
        axes: the stored layout, such as "HWIO": I and O the channels, the others spatial; of a
            product such as "IO", see `Matrix`; "" if not known.
        strides, dilation, input_dilation: one entry for each spatial axis.
        padding: (before, after) for each spatial axis.
        groups: number of feature groups.
        inputs, outputs: shapes (batch, *spatial, channels) of one use; of a product those of its
            operand.
        uses: how often it runs in one call of the program.
        macs: multiply-accumulates of all the uses, for the batch given.
        bytes: inputs, kernel and outputs of all the uses, each moved once.
        count: "exact", "at most" (in a branch of a ``cond``) or "per iteration" (in a ``while``).
        reason: why the layer cannot be decomposed safely; "" if it can.
        dtype: type of the inputs of the convolution or product.
        changed: whether the program changes the kernel first, by parameters alone. What is
            decomposed is the changed kernel, for evaluation.
    """

    path: str
    kind: str
    kernel_shape: tuple[int, ...]
    axes: str
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    input_dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    groups: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    uses: int
    macs: int
    bytes: int
    count: str = "exact"
    reason: str = ""
    dtype: str = "float32"
    changed: bool = False

    @property
    def parameters(self) -> int:
        """Entries of the kernel, of all kernels of a stack."""
        return math.prod(self.kernel_shape)

    @property
    def positions(self) -> int:
        """Output positions of one use, over the whole batch; of a product its rows."""
        if self.kind == "product" and self.axes:
            return self.macs // max(kernel_size(self.axes, self.kernel_shape), 1) // self.uses
        return math.prod(self.outputs[:-1])

    @property
    def safe(self) -> bool:
        """Whether the kernel is proven to reach nothing but this convolution or product, and to
        reach it unaltered."""
        return not self.reason

    @property
    def forms(self) -> tuple[str, ...]:
        """Names of the forms in which two factors may stand for the kernel, the usual one first.

        Forms that would be the same product are named once.
        """
        return forms_of(self.axes, self.kernel_shape) if self.axes else ()

    @property
    def sizes(self) -> dict[str, int]:
        """Letter of each axis of one kernel to its size."""
        return sizes_of(self.axes, self.kernel_shape)

    @property
    def width(self) -> int:
        """Outputs of one kernel, of all groups."""
        return width_of(self.axes, self.kernel_shape)

    @property
    def heads(self) -> int:
        """The size of the first output axis of a product with several output axes, else 1."""
        return heads_of(self.axes, self.kernel_shape)

    def scheme(self, rank: int, first: str | None = None) -> Scheme:
        """The scheme of a rank and a form for this layer; the usual form if none is named.

        Raises:
            ValueError: the form is not known.
        """
        form = first or self.forms[0]
        form_of(form)
        groups = self.heads if form == "heads" else self.groups
        return SCHEMES[form](rank, groups, self.axes, form)

    def parameters_at(self, scheme: Scheme) -> int:
        """Parameters of the factors, of all kernels of a stack."""
        return scheme.parameters(self.kernel_shape) * math.prod(
            self.kernel_shape[: -len(scheme.axes)]
        )

    def macs_at(self, scheme: Scheme) -> int:
        """Macs of all the uses with the factors in place of the kernel.

        The first convolution runs at the input's size along the axes that it leaves alone, so that
        with a stride the macs do not follow the parameters. The zeros that a transposed convolution
        puts between its inputs are not counted. Padding that the program adds as an operation of
        its own, such as circular padding, is counted as part of that input.
        """
        sizes = map(math.prod, scheme.shapes(self.kernel_shape))
        rows = zip(self.positions_after(scheme), sizes, scheme.taps(), strict=True)
        return self.uses * sum(
            positions * size // self._spread(along, scheme.axes) for positions, size, along in rows
        )

    def positions_after(self, scheme: Scheme) -> list[int]:
        """Positions of one use after each factor, over the whole batch."""
        taps = scheme.taps()
        if self.kind == "product":
            return [self.positions] * len(taps)
        done = ["".join(taps[:count]) for count in range(1, len(taps))]
        return [*(self._positions(along, scheme.axes) for along in done), self.positions]

    def _positions(self, along: str, axes: str) -> int:
        """Positions where the convolutions along some axes have run."""
        extent = zip(spatial_axes(axes), self.inputs[1:-1], self.outputs[1:-1], strict=True)
        sizes = [out if letter in along else own for letter, own, out in extent]
        return self.inputs[0] * math.prod(sizes)

    def _spread(self, along: str, axes: str) -> int:
        """How many times a convolution along some axes spreads its inputs with zeros between."""
        pairs = zip(spatial_axes(axes), self.input_dilation, strict=False)  # a product has none
        return math.prod(times for letter, times in pairs if letter in along)

    def bytes_at(self, scheme: Scheme) -> float:
        """Bytes that all the uses move with the factors in place of the kernel.

        The arrays between the factors are written and read.
        """
        shapes = scheme.shapes(self.kernel_shape)
        channels = [shape[scheme.axes.index("O")] for shape in shapes[:-1]]
        pairs = zip(self.positions_after(scheme)[:-1], channels, strict=True)
        between = sum(positions * count for positions, count in pairs)
        kernel = kernel_size(scheme.axes, self.kernel_shape)
        entries = math.prod(self.inputs) + kernel + math.prod(self.outputs)
        entry = self.bytes / entries  # of all the uses; the mean if the types of the arrays differ
        return self.bytes + entry * (sum(map(math.prod, shapes)) - kernel + 2 * between)


@dataclasses.dataclass(frozen=True)
class Trace:
    """The uses of all kernels in program order; prints as a table.

    Attributes:
        uses: in program order.
        changed: the kernels that the program changes first; None if there are none.
    """

    uses: tuple[KernelUse, ...]
    changed: "ChangedKernels | None" = dataclasses.field(default=None, compare=False, repr=False)

    def __iter__(self) -> Iterator[KernelUse]:
        return iter(self.uses)

    def __len__(self) -> int:
        return len(self.uses)

    def __getitem__(self, index: int) -> KernelUse:
        return self.uses[index]

    @property
    def macs(self) -> int:
        """Macs of the whole program, for the batch given."""
        return sum(use.macs for use in self)

    @property
    def parameters(self) -> int:
        """Entries of all kernels; one that is used twice counts once."""
        return sum({use.path: use.parameters for use in self if use.path}.values())

    def at(self, path: str) -> list[KernelUse]:
        """The uses of the kernel at a path."""
        return [use for use in self if use.path == path]

    def paths(self) -> list[str]:
        """The paths of the layers, in program order."""
        return list(dict.fromkeys(use.path for use in self if use.path))

    def safe_use(self, path: str) -> KernelUse | None:
        """The first use of the kernel at a path; None if the program has none.

        Raises:
            ValueError: the layer cannot be decomposed safely.
        """
        uses = self.at(path)
        if unsafe := [use for use in uses if not use.safe]:
            raise ValueError(
                f"{path}: cannot be decomposed: {unsafe[0].reason}. Leave it out of the table."
            )
        return uses[0] if uses else None

    def safe_paths(self) -> list[str]:
        """The layers that are proven to run decomposed as they do dense."""
        return [path for path in self.paths() if all(use.safe for use in self.at(path))]

    def half_parameters(self) -> dict[str, Scheme]:
        """Every safe layer at the largest rank that leaves at most half of its parameters."""
        uses = [self.at(path)[0] for path in self.safe_paths()]
        ranks = {
            use.path: (use, use.parameters // (2 * use.parameters_at(use.scheme(1))))
            for use in uses
        }
        return {path: use.scheme(rank) for path, (use, rank) in ranks.items() if rank}

    def __str__(self) -> str:
        head = (
            "layer",
            "kind",
            "kernel",
            "axes",
            "strides",
            "groups",
            "uses",
            "positions",
            "macs",
            "bytes",
        )
        rows = [(*head, "decomposable"), *(_row(use) for use in self)]
        total = (
            "total",
            *[""] * 7,
            f"{self.macs:,}",
            f"{sum(use.bytes for use in self):,}",
            "",
        )
        return table([*rows, total], left=4)


def _row(use: KernelUse) -> tuple[str, ...]:
    shape, strides = ("x".join(map(str, sizes)) for sizes in (use.kernel_shape, use.strides))
    counts = [f"{value:,}" for value in (use.groups, use.uses, use.positions, use.macs, use.bytes)]
    note = "" if use.count == "exact" else f" ({use.count})"
    return (
        use.path or "(computed)",
        use.kind,
        shape,
        use.axes,
        strides,
        *counts,
        (use.reason or ("yes, as the program changes it" if use.changed else "yes")) + note,
    )


def table(rows: list[tuple[str, ...]], left: int) -> str:
    """Lines of aligned columns: the first ones and the last one to the left, those between to the
    right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1

    def cell(text: str, index: int) -> str:
        return (
            text.ljust(widths[index])
            if index < left or index == last
            else text.rjust(widths[index])
        )

    return "\n".join(
        "  ".join(cell(text, i) for i, text in enumerate(row)).rstrip() for row in rows
    )
