"""The journey: decompose a trained network, fine-tune it, and measure both."""

import dataclasses
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.data.datasets import Dataset, normalize
from lowrank_jax.factorization.scheme import spectrum
from lowrank_jax.io.weights import load_weights
from lowrank_jax.models import NIN
from lowrank_jax.program.kernel_use import Trace
from lowrank_jax.program.tracing import trace
from lowrank_jax.training.augmentation import crop_and_flip
from lowrank_jax.training.evaluation import evaluate
from lowrank_jax.training.finetuning import finetune
from lowrank_jax.training.metrics import read_metrics
from lowrank_jax.tree.decomposing import decompose
from lowrank_jax.tuning.timing import Throughput, compile_fastest, throughput

Variables = dict[str, Any]
Log = Callable[[str], None]
PAPER_RANKS = {"Conv_0": 10, "Conv_2": 20}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: passes over the training images.
        peak: highest learning rate of the one-cycle schedule.
        batch_size: images in a step.
        crop: side in pixels of the random training crops; 24 costs about half of 32.
        padding: zeros around an image before the crop, in pixels.
        seed: of initialisation, augmentation and shuffling.
        distill: fine-tune towards the dense network's probabilities instead of the labels.
    """

    epochs: int
    peak: float
    batch_size: int = 128
    crop: int = 32
    padding: int = 4
    seed: int = 0
    distill: bool = False


@dataclasses.dataclass(frozen=True)
class Layer:
    """Cost of one layer for one image, dense and as it is in the low-rank network."""

    name: str
    rank: int | None
    parameters: tuple[int, int]
    macs: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Journey:
    """What the experiment found.

    Attributes:
        layers: one entry for each convolution of the dense network.
        spectra: layer name to its singular values, largest first.
        accuracy: "dense", "decomposed" and "fine-tuned" to the share of test images classified as
            their labels say.
        curve: that share after each epoch of fine-tuning.
        times: forward passes "dense" and "low-rank".
        machine: device, versions.
        variables: the fine-tuned low-rank network.
    """

    layers: list[Layer]
    spectra: dict[str, np.ndarray]
    accuracy: dict[str, float]
    curve: list[float]
    times: Throughput
    machine: str
    variables: Variables


def init(model: NIN, seed: int = 0) -> Variables:
    """Freshly initialised variables of a CIFAR-10 model."""
    return dict(model.init(jax.random.key(seed), jnp.zeros((1, 32, 32, 3))))


def load(model: NIN, path: str | os.PathLike) -> Variables:
    """Reads variables of a CIFAR-10 model; those of another network are a ValueError."""
    variables = load_weights(path)
    expected = jax.eval_shape(lambda: init(model))
    if jax.tree.map(jnp.shape, variables) != jax.tree.map(jnp.shape, expected):
        raise ValueError(
            f"{path} does not hold the weights of this network; give the dense.npz of an earlier "
            "run."
        )
    return variables


def accuracy(model: NIN, variables: Variables, data: Dataset) -> float:
    """Share of the images classified as their labels say, from 0 to 1."""
    return evaluate(model.apply, variables, data.images, data.labels, preprocess=normalize)


def fit(
    model: NIN,
    variables: Variables,
    data: Dataset,
    test: Dataset,
    recipe: Recipe,
    log: Log = print,
    teacher: tuple[NIN, Variables] | None = None,
    folder: Path | None = None,
) -> tuple[Variables, list[float]]:
    """Trains a network and evaluates it after every epoch.

    Args:
        model: dense or with ranks.
        variables: to start with.
        data, test: images to train with, and for the accuracy.
        recipe: how to train.
        log: called with a line after every epoch.
        teacher: a network whose probabilities are the targets in place of the labels.
        folder: for checkpoints; the same call goes on from there.

    Returns:
        The trained variables and the test accuracy after each epoch.
    """

    def augment(key: jax.Array, batch: tuple) -> tuple:
        images, labels = batch
        return crop_and_flip(key, normalize(images), recipe.crop, recipe.padding), labels

    def after_epoch(epoch: int, variables: Variables, metrics: Mapping) -> dict[str, float]:
        history[epoch] = accuracy(model, variables, test)
        log(
            f"epoch {epoch}/{recipe.epochs}: loss {metrics['loss']:.4f}, "
            f"test accuracy {history[epoch]:.2%}"
        )
        return {"test_accuracy": history[epoch]}

    history = {} if folder is None else _history(folder)
    dense, target = teacher or (None, None)
    trained = finetune(
        model.apply,
        variables,
        (data.images, data.labels),
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        learning_rate=recipe.peak,
        teacher=target,
        teacher_apply=dense.apply if dense else None,
        augment=augment,
        seed=recipe.seed,
        folder=folder,
        after_epoch=after_epoch,
    )
    return trained, [history[epoch] for epoch in sorted(history)]


def _history(folder: Path) -> dict[int, float]:
    """Epoch to its test accuracy, as far as the run in a folder came."""
    lines = [line for line in read_metrics(folder) if "test_accuracy" in line]
    return {line["epoch"]: line["test_accuracy"] for line in lines}


def run(
    dense: NIN,
    variables: Variables,
    ranks: Mapping[str, int],
    data: Dataset,
    test: Dataset,
    recipe: Recipe,
    *,
    batch_size: int = 128,
    rounds: int = 15,
    log: Log = print,
    folder: Path | None = None,
) -> Journey:
    """Decomposes a trained network, fine-tunes it and measures it beside the dense one.

    Args:
        dense: the network, without ranks.
        variables: its trained variables.
        ranks: layer name to rank.
        data: training images for the fine-tuning.
        test: images for every accuracy.
        recipe: of the fine-tuning.
        batch_size, rounds: images in a forward pass and passes of each network in the timing.
        log: called with a line after every step.
        folder: for checkpoints of the fine-tuning; the same call goes on from there.
    """
    small = dense.clone(ranks=dict(ranks))
    variables = flax.core.unfreeze(variables)
    lowrank = decompose(variables, ranks)
    kernels = {name: variables["params"][name]["kernel"] for name in ranks}
    spectra = {name: np.asarray(spectrum(kernel)).ravel() for name, kernel in kernels.items()}
    layers = compare_costs(trace_one(dense, variables), trace_one(small, lowrank), ranks)
    scores = {
        "dense": accuracy(dense, variables, test),
        "decomposed": accuracy(small, lowrank, test),
    }
    shares = ", ".join(f"{name} {score:.2%}" for name, score in scores.items())
    log(f"{len(test):,} test images: {shares}")
    teacher = (dense, variables) if recipe.distill else None
    tuned, curve = fit(small, lowrank, data, test, recipe, log, teacher, folder)
    scores["fine-tuned"] = curve[-1]
    log("timing the forward passes")
    times = measure(
        {"dense": (dense, variables), "low-rank": (small, tuned)}, test, batch_size, rounds
    )
    return Journey(layers, spectra, scores, curve, times, machine(), tuned)


def trace_one(model: NIN, variables: Variables) -> Trace:
    """The convolutions of a forward pass of one image."""
    return trace(model.apply, variables, jnp.zeros((1, 32, 32, 3)))


def compare_costs(dense: Trace, lowrank: Trace, ranks: Mapping[str, int]) -> list[Layer]:
    """Sets the cost of each dense layer beside that of its factors, or of itself.

    Args:
        dense: of the dense network, whose layers are named as in "Conv_0".
        lowrank: of the low-rank one, whose factors are named as in "Conv_0/vertical".
        ranks: layer name to rank.
    """

    def total(uses: Trace, name: str, field: str) -> int:
        names = (name, f"{name}/vertical", f"{name}/horizontal")
        return sum(getattr(use, field) for use in uses if use.path in names)

    def both(name: str, field: str) -> tuple[int, int]:
        return total(dense, name, field), total(lowrank, name, field)

    names = [use.path for use in dense]
    return [
        Layer(name, ranks.get(name), both(name, "parameters"), both(name, "macs")) for name in names
    ]


def measure(
    networks: Mapping[str, tuple[NIN, Variables]], data: Dataset, batch_size: int, rounds: int
) -> Throughput:
    """Times forward passes on the same real images, each at its fastest compiler options."""
    images = normalize(jnp.asarray(np.resize(data.images, (batch_size, *data.images.shape[1:]))))
    programs = {
        name: compile_fastest(model.apply, variables, images)
        for name, (model, variables) in networks.items()
    }
    return throughput(programs, items=batch_size, rounds=rounds)


def check_ranks(variables: Variables, ranks: Mapping[str, int]) -> None:
    """Raises what `decompose` would for this table, before any long work."""
    jax.eval_shape(lambda tree: decompose(tree, ranks), variables)


def machine() -> str:
    """The device and the versions that figures depend on."""
    device = jax.devices()[0]
    kind = (
        platform.processor() or platform.machine()
        if device.platform == "cpu"
        else device.device_kind
    )
    versions = f"jax {jax.__version__}, flax {flax.__version__}, Python {platform.python_version()}"
    return f"{device.platform} ({kind}, {os.cpu_count()} CPU cores), {versions}"
