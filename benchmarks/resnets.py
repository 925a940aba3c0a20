"""What CIFAR-10 ResNets of any depth keep without training, by two sets of unlabelled images.

python benchmarks/resnets.py --shared ../shared/data --weights resnet56.npz resnet32.npz

The weights are of github.com/akamaster/pytorch_resnet_cifar10, as that of the ResNet-20 in the
shared folder is; `torch.load` and `numpy.savez` of the tensors, less the prefix "module.", make
them .npz. A name ends in the depth. All test images are scored. Writes JSON,
and goes on after the rows that it has.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress import images_of, interval, load, normalize, scorer
from turns import told

from lowrank_jax import calibrate, compress, decompose, plan
from lowrank_jax.tuning.device import machine


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shared", type=Path, required=True, help="holds tensorflow_datasets")
    add("--weights", type=Path, nargs="+", required=True, help=".npz of PyTorch's tensors")
    add("--macs", type=float, nargs="+", default=[0.5, 0.33, 0.25], help="shares that are left")
    add("--sets", type=int, default=2, help="of calibration images, the first ones and the next")
    add("--calibration", type=int, default=2048, help="images of a set")
    add("--steps", type=int, default=0, help="without labels, of each block")
    add("--test", type=int, default=10_000, help="test images")
    add("--out", type=Path, default=Path(__file__).parent / "results" / "resnets.json")
    return parser.parse_args()


def depth_of(weights: Path) -> int:
    """The number at the end of a file's name."""
    return int(re.findall(r"\d+", weights.stem)[-1])


def rows(args: argparse.Namespace, weights: Path, sets: tuple, known: list[dict]) -> Iterator[dict]:
    """The dense network, then each share with plain and with fitted factors, that are not known."""
    train, test = sets
    done = {(row["weights"], row.get("set"), row.get("macs")) for row in known}
    model, dense = load(weights, depth_of(weights))
    score = scorer(model, test, args.test)
    if (weights.stem, None, None) not in done:
        yield {"weights": weights.stem, "network": "dense", "accuracy": score(dense)}
    for turn in range(args.sets):
        shares = [share for share in args.macs if (weights.stem, turn, share) not in done]
        if not shares:
            continue
        images = train.images[turn * args.calibration :][: args.calibration]
        found = calibrate(model.apply, dense, normalize(images))
        for share in shares:
            facts = {"weights": weights.stem, "set": turn, "macs": share}
            pair = []  # at once, so that a run that goes on has none or both
            for name, network, seconds in networks(found, plan(found, macs=share), args.steps):
                kept = score(network)
                more = {"accuracy": kept, "interval": interval(kept, args.test)}
                pair.append(facts | {"network": name, "seconds": seconds} | more)
            yield from pair


def networks(found: Any, chosen: Any, steps: int) -> Iterator[tuple[str, Any, float]]:
    """Name, network and seconds."""
    start = time.perf_counter()
    plain = decompose(found.network.variables, chosen, found.trace)
    yield "plain factors", plain, time.perf_counter() - start
    start = time.perf_counter()
    fitted = compress(found, chosen, steps=steps)
    yield "fitted", fitted, time.perf_counter() - start


def main() -> None:
    args = options()
    sets = images_of(args)
    facts = {"benchmark": "resnets", "machine": machine(), "options": told(args)}
    known: list[dict] = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    for weights in args.weights:
        for row in rows(args, weights, sets, known):
            known.append(row)
            print(json.dumps(row), flush=True)
            args.out.write_text(json.dumps({**facts, "rows": known}, indent=1) + "\n")


if __name__ == "__main__":
    main()
