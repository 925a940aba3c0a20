"""Seconds and memory of `calibrate`, `plan` and `compress` for a network of 224 pixels.

python benchmarks/real_size.py [--network vit_b] [--images 256] [--steps 200] [--out FILE]

A network with random weights, smooth random images, half of the macs. The memory is the largest
that the process holds in a stage, files that are mapped left out; Linux alone tells it.
"""

import argparse
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from growth import memory
from modern import ConvNeXt, ViT
from turns import told

from lowrank_jax import calibrate, compress, plan
from lowrank_jax.models.imagenet import VGG16, ResNet50
from lowrank_jax.tuning.device import machine

NETWORKS = {"resnet50": ResNet50, "vgg16": VGG16, "convnext_t": ConvNeXt, "vit_b": ViT}


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--network", choices=NETWORKS, default="resnet50")
    add("--images", type=int, default=256)
    add("--batch", type=int, default=32, help="images that run at once")
    add("--size", type=int, default=224, help="height and width")
    add("--macs", type=float, default=0.5, help="share that is left")
    add("--steps", type=int, default=0, help="gradient steps of `compress` for each block")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="JSON; by default named by the network in benchmarks/results")
    args = parser.parse_args()
    name = f"real_size_{args.network}.json"
    args.out = args.out or Path(__file__).parent / "results" / name
    return args


def smooth(count: int, size: int, seed: int) -> np.ndarray:
    """Random images whose neighbouring pixels are alike, as in photographs."""
    small = np.random.default_rng(seed).normal(size=(count, size // 16, size // 16, 3))
    shape = (count, size, size, 3)
    return np.asarray(jax.image.resize(small.astype(np.float32), shape, "cubic"))


class Stages:
    """Runs stages one after the other, and notes the seconds and the memory of each."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self.peak = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, memory("RssAnon") / 1e9)
            time.sleep(0.05)

    def run(self, name: str, function: Callable[[], Any]) -> Any:
        """What the function gives."""
        self.peak, start = 0.0, time.perf_counter()
        result = function()
        seconds = time.perf_counter() - start
        time.sleep(0.1)  # for one more look
        self.found[name] = {"seconds": seconds, "gigabytes": self.peak}
        print(f"{name}: {seconds:.1f} s, at most {self.peak:.2f} GB", flush=True)
        return result


def main() -> None:
    args = options()
    model, count = NETWORKS[args.network](), args.images // args.batch
    batches = [smooth(args.batch, args.size, args.seed + number) for number in range(count)]
    variables = jax.jit(model.init)(jax.random.key(args.seed), jnp.asarray(batches[0][:1]))
    stages = Stages()
    found = stages.run("calibrate", lambda: calibrate(model.apply, variables, batches))
    chosen = stages.run("plan", lambda: plan(found, macs=args.macs))
    stages.run("compress", lambda: compress(found, chosen, steps=args.steps))
    written = {
        "benchmark": "real_size",
        "machine": machine(),
        "options": told(args),
        "macs": chosen.total("macs"),
        "stages": stages.found,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
