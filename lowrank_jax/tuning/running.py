"""A network whose convolutions run by chosen algorithms."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lowrank_jax.factorization.axes import AXES, split_axes
from lowrank_jax.factorization.forms import FORMS, SCHEMES
from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.program.changed import changed
from lowrank_jax.program.factored import arranged, own_axes, run_factored
from lowrank_jax.program.interpreter import Found, Rule
from lowrank_jax.program.kernel import Kernel, dense, sources_of
from lowrank_jax.program.reading import READERS, Reading
from lowrank_jax.program.transform import lowrank, with_rule
from lowrank_jax.tuning.algorithms import PLAIN, PLAIN_DENSE, Choose, Layer


def with_algorithms(apply: Callable, choose: Choose | None) -> Callable:
    """Makes a function run each convolution by the algorithm that is chosen for its layer.

    Args:
        apply: ``model.apply``, or any function of a tree, dense or decomposed.
        choose: function of (layer, scheme) that gives the name of an algorithm; the scheme is None
            for a dense layer. `Timer.fastest` is one. Without a function the convolutions are plain
            ones, as `lowrank` runs them.

    Returns:
        A function of the same arguments.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import linen as nn
        >>> model, x = nn.Conv(16, (3, 3)), jnp.ones((1, 8, 8, 4))
        >>> variables = model.init(jax.random.key(0), x)
        >>> with_algorithms(model.apply, lambda layer, scheme: "im2col")(variables, x).shape
        (1, 8, 8, 16)
    """
    if choose is None:
        return lowrank(apply)
    return with_rule(changed(apply), Algorithms(choose), dense_too=True)


@dataclasses.dataclass(frozen=True)
class Algorithms(Rule):
    """Runs each convolution by the algorithm that is chosen for its layer."""

    choose: Choose

    def apply(self, eqn: Any, values: list) -> Found | None:
        if eqn.primitive.name not in READERS:
            return None
        reading = Reading.of(eqn, sources_of(values))
        kernel = values[reading.operand]
        if not isinstance(kernel, Kernel):
            return None
        found = self._run(reading, dense(values[1 - reading.operand]), kernel)
        return None if found is None else ([found], {})

    def _run(self, reading: Reading, x: jax.Array, kernel: Kernel) -> jax.Array | None:
        known = reading.is_convolution and _is_plain(reading)
        if kernel.factors is None:
            return self._run_dense(reading, x, kernel) if known else None
        order = reading.order(kernel.axes, kernel.first, kernel.groups)
        if not known or reading.stack != 1 or order != (0, 1):
            return run_factored(reading, x, kernel)
        layer, scheme = layer_of(reading, x), _scheme(reading, kernel)
        name = PLAIN if scheme is None else self.choose(layer, scheme)
        if scheme is None or name == PLAIN:
            return run_factored(reading, x, kernel)
        one, two = (_channels_last(reading, arranged(reading, kernel, i)) for i in (0, 1))
        outputs = layer.run(name, scheme.first, _inputs(reading, x), one, two)
        return _outputs(reading, outputs)

    def _run_dense(self, reading: Reading, x: jax.Array, kernel: Kernel) -> jax.Array | None:
        layer = layer_of(reading, x)
        name = self.choose(layer, None)
        if name == PLAIN_DENSE or kernel.value is None:
            return None
        weights = _channels_last(reading, kernel.value)
        return _outputs(reading, layer.convolve(_inputs(reading, x), weights, name))


def _is_plain(reading: Reading) -> bool:
    """Whether the algorithms compute what the convolution does."""
    params = reading.eqn.params
    spatial = len(params["window_strides"])
    usual = params["precision"] is None and params["batch_group_count"] == 1 and spatial in AXES
    return usual and min((min(pair) for pair in params["padding"]), default=0) >= 0


def layer_of(reading: Reading, x: jax.Array) -> Layer:
    """A convolution as numbers."""
    params = reading.eqn.params
    sizes = {reading.letters[axis]: n for axis, n in enumerate(reading.eqn.invars[1].aval.shape)}
    spatial = AXES[len(params["window_strides"])][:-2]
    return Layer(
        _inputs(reading, x).shape,
        sizes["O"],
        tuple(sizes[letter] for letter in spatial),
        tuple(params["window_strides"]),
        tuple(map(tuple, params["padding"])),
        tuple(params["rhs_dilation"]),
        tuple(params["lhs_dilation"]),
        params["feature_group_count"],
        np.dtype(x.dtype).name,
    )


def _scheme(reading: Reading, kernel: Kernel) -> Scheme | None:
    """The scheme of the factors along the axes that the program knows; None if there is none."""
    mine = own_axes(reading, kernel, split_axes(kernel.axes, kernel.first)[0])
    axes = AXES[len(mine)]
    spatial = axes[:-2]
    letters = "".join(letter for letter, own in zip(spatial, mine, strict=True) if own)
    forms = [name for name, form in FORMS.items() if form.spatial]
    first = next((name for name in forms if FORMS[name].split(spatial)[0] == letters), None)
    if first is None:
        return None
    rank = _channels_last(reading, arranged(reading, kernel, 1)).shape[-2]
    return SCHEMES[first](rank, reading.groups, axes, first)


def _inputs(reading: Reading, x: jax.Array) -> jax.Array:
    batch, channels, *spatial = reading.eqn.params["dimension_numbers"].lhs_spec
    return x.transpose(batch, *spatial, channels)


def _channels_last(reading: Reading, kernel: jax.Array) -> jax.Array:
    outputs, channels, *spatial = reading.eqn.params["dimension_numbers"].rhs_spec
    return kernel.transpose(*spatial, channels, outputs)


def _outputs(reading: Reading, y: jax.Array) -> jax.Array:
    """Outputs (batch, *spatial, features) in the program's order and type."""
    batch, channels, *spatial = reading.eqn.params["dimension_numbers"].out_spec
    order = np.argsort([batch, *spatial, channels])
    return y.transpose(order).astype(reading.eqn.outvars[0].aval.dtype)
