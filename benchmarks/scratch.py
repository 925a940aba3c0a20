"""Trains the low-rank network in network from random weights on CIFAR-10; goes on where it ended.

python benchmarks/scratch.py --shared ../shared/data --epochs 12

The layers and ranks are those of Tai et al. (2016) for CIFAR-10: 10 and 51 for the two 5 x 5
convolutions, batch normalisation after the second factor. No augmentation. The test images are
looked at, not chosen by: the accuracy of the last epoch counts. Writes JSON to benchmarks/results.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from compress import images_of, interval, normalize, scorer
from turns import told

from lowrank_jax import finetune, save_weights
from lowrank_jax.models import NIN
from lowrank_jax.training.losses import cross_entropy
from lowrank_jax.training.metrics import read_metrics
from lowrank_jax.tuning.device import machine

RANKS = {"Conv_0": 10, "Conv_2": 51}


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shared", type=Path, required=True, help="holds tensorflow_datasets")
    add("--epochs", type=int, default=300)
    add("--seed", type=int, default=0)
    add("--folder", type=Path, help="of the run; default scratch-SEED")
    add("--out", type=Path, help="JSON; default benchmarks/results/scratch-SEED.json")
    add("--batch-size", type=int, default=128)
    add("--learning-rate", type=float, default=0.1, help="highest of the one-cycle schedule")
    add("--dropout", type=float, default=0.5, help="after each pooling, as Lin et al. (2013)")
    add("--smoothing", type=float, default=0.0, help="of the labels")
    add("--dtype", default="float32", help="of the computation, such as bfloat16")
    add("--train", type=int, default=50_000, help="training images")
    add("--test", type=int, default=10_000, help="test images")
    args = parser.parse_args()
    name = f"scratch-{args.seed}"
    args.folder = args.folder or Path(name)
    args.out = args.out or Path(__file__).parent / "results" / f"{name}.json"
    return args


def prepared(key: jax.Array, batch: tuple) -> tuple:
    """A batch as the network takes it; nothing is random."""
    del key
    images, labels = batch
    return normalize(images), labels


def main() -> None:
    args = options()
    train, test = images_of(args)
    model = NIN(ranks=RANKS, dropout=args.dropout)
    start = jax.jit(model.init)(jax.random.key(args.seed), normalize(train.images[:1]))
    accuracy = scorer(model, test, args.test)

    def after_epoch(epoch: int, network: Any, metrics: Any) -> dict[str, float]:
        score = accuracy(network)
        print(f"epoch {epoch}: loss {metrics['loss']:.4f}, accuracy {score:.2%}", flush=True)
        return {"accuracy": score}

    began = time.perf_counter()
    network = finetune(
        model.apply,
        start,
        (train.images[: args.train], train.labels[: args.train]),
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        loss=cross_entropy(args.smoothing),
        dtype=args.dtype,
        augment=prepared,
        seed=args.seed,
        folder=args.folder,
        after_epoch=after_epoch,
    )
    seconds = time.perf_counter() - began
    save_weights(args.folder / "variables.npz", network)
    write(args, accuracy(network), seconds)


def write(args: argparse.Namespace, score: float, seconds: float) -> None:
    """The figures of a run, whose seconds are those of this process alone."""
    lines = read_metrics(args.folder)
    speeds = [line["steps_per_second"] for line in lines if "steps_per_second" in line]
    found = {
        "benchmark": "scratch",
        "machine": machine(),
        "options": told(args),
        "accuracy": score,
        "interval": interval(score, args.test),
        "curve": [line["accuracy"] for line in lines if "accuracy" in line],
        "images_per_second": float(np.median(speeds)) * args.batch_size if speeds else None,
        "seconds": seconds,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
