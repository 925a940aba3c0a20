"""Trains the low-rank network in network from random weights on CIFAR-10; goes on where it ended.

python benchmarks/scratch.py --shared ../shared/data --epochs 12

The layers and ranks are those of Tai et al. (2016) for CIFAR-10: 10 and 51 for the two 5 x 5
convolutions, batch normalisation after the second factor. No augmentation. The test images are
looked at, not chosen by: the accuracy of the last epoch counts. Writes JSON to benchmarks/results.
"""

import argparse
import time
from pathlib import Path

import jax
from compress import images_of, normalize, scorer
from finetune import told_after, write

from lowrank_jax import finetune, save_weights
from lowrank_jax.models import NIN
from lowrank_jax.training.losses import cross_entropy

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
        after_epoch=told_after(accuracy),
    )
    seconds = time.perf_counter() - began
    save_weights(args.folder / "variables.npz", network)
    score = accuracy(network)
    write(args, "scratch", {"accuracy": score}, score, seconds)


if __name__ == "__main__":
    main()
