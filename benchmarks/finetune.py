"""Fine-tunes the compressed ResNet-20 on CIFAR-10, and says what it keeps; goes on where it ended.

python benchmarks/finetune.py --shared ../shared/data --speedup 2 --epochs 30

The network is calibrated, planned and compressed on unlabelled training images, then trained with
random crops and flips towards the dense network and the labels. The test images are looked at, not
chosen by: the accuracy of the last epoch counts. Writes JSON to benchmarks/results.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from compress import RESNET_20, images_of, interval, load, normalize, scorer
from turns import told

from lowrank_jax import Plan, calibrate, compress, load_weights, plan, save_weights
from lowrank_jax.models import CifarResNet
from lowrank_jax.training import (
    crop_and_flip,
    cross_entropy,
    distillation,
    finetune,
    layer_matching,
)
from lowrank_jax.training.losses import Loss
from lowrank_jax.training.metrics import read_metrics
from lowrank_jax.training.runs import AfterEpoch
from lowrank_jax.tuning.algorithms import factors_by
from lowrank_jax.tuning.device import machine


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = run_options(__doc__)
    add = parser.add_argument
    add("--speedup", type=float, default=2.0, help="times fewer macs")
    add("--epochs", type=int, default=30)
    add("--learning-rate", type=float, default=0.02, help="highest of the one-cycle schedule")
    add("--labels", type=float, default=0.5, help="weight of the cross-entropy")
    add("--distill", type=float, default=0.5, help="weight of the dense network's probabilities")
    add("--temperature", type=float, default=4.0, help="of the distillation")
    add("--layers", type=float, default=0.0, help="weight of the layers' outputs")
    add("--average", type=float, help="decay of a moving average of the parameters, as 0.999")
    add("--calibration", type=int, default=2048, help="unlabelled training images for the plan")
    add("--algorithms", help="of the two convolutions of each layer, as kn2row+im2col")
    add("--after", type=Path, help="folder of a finished run, whose network this one starts from")
    args = parser.parse_args()
    return with_places(args, f"finetune-{args.speedup:g}-{args.seed}")


def run_options(text: str | None) -> argparse.ArgumentParser:
    """The options that every run of training has."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shared", type=Path, required=True, help="holds the weights and tensorflow_datasets")
    add("--seed", type=int, default=0)
    add("--folder", type=Path, help="of the run; by default named by what it is")
    add("--out", type=Path, help="JSON; by default so named in benchmarks/results")
    add("--batch-size", type=int, default=128)
    add("--dtype", default="float32", help="of the computation, such as bfloat16")
    add("--train", type=int, default=50_000, help="training images")
    add("--test", type=int, default=10_000, help="test images")
    return parser


def with_places(args: argparse.Namespace, name: str) -> argparse.Namespace:
    """The options with the folder of the run and the file of its figures."""
    args.folder = args.folder or Path(name)
    args.out = args.out or Path(__file__).parent / "results" / f"{name}.json"
    return args


def loss(args: argparse.Namespace) -> Loss:
    """The weighted sum that the options name."""
    parts = {
        cross_entropy: args.labels,
        lambda: distillation(args.temperature): args.distill,
        layer_matching: args.layers,
    }
    return sum((weight * make() for make, weight in parts.items() if weight), Loss(()))


def compressed(args: argparse.Namespace, model: CifarResNet, dense: Any, images: Any) -> tuple:
    """The plan and the network before training; a run that goes on has them in its folder."""
    plan_path, start_path = args.folder / "plan.json", args.folder / "start.npz"
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.after and not start_path.exists():
        shutil.copy(args.after / "plan.json", plan_path)
        shutil.copy(args.after / "variables.npz", start_path)
    if start_path.exists():
        return Plan.load(plan_path), jax.tree.map(jnp.asarray, load_weights(start_path))
    found = calibrate(model.apply, dense, images)
    chosen = plan(found, macs=1 / args.speedup)
    small = compress(found, chosen)
    chosen.save(plan_path)
    save_weights(start_path, small)
    return chosen, small


def augment(key: jax.Array, batch: tuple) -> tuple:
    images, labels = batch
    return crop_and_flip(key, normalize(images), size=32, padding=4), labels


def tuned(args: argparse.Namespace, model: CifarResNet, dense: Any, small: Any, **more: Any) -> Any:
    """The network after training."""
    wanted = loss(args)
    return finetune(
        model.apply,
        small,
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        clip=None,
        loss=wanted,
        teacher=dense if wanted.needs & {"teacher", "layers"} else None,
        average=args.average,
        dtype=args.dtype,
        augment=augment,
        choose=factors_by(args.algorithms) if args.algorithms else None,
        seed=args.seed,
        folder=args.folder,
        **more,
    )


def main() -> None:
    args = options()
    model, dense = load(args.shared / RESNET_20)
    train, test = images_of(args)
    images = normalize(train.images[: args.calibration])
    chosen, small = compressed(args, model, dense, images)
    accuracy = scorer(model, test, args.test)
    before = {"dense": accuracy(dense), "compressed": accuracy(small)}
    print({name: f"{score:.2%}" for name, score in before.items()}, flush=True)
    batches = train.images[: args.train], train.labels[: args.train]
    start = time.perf_counter()
    network = tuned(
        args, model, dense, small, batches=batches, plan=chosen, after_epoch=told_after(accuracy)
    )
    seconds = time.perf_counter() - start
    save_weights(args.folder / "variables.npz", network)
    score = accuracy(network)
    facts = {
        "macs": chosen.total("macs"),
        "parameters": chosen.total("parameters"),
        "accuracy": before | {"fine-tuned": score},
    }
    write(args, "finetune", facts, score, seconds)


def told_after(accuracy: Callable[[Any], float]) -> AfterEpoch:
    """What is told and kept of each epoch."""

    def after_epoch(epoch: int, network: Any, metrics: Any) -> dict[str, float]:
        score = accuracy(network)
        print(f"epoch {epoch}: loss {metrics['loss']:.4f}, accuracy {score:.2%}", flush=True)
        return {"accuracy": score}

    return after_epoch


def write(
    args: argparse.Namespace, benchmark: str, facts: dict[str, Any], score: float, seconds: float
) -> None:
    """The figures of a run, whose seconds are those of this process alone."""
    lines = read_metrics(args.folder)
    speeds = [line["steps_per_second"] for line in lines if "steps_per_second" in line]
    found = {
        "benchmark": benchmark,
        "machine": machine(),
        "options": told(args),
        **facts,
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
