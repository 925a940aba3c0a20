"""One report of every command, of a small network with figures that are made up."""

from pathlib import Path

import numpy as np
import pytest

from lowrank_jax import Channel, Matrix, Plan, Separable, Tucker, decompose
from lowrank_jax.experiments import journey as journeys
from lowrank_jax.models.published import PUBLISHED
from lowrank_jax.planning.budget import Budget
from lowrank_jax.planning.plans import Choice, Rest
from lowrank_jax.planning.spectra import Spectra
from lowrank_jax.report.journey import journey_report
from lowrank_jax.report.next_steps import Setting, after_compress, after_finetune, after_plan
from lowrank_jax.report.paper import NetworkFacts, layer_facts, paper_report
from lowrank_jax.report.planned import Networks, Point, compress_report, plan_report
from lowrank_jax.report.scores import Images, Score
from lowrank_jax.report.times import Times
from lowrank_jax.report.tuned import Training, tuned_report
from lowrank_jax.report.writing import write_report
from lowrank_jax.tuning.timing import Throughput

SCHEMES = {
    "stem": None,
    "stage1/block_0/conv_with_a_long_name": Separable(8),
    "stage1/block_0/Conv_1": Channel(12),
    "stage2/block_0/Conv_0": Tucker(10, inner=12),
    "head": Matrix(6, axes="IO"),
}
SHAPES = dict.fromkeys(SCHEMES, (3, 3, 16, 32)) | {"head": (64, 10)}
SETTING = Setting(
    subject="nets:ResNet, dense.npz, with i.npy",
    checkpoint="dense.npz",
    options=["--model", "nets:ResNet", "--model-kwargs", '{"train": false}', "--images", "i.npy"],
    labels=["--labels", "labels.npy"],
    imports="from nets import ResNet",
    apply="ResNet().apply",
    call=", train=False",
)


def choice(path, scheme):
    shape = SHAPES[path]
    dense = int(np.prod(shape))
    low = scheme.parameters(shape) if scheme else dense
    costs = dict(parameters=(dense, low), macs=(900 * dense, 900 * low), bytes=(4 * dense, 4 * low))
    return Choice(path=path, scheme=scheme, error=0.05 if scheme else 0.0, **costs)


def made_plan(share=0.5):
    choices = tuple(choice(path, scheme) for path, scheme in SCHEMES.items())
    rest = Rest(parameters=round(9000 * share), macs=10000)
    return Plan(choices=choices, selector="total_energy", budget=Budget("macs", share), rest=rest)


@pytest.fixture(scope="session")
def networks():
    """A network with kernels that fall off, its decomposition, spectra and times."""
    rng = np.random.default_rng(0)
    kernels = {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
    plan = made_plan()
    values = {
        path: {scheme.first: np.geomspace(1, 1e-5, 16)} for path, scheme in plan.ranks.items()
    }
    layers = {path: (2e-4, 1e-4 if scheme else 2e-4) for path, scheme in SCHEMES.items()}
    network = Throughput(16, {"dense": [0.02, 0.021, 0.02], "low-rank": [0.01, 0.012, 0.011]})
    return Networks(
        plan=plan,
        dense=kernels,
        small=decompose(kernels, plan.ranks),
        spectra=Spectra(values),
        weighted=True,
        times=Times(network=network, layers=layers),
    )


@pytest.fixture(scope="session")
def score():
    images = Images(count=512, held_out=True, labelled=True)
    return Score(images=images, error=0.12, dense=0.917, small=0.883)


@pytest.fixture(scope="session")
def training():
    lines = [{"step": step, "loss": 1 / step} for step in range(20, 400, 20)]
    accuracy = {"dense": 0.93, "before": 0.88, "after": 0.92}
    return Training(asked="10 epochs", metrics=lines, accuracy=accuracy, scored=4096)


@pytest.fixture(scope="session")
def journey(networks):
    """What a demo might find."""
    seconds = {"dense": [2.0, 2.1], "low-rank": [1.5, 1.6]}
    fast = {f"{name}, fast": [value / 2 for value in own] for name, own in seconds.items()}
    scores = {journeys.CLOSED: 0.5, journeys.FITTED: 0.7, journeys.TUNED: 0.8}
    stages = {
        name: journeys.Stage(accuracy=score, plan=networks.plan, variables=networks.small)
        for name, score in {**scores, journeys.PLANNED: 0.84}.items()
    }
    dense = journeys.Stage(accuracy=0.85, plan=None, variables=networks.dense)
    return journeys.Journey(
        stages={journeys.DENSE: dense, **stages},
        given=networks.plan,
        planned=networks.plan,
        spectra={path: np.geomspace(1, 1e-5, 16) for path in networks.plan.ranks},
        images=512,
        tests=1000,
        times=Throughput(64, seconds | fast),
        machine="cpu",
    )


@pytest.fixture(scope="session")
def reports(networks, score, training, journey):
    """Name of a command to its report."""
    points = [
        Point(amount=share, plan=made_plan(share), small=None, score=score) for share in (0.5, 0.8)
    ]
    name = "CIFAR CNN"
    facts = NetworkFacts(layers=layer_facts(PUBLISHED[name]), batch=2, speed_up=(1.0, 1.5, 2.0))
    out = Path("out")
    return {
        "demo": journey_report(journey, "lowrank-jax demo", out),
        "plan": plan_report(SETTING.subject, networks, points, after_plan(SETTING, out)),
        "compress": compress_report(
            SETTING.subject, networks, score, after_compress(SETTING, out, score), {}
        ),
        "finetune": tuned_report(
            SETTING.subject, training, None, after_finetune(SETTING, out / "w.npz")
        ),
        "paper": paper_report({name: facts}),
    }


@pytest.fixture(scope="session")
def folders(reports, tmp_path_factory):
    """Name of a command to the folder of its report."""
    home = tmp_path_factory.mktemp("reports")
    for name, report in reports.items():
        (home / name).mkdir()
        write_report(home / name, report)
    return {name: home / name for name in reports}
