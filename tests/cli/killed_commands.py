"""Kills a command again and again while it writes; prints what each kill left, as lines of JSON.

Usage: python killed_commands.py COMMAND HOME RUNS SECONDS. This process imports everything, and
each run that is killed is a fork of it. Only the work before the report is replaced, by results
that carry the number of the run. The command itself writes them, again and again until the signal
comes.
"""

import hashlib
import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import MappingProxyType

import numpy as np

from lowrank_jax import data
from lowrank_jax.cli import compress_command
from lowrank_jax.cli import main as cli
from lowrank_jax.cli.models import Model
from lowrank_jax.experiments import cifar10 as experiment
from lowrank_jax.experiments import journey as journeys
from lowrank_jax.factorization.separable import Separable
from lowrank_jax.io.folders import check_folder
from lowrank_jax.io.weights import load_weights
from lowrank_jax.planning.plans import Choice, Plan
from lowrank_jax.planning.spectra import Spectra
from lowrank_jax.report import writing
from lowrank_jax.report.drawing import Drawn
from lowrank_jax.tuning.timing import Throughput

OPTIONS = {"compress": ["--checkpoint", "a.npz", "--model", "a:B", "--images", "a.npy"]}
numbers = itertools.count()


def tree(value):
    """Weights that say which run wrote them."""
    return {"params": {"Conv_0": {"kernel": np.full((3, 3, 64, 64), value, np.float32)}}}


def journey(*args, **kwargs):
    value = next(numbers)
    costs = dict(parameters=(9, 6), macs=(90, 60), bytes=(36, 24))
    choice = Choice(path="Conv_0", scheme=Separable(1), **costs)
    plan = Plan(choices=(choice,), selector="fixed")
    stage = journeys.Stage(accuracy=0.5, plan=plan, variables=tree(value))
    names = ("dense", "low-rank", "dense, fast", "low-rank, fast")
    return journeys.Journey(
        stages={
            journeys.DENSE: journeys.Stage(accuracy=0.5, plan=None, variables=tree(0)),
            journeys.CLOSED: stage,
            journeys.PLANNED: stage,
        },
        given=plan,
        planned=plan,
        spectra={"Conv_0": np.arange(6.0, 0, -1)},
        images=4,
        tests=4,
        times=Throughput(4, {name: [2.0, 2.0] for name in names}),
        machine=str(value),
    )


class Job:
    """Its dense network gives ones, and the others differ by the number of their run."""

    model = Model(path="a:B", expression="B()", apply=len, module=None)
    images, variables, kwargs = np.zeros((2, 4, 4, 3)), tree(0), MappingProxyType({})

    def outputs(self, variables):
        yield np.ones((2, 1)) + variables["params"]["Conv_0"]["kernel"].flat[0]

    def labels(self, images, labels):
        return None


def replace_the_work():
    data.pretrained = lambda: tree(0)
    data.sample = data.cifar10 = lambda *args: None
    experiment.init = lambda *args: tree(0)
    experiment.fit = lambda *args, **kwargs: (tree(0), [])
    experiment.check_ranks = lambda *args: None
    journeys.run = journey
    fake = Drawn(png=bytes(9999), bright=b"<svg/>", dark=b"<svg/>")  # drawing takes long
    writing.draw_all = lambda pictures: {picture.name: fake for picture in pictures}
    compress_command.load_job = lambda args: Job()
    empty = Plan(choices=(), selector="total_energy")
    nothing = Spectra({})
    compress_command.compressed = lambda *args: (empty, tree(next(numbers)), {}, nothing)


def of_one_run(command, out):
    """Whether the report and the weights are of the same run, with the hashes of the manifest."""
    found = json.loads((out / "report.json").read_text())
    name, key = ("variables", "output_error") if command == "compress" else ("lowrank", "machine")
    value = load_weights(out / f"{name}.npz")["params"]["Conv_0"]["kernel"].flat[0]
    manifest = json.loads((out / "manifest.json").read_text())["files"]
    hashes = {path: hashlib.sha256((out / path).read_bytes()).hexdigest() for path in manifest}
    return float(found[key]) == value and hashes == manifest


def run_until_killed(command, out):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    while True:
        if cli.main([command, "--out", str(out), *OPTIONS.get(command, [])]):
            os._exit(1)


def kill_one(command, out, seconds, how):
    child = os.fork()
    if not child:
        run_until_killed(command, out)
    time.sleep(seconds)
    os.kill(child, how)
    _, status = os.waitpid(child, 0)
    check_folder(out)  # as the next run does
    return {
        "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == how,
        "whole": of_one_run(command, out),
        "beside": sorted({*os.listdir(out.parent)} - {out.name}),
    }


def main(command, home, runs, seconds):
    out, rng = Path(home) / "out", random.Random(command)
    replace_the_work()
    first = os.fork()
    if not first:
        os._exit(cli.main([command, "--out", str(out), *OPTIONS.get(command, [])]))
    assert os.waitpid(first, 0)[1] == 0
    for _ in range(int(runs)):
        how = rng.choice([signal.SIGKILL, signal.SIGTERM])
        print(json.dumps(kill_one(command, out, rng.uniform(0, float(seconds)), how)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
