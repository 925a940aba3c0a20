"""Where the arrays of a training lie: split batches, and the state beside its parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, auto_axes

from lowrank_jax.training.state import TrainState


def placed(tree: Any, sharding: NamedSharding | None) -> Any:
    """Host arrays as global ones, split by a sharding; every process holds the whole arrays.

    Args:
        tree: of arrays.
        sharding: of each array, such as ``NamedSharding(mesh, PartitionSpec("data"))``; None leaves
            the tree as it is.

    Raises:
        ValueError: the first axis of an array cannot be split so.

    Example:
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> whole = NamedSharding(mesh, PartitionSpec("data"))
        >>> placed(np.ones((4, 3)), whole).sharding == whole
        True
    """
    if sharding is None:
        return tree
    return jax.tree.map(lambda x: _global(np.asarray(x), sharding), tree)


def _global(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    try:
        _check_axes(sharding, array.ndim)
        sharding.shard_shape(array.shape)
    except ValueError as error:
        raise ValueError(
            f"Arrays {array.shape} cannot be split by {sharding.spec} over the mesh "
            f"{dict(sharding.mesh.shape)}; give a batch_size that the devices divide, and a spec "
            "of the first axis alone."
        ) from error
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def _check_axes(sharding: NamedSharding, ndim: int) -> None:
    if len(sharding.spec) > ndim:
        raise ValueError(f"{sharding.spec} has more than {ndim} axes; give one of the first axis.")


def on_mesh(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The tree on a mesh: a leaf that lies there stays, the others are whole on each device.

    Args:
        tree: of arrays.
        mesh: of devices.
    """
    return jax.tree.map(_moved, tree, _places(tree, mesh))


def automatic(function: Callable, mesh: Mesh | AbstractMesh, out: Any) -> Callable:
    """A function that lets the compiler place what lies between its arguments and its results.

    `jax.make_mesh` makes explicit axes, on which random numbers, gathers and convolutions of split
    kernels need a place of their own.

    Args:
        function: of arrays on the mesh.
        mesh: of devices.
        out: places of the results.
    """
    if AxisType.Explicit not in mesh.axis_types:
        return function
    return auto_axes(function, out_sharding=out)


def beside(
    state: TrainState, tx: optax.GradientTransformation, mesh: Mesh | AbstractMesh
) -> TrainState:
    """The state on a mesh; the optimiser's moments and the average lie as their parameters do.

    Args:
        state: of one device, or with parameters that lie on the mesh.
        tx: the optimiser of the state.
        mesh: of devices.
    """
    whole, own = NamedSharding(mesh, PartitionSpec()), _places(state.params, mesh)

    def as_its_parameter(moment: Any, sharding: NamedSharding) -> Any:
        return moment if _is_masked(moment) else sharding

    moments = optax.tree_utils.tree_map_params(
        tx,
        as_its_parameter,
        state.optimizer,
        own,
        transform_non_params=lambda _: whole,
        is_leaf=_is_masked,
    )
    places = dataclasses.replace(
        _places(state, mesh),
        params=own,
        optimizer=moments,
        average=None if state.average is None else own,
    )
    return jax.tree.map(_moved, state, places)


def _is_masked(moment: Any) -> bool:
    """Whether an optimiser of some of the parameters has nothing for this one."""
    return isinstance(moment, optax.MaskedNode)


def like(tree: Any, other: Any) -> Any:
    """The tree on the devices where another tree of the same structure lies."""
    return jax.tree.map(lambda leaf, place: _moved(leaf, place.sharding), tree, other)


def _places(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    def place(leaf: jax.Array) -> NamedSharding:
        own = getattr(leaf, "sharding", None)
        if isinstance(own, NamedSharding) and own.mesh == mesh:
            return own
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(place, tree)


def _moved(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """The leaf on devices of which this process may not see all."""
    if getattr(leaf, "sharding", None) == sharding:
        return leaf
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        bits = _global(np.asarray(jax.random.key_data(leaf)), sharding)
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(leaf))
    return _global(np.asarray(leaf), sharding)
