"""Trains the low-rank network in network from random weights on CIFAR-10; goes on where it ended.

python benchmarks/scratch.py --shared ../shared/data --epochs 12

The layers and ranks are those of Tai et al. (2016) for CIFAR-10: 10 and 51 for the two 5 x 5
convolutions, batch normalisation after the second factor. No augmentation. The test images are
looked at, not chosen by: the accuracy of the last epoch counts. Writes JSON to benchmarks/results.
"""

import argparse
import time

import jax
from compress import images_of, normalize, scorer
from finetune import run_options, told_after, with_places, write

from lowrank_jax import finetune, save_weights
from lowrank_jax.models import NIN
from lowrank_jax.models.published import PUBLISHED
from lowrank_jax.training.losses import cross_entropy


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = run_options(__doc__)
    add = parser.add_argument
    add("--epochs", type=int, default=300)
    add("--learning-rate", type=float, default=0.1, help="highest of the one-cycle schedule")
    add("--dropout", type=float, default=0.5, help="after each pooling, as Lin et al. (2013)")
    add("--smoothing", type=float, default=0.0, help="of the labels")
    args = parser.parse_args()
    return with_places(args, f"scratch-{args.seed}")


def prepared(key: jax.Array, batch: tuple) -> tuple:
    """A batch as the network takes it; nothing is random."""
    del key
    images, labels = batch
    return normalize(images), labels


def main() -> None:
    args = options()
    train, test = images_of(args)
    model = NIN(ranks=PUBLISHED["NIN"].ranks, dropout=args.dropout)
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
