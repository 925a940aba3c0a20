"""What `compress` must know of a network's program before it runs: where to fit, where to match."""

import dataclasses
import functools
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Literal

from lowrank_jax.calibration.inputs import shape_key
from lowrank_jax.calibration.network import Network, NetworkProgram
from lowrank_jax.factorization.axes import kernel_size, width_of
from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.factorization.whole import whole_scheme
from lowrank_jax.program.channels import RESHAPES, SHIFTS, Channels
from lowrank_jax.program.flat import flatten
from lowrank_jax.program.jaxprs import constants, opened
from lowrank_jax.program.provenance import Source
from lowrank_jax.program.reading import Reading
from lowrank_jax.program.survey import Survey

LOG = logging.getLogger("lowrank_jax")
WIDEST = 16_384  # inputs of a layer; more have a covariance of over 2 GB, and a fit needs several
KEPT = 4_608  # inputs and outputs of a layer that stays dense, which can do without a fit
Slice = tuple[int, ...]
LINEAR = ("add", "sub", "convert_element_type", "copy", "transpose", *RESHAPES)


class Outline:
    """The flat program of a network, its variables numbered in the order in which they appear.

    Programs for batches of different sizes have the same numbers.

    Attributes:
        flat, jaxpr: the program.
        eqns: its equations.
        readings: index of an equation to the reading of a kernel.
        sources: number of an input to the parameter that it is.
        images: numbers of the inputs that are images.
        fixed: numbers of the variables that do not depend on the images.
    """

    def __init__(self, traced: NetworkProgram) -> None:
        self.flat = flatten(traced.program.closed, traced.sources)
        self.jaxpr = opened(self.flat)
        self.eqns = list(self.jaxpr.eqns)
        results = [var for eqn in self.eqns for var in eqn.outvars]
        variables = [*self.jaxpr.constvars, *self.jaxpr.invars, *results]
        self._numbers = {var: number for number, var in enumerate(variables)}
        self._places = {id(eqn): index for index, eqn in enumerate(self.eqns)}
        self.survey = Survey.of(self.jaxpr, traced.sources)
        found = [(self._places.get(id(f.reading.eqn)), f.reading) for f in self.survey.found]
        self.readings = {place: reading for place, reading in found if place is not None}
        inputs = list(zip(self.jaxpr.invars, traced.sources, traced.kinds(), strict=True))
        self.sources: dict[int, Source] = {self.number(v): s for v, s, _ in inputs if s is not None}
        self.images = [self.number(v) for v, _, kind in inputs if kind == "image"]
        others = [v for v, _, kind in inputs if kind != "image"]
        self.channels = Channels(self.jaxpr, others)
        self.fixed = {self.number(var) for var in self.channels.fixed}

    def number(self, var: Any) -> int:
        return self._numbers[var]

    def place(self, eqn: Any) -> int:
        return self._places[id(eqn)]

    def readers(self, place: int) -> list:
        """The equations that read what an equation gives; None where the program returns it."""
        return [eqn for var in self.eqns[place].outvars for eqn in self.channels.readers(var)]

    def is_linear(self, eqn: Any) -> bool:
        """Whether an equation adds, moves, or scales channel by channel."""
        return eqn.primitive.name in LINEAR or self.channels.step(eqn) is not None

    def reads(self, eqn: Any) -> list[int]:
        """Numbers of the variables that an equation reads."""
        return [self.number(var) for var in eqn.invars if not isinstance(var, Literal)]

    def gives(self, eqn: Any) -> list[int]:
        return [self.number(var) for var in eqn.outvars]

    @functools.cached_property
    def last_reads(self) -> dict[int, int]:
        """The last equation that reads each variable; the number of equations for the outputs."""
        last = {}
        for place, eqn in enumerate(self.eqns):
            last.update(dict.fromkeys(self.reads(eqn), place))
        results = [var for var in self.jaxpr.outvars if not isinstance(var, Literal)]
        return last | dict.fromkeys(map(self.number, results), len(self.eqns))

    def constants(self) -> dict[int, Any]:
        values = zip(self.jaxpr.constvars, constants(self.flat), strict=True)
        return {self.number(var): value for var, value in values}

    def same_program(self, other: "Outline") -> bool:
        """Whether two programs differ in shapes alone."""
        steps = [
            [(eqn.primitive.name, *one.reads(eqn), *one.gives(eqn)) for eqn in one.eqns]
            for one in (self, other)
        ]
        return steps[0] == steps[1]

    def differing(self, changed: Collection[int]) -> set[int]:
        """The variables that change with some inputs."""
        found = set(changed)
        for eqn in self.eqns:
            if not found.isdisjoint(self.reads(eqn)):
                found.update(self.gives(eqn))
        return found


def outlines_of(network: Network, batches: Sequence[tuple]) -> list[Outline]:
    """The program at the shapes of each batch; batches of one shape share one."""
    known: dict[str, Outline] = {}
    found = []
    for batch in batches:
        key = shape_key(batch)
        if key not in known:
            known[key] = Outline(network.program(batch))
        found.append(known[key])
    if not all(found[0].same_program(own) for own in known.values()):
        raise ValueError(
            "The program of the model differs with the size of its batch; give batches of one size."
        )
    return found


def slices(reading: Reading) -> Iterator[Slice]:
    """The kernels of a stack that a reading runs at once, in its order."""
    source, stack = reading.source, reading.layout.stack
    assert source is not None
    fixed = dict(source.gone)
    sizes = [source.shape[axis] for axis in stack]
    for place in np.ndindex(*sizes):
        own: dict[int, Any] = {**fixed, **dict(zip(stack, place, strict=True))}
        yield tuple(int(own[axis]) for axis in sorted(own))


