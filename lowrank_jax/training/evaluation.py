"""Exact accuracy of a classifier."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_jax.program.compiler import default_options
from lowrank_jax.program.transform import lowrank
from lowrank_jax.training.arguments import check_kinds
from lowrank_jax.training.placing import automatic, on_mesh, placed
from lowrank_jax.tree.kinds import whole

Preprocess = Callable[[jax.Array], jax.Array]


def same(images: jax.Array) -> jax.Array:
    """The images as they are."""
    return images


def evaluate(
    apply: Callable,
    variables: chex.ArrayTree,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    preprocess: Preprocess = same,
    batch_size: int = 250,
    sharding: NamedSharding | None = None,
) -> float:
    """Share of the images whose largest logit is the label, exact for any count of images.

    The last partial batch is filled with the label -1, which no prediction equals.

    Args:
        apply: ``model.apply``, or any function of a tree and images.
        variables: the tree, with kernels dense or as factors.
        images: (count, ...).
        labels: ints (count,).
        preprocess: function of the images, run on the device.
        batch_size: images at once; with a sharding the next multiple of the number of devices.
        sharding: of the batches over devices, as in `finetune`. Variables on the mesh stay where
            they are, the others are whole on each device.

    Returns:
        A number from 0 to 1.

    Raises:
        ValueError: there are no images, not one int for each image as its label, or not one row of
            logits for each image; or the batch size or the sharding is not allowed.

    Example:
        >>> images, labels = np.eye(3, dtype=np.float32), np.array([0, 1, 0])
        >>> round(evaluate(lambda tree, x: x, {}, images, labels), 3)
        0.667
    """
    check_kinds({"sharding": sharding})
    _check_labels(np.shape(images), np.shape(labels))
    count = _count_correct(apply, preprocess, None if sharding is None else sharding.mesh)
    batch_size = _fitting(whole("batch_size", batch_size), len(labels), sharding)
    if sharding is not None:
        variables = on_mesh(variables, sharding.mesh)
    correct = 0
    for start in range(0, len(labels), batch_size):
        x, y = images[start : start + batch_size], labels[start : start + batch_size]
        missing = batch_size - len(y)
        x = np.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1))
        y = np.pad(y, (0, missing), constant_values=-1)
        correct += int(count(variables, *placed((x, y), sharding)))
    return correct / len(labels)


def _check_labels(images: tuple[int, ...], labels: tuple[int, ...]) -> None:
    if labels != images[:1]:
        raise ValueError(
            f"Labels of shape {labels} are not allowed for images of shape {images}; give one int "
            "for each image."
        )
    if not images or not images[0]:
        raise ValueError("evaluate needs at least one image; give some.")


def _fitting(size: int, count: int, sharding: NamedSharding | None) -> int:
    """A batch size that is hardly above the number of images, and that the devices divide."""
    devices = 1 if sharding is None else sharding.mesh.size
    return -(-min(size, count) // devices) * devices


@functools.lru_cache(maxsize=8)  # what is kept, keeps its function, too
def _count_correct(apply: Callable, preprocess: Preprocess, mesh: Any) -> Callable:
    def count(variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = lowrank(apply)(variables, preprocess(images))
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"Outputs of shape {logits.shape} are not allowed for {len(labels)} images; give a "
                "function whose outputs are one row of logits for each image."
            )
        return jnp.sum(jnp.argmax(logits, -1) == labels)

    if mesh is not None:
        count = automatic(count, mesh, NamedSharding(mesh, PartitionSpec()))
    return jax.jit(count, compiler_options=default_options())
