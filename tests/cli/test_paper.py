"""The command `paper` prints what the authors published of the costs."""

import json

import pytest

from lowrank_jax.cli import main as cli
from lowrank_jax.cli.paper_command import network_facts
from lowrank_jax.models.published import PUBLISHED


@pytest.fixture
def untimed(monkeypatch):
    monkeypatch.setattr("lowrank_jax.cli.paper_command._gain", lambda *args: [0.9, 1.0, 1.1])


def factors(facts):
    sums = [
        [sum(layer[measure][i] for layer in facts["layers"]) for i in (0, 1)]
        for measure in ("parameters", "macs")
    ]
    return [dense / low for dense, low in sums]


CIFAR_CNN = ((3, 96, 10), (96, 128, 51), (128, 256, 51))  # C, N and K of 5x5 convolutions


def test_costs_at_the_authors_ranks(untimed):
    """CaffeNet as published; the other by K d (C + N) in place of d^2 C N."""
    assert round(factors(network_facts(PUBLISHED["CaffeNet"], 1, 2))[0], 2) == 5.00
    dense = sum(25 * c * n for c, n, _ in CIFAR_CNN)
    low = sum(5 * k * (c + n) for c, n, k in CIFAR_CNN)
    assert factors(network_facts(PUBLISHED["CIFAR CNN"], 1, 2))[0] == pytest.approx(dense / low)


@pytest.mark.slow
def test_costs_of_vgg_16_are_the_published_ones(untimed):
    parameters, macs = factors(network_facts(PUBLISHED["VGG-16"], 1, 2))
    assert (round(parameters, 3), round(macs, 2)) == (2.745, 3.10)


def test_the_command_prints_a_table_and_writes_a_report(tmp_path, capsys):
    out = tmp_path / "paper"
    options = ["--networks", "CIFAR CNN", "--batch", "2", "--rounds", "2", "--out", str(out)]
    assert cli.main(["paper", *options]) == 0
    text = capsys.readouterr().out
    assert "## CIFAR CNN" in text and "times as fast (quartiles" in text
    assert text.strip().splitlines()[-1] in (out / "report.md").read_text()
    found = json.loads((out / "report.json").read_text())["networks"]["CIFAR CNN"]
    assert [layer["rank"] for layer in found["layers"]] == [10, 51, 51]
    assert len(found["speed_up"]) == 3 and min(found["speed_up"]) > 0


def test_a_network_that_is_not_known_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["paper", "--networks", "LeNet"])
    assert "invalid choice: 'LeNet'" in capsys.readouterr().err
