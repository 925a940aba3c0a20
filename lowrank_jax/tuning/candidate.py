"""A candidate of a search: compiler options, images at a time, and the algorithms of the layers."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.program.compiler import calls_onednn
from lowrank_jax.tuning.algorithms import Choose, Layer, plain
from lowrank_jax.tuning.experimental.folding import folded
from lowrank_jax.tuning.experimental.pools import POOLS, Pool, pooled

# Makes a function of (variables, inputs) that runs each layer by the algorithm that the argument
# chooses; None for the plain network.
Network = Callable[[Choose | None], Callable[[Any, Any], Any]]


@dataclasses.dataclass(frozen=True)
class Configuration:
    """How a network is compiled.

    Attributes:
        options: compiler options, as of ``jax.jit``.
        size: images that run through the network at a time; None for all of them.
    """

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    size: int | None = None

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        size = "all at once" if self.size is None else f"slices of {self.size}"
        return f"{options or 'default options'}, {size}"


@dataclasses.dataclass(frozen=True)
class Choices:
    """The algorithms of layers and poolings, for any batch.

    A layer that is not among them, such as one of another image size, runs by its plain algorithm.
    Nothing is measured when a network asks.

    Attributes:
        algorithms: layers, with their scheme or None if dense, to names of algorithms.
        pools: poolings to names of algorithms.

    Example:
        >>> layer = Layer((4, 8, 8, 4), 16, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))
        >>> choices = Choices({(layer, None): "im2col"})
        >>> other = dataclasses.replace(layer, inputs=(2, 8, 8, 4))
        >>> larger = dataclasses.replace(layer, inputs=(2, 9, 9, 4))
        >>> choices.algorithm(other, None), choices.algorithm(larger, None)
        ('im2col', 'convolve')
    """

    algorithms: Mapping[tuple[Layer, Scheme | None], str] = dataclasses.field(default_factory=dict)
    pools: Mapping[Pool, str] = dataclasses.field(default_factory=dict)

    def algorithm(self, layer: Layer, scheme: Scheme | None) -> str:
        """Name of the algorithm of a layer, for `with_algorithms`."""
        return self._of_layers.get((_any_batch(layer), scheme), plain(scheme))

    def pool(self, pool: Pool) -> str:
        """Name of the algorithm of a pooling, for `pooled`."""
        return self._of_pools.get(_any_batch(pool), POOLS[0])

    @property
    def differ(self) -> bool:
        """Whether some algorithm is not the plain one."""
        layers = any(name != plain(scheme) for (_, scheme), name in self.algorithms.items())
        return layers or any(name != POOLS[0] for name in self.pools.values())

    @functools.cached_property
    def _of_layers(self) -> dict[tuple[Layer, Scheme | None], str]:
        return {(_any_batch(layer), how): name for (layer, how), name in self.algorithms.items()}

    @functools.cached_property
    def _of_pools(self) -> dict[Pool, str]:
        return {_any_batch(pool): name for pool, name in self.pools.items()}


def _any_batch(what: Any) -> Any:
    return dataclasses.replace(what, inputs=what.inputs[1:])


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One program of a network."""

    configuration: Configuration
    choices: Choices = Choices()

    def __str__(self) -> str:
        return (
            f"{self.configuration}, algorithms" if self.choices.differ else str(self.configuration)
        )

    def compiled(self, network: Network) -> Any:
        """The network under ``jax.jit``: a function of (variables, inputs)."""
        options, choices = self.configuration.options, self.choices
        run = network(choices.algorithm if choices.algorithms else None)
        if choices.pools:
            run = pooled(run, choices.pool)
        if calls_onednn(options):
            run = folded(run)
        return jax.jit(in_slices(run, self.configuration.size), compiler_options=dict(options))


def in_slices(apply: Callable[[Any, Any], Any], size: int | None) -> Callable[[Any, Any], Any]:
    """A function of (variables, inputs) that runs so many images at a time, in one program.

    Args:
        apply: function whose outputs have the leading axis of the inputs.
        size: of a slice; the last one may be smaller. None runs all images at once.

    Example:
        >>> run = in_slices(lambda scale, x: scale * x["a"] + x["b"], 2)
        >>> run(2.0, {"a": jnp.arange(5.0), "b": jnp.ones(5)}).tolist()
        [1.0, 3.0, 5.0, 7.0, 9.0]
    """
    if size is None:
        return apply

    def run(variables: Any, inputs: Any) -> Any:
        count = batch_of(inputs)
        whole = count - count % size
        parts = []
        if whole:
            stacked = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), inputs)
            outputs = jax.lax.map(lambda part: apply(variables, part), stacked)
            parts.append(jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), outputs))
        if whole < count:
            parts.append(apply(variables, jax.tree.map(lambda x: x[whole:], inputs)))
        return jax.tree.map(lambda *y: jnp.concatenate(y), *parts) if len(parts) > 1 else parts[0]

    return run


def batch_of(inputs: Any) -> int:
    """How many images a pytree of arrays holds.

    Raises:
        ValueError: the arrays do not have one leading axis in common, or hold no image.
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(inputs)]
    counts = {shape[:1] for shape in shapes}
    if len(counts) != 1 or counts <= {(), (0,)}:
        raise ValueError(
            f"inputs with arrays of the shapes {shapes} are not allowed; give at least one array, "
            "and to all of them the batch, of at least one image, as their first axis. Constants "
            "of the model belong to the arguments after the inputs."
        )
    return int(counts.pop()[0])


def asked_of(
    network: Network, args: tuple, sizes: Sequence[int | None]
) -> tuple[list[tuple[Layer, Scheme | None]], list[Pool]]:
    """The layers, with their schemes, and the poolings of a network that can run by algorithms.

    Layers and poolings that differ in the batch alone are listed once, at the first size.

    Args:
        network: is traced, not run.
        args: variables and inputs.
        sizes: of slices.
    """
    layers: dict[Any, tuple[Layer, Scheme | None]] = {}
    pools: dict[Any, Pool] = {}

    def ask(layer: Layer, scheme: Scheme | None) -> str:
        layers.setdefault((_any_batch(layer), scheme), (layer, scheme))
        return plain(scheme)

    def ask_pool(pool: Pool) -> str:
        pools.setdefault(_any_batch(pool), pool)
        return POOLS[0]

    for size in sizes:
        jax.eval_shape(in_slices(pooled(network(ask), ask_pool), size), *args)
    return list(layers.values()), list(pools.values())
