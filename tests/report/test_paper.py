"""The costs of published networks are the published ones; the report sets them side by side."""

import dataclasses
import functools

import pytest

from lowrank_jax.models.published import PUBLISHED
from lowrank_jax.report.costs import total
from lowrank_jax.report.paper import LayerFacts, NetworkFacts, factor, layer_facts, markdown

CIFAR_CNN = ((3, 96, 10), (96, 128, 51), (128, 256, 51))  # C, N and K of 5x5 convolutions
OURS = {"GoogLeNet": 1 / 2.84, "ImageNet NIN": 0.5, "ResNet-18": 0.5}


@functools.cache
def facts_of(name):
    return layer_facts(PUBLISHED[name])


def decomposed(name):
    return [layer for layer in facts_of(name) if layer.rank is not None]


def test_weights_of_caffenet_and_of_the_cifar_network_fall_as_published():
    """CaffeNet five times; the other by K d (C + N) in place of d^2 C N."""
    assert round(factor(facts_of("CaffeNet"), "parameters"), 2) == 5.00
    dense = sum(25 * c * n for c, n, _ in CIFAR_CNN)
    low = sum(5 * k * (c + n) for c, n, k in CIFAR_CNN)
    assert total(facts_of("CIFAR CNN"), "parameters") == (dense, low)


def test_costs_of_vgg_16_are_the_published_ones():
    layers = facts_of("VGG-16")
    assert round(factor(layers, "parameters"), 3) == 2.745
    assert round(factor(layers, "macs"), 2) == 3.10


def test_the_ranks_of_caffenet_are_the_authors_sums_over_its_groups():
    assert [layer.rank for layer in facts_of("CaffeNet")] == [8, 40, 60, 100, 200]


@pytest.mark.parametrize("name, share", OURS.items())
def test_ranks_of_ours_are_the_largest_within_their_share(name, share):
    for layer in decomposed(name):
        dense, low = layer.parameters
        assert low <= share * dense < low + low / layer.rank


def test_no_ranks_of_googlenets_spatial_layers_save_the_published_factor_of_all_weights():
    layers = facts_of("GoogLeNet")
    pointwise = [layer for layer in layers if layer.rank is None]
    all_weights, published = total(layers, "parameters")[0], PUBLISHED["GoogLeNet"].compression
    assert all_weights / total(pointwise, "parameters")[0] < published
    assert published <= factor(decomposed("GoogLeNet"), "parameters") < published + 0.02


LAYERS = (
    LayerFacts(layer="a", rank=2, parameters=(90, 30), macs=(900, 450), error=0.25),
    LayerFacts(layer="b", rank=None, parameters=(10, 10), macs=(100, 100)),
)


def test_the_report_sets_found_beside_published_figures():
    facts = NetworkFacts(
        layers=LAYERS,
        batch=2,
        speed_up=(1.0, 1.5, 2.0),
        compression=2.5,
        notes=["The ranks are ours."],
    )
    text = markdown(facts)
    assert "Weights: 2.500 times fewer, in the decomposed layers 3.000 times" in text
    assert "published: 2.50.\n" in text and "Multiply-adds: 1.82 times fewer." in text
    assert "2 images: 1.50 times as fast (quartiles 1.00 to 2.00).\nThe ranks are ours." in text


def test_errors_are_a_column_where_they_are_known_and_none_elsewhere():
    facts = NetworkFacts(layers=LAYERS, batch=2, speed_up=(1.0, 1.5, 2.0))
    head, _, first, second, *_ = markdown(facts).splitlines()
    assert head.endswith(" error |") and first.endswith(" 0.250 |") and second.endswith("  |")
    unknown = tuple(dataclasses.replace(layer, error=None) for layer in LAYERS)
    assert "error" not in markdown(dataclasses.replace(facts, layers=unknown))
