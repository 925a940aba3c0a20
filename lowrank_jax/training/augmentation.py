"""Random changes of batches, on the device: pure functions of (key, batch)."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from lowrank_jax.training.labels import probabilities
from lowrank_jax.tree.kinds import is_above_zero, is_int, whole

Augment = Callable[[chex.PRNGKey, tuple], tuple]


def chain(*parts: Augment) -> Augment:
    """One change after the other, each with a key of its own.

    Example:
        >>> double = lambda key, batch: (2 * batch[0], *batch[1:])
        >>> chain(double, double)(jax.random.key(0), (jnp.ones(2), "labels"))[0].tolist()
        [4.0, 4.0]
    """

    def augment(key: chex.PRNGKey, batch: tuple) -> tuple:
        for part, own in zip(parts, jax.random.split(key, len(parts)), strict=True):
            batch = part(own, batch)
        return batch

    return augment


def crops_and_flips(size: int | tuple[int, int], padding: int) -> Augment:
    """Applies `crop_and_flip` to the images, the first entry of a batch.

    Args:
        size, padding: as in `crop_and_flip`.

    Raises:
        ValueError: the size or the padding is not allowed.

    Example:
        >>> batch = jnp.ones((4, 32, 32, 3)), jnp.arange(4)
        >>> crops_and_flips(24, padding=0)(jax.random.key(0), batch)[0].shape
        (4, 24, 24, 3)
    """

    _check_part(size, padding)

    def augment(key: chex.PRNGKey, batch: tuple) -> tuple:
        images, *rest = batch
        return crop_and_flip(key, images, size, padding), *rest

    return augment


def mixup(classes: int, alpha: float = 0.2) -> Augment:
    """Mixes each example and its label with another (Zhang et al., 2017, arXiv 1710.09412).

    A batch of one entry has no labels: its inputs alone are mixed.

    Args:
        classes: of the labels, which are ints (batch,) or probabilities (batch, classes).
        alpha: parameter of Beta(alpha, alpha), the distribution of the first example's share.

    Raises:
        ValueError: ``classes`` is no int above 0, or ``alpha`` not above 0; when called, for inputs
            of ints, which have no shares.

    Example:
        >>> batch = jnp.ones((4, 8, 8, 3)), jnp.arange(4)
        >>> images, labels = mixup(4)(jax.random.key(0), batch)
        >>> images.shape, labels.shape, labels.sum(-1).tolist()
        ((4, 8, 8, 3), (4, 4), [1.0, 1.0, 1.0, 1.0])
    """
    whole("classes", classes)
    _check_alpha(alpha)

    def augment(key: chex.PRNGKey, batch: tuple) -> tuple:
        inputs, labels = parts(batch)
        _check_floating(inputs)
        order, share = _drawn(key, len(jax.tree.leaves(inputs)[0]), alpha)

        def mixed(x: jax.Array) -> jax.Array:
            own = share.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)
            return own * x + (1 - own) * x[order]

        return *jax.tree.map(mixed, inputs), *map(mixed, _targets(labels, classes))

    return augment


def cutmix(classes: int, alpha: float = 1.0) -> Augment:
    """Puts a part of another image into each image (Yun et al., 2019, arXiv 1905.04899).

    The labels are mixed by the shares of the areas. A batch of one entry has no labels.

    Args:
        classes, alpha: as in `mixup`.

    Raises:
        ValueError: ``classes`` is no int above 0, or ``alpha`` not above 0; when called, for inputs
            that are not one array of images.

    Example:
        >>> batch = jnp.ones((4, 8, 8, 3)), jnp.arange(4)
        >>> images, labels = cutmix(4)(jax.random.key(0), batch)
        >>> images.shape, labels.sum(-1).tolist()
        ((4, 8, 8, 3), [1.0, 1.0, 1.0, 1.0])
    """
    whole("classes", classes)
    _check_alpha(alpha)

    def augment(key: chex.PRNGKey, batch: tuple) -> tuple:
        inputs, labels = parts(batch)
        images = _images(inputs)
        draw_key, box_key = jax.random.split(key)
        order, share = _drawn(draw_key, len(images), alpha)
        inside = _boxes(box_key, share, images.shape)
        own = 1 - inside.mean((1, 2))[:, None]
        mixed = [own * x + (1 - own) * x[order] for x in _targets(labels, classes)]
        return jnp.where(inside[..., None], images[order], images), *mixed

    return augment


def parts(batch: tuple) -> tuple[tuple, Any]:
    """The inputs of a batch, and its labels: the last of several things, or None.

    Raises:
        ValueError: the batch is no tuple or list, as that of an own function may be.
    """
    if not isinstance(batch, tuple | list) or not batch:
        raise ValueError(
            f"The batch is a {type(batch).__name__}; give a tuple of the inputs, then the labels "
            "where there are some, be it from the data or from augment."
        )
    batch = tuple(batch)
    return (batch[:-1], batch[-1]) if len(batch) > 1 else (batch, None)


def crop_and_flip(
    key: chex.PRNGKey, images: jax.Array, size: int | tuple[int, int], padding: int
) -> jax.Array:
    """Pads with zeros, takes a random part and mirrors half of the images, on the device.

    Args:
        key: random key.
        images: (batch, height, width, channels).
        size: height and width of the part in pixels, or one int for a square; at most those of the
            padded images.
        padding: zeros added on each side, in pixels.

    Returns:
        Array of shape (batch, *size, channels).

    Raises:
        ValueError: the size or the padding is not allowed, the part is larger than the padded
            images, or the images are no such array.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> crop_and_flip(jax.random.key(0), jnp.ones((4, 32, 32, 3)), size=24, padding=0).shape
        (4, 24, 24, 3)
    """
    sides = _check_part(size, padding)
    batch, height, width, channels = _images((images,)).shape
    room = jnp.array((height, width)) + 2 * padding - jnp.array(sides)
    if height + 2 * padding < sides[0] or width + 2 * padding < sides[1]:
        raise ValueError(
            f"size={size} is larger than the padded images, {height}x{width} with "
            f"padding={padding}; give a smaller size or more padding."
        )
    corner_key, flip_key = jax.random.split(key)
    corners = jax.random.randint(corner_key, (batch, 2), 0, room + 1)
    flips = jax.random.bernoulli(flip_key, shape=(batch, 1, 1, 1))
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))

    def part(image: jax.Array, corner: jax.Array) -> jax.Array:
        start = (corner[0], corner[1], 0)
        return jax.lax.dynamic_slice(image, start, (*sides, channels))

    found = jax.vmap(part)(padded, corners)
    return jnp.where(flips, found[:, :, ::-1], found)


def _check_alpha(alpha: float) -> None:
    if not is_above_zero(alpha):
        raise ValueError(f"alpha={alpha!r} is not allowed; give a number above 0.")


def _check_part(size: Any, padding: Any) -> tuple[int, int]:
    """Height and width of a part."""
    sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(sides) != 2 or not all(is_int(side) and side > 0 for side in sides):
        raise ValueError(
            f"size={size!r} is not allowed; give an int of 1 or more, or two: (height, width)."
        )
    whole("padding", padding, 0)
    return sides


def _check_floating(inputs: Any) -> None:
    others = [x.dtype for x in jax.tree.leaves(inputs) if not jnp.issubdtype(x.dtype, jnp.floating)]
    if others:
        raise ValueError(
            f"Inputs of type {others[0]} are not allowed in mixup; scale them to floats first, as "
            "in chain(lambda key, batch: (batch[0] / 255, *batch[1:]), mixup(10))."
        )


def _images(inputs: tuple) -> jax.Array:
    """The one array of images that inputs are."""
    if len(inputs) != 1 or len(getattr(inputs[0], "shape", ())) != 4:
        shapes = jax.tree.map(jnp.shape, inputs)
        raise ValueError(
            f"Inputs of shapes {shapes} are not allowed here; give one array of images "
            "(batch, height, width, channels), or an augmentation of your own."
        )
    return inputs[0]


def _targets(labels: jax.Array | None, classes: int) -> list[jax.Array]:
    """The labels as probabilities, where there are labels."""
    return [] if labels is None else [probabilities(labels, (len(labels), classes))]


def _drawn(key: chex.PRNGKey, count: int, alpha: float) -> tuple[jax.Array, jax.Array]:
    """The partner of each example, and the share of the first one."""
    order_key, share_key = jax.random.split(key)
    order = jax.random.permutation(order_key, count)
    return order, jax.random.beta(share_key, alpha, alpha, (count,))


def _boxes(key: chex.PRNGKey, share: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """For each image a box with that share outside of it, cut off at the border: bools."""
    count, height, width = shape[:3]
    side = jnp.sqrt(1 - share)[:, None]
    centre = jax.random.uniform(key, (count, 2))
    low, high = centre - side / 2, centre + side / 2
    rows = (jnp.arange(height) + 0.5) / height
    columns = (jnp.arange(width) + 0.5) / width
    inside_rows = (rows > low[:, :1]) & (rows < high[:, :1])
    inside_columns = (columns > low[:, 1:]) & (columns < high[:, 1:])
    return inside_rows[:, :, None] & inside_columns[:, None, :]
