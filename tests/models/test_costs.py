"""Networks cost what was published, and their low-rank programs what handwritten ones cost."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from lowrank_jax import decompose, lowrank, trace
from lowrank_jax.models import NIN, CifarResNet
from lowrank_jax.models.imagenet import VGG16, ResNet50

SMALL = {"NIN": (NIN, 32), "ResNet-20": (CifarResNet, 32)}
LARGE = {"ResNet-50": (ResNet50, 224), "VGG-16": (VGG16, 224)}


def images(size, batch=1):
    return jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)


def skeleton(model, x):
    return jax.eval_shape(model.init, jax.random.key(0), x)


class TwoConvs(nn.Module):
    """What one would write by hand for an `nn.Conv` at half of its parameters."""

    features: int
    kernel_size: Sequence[int]
    strides: int = 1
    padding: str | int = "SAME"
    use_bias: bool = True
    dtype: str | None = None
    precision: str | None = None

    @nn.compact
    def __call__(self, x):
        (h, w), c, n = self.kernel_size, x.shape[-1], self.features
        rank = h * w * c * n // (2 * (h * c + w * n))
        stride = self.strides  # models give an int
        pads = [self.padding] * 2
        if not isinstance(self.padding, str):
            pads = [((self.padding,) * 2, (0, 0)), ((0, 0), (self.padding,) * 2)]
        both = {"dtype": self.dtype, "precision": self.precision}
        first = CONV(rank, (h, 1), (stride, 1), pads[0], use_bias=False, **both)
        return CONV(n, (1, w), (1, stride), pads[1], use_bias=self.use_bias, **both)(first(x))


CONV = nn.Conv


def both_programs(model, size, monkeypatch):
    """The low-rank program of a network with half the parameters of its convolutions, and the
    handwritten one."""
    x = images(size)
    dense = skeleton(model, x)
    uses = trace(model.apply, dense, x)
    convolutions = [use.path for use in uses if use.kind != "product"]
    half = {path: scheme for path, scheme in uses.half_parameters().items() if path in convolutions}
    small = jax.eval_shape(lambda tree: decompose(tree, half, uses), dense)
    low = jax.jit(lowrank(model.apply)).lower(small, x)
    monkeypatch.setattr(nn, "Conv", TwoConvs)
    hand = skeleton(model, x)
    count = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (small, hand)]
    assert count[0] == count[1]
    return low, jax.jit(model.apply).lower(hand, x)


@pytest.mark.parametrize("name", SMALL)
def test_a_low_rank_program_costs_what_the_handwritten_one_does(name, monkeypatch):
    build, size = SMALL[name]
    low, hand = both_programs(build(), size, monkeypatch)
    assert low.cost_analysis()["flops"] == hand.cost_analysis()["flops"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_a_compiled_low_rank_program_costs_what_the_handwritten_one_does(name, monkeypatch):
    build, size = (SMALL | LARGE)[name]
    low, hand = both_programs(build(), size, monkeypatch)
    assert low.cost_analysis()["flops"] == hand.cost_analysis()["flops"] > 0
    found, expected = (lowered.compile().cost_analysis()["flops"] for lowered in (low, hand))
    assert found == expected > 0


@functools.cache
def traced(build, **options):
    model, x = build(**options), images(224)
    return trace(model.apply, skeleton(model, x), x)


def test_published_macs_of_resnet_50_and_vgg_16():
    uses = traced(ResNet50)
    assert round(uses.macs / 1e9, 2) == 4.09 and len(uses.safe_paths()) == 54
    convolutions = [use for use in traced(VGG16) if use.kind == "conv"]
    assert round(sum(use.macs for use in convolutions) / 1e9, 2) == 15.35
    assert round(sum(use.parameters for use in convolutions) / 1e6, 2) == 14.71


def test_the_authors_ranks_of_vgg_16_give_the_published_cost():
    ranks = [5, 24, 48, 48, 64, 128, 160, 192, 192, 256, 320, 320, 320]
    uses = traced(VGG16, num_classes=None)
    schemes = [use.scheme(rank) for use, rank in zip(uses, ranks, strict=True)]
    parameters = sum(use.parameters_at(scheme) for use, scheme in zip(uses, schemes, strict=True))
    macs = sum(use.macs_at(scheme) for use, scheme in zip(uses, schemes, strict=True))
    assert (round(parameters / 1e6, 2), round(uses.parameters / parameters, 3)) == (5.36, 2.745)
    assert (round(macs / 1e9, 2), round(uses.macs / macs, 2)) == (4.94, 3.1)
