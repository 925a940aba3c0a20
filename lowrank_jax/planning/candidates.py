"""What every layer may become, with its cost and its error: the table that the selectors choose
from."""

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from lowrank_jax.factorization.layout import split_axes
from lowrank_jax.factorization.separable import Separable, max_rank
from lowrank_jax.planning.budget import check_measure
from lowrank_jax.planning.spectra import Spectra, known_use
from lowrank_jax.program.kernel_use import KernelUse, Trace


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to run one layer.

    Attributes:
        scheme: the decomposition; None if the layer stays dense.
        parameters: of the kernel or of both factors, of all kernels of a stack.
        macs, bytes: of all the uses in one call of the program.
        error: share of the squared singular values left out.
        spectral: the largest singular value left out, over the largest, of the worst group or
            slice.
        latency: measured time in seconds; NaN if it is not known.
    """

    scheme: Separable | None
    parameters: int
    macs: int
    bytes: int
    error: float = 0.0
    spectral: float = 0.0
    latency: float = math.nan

    def cost(self, measure: str) -> float:
        """The cost by one of `lowrank_jax.budget.MEASURES`."""
        return getattr(self, check_measure(measure))


@dataclasses.dataclass(frozen=True, eq=False)
class Options:
    """The options of every layer of a traced program, the dense one first.

    Attributes:
        trace: the traced program, which tells the costs.
        spectra: singular values of the layers, which tell the errors.
        layers: path to its options; the other layers of the program stay as they are.
    """

    trace: Trace
    spectra: Spectra
    layers: Mapping[str, tuple[Option, ...]]

    def rest(self, measure: str) -> float:
        """Cost of the layers that stay as they are; in latency 0, because only the others are
        measured."""
        others = [use for use in self.trace if use.path not in self.layers]
        if check_measure(measure) == "parameters":
            return sum({use.path: use.parameters for use in others if use.path}.values())
        return 0 if measure == "latency" else sum(getattr(use, measure) for use in others)

    def dense(self, measure: str) -> float:
        """Cost of the whole program with every layer dense."""
        return self.rest(measure) + sum(layer[0].cost(measure) for layer in self.layers.values())

    def least(self, measure: str) -> float:
        """Cost of the whole program with every layer at its cheapest."""
        cheapest = (min(option.cost(measure) for option in layer) for layer in self.layers.values())
        return self.rest(measure) + sum(cheapest)

    def at(self, path: str, scheme: Separable) -> Option:
        """The option of any scheme that a layer allows, be it cheaper than dense or not.

        Raises:
            ValueError: the path is unknown, or the scheme does not fit the layer.
        """
        use = known_use(self.trace, path)
        if path not in self.layers or scheme.first not in self.spectra.values[path]:
            raise ValueError(
                f"{path}: there is no spectrum of it with the {scheme.first} convolution first; add one."
            )
        if (scheme.groups, scheme.axes) != (use.groups, use.axes):
            raise ValueError(
                f"{path}: {scheme} does not fit the program; write {use.scheme(scheme.rank, scheme.first)}."
            )
        rank = scheme.check(use.kernel_shape, path)
        return _cut(self.trace.at(path), self.spectra, scheme.first, [rank])[0]


def options(trace: Trace, spectra: Spectra, multiple: int = 1) -> Options:
    """Lists dense and every useful rank in both orders of the factors, for every layer that has a
    spectrum.

    A rank is useful if it is cheaper than dense by any measure. A layer that is used several times
    or at several sizes costs the sum; the kernels of a stack and the groups of a kernel have one
    rank.

    Args:
        trace: `lowrank_jax.trace` of the forward pass.
        spectra: `lowrank_jax.spectra.spectra`, or whitened ones.
        multiple: ranks are restricted to multiples of it, such as 8 for tensor cores.

    Raises:
        ValueError: a path is unknown or unsafe, a spectrum is that of another kernel, or no rank is
            left.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import lowrank_jax as lr
        >>> from lowrank_jax.planning.spectra import spectra
        >>> from flax import linen as nn
        >>> model, images = nn.Sequential([nn.Conv(16, (3, 3))]), jnp.ones((1, 8, 8, 8))
        >>> variables = model.init(jax.random.key(0), images)
        >>> uses = lr.trace(model.apply, variables, images)
        >>> table = options(uses, spectra(variables["params"], uses), multiple=4)
        >>> [(option.scheme.rank, option.scheme.first) for option in table.layers["layers_0"][1:]]
        [(4, 'vertical'), (8, 'vertical'), (12, 'vertical'), (4, 'horizontal'), (8, 'horizontal'),
        (12, 'horizontal')]
    """
    multiple = _check_multiple(multiple)
    layers = {path: _layer(trace, spectra, path, multiple) for path in spectra.values}
    if not any(len(layer) > 1 for layer in layers.values()):
        raise ValueError(
            f"No layer has a rank that is a multiple of {multiple} and cheaper than dense; give a smaller "
            f"multiple, or a network with larger kernels than these:\n{trace}"
        )
    return Options(trace, spectra, layers)


def front(layer: Iterable[Option], measure: str, loss: Callable[[Option], float]) -> list[Option]:
    """The options that no other one beats, from the cheapest to that of least loss.

    Of those that cost and lose the same, the one of fewest macs and parameters stays.

    Example:
        >>> dense, low, bad = Option(None, 9, 9, 9), Option(None, 4, 9, 9, 0.5), Option(None, 5, 9, 9, 0.6)
        >>> front([dense, low, bad], "parameters", lambda option: option.error) == [low, dense]
        True
    """
    best: list[Option] = []
    key = operator.attrgetter(check_measure(measure))
    for option in sorted(layer, key=lambda o: (key(o), loss(o), o.macs, o.parameters)):
        if not best or loss(option) < loss(best[-1]):
            best.append(option)
    return best


def _layer(trace: Trace, spectra: Spectra, path: str, multiple: int) -> tuple[Option, ...]:
    use, uses = known_use(trace, path), trace.at(path)
    totals = (sum(u.macs for u in uses), sum(u.bytes for u in uses))
    dense, found, seen = Option(None, use.parameters, *totals), [], []
    for first, values in spectra.values[path].items():
        limit = max_rank(use.kernel_shape, use.groups, use.axes, first)
        if values.shape[-1] != limit:
            raise ValueError(
                f"{path}: a spectrum of {values.shape[-1]} values does not fit the kernel {use.kernel_shape} with "
                f"the {first} convolution first, which has {limit}; compute the spectra from this network."
            )
        cut = _cut(uses, spectra, first, range(multiple, limit + 1, multiple))
        facts = [(option.parameters, option.macs, option.bytes, option.error) for option in cut]
        if facts not in seen:  # the two orders of a pointwise kernel are the same
            found += [option for option in cut if _cheaper(option, dense)]
        seen.append(facts)
    return (dense, *found)


def _cut(uses: list[KernelUse], spectra: Spectra, first: str, ranks: Iterable[int]) -> list[Option]:
    """The options of some ranks; all costs are linear in the rank."""
    use, path = uses[0], uses[0].path
    one = use.scheme(1, first)
    parameters, macs = use.parameters_at(one), sum(u.macs_at(one) for u in uses)
    fixed, each = np.sum([_bytes(u, one) for u in uses], axis=0)
    error, spectral = (
        spectra.left_out(path, first).tolist(),
        spectra.largest_left_out(path, first).tolist(),
    )

    def at(rank: int) -> Option:
        moved = round(float(fixed + rank * each))
        return Option(
            use.scheme(rank, first),
            rank * parameters,
            rank * macs,
            moved,
            error[rank],
            spectral[rank],
        )

    return [at(rank) for rank in ranks]


def _bytes(use: KernelUse, one: Separable) -> tuple[float, float]:
    """Bytes that move at any rank, and those that each rank adds: parameters, and the array between
    written and read."""
    spatial = [letter for letter in one.axes if letter not in "IO"]
    along = split_axes(one.axes, one.first)[0]
    extent = zip(spatial, use.inputs[1:-1], use.outputs[1:-1], strict=True)
    between = use.inputs[0] * math.prod(
        out if letter in along else own for letter, own, out in extent
    )
    kernel = math.prod(use.kernel_shape[-len(one.axes) :])
    entries = math.prod(use.inputs) + kernel + math.prod(use.outputs)
    entry = (
        use.bytes / entries
    )  # of all the uses; the mean if inputs, kernel and outputs differ in type
    return use.bytes - entry * kernel, entry * (
        one.parameters(use.kernel_shape) + 2 * between * use.groups
    )


def _cheaper(option: Option, dense: Option) -> bool:
    return any(
        option.cost(measure) < dense.cost(measure) for measure in ("parameters", "macs", "bytes")
    )


def _check_multiple(multiple: Any) -> int:
    if (
        isinstance(multiple, bool)
        or not hasattr(multiple, "__index__")
        or operator.index(multiple) < 1
    ):
        raise ValueError(
            f"multiple={multiple!r} is not allowed; give an int of 1 or more, such as 8 for tensor cores."
        )
    return operator.index(multiple)
