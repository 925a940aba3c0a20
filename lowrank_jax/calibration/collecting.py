"""`calibrate`: one pass over unlabelled data, in one compiled program for each shape of a batch."""

import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from operator import length_hint
from typing import Any

import jax
import numpy as np

from lowrank_jax.calibration.amount import tell_amount
from lowrank_jax.calibration.curvature import importance_of, output_curvature
from lowrank_jax.calibration.inputs import (
    Inputs,
    check_evaluation,
    images,
    shape_key,
    tell_labels,
    tell_together,
)
from lowrank_jax.calibration.network import Network
from lowrank_jax.calibration.noise import independent
from lowrank_jax.calibration.storing import read_moments, write_moments
from lowrank_jax.calibration.strips import StripGeometry, strip_sums
from lowrank_jax.factorization.importance import Importance
from lowrank_jax.factorization.strips import Strips
from lowrank_jax.io.progress import Progress
from lowrank_jax.program.compiler import default_options
from lowrank_jax.program.interpreter import Found, Rule, bind, interpret
from lowrank_jax.program.kernel import Kernel, dense, sources_of
from lowrank_jax.program.kernel_use import Trace
from lowrank_jax.program.reading import READERS, Reading
from lowrank_jax.tree.suggest import suggest

Slice = tuple[int, ...]  # index of a kernel in its stack; () where there is no stack
LayerMoments = dict[Slice, Strips]


@dataclasses.dataclass(frozen=True)
class Key:
    """Which kernel of which parameter some sums are of.

    Attributes:
        path: of the parameter.
        gone: axes and indices of the stack that the program has taken apart; see `Source`.
        stack: axes of the stack that run at once.
    """

    path: str
    gone: tuple[tuple[int, int | None], ...]
    stack: tuple[int, ...]

    def __lt__(self, other: "Key") -> bool:
        """JAX sorts the keys of every dict that leaves a call."""
        return str(self) < str(other)


