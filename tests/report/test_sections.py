"""What the parts of a report show: costs, spectra, filters, scores and times."""

import dataclasses

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax import Channel, Separable, Tucker, decompose, trace
from lowrank_jax.planning.candidates import candidates
from lowrank_jax.planning.plans import Plan
from lowrank_jax.planning.spectra import spectra
from lowrank_jax.report.costs import MOST, LayerCost, bars, layer_costs, layer_table, total
from lowrank_jax.report.drawing import BRIGHT
from lowrank_jax.report.filters import filters, filters_section, pictured
from lowrank_jax.report.scores import Images, Score
from lowrank_jax.report.spectra import spectra_cuts, spectra_section

EMPTY = Plan(choices=(), selector="fixed")
KERNEL = jax.random.normal(jax.random.key(0), (3, 3, 8, 16))


def drawn(picture):
    with matplotlib.rc_context(BRIGHT.style()):
        return picture.draw()


def test_costs_of_all_layers_are_those_of_the_plan(networks):
    layers = layer_costs(networks.plan)
    for measure in ("parameters", "macs"):
        assert total(layers, measure) == networks.plan.total(measure)
    assert [layer.rank for layer in layers] == ["dense", "8", "12", "10x12", "6", "dense"]


def test_a_column_is_there_only_where_its_figure_is_known(networks):
    plain, timed = (layer_costs(networks.plan, times) for times in (None, networks.times.layers))
    assert "time" not in layer_table(plain).rows[0]
    head, first, *_ = layer_table(timed).rows
    assert first[head.index("time")] == "200 µs"
    unknown = [dataclasses.replace(layer, error=None) for layer in plain]
    assert "error" not in layer_table(unknown).rows[0]
    assert {len(row) for row in layer_table(timed).rows} == {len(head)}


def test_bars_are_of_the_layers_that_cost_most_in_the_order_of_the_network():
    layers = [
        LayerCost(path=f"layer{n}", parameters=(n, n), macs=(100 - n, 1)) for n in range(1, 40)
    ]
    picture = bars(layers, "parameters")
    axis = drawn(picture).axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == [f"layer{n}" for n in range(40 - MOST, 40)]
    assert len(axis.patches) == 2 * MOST and f"{MOST} layers that cost most of 39" in picture.about


def test_spectra_are_cut_at_the_ranks_of_the_plan(networks):
    cuts = spectra_cuts(networks.plan, networks.spectra)
    ranks = {path: scheme.rank for path, scheme in networks.plan.ranks.items()}
    assert {cut.path: cut.rank for cut in cuts} == ranks
    assert all(cut.values[0] == 1 for cut in cuts)
    section = spectra_section(networks.plan, networks.spectra, weighted=True)
    axes = drawn(section.pictures[0]).axes
    assert [axis.lines[1].get_xdata().size for axis in axes] == list(ranks.values())
    assert spectra_section(EMPTY, networks.spectra, weighted=True) is None


def test_a_scheme_whose_spectrum_has_another_name_is_left_out():
    tree, x = {"w": jnp.ones((1, 3, 8, 8))}, jnp.ones((1, 4, 4, 8))
    apply = nn.Conv(8, (1, 3), use_bias=False).apply
    program = trace(lambda tree, x: apply({"params": {"kernel": tree["w"]}}, x), tree, x)
    found = spectra(tree, program)
    table = candidates(program, found)
    chosen = table.plan({"w": table.at("w", Tucker(2, inner=3))}, "by hand")
    assert chosen.ranks and spectra_cuts(chosen, found) == []


@pytest.mark.parametrize("scheme", [Separable(24), Channel(16), Tucker(8, inner=16)])
def test_at_full_rank_the_rebuilt_filters_are_the_dense_ones(scheme):
    node = decompose({"stem": KERNEL}, {"stem": scheme})["stem"]
    rows = filters("stem", KERNEL, node).rows
    np.testing.assert_allclose(rows["As it was"], rows["Rebuilt from its factors"], atol=1e-4)
    factors = [name for name in rows if "factor," in name]
    sizes = [rows[name].shape[1:] for name in factors]
    assert sizes == [shape[:2] for shape in scheme.shapes(KERNEL.shape)]


def test_filters_of_another_layout_are_the_same():
    usual = decompose({"stem": KERNEL}, {"stem": 3})["stem"]
    other = decompose({"stem": KERNEL.transpose(3, 2, 0, 1)}, {"stem": 3}, axes="OIHW")["stem"]
    one = filters("stem", KERNEL, usual).rows
    two = filters("stem", KERNEL.transpose(3, 2, 0, 1), other).rows
    for name in ("As it was", "Rebuilt from its factors"):
        np.testing.assert_allclose(one[name], two[name], atol=1e-5)


def test_the_filters_are_of_the_convolution_in_which_most_is_saved(networks):
    choice = pictured(networks.plan, networks.dense)
    saved = {c.path: c.macs[0] - c.macs[1] for c in networks.plan if c.path != "head"}
    assert choice.path == max(saved, key=saved.get)
    assert filters_section(EMPTY, networks.dense, networks.dense) is None
    matrices = dataclasses.replace(networks.plan, choices=networks.plan.choices[-1:])
    assert filters_section(matrices, networks.dense, networks.small) is None


def test_a_score_says_on_which_images_it_is():
    images = Images(count=64, held_out=False, labelled=False)
    kept = Score(images=images, error=0.1, dense=1.0, small=0.95)
    assert "95.0 % have the class that the dense network gives" in str(kept)
    assert "64 images given, to which the factors were fitted" in str(kept)
    changed = Score(images=dataclasses.replace(images, held_out=True), error=0.1)
    assert str(changed).startswith("The outputs differ by 10.0 %") and "nothing was" in str(changed)
    assert changed.facts().keys() == {"output_error", "scored_images"}


def test_times_are_ratios_of_passes_in_turn(networks):
    facts = networks.times.facts()
    assert facts["speed_up"]["median"] == pytest.approx(0.02 / 0.011, rel=0.1)
    assert "with 16 images at once, in 3 passes" in str(networks.times)