@dataclasses.dataclass(frozen=True)
class Shift:
    """A parameter that is added to a value channel by channel, or subtracted from it.

    Attributes:
        place: index of the equation.
        data: number of the value.
        leaf: number of the parameter.
        sign: 1 where the parameter is added, -1 where it is subtracted.
        axis: of the channels in the value.
    """

    place: int
    data: int
    leaf: int
    sign: int
    axis: int


def find_shift(outline: Outline, place: int) -> Shift | None:
    """The shift of an equation; None if it adds no parameter, or one used elsewhere, too."""
    eqn = outline.eqns[place]
    step = outline.channels.step(eqn)
    if step is None or step.name not in SHIFTS or step.axis < 0:
        return None
    leaf = outline.channels.leaf(step.by)
    if leaf is None or outline.number(leaf) not in outline.sources:
        return None
    channels = eqn.outvars[0].aval.shape[step.axis]
    own = leaf.aval.size == channels and outline.channels.count_readers(leaf) == 1
    data = outline.number(eqn.invars[step.index])
    sign = 1 if step.name == "add" else -1
    return Shift(place, data, outline.number(leaf), sign, step.axis) if own else None


def shift_after(outline: Outline, place: int) -> Shift | None:
    """The shift that a layer's outputs meet first, if nothing else reads them before."""
    axis = outline.readings[place].channel_axis
    steps = [] if axis is None else outline.channels.after(outline.eqns[place].outvars[0], axis)
    if not steps:
        return None
    return find_shift(outline, outline.place(steps[0].eqn))


def are_means_matched(outline: Outline, place: int) -> bool:
    """Whether normalisations take up the means of the outputs of an equation.

    They do where linear steps lead to nothing but subtractions of parameters, as from a convolution
    over residual sums to batch normalisations.
    """
    led = {place}
    for index in range(place, len(outline.eqns)):
        for reader in outline.readers(index) if index in led else ():
            if reader is None or not outline.is_linear(reader):
                return False
            after = outline.place(reader)
            shift = find_shift(outline, after)
            if shift is None or shift.sign > 0:
                led.add(after)
    return True


@dataclasses.dataclass
class Matched:
    """The variables whose means are those of the dense network.

    Attributes:
        outline: of the program.
        differing: the variables that differ at all.
        numbers: the variables that a correction gave.
    """

    outline: Outline
    differing: set[int]
    numbers: set[int] = dataclasses.field(default_factory=set)

    def note(self, place: int) -> None:
        """Follows one equation."""
        eqn = self.outline.eqns[place]
        data = [n for n in self.outline.reads(eqn) if n in self.differing]
        if data and self.outline.is_linear(eqn) and set(data) <= self.numbers:
            self.numbers.update(self.outline.gives(eqn))


def fit_places(outline: Outline, schemes: Mapping[str, Any]) -> dict[int, str]:
    """The equations at which a kernel of a table is read and can be fitted, and its path.

    A layer that reads the same for all images, such as learned queries, has one sample alone and is
    not fitted, nor is one whose covariance is too large.
    """
    found, wide = {}, set[str]()
    for place, reading in sorted(outline.readings.items()):
        source = reading.source
        fixed = set(outline.reads(reading.eqn)) <= outline.fixed
        if source is None or reading.reason or fixed or source.path not in schemes:
            continue
        if _inputs(reading, source) > WIDEST:
            wide.add(source.path)
        else:
            found[place] = source.path
    for path in sorted(wide):
        LOG.warning("%s has plain factors: more than %d inputs are not fitted.", path, WIDEST)
    return found


def kept_schemes(outline: Outline, schemes: Mapping[str, Any]) -> dict[str, Scheme]:
    """The layers that stay dense, and that can make up for the errors of layers before them.

    Args:
        outline: of the program.
        schemes: of the layers that are decomposed.

    Returns:
        Path to the scheme of the whole kernel. Layers of which the program reads the kernel more
        than once, or uses it in another way, too, are left out, and so are wide ones.
    """
    changed = {number for number, own in outline.sources.items() if own.path in schemes}
    differing, touched = outline.differing(changed), outline.survey.touched
    paths = [own.source.path for own in outline.readings.values() if own.source]
    paths += [own.path for own in outline.survey.outputs if own]  # the program gives it, too
    found: dict[str, Scheme] = {}
    for reading in outline.readings.values():
        source, x = reading.source, reading.eqn.invars[1 - reading.operand]
        if source is None or source.path in schemes or not _is_small_kernel(reading, source):
            continue
        alone = paths.count(source.path) == 1 and not touched.get(source.path)
        if alone and outline.number(x) in differing:
            axes, groups = reading.layout.axes, reading.groups
            found[source.path] = whole_scheme(axes, source.shape, groups)
    return found


def _is_small_kernel(reading: Reading, source: Source) -> bool:
    """Whether an equation reads one kernel, no stack, of few inputs and outputs."""
    if reading.reason or source.gone or reading.layout.stack:
        return False
    outputs = width_of(reading.layout.axes, source.shape) // reading.groups
    return max(_inputs(reading, source), outputs) <= KEPT


def _inputs(reading: Reading, source: Source) -> int:
    """The entries of a patch that a layer reads, of one group."""
    axes = reading.layout.axes
    return kernel_size(axes, source.shape) // width_of(axes, source.shape)
