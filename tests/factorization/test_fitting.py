"""Fitted factors are never worse than plain ones on images that they were not fitted to."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowrank_jax.factorization.axes import OUTPUTS
from lowrank_jax.factorization.cross_validation import SHRINKAGES
from lowrank_jax.factorization.fitting import FEW, fit_layer
from lowrank_jax.factorization.forms import FORMS, SCHEMES
from lowrank_jax.factorization.importance import Importance
from lowrank_jax.factorization.merging import merge
from lowrank_jax.factorization.moments import Moments
from lowrank_jax.factorization.ranks import max_rank
from lowrank_jax.factorization.separable import Separable
from lowrank_jax.factorization.strips import Strips, whitened_spectrum
from lowrank_jax.factorization.tucker import Tucker

# Statistics of random data hold for nearly all seeds: the examples are the same in every run.
few = settings(max_examples=20)
seeds = st.integers(0, 2**31)
LAYOUTS = {
    "HWIO": (3, 3, 4, 6),
    "OIHW": (6, 4, 3, 3),
    "WIO": (3, 4, 6),
    "DHWIO": (2, 3, 2, 2, 4),
    "IWHO": (4, 3, 3, 6),
    "IO": (7, 6),
    "OI": (6, 7),
    "IPO": (7, 2, 3),
    "JIO": (2, 3, 6),
    "PJOI": (2, 3, 2, 2),
}
SPATIAL = [first for first, form in FORMS.items() if form.spatial]
CASES = [
    (axes, first)
    for axes in LAYOUTS
    for first, form in FORMS.items()
    if form.spatial == ("W" in axes)
]


class Layer:
    """Images of correlated patches of inputs that have drifted, and the outputs of a kernel."""

    def __init__(self, seed, shape=(3, 3, 2, 6), axes="HWIO", groups=1, drift=0.3):
        self.rng, self.axes, self.groups, self.drift = (
            np.random.default_rng(seed),
            axes,
            groups,
            drift,
        )
        self.kernel = self.rng.standard_normal(shape)
        self.outputs = [axes.index(letter) for letter in axes if letter in OUTPUTS]
        self.size = self.kernel.size // math.prod(shape[axis] for axis in self.outputs)
        mix = self.rng.standard_normal((groups, self.size, self.size)) / math.sqrt(self.size)
        self.mix = mix * self.rng.uniform(0.05, 2, self.size)
        self.lost = self.rng.standard_normal((groups, self.size, self.size)) / math.sqrt(self.size)

    def flat(self, kernel):
        """(g, p, m)"""
        moved = np.moveaxis(kernel, self.outputs, range(-len(self.outputs), 0))
        return moved.reshape(self.size, self.groups, -1).transpose(1, 0, 2)

    def images(self, count, positions=16):
        shared = self.rng.standard_normal((count, 1, self.groups, self.size))
        own = self.rng.standard_normal((count, positions, self.groups, self.size))
        patches = np.einsum("nigq,gpq->nigp", shared + own, self.mix, optimize=True)
        outputs = np.einsum("nigp,gpm->nigm", patches, self.flat(self.kernel))
        noise = self.rng.standard_normal(patches.shape) * patches.std()
        turned = np.einsum("nigq,gpq->nigp", patches, self.lost, optimize=True)
        drifted = patches + self.drift * (0.3 * noise + turned)
        return drifted.reshape(-1, *patches.shape[2:]), outputs.reshape(-1, *outputs.shape[2:])

    def moments(self, count, **options):
        return moments_of(*self.images(count, **options))

    def error(self, first, second):
        """Of the outputs of fresh images, relative to their variance."""
        fresh = self.moments(200)
        flat = self.flat(np.asarray(merge(first, second, self.axes), np.float64))
        gained = np.einsum("gpm,gpq,gqm->gm", flat, fresh.covariance, flat, optimize=True)
        error = (
            fresh.variance + gained - 2 * np.einsum("gpm,gpm->gm", flat, fresh.cross, optimize=True)
        )
        return error.sum() / fresh.variance.sum()


def moments_of(x, y):
    """Of patches (i, g, p) and their outputs (i, g, m)."""
    xx, xy = (
        np.einsum("igp,igq->gpq", x, x, optimize=True),
        np.einsum("igp,igm->gpm", x, y, optimize=True),
    )
    return Moments(len(x), x.sum(0), y.sum(0), xx, xy, (y**2).sum(0))


def strips_of(x, y, taps):
    """Of the same, of a kernel of one column of taps."""
    parts = x.reshape(*x.shape[:2], taps, -1)
    own = np.einsum("igbr,igbs->grs", parts, parts, optimize=True) / taps
    offsets = np.einsum("igbr,igcr->gbc", parts, parts, optimize=True)
    whole = np.einsum("igm,ign->gmn", y, y, optimize=True)
    strips, offsets = ({"horizontal": a, "pointwise": a} for a in (own, offsets))
    return Strips(len(x), len(x), x.sum(0), y.sum(0), whole, strips, offsets)


def factors(layer, scheme):
    return scheme.factor(jnp.asarray(layer.kernel, jnp.float32))


@settings(max_examples=20)
@given(seeds, st.sampled_from([1, 2, 3, 4, 6, 8, 16, 64]), st.integers(1, 6), st.floats(0, 0.5))
@example(seed=0, count=4, rank=3, drift=0.3)  # about as many samples as dimensions
def test_with_any_number_of_images_the_fit_is_not_worse_than_plain(seed, count, rank, drift):
    layer, scheme = Layer(seed, drift=drift), Separable(rank)
    images = [count - count // 2, count // 2]
    fit = fit_layer(layer.kernel, [layer.moments(n) for n in images if n], scheme)
    plain = layer.error(*factors(layer, scheme))
    assert layer.error(fit.first, fit.second) <= 1.15 * plain + 1e-3
    assert fit.held_out <= fit.plain


@few
@given(seeds, st.integers(2, 6))
def test_with_many_images_the_fit_wins_and_the_held_out_error_tells_it(seed, rank):
    layer = Layer(seed)
    folds = [layer.moments(100), layer.moments(100)]
    fit = fit_layer(layer.kernel, folds, Separable(rank), sweeps=0)
    fresh = layer.error(fit.first, fit.second)
    assert not fit.is_plain and fit.samples > FEW
    assert fresh < layer.error(*factors(layer, Separable(rank)))
    # Half of the images make worse factors, and measure them within a few times the error.
    assert 0.5 * fresh < fit.held_out < 5 * fresh


def test_a_fit_to_few_images_shrinks_more():
    layer = Layer(0)
    few, many = (
        fit_layer(layer.kernel, [layer.moments(n), layer.moments(n)], Separable(3)).shrinkage
        for n in (1, 256)
    )
    assert few > many


def test_one_fold_leaves_the_plain_factors():
    layer = Layer(1)
    fit = fit_layer(layer.kernel, [layer.moments(1)], Separable(3))
    assert fit.is_plain and fit.held_out == fit.plain and fit.samples == 16 / 18
    expected = merge(*factors(layer, Separable(3)))
    np.testing.assert_allclose(merge(fit.first, fit.second), expected, atol=1e-5)


@pytest.mark.parametrize("axes, first", CASES)
def test_in_every_layout_and_form_full_rank_is_the_kernel(axes, first):
    shape = LAYOUTS[axes]
    for groups in (1, 2):
        # The blocks of the outputs of a matrix read the same inputs.
        layer = Layer(0, shape, axes, groups if FORMS[first].spatial else 1, drift=0)
        scheme = SCHEMES[first](max_rank(shape, groups, axes, first), groups, axes, first)
        fit = fit_layer(layer.kernel, [layer.moments(8), layer.moments(8)], scheme)
        assert (fit.first.shape, fit.second.shape) == scheme.shapes(shape)
        assert fit.first.dtype == fit.second.dtype == np.float64
        np.testing.assert_allclose(merge(fit.first, fit.second, axes), layer.kernel, atol=1e-3)


TUCKER = [Tucker(3, inner=4), Tucker(3, axes="OIHW", inner=4), Tucker(2, 2, inner=2)]


@settings(max_examples=6)
@given(seeds, st.sampled_from(TUCKER))
def test_three_factors_are_fitted_and_keep_their_ranks(seed, scheme):
    shape = LAYOUTS[scheme.axes]
    layer = Layer(seed, shape, scheme.axes, scheme.groups)
    fit = fit_layer(layer.kernel, [layer.moments(100), layer.moments(100)], scheme)
    pair = scheme.joined(scheme.parted((fit.first, fit.second)))
    for found, wanted in zip(pair, (fit.first, fit.second), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6 * np.abs(wanted).max())
    plain = scheme.joined(factors(layer, scheme))
    assert not fit.is_plain and layer.error(*pair) < layer.error(*plain)


def test_three_factors_of_full_rank_are_the_kernel():
    layer, scheme = Layer(0, LAYOUTS["HWIO"], drift=0), Tucker(4, inner=6)
    fit = fit_layer(layer.kernel, [layer.moments(8), layer.moments(8)], scheme)
    np.testing.assert_allclose(merge(fit.first, fit.second), layer.kernel, atol=1e-3)


def test_sweeps_lower_the_error_of_fresh_images():
    errors = []
    for seed, sweeps in itertools.product(range(6), (0, 1)):
        layer = Layer(seed)
        folds = [layer.moments(100), layer.moments(100)]
        fit = fit_layer(layer.kernel, folds, Separable(3), sweeps=sweeps)
        errors.append(layer.error(fit.first, fit.second))
    assert np.mean(errors[1::2]) < np.mean(errors[0::2])


def test_three_folds_are_each_held_out():
    layer = Layer(2)
    folds = [layer.moments(20) for _ in range(3)]
    fit = fit_layer(layer.kernel, folds, Separable(3), sweeps=0)
    np.testing.assert_allclose(fit.held_out, layer.error(fit.first, fit.second), rtol=0.3)


def weighted_folds(layer, importance, count=50):
    found = []
    for _ in range(2):
        x, y = layer.images(count)
        found.append(moments_of(x, importance.weighted(y.reshape(len(y), -1)).reshape(y.shape)))
    return found


def fit_weighted(layer, scheme, importance, count=50):
    return fit_layer(layer.kernel, weighted_folds(layer, importance, count), scheme, importance)


@few
@given(seeds, st.sampled_from([(6, "HWIO", 1), (8, "HWIO", 2), (6, "OIHW", 1)]))
def test_a_fit_costs_less_where_it_knows_what_errors_cost(seed, case):
    width, axes, groups = case
    costs = {"known": 0.0, "unknown": 0.0}
    for own in range(4):
        shape = (3, 3, 2, width) if axes == "HWIO" else (width, 2, 3, 3)
        layer, rng = Layer(seed + own, shape, axes, groups, 0), np.random.default_rng(seed + own)
        size = width // groups
        half = rng.standard_normal((groups, size, size)) * np.exp(rng.standard_normal(size))
        cost, scheme = half @ half.mT, Separable(2, groups, axes)
        x, _ = layer.images(100)
        for name, importance in (
            ("known", Importance.of(cost)),
            ("unknown", Importance.even(width)),
        ):
            fit = fit_weighted(layer, scheme, importance)
            flat = layer.flat(np.asarray(merge(fit.first, fit.second, axes)) - layer.kernel)
            error = np.einsum("igp,gpm->igm", x, flat)
            costs[name] += np.einsum("igm,gmn,ign->", error, cost, error, optimize=True)
    assert costs["known"] < costs["unknown"]


def test_important_outputs_are_kept_better():
    layer = Layer(3, drift=0)
    important = Importance.of(np.square([10.0, 1, 1, 1, 1, 1])[:, None, None])
    gaps = []
    for importance in (important, Importance.even(6)):
        fit = fit_weighted(layer, Separable(3), importance)
        gaps.append(np.square(merge(fit.first, fit.second) - layer.kernel)[..., 0].sum())
    assert gaps[0] < gaps[1]


@pytest.mark.parametrize("costs", [np.zeros(6), np.array([0.0, 1, 0, 0, 0, 0])])
@pytest.mark.parametrize("make", [np.diag, lambda x: x[:, None, None]], ids=["block", "channels"])
def test_outputs_of_no_importance_leave_finite_factors(costs, make):
    layer, importance = Layer(4), Importance.of(make(costs).reshape(-1, *make(costs).shape[-2:]))
    fit = fit_weighted(layer, Separable(3), importance, 8)
    assert np.isfinite(fit.first).all() and np.isfinite(fit.second).all()


def test_the_plain_factors_do_not_depend_on_what_errors_cost():
    layer, half = Layer(8), np.random.default_rng(0).standard_normal((6, 6))
    importance = Importance.of((half @ half.T)[None])
    one = weighted_folds(layer, importance)[:1]
    fits = [fit_layer(layer.kernel, one, Separable(3), own) for own in (importance, None)]
    assert all(fit.is_plain for fit in fits)
    known, plain = (merge(fit.first, fit.second) for fit in fits)
    np.testing.assert_allclose(known, plain, atol=1e-9)  # float64, well-conditioned roots


def silent(moments):
    return Moments(moments.count, *(0 * part for part in parts(moments)))


def parts(moments):
    return moments.x, moments.y, moments.xx, moments.xy, moments.yy


def without_channel(moments, channel=1, channels=2):
    """One input channel is always zero."""
    mask = np.ones(moments.x.shape[-1])
    mask[channel::channels] = 0
    x, y, xx, xy, yy = parts(moments)
    return Moments(moments.count, x * mask, y, xx * mask[:, None] * mask, xy * mask[:, None], yy)


def in_float32(moments):
    return Moments(
        moments.count, *(part.astype(np.float32).astype(np.float64) for part in parts(moments))
    )


@pytest.mark.parametrize("change", [silent, without_channel, in_float32])
@pytest.mark.parametrize("images", [1, 40])
def test_degenerate_patches_leave_factors_that_are_not_worse_than_plain(change, images):
    layer = Layer(5)
    folds = [change(layer.moments(images)) for _ in range(2)]
    fit = fit_layer(layer.kernel, folds, Separable(3))
    assert np.isfinite(fit.first).all() and np.isfinite(fit.second).all()
    assert 0 <= fit.held_out <= fit.plain


def test_one_patch_a_fold_leaves_finite_factors():
    layer = Layer(6)
    folds = [layer.moments(1, positions=1) for _ in range(2)]
    fit = fit_layer(layer.kernel, folds, Separable(3))
    assert np.isfinite(fit.first).all() and fit.held_out <= fit.plain


def test_a_kernel_of_zeros_leaves_finite_factors():
    layer = Layer(7)
    layer.kernel[:] = 0
    fit = fit_layer(layer.kernel, [layer.moments(4), layer.moments(4)], Separable(3))
    np.testing.assert_allclose(merge(fit.first, fit.second), 0, atol=1e-12)


@few
@given(seeds, st.sampled_from(SPATIAL), st.sampled_from([1, 2]))
def test_the_whitened_spectrum_is_the_error_of_the_outputs_of_kronecker_patches(
    seed, first, groups
):
    layer = Layer(seed, (3, 1, 4, 6), groups=groups, drift=0)  # one column of taps: Kronecker
    images = layer.images(100)
    moments, strips = moments_of(*images), strips_of(*images, taps=3)
    for rank in (1, 2):
        scheme = SCHEMES[first](rank, groups, first=first)
        values = whitened_spectrum(layer.kernel, strips, scheme)
        fit = fit_layer(layer.kernel, [moments, moments], scheme)
        left_out = np.sum(values[:, rank:] ** 2) / moments.total_variance.sum()
        if first in ("vertical", "spatial"):
            np.testing.assert_allclose(fit.held_out, left_out, rtol=0.05, atol=1e-3)
        assert values.shape == (groups, max_rank(layer.kernel.shape, groups, first=first))


def test_the_path_of_shrinkages_ascends():
    assert list(SHRINKAGES) == sorted(SHRINKAGES)
