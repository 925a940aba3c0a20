"""Random changes of batches: crops are windows, mixed labels stay probabilities."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.training import chain, crop_and_flip, crops_and_flips, cutmix, mixup

IMAGES = jnp.broadcast_to(jnp.arange(8.0).reshape(8, 1, 1, 1), (8, 6, 6, 2))  # image i holds i
LABELS = jnp.arange(8)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("size", "padding"), [(8, 0), (8, 2), (5, 0), ((4, 9), 1)])
def test_every_crop_is_a_window_of_the_padded_image_or_its_mirror(size, padding, compiled):
    images = jnp.arange(6 * 8 * 8 * 2.0).reshape(6, 8, 8, 2) + 1
    height, width = size if isinstance(size, tuple) else (size, size)
    fn = jax.jit(crop_and_flip, static_argnums=(2, 3)) if compiled else crop_and_flip
    padded = np.pad(images, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    corners = itertools.product(
        range(padded.shape[1] - height + 1), range(padded.shape[2] - width + 1)
    )
    parts = [np.s_[y : y + height, x : x + width] for y, x in corners]
    for image, out in zip(padded, fn(jax.random.key(0), images, size, padding), strict=True):
        windows = [image[part] for part in parts]
        assert any(np.array_equal(out, w) or np.array_equal(out, w[:, ::-1]) for w in windows)


def test_crops_reach_every_corner_and_flip_about_half():
    images = jnp.broadcast_to(jnp.arange(16.0).reshape(1, 4, 4, 1), (400, 4, 4, 1))
    out = np.asarray(crop_and_flip(jax.random.key(0), images, 3, 0))
    flipped = out[:, 0, 0, 0] > out[:, 0, 2, 0]
    assert 0.4 < flipped.mean() < 0.6  # binomial with n=400: 4 standard deviations
    assert set(out[~flipped][:, 0, 0, 0]) == {0.0, 1.0, 4.0, 5.0}


@pytest.mark.parametrize("size", [9, (9, 8), (8, 9)])
def test_a_crop_larger_than_the_padded_image_is_refused(size):
    with pytest.raises(ValueError, match=re.escape(f"size={size} is larger")):
        crop_and_flip(jax.random.key(0), jnp.ones((1, 8, 8, 1)), size, 0)


@pytest.mark.slow
def test_mixed_images_are_means_by_the_shares_that_the_labels_have():
    images, labels = mixup(8)(jax.random.key(1), (IMAGES, LABELS))
    np.testing.assert_allclose(labels.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(images[:, 0, 0, 0], labels @ jnp.arange(8.0), rtol=1e-5)


def test_cut_images_hold_as_much_of_each_as_the_labels_say():
    images, labels = cutmix(8)(jax.random.key(1), (IMAGES, LABELS))
    np.testing.assert_allclose(labels.sum(-1), 1, rtol=1e-6)
    shares = jnp.stack([(images == i).mean((1, 2, 3)) for i in range(8)], -1)
    np.testing.assert_allclose(shares, labels, atol=1e-6)
    assert (jnp.sum(labels > 0, -1) == 2).any()


def test_changes_follow_each_other_and_leave_the_labels():
    augment = chain(crops_and_flips(4, 0), crops_and_flips(3, 0))
    images, labels = augment(jax.random.key(0), (IMAGES, LABELS))
    assert images.shape == (8, 3, 3, 2) and labels is LABELS


@pytest.mark.parametrize("make", [mixup, cutmix])
def test_a_batch_without_labels_is_mixed_as_one_with_labels(make):
    [images] = make(8)(jax.random.key(1), (IMAGES,))
    wanted, _ = make(8)(jax.random.key(1), (IMAGES, LABELS))
    assert jnp.array_equal(images, wanted)


CHANGES = {
    "cutmix": cutmix(8),
    "crops": crops_and_flips(4, 0),
    "chain": chain(crops_and_flips(4, 0), cutmix(8)),
}


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 6), (8, 2, 6, 6, 2)])
@pytest.mark.parametrize("change", CHANGES)
def test_inputs_that_are_no_images_are_refused(change, shape, labelled):
    batch = (jnp.ones(shape), LABELS) if labelled else (jnp.ones(shape),)
    with pytest.raises(ValueError, match=r"not allowed here; give one array of images"):
        CHANGES[change](jax.random.key(0), batch)


@pytest.mark.parametrize("inputs", [(IMAGES, IMAGES), ({"image": IMAGES},)])
def test_images_within_or_beside_other_inputs_are_not_cut(inputs):
    with pytest.raises(ValueError, match=r"give one array of images"):
        cutmix(8)(jax.random.key(0), (*inputs, LABELS))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32, bool])
def test_shares_of_ints_are_refused_with_the_remedy(dtype):
    with pytest.raises(ValueError, match=r"not allowed in mixup; scale them to floats first"):
        mixup(8)(jax.random.key(0), (IMAGES.astype(dtype), LABELS))


@pytest.mark.parametrize("make", [mixup, cutmix])
def test_a_distribution_that_does_not_exist_is_refused(make):
    with pytest.raises(ValueError, match=r"alpha=0\.0 is not allowed"):
        make(8, 0.0)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: crops_and_flips((8,), 1), "size=(8,) is not allowed"),
        (lambda: crops_and_flips(8.0, 1), "size=8.0 is not allowed"),
        (lambda: crops_and_flips(0, 4), "size=0 is not allowed"),
        (lambda: crops_and_flips(8, 1.5), "padding=1.5 is not allowed"),
        (lambda: crops_and_flips(8, -1), "padding=-1 is not allowed"),
        (lambda: mixup(4.0), "classes=4.0 is not allowed"),
        (lambda: cutmix("4"), "classes='4' is not allowed"),
        (lambda: mixup(4, "a"), "alpha='a' is not allowed"),
        (lambda: cutmix(4, float("inf")), "alpha=inf is not allowed"),
    ],
)
def test_settings_that_are_not_allowed_are_refused_when_a_change_is_made(make, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        make()


def test_a_list_of_two_is_a_size():
    assert crops_and_flips([4, 5], 0)(jax.random.key(0), (jnp.ones((1, 8, 8, 1)),))[0].shape == (
        1,
        4,
        5,
        1,
    )
