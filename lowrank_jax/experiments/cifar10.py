"""The network of the original experiment: its weights, its training, its accuracy."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.data.datasets import Dataset, normalize
from lowrank_jax.io.weights import load_weights
from lowrank_jax.models import NIN
from lowrank_jax.training.augmentation import crop_and_flip
from lowrank_jax.training.evaluation import evaluate
from lowrank_jax.training.finetuning import finetune
from lowrank_jax.training.losses import taught
from lowrank_jax.training.metrics import read_metrics
from lowrank_jax.tree.decomposing import decompose

Variables = dict[str, Any]
Log = Callable[[str], None]
PAPER_RANKS = {"Conv_0": 10, "Conv_2": 20}
TEMPERATURE = 4  # what the dense network rules out tells little at 1


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
        distill: weight from 0 to 1 of the dense network's probabilities in the fine-tuning; the
            labels have the rest.
    """

    epochs: int
    peak: float
    batch_size: int = 128
    crop: int = 32
    padding: int = 4
    seed: int = 0
    distill: float = 0.0


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
    teacher: Variables | None = None,
    folder: Path | None = None,
) -> tuple[Variables, list[float]]:
    """Trains a network and evaluates it after every epoch.

    Args:
        model: of the dense network.
        variables: to start with, dense or decomposed.
        data, test: images to train with, and for the accuracy.
        recipe: how to train.
        log: called with a line after every epoch.
        teacher: dense variables; a recipe whose ``distill`` is 0 needs none.
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

    loss = taught(recipe.distill, TEMPERATURE)
    history = {} if folder is None else _history(folder)
    trained = finetune(
        model.apply,
        variables,
        (data.images, data.labels),
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        learning_rate=recipe.peak,
        clip=None,
        loss=loss,
        teacher=teacher if "teacher" in loss.needs else None,
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


def check_ranks(variables: Variables, ranks: Mapping[str, int]) -> None:
    """Raises what `decompose` would for this table, before any long work."""
    jax.eval_shape(lambda tree: decompose(tree, ranks), variables)
