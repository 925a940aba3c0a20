"""Compares losses for fine-tuning the compressed ResNet-20 on CIFAR-10: equal steps, several seeds.

python benchmarks/losses.py --shared ../shared/data

Every run starts from the same compressed network and sees the same batches as the others of its
seed. Adam makes the size of a loss's gradient no matter. Writes JSON and a table to
benchmarks/results after each run, and goes on with the runs that the JSON lacks.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import finetune
import optax
from compress import RESNET_20, images_of, interval, load, normalize, scorer
from turns import told

from lowrank_jax import calibrate, compress, plan
from lowrank_jax import finetune as train
from lowrank_jax.training import cross_entropy, distillation, layer_matching
from lowrank_jax.tuning.device import machine

LOSSES = {
    "labels": cross_entropy(),
    "probabilities": distillation(4.0),
    "layers": layer_matching(),
    "labels and probabilities": 0.5 * cross_entropy() + 0.5 * distillation(4.0),
    "probabilities and layers": 0.5 * distillation(4.0) + 0.5 * layer_matching(),
}


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shared", type=Path, required=True, help="holds the weights and tensorflow_datasets")
    add("--speedups", type=float, nargs="+", default=[2.0, 2.84], help="times fewer macs")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    add("--steps", type=int, default=100)
    add("--batch-size", type=int, default=64)
    add("--learning-rate", type=float, default=1e-3, help="highest of Adam's one-cycle schedule")
    add("--calibration", type=int, default=2048, help="unlabelled training images for the plan")
    add("--train", type=int, default=50_000, help="training images")
    add("--test", type=int, default=10_000, help="test images")
    add("--out", type=Path, default=Path(__file__).parent / "results" / "losses.json")
    return parser.parse_args()


def main() -> None:
    args = options()
    model, dense = load(args.shared / RESNET_20)
    data, test = images_of(args)
    found = calibrate(model.apply, dense, normalize(data.images[: args.calibration]))
    batches = data.images[: args.train], data.labels[: args.train]
    accuracy = scorer(model, test, args.test)
    rows = kept(args)
    done = {(row["speedup"], row["seed"], row["loss"]) for row in rows}
    starts = {speedup: compress(found, plan(found, macs=1 / speedup)) for speedup in args.speedups}
    before = {speedup: accuracy(small) for speedup, small in starts.items()}
    for seed, speedup, name in itertools.product(args.seeds, args.speedups, args.losses):
        if (speedup, seed, name) in done:
            continue
        start = time.perf_counter()
        network = trained(args, model, dense, starts[speedup], batches, name, seed)
        seconds = time.perf_counter() - start
        row = {"speedup": speedup, "seed": seed, "loss": name, "start": before[speedup]}
        rows.append(row | {"accuracy": accuracy(network), "seconds": seconds})
        print(rows[-1], flush=True)
        write(args, rows)


def kept(args: argparse.Namespace) -> list[dict]:
    """The runs of an earlier call, which had the same steps and data."""
    if not args.out.exists():
        return []
    found = json.loads(args.out.read_text())
    for name in ("steps", "batch_size", "learning_rate", "calibration", "train", "test"):
        if found["options"][name] != str(vars(args)[name]):
            raise SystemExit(
                f"{args.out} has runs with {name}={found['options'][name]}, not "
                f"{vars(args)[name]}; give what they had, or another --out."
            )
    return found["rows"]


def trained(
    args: argparse.Namespace, model: Any, dense: Any, small: Any, batches: Any, name: str, seed: int
) -> Any:
    """The network after the steps of one run."""
    schedule = optax.cosine_onecycle_schedule(args.steps, args.learning_rate, pct_start=0.2)
    return train(
        model.apply,
        small,
        batches,
        steps=args.steps,
        batch_size=args.batch_size,
        loss=LOSSES[name],
        teacher=None if name == "labels" else dense,
        tx=optax.adam(schedule),
        augment=finetune.augment,
        seed=seed,
    )


def write(args: argparse.Namespace, rows: list[dict]) -> None:
    """The JSON with every run, and the table beside it."""
    found = {"benchmark": "losses", "machine": machine(), "options": told(args), "rows": rows}
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(rows, args.test))


def markdown(rows: list[dict], count: int) -> str:
    """Mean and range of the seeds for each loss, and the network before training."""
    lines = ["| fewer macs | loss | before | after | lowest and highest seed | seeds |"]
    lines.append("| ---: | --- | ---: | ---: | --- | ---: |")
    for speedup, name in dict.fromkeys((row["speedup"], row["loss"]) for row in rows):
        own = [r for r in rows if (r["speedup"], r["loss"]) == (speedup, name)]
        scores = [row["accuracy"] for row in own]
        low, high = min(scores), max(scores)
        lines.append(
            f"| {speedup:g}x | {name} | {own[0]['start']:.2%} | {statistics.mean(scores):.2%} | "
            f"{low:.2%} to {high:.2%} | {len(own)} |"
        )
    low, high = interval(rows[0]["accuracy"], count)
    lines.append(f"\nThe 95 % interval of an accuracy reaches {(high - low) / 2:.2%} to each side.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