@dataclasses.dataclass(frozen=True, eq=False)
class Measure(Rule):
    """Adds up the moments of the convolutions and products that read some kernels.

    Attributes:
        paths: of the kernels.
        turn: number of the batch.
    """

    paths: Collection[str]
    turn: Any = 0

    def apply(self, eqn: Any, values: list) -> Found | None:
        if eqn.primitive.name not in READERS:
            return None
        reading = Reading.of(eqn, sources_of(values))
        x, source = values[1 - reading.operand], reading.source
        if reading.reason or source is None or source.path not in self.paths:
            return None
        if isinstance(x, Kernel):
            return None
        outputs = bind(eqn, [dense(value) for value in values])
        key = Key(source.path, source.gone, reading.layout.stack)
        sums = strip_sums(StripGeometry.of(reading), x, outputs[0], self.turn)
        return outputs, {key: sums}


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """What a network does with unlabelled data: all that plans and fits need to know.

    Attributes:
        network: the function and its variables.
        inputs: the batches.
        trace: of one image.
        moments: layer path to the moments of each kernel of its stack.
        curvature: layer path to what errors of the outputs cost the network's outputs;
            see `output_curvature`.
        images: how many images there were.
    """

    network: Network
    inputs: Inputs
    trace: Trace
    moments: Mapping[str, LayerMoments]
    curvature: Mapping[str, np.ndarray]
    images: int

    @functools.cached_property
    def importance(self) -> dict[str, Importance]:
        """Layer path to how much errors of the outputs count."""
        return importance_of(self.curvature, self.images)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the moments to a ``.npz`` file.

        Args:
            path: of the file, which appears whole or not at all.
        """
        kernels = self.network.named()
        write_moments(path, dict(self.moments), self.curvature, kernels, self.images)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        apply: Callable,
        variables: Any,
        inputs: Any,
        *args: Any,
        **kwargs: Any,
    ) -> "Calibration":
        """Reads what `save` wrote, for the network that was calibrated; runs nothing.

        Args:
            path: of the file.
            apply, variables, inputs, *args, **kwargs: as in `calibrate`.

        Raises:
            FileNotFoundError: there is nothing at the path.
            ValueError: the file is damaged, or belongs to other variables.
        """
        network, batches, trace = prepared(apply, variables, inputs, args, kwargs)
        moments, curvature, count = read_moments(path, network.named())
        return cls(network, batches, trace, moments, curvature, count)


def prepared(
    apply: Callable, variables: Any, inputs: Any, args: tuple, kwargs: Mapping[str, Any]
) -> tuple[Network, Inputs, Trace]:
    """The network, its batches, which can be had again, and its trace of one image, or of a batch
    if one image does not run."""
    network = Network(apply, variables, args, kwargs)
    batches = inputs if isinstance(inputs, Inputs) else Inputs(inputs)
    first = batches.first()
    check_evaluation(kwargs, (*first, *args))
    tell_labels(first)
    one = jax.tree.map(lambda x: x[:1], first)
    try:
        trace = network.trace(one)
    except ValueError:  # a mesh of devices may not divide one image
        trace = network.trace(first)
        tell_together(first)
    return network.with_changed(trace), batches.held(), trace


def calibrate(
    apply: Callable,
    variables: Any,
    inputs: Any,
    *args: Any,
    paths: Collection[str] | None = None,
    **kwargs: Any,
) -> Calibration:
    """Gathers what a plan needs to know of every convolution and product: second moments.

    The moments are additional outputs of the network's own program, inside loops and calls too. One
    batch is held at a time; an iterator that runs once is held whole, for the fits. A line of the
    log says whether the images are enough for the widest layer.

    Args:
        apply: ``model.apply``, or any function of (variables, *inputs, *args, **kwargs).
        variables: trained variables of the dense model.
        inputs: one batch, or an iterable of batches; see `Inputs`.
        *args: arguments of the model after its inputs.
        paths: the layers wanted; without them all that can be decomposed.
        **kwargs: other arguments of the model, for evaluation, such as ``train=False``.

    Returns:
        A `Calibration`, which `plan` and `compress` take in place of their first three arguments.

    Raises:
        ValueError: there is no data, the model does not run on it, its arguments are those of
            training, or the activations are not finite.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> model, images = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu]), jnp.ones((4, 8, 8, 4))
        >>> variables = model.init(jax.random.key(0), images)
        >>> found = calibrate(model.apply, variables, images)
        >>> strips = found.moments["layers_0"][()].strips
        >>> {form: own.shape for form, own in strips.items()}
        {'horizontal': (1, 12, 12), 'pointwise': (1, 4, 4), 'vertical': (1, 12, 12)}
    """
    network, batches, trace = prepared(apply, variables, inputs, args, kwargs)
    wanted = _wanted(trace, paths)
    moments, count = _moments(network, batches, wanted)
    curvature = output_curvature(network, batches, trace, list(moments))
    tell_amount(trace, count)
    return Calibration(network, batches, trace, moments, curvature, count)


def _wanted(trace: Trace, paths: Collection[str] | None) -> set[str]:
    """The layers that were named, or all that can be decomposed."""
    named = [paths] if isinstance(paths, str) else paths
    wanted, known = set(trace.safe_paths() if named is None else named), trace.paths()
    if unknown := sorted(wanted - set(known)):
        advice = suggest(unknown[0], known, "there are no layers.")
        raise ValueError(f"paths: {unknown[0]!r} is no layer of the network; {advice}")
    return wanted


def _moments(
    network: Network, batches: Iterable[tuple], wanted: Collection[str]
) -> tuple[dict[str, LayerMoments], int]:
    total, programs, count = _Total(), dict[str, Callable](), 0
    with Progress("calibrating", length_hint(batches) or None) as progress:
        for turn, batch in enumerate(progress.over(batches)):
            shape = shape_key(batch)
            if shape not in programs:
                programs[shape] = _program(network, batch, wanted)
            total.add(programs[shape](turn, *network.leaves(batch)))
            count += images(batch)
    return total.by_layer(network.shapes()), count


def _program(network: Network, batch: tuple, wanted: Collection[str]) -> Callable:
    traced = network.program(batch)
    keys: list[Key] = []

    def sums(turn: jax.Array, *inputs: jax.Array) -> list:
        values = traced.values(inputs)
        _, notes = interpret(traced.program.closed, values, Measure(wanted, turn))
        keys[:] = notes
        return list(notes.values())

    compiled = jax.jit(sums, compiler_options=default_options())
    return lambda *inputs: list(zip(compiled(*inputs), keys, strict=True))


class _Total:
    """Sums over batches, in float64 on the host."""

    def __init__(self) -> None:
        self.sums: dict[Key, Any] = {}

    def add(self, found: list[tuple[Any, Key]]) -> None:
        for sums, key in found:
            new = jax.tree.map(lambda value: np.asarray(value, np.float64), sums)
            old = self.sums.get(key)
            self.sums[key] = new if old is None else jax.tree.map(np.add, old, new)

    def by_layer(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LayerMoments]:
        """The moments of each kernel of each stack."""
        found: dict[str, LayerMoments] = {}
        for key in list(self.sums):
            layer = found.setdefault(key.path, {})
            for index, own in _taken_apart(key, self.sums.pop(key), shapes[key.path]):
                layer[index] = layer[index] + own if index in layer else own
        for path, layer in found.items():
            _check_finite(path, layer.values())
        return found


def _taken_apart(key: Key, sums: Any, shape: tuple[int, ...]) -> Iterator[tuple[Slice, Strips]]:
    """The kernels of a stack with their moments."""
    loops = [axis for axis, index in key.gone if index is None]
    sizes = tuple(shape[axis] for axis in (*loops, *key.stack))
    fixed = {axis: index for axis, index in key.gone if index is not None}
    flat = jax.tree.map(lambda value: value.reshape((*sizes, *value.shape[len(loops) + 1 :])), sums)
    for place in np.ndindex(sizes):
        own = dict(zip((*loops, *key.stack), place, strict=True)) | fixed
        index = tuple(int(own[axis]) for axis in sorted(own))
        one = jax.tree.map(lambda value, at=place: value[at], flat)
        yield index, _strips(**one)


def _strips(count: Any, part: Any, even: Mapping[str, Any], **rest: Any) -> Strips:
    """The sums of one kernel, and how many of its patches are independent."""
    own = Strips(count=int(count), samples=1.0, **rest)
    return dataclasses.replace(own, samples=independent(own, part, even))


def _check_finite(path: str, layer: Iterable[Strips]) -> None:
    for own in layer:
        if not all(np.isfinite(x).all() for x in jax.tree.leaves([own.x, own.yy, own.strips])):
            raise ValueError(
                f"{path}: the activations hold NaN or infinite values; check the weights and the "
                "calibration images."
            )
