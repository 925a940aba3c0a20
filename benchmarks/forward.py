"""Forward passes, dense and low-rank, beside PyTorch with the very same weights; writes JSON and a table.

python benchmarks/forward.py [--torch-python PYTHON] [--networks nin resnet20] [--batches 1 32 256]
    [--dtypes float32 bfloat16] [--keep-memory] [--freeze] [--out benchmarks/results/forward.json]

Each network runs as `lowrank_jax.fast.fast` finds it fastest, dense and low-rank alike, and under plain ``jax.jit``;
PyTorch runs eager, channels_last, in processes of its own. All take turns. Outputs are compared before.
With --keep-memory no process, PyTorch's included, gives freed memory back to the system; with --freeze `fast` makes
the weights constants of its programs.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from turns import Worker, quartiles, ratios, repeated, take_turns, write

from lowrank_jax import decompose, keep_memory, lowrank, trace
from lowrank_jax.allocator import SETTINGS
from lowrank_jax.experiment import PAPER_RANKS
from lowrank_jax.fast import Fast, fast
from lowrank_jax.models import NIN, CifarResNet
from lowrank_jax.models.imagenet import VGG16, ResNet50
from lowrank_jax.tuning import Timer
from lowrank_jax.uses import Trace

KEPT = {name: str(value) for name, (_, value) in SETTINGS.items()}
VGG_RANKS = (5, 24, 48, 48, 64, 128, 160, 192, 192, 256, 320, 320, 320)  # of Tai et al., table 3
RIVAL = Path(__file__).with_name("rival_torch.py")
AGREE = {"float32": 1e-3, "bfloat16": 0.1}  # relative difference of outputs: rounding through up to 50 layers


def half(uses: Trace) -> dict[str, Any]:
    """Every layer at the largest rank that leaves at most half of its multiply-adds."""
    found = {}
    for path in uses.safe_paths():
        use = uses.at(path)[0]
        if rank := use.multiply_adds // (2 * use.multiply_adds_at(use.scheme(1))):
            found[path] = use.scheme(rank)
    return found


NETWORKS: dict[str, tuple[Callable[..., nn.Module], str, int, Callable[[Trace], Any]]] = {
    "nin": (NIN, "nin", 32, lambda uses: PAPER_RANKS),
    "nin, no batch norm": (lambda **o: NIN(batch_norm=False, **o), "nin", 32, lambda uses: PAPER_RANKS),
    "resnet20": (CifarResNet, "resnet20", 32, half),
    "resnet50": (ResNet50, "resnet50", 224, half),
    "vgg16": (
        lambda **o: VGG16(num_classes=None, **o),
        "vgg16",
        224,
        lambda uses: dict(zip([u.path for u in uses], VGG_RANKS, strict=True)),
    ),
}


def flat(variables: Any) -> dict[str, np.ndarray]:
    """Arrays by their path without the collection, as rival_torch.py takes them."""
    return {"/".join(path[1:]): np.asarray(leaf) for path, leaf in flatten_dict(variables).items()}


def row(name: str, batch: int, dtype: str, args: argparse.Namespace) -> dict:
    """All programs of one network, batch and type, in turn."""
    make, rival, side, choose = NETWORKS[name]
    model = make(dtype=None if dtype == "float32" else dtype)
    images = jax.random.normal(jax.random.key(1), (batch, side, side, 3))
    dense = jax.jit(model.init)(jax.random.key(0), images[:1])
    uses = trace(model.apply, dense, images[:1])
    low = {**dense, "params": decompose(dense["params"], choose(uses), uses)}
    adds = trace(lowrank(model.apply), low, images[:1]).multiply_adds
    facts: dict[str, Any] = {"images": batch, "dtype": dtype, "multiply_adds_ratio": uses.multiply_adds / adds}
    programs: dict[str, tuple[Callable, int]] = {}
    with ExitStack() as stack:
        for kind, tree in {"dense": dense, "low-rank": low}.items():
            own = fast(model.apply, tree, images, timers=lambda o: Timer(o, path=args.times), freeze=args.freeze)
            plain = jax.jit(lowrank(model.apply))
            facts[f"fast, {kind}"] = describe(own)
            given = None if args.freeze else tree
            right = differ(own(given, images), plain(tree, images)) < AGREE[dtype]
            facts[f"jit, {kind}"] = "right" if right else "wrong outputs"  # seen of XLA's default program in bfloat16
            for how, run, variables in (("fast", own, given), ("jit", plain, tree)):
                once = lambda run=run, args=(variables, images): jax.block_until_ready(run(*args))  # noqa: E731
                programs[f"{how}, {kind}"] = repeated(once)
            if args.torch_python:
                env = KEPT if args.keep_memory else {}
                worker = stack.enter_context(pytorch(args.torch_python, rival, dtype, tree, images, env))
                if not (gap := differ(own(given, images), worker.facts["outputs"])) < AGREE[dtype]:
                    raise ValueError(f"{name}: the outputs of PyTorch differ by {gap:.2g}, which is not rounding.")
                programs[f"PyTorch, {kind}"] = worker, worker.facts["repeats"]
        turns = in_turn({key: run for key, (run, _) in programs.items()}, args.seconds)
    seconds = {key: [value / programs[key][1] for value in values] for key, values in turns.items()}
    return {"name": f"{name}, batch {batch}, {dtype}", **facts, "seconds": seconds, "base": "fast, low-rank"}


def pytorch(python: str, rival: str, dtype: str, tree: Any, images: jax.Array, env: dict[str, str]) -> Worker:
    """The worker of a network; it has read its weights when it is ready."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "weights.npz")
        np.savez(weights, images=np.asarray(images), **flat(tree))
        return Worker([python, str(RIVAL), str(weights), "--network", rival, "--dtype", dtype], env=env)


def in_turn(programs: dict[str, Callable], budget: float) -> dict[str, list[float]]:
    """One round to warm up, then as many as the budget of seconds has, from 3 to 15."""
    start = time.perf_counter()
    take_turns(programs, 1)
    return take_turns(programs, int(np.clip(budget / (time.perf_counter() - start), 3, 15)))


def describe(own: Fast) -> dict[str, Any]:
    programs = {
        f"{layer.inputs} {layer.kernel} {f'rank {scheme.rank}' if scheme else 'dense'}": how
        for (layer, scheme), how in own.programs.items()
    }
    pools = {f"{pool.kind} {pool.inputs} {pool.window}": how for pool, how in own.pools.items()}
    facts = {"options": dict(own.options), "slice": own.size, "tried_s": dict(own.seconds)}
    return facts | {"programs": programs, "pools": pools}


def differ(ours: Any, theirs: Any) -> float:
    """Relative difference of the outputs for the first image, of which a rival's are the first ones."""
    mine, other = (np.asarray(jnp.asarray(y, jnp.float32)).reshape(-1) for y in (ours[0], jnp.asarray(theirs)))
    size = min(mine.size, other.size)
    with np.errstate(over="ignore"):
        return float(np.linalg.norm(mine[:size] - other[:size]) / np.linalg.norm(mine[:size]))


def summary(rows: list[dict]) -> list[str]:
    """Speed-ups of the low-rank network, and images a second over PyTorch's."""
    notes = []
    for each in rows:
        gain, plain = (quartiles(ratios(each, f"{how}, dense", f"{how}, low-rank")) for how in ("fast", "jit"))
        text = f"{each['name']}: low-rank {gain[1]:.2f} ({gain[0]:.2f} to {gain[2]:.2f}) times the images/s of dense, "
        text += f"plain jit {plain[1]:.2f}; multiply-adds fall {each['multiply_adds_ratio']:.2f} times"
        if wrong := [key for key, value in each.items() if value == "wrong outputs"]:
            text += f"; wrong outputs: {' and '.join(wrong)}"
        if "PyTorch, dense" in each["seconds"]:
            over = [quartiles(ratios(each, f"PyTorch, {kind}", f"fast, {kind}"))[1] for kind in ("low-rank", "dense")]
            own = quartiles(ratios(each, "PyTorch, dense", "PyTorch, low-rank"))[1]
            text += f"; over PyTorch {over[0]:.2f} low-rank, {over[1]:.2f} dense, whose own gain is {own:.2f}"
        notes.append(text)
    return notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "forward.json")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--torch-python", help="an interpreter that has PyTorch; without it there is no rival")
    parser.add_argument("--times", help="JSON file that keeps the measured times of layers")
    parser.add_argument("--seconds", type=float, default=20, help="of the counted rounds of a row, 3 to 15 rounds")
    parser.add_argument("--largest", type=int, default=32, help="largest batch of the networks with 224 pixels")
    parser.add_argument("--keep-memory", action="store_true", help="as `lowrank_jax.keep_memory`, in every process")
    parser.add_argument("--freeze", action="store_true", help="the weights are constants of the programs of `fast`")
    args = parser.parse_args()
    if args.keep_memory and not keep_memory():
        parser.error("--keep-memory: this C library has no such settings; leave it out")
    rows: list[dict] = []
    for name in args.networks:
        for dtype in args.dtypes:
            for batch in args.batches:
                if NETWORKS[name][2] == 224 and batch > args.largest:
                    continue
                rows.append(row(name, batch, dtype, args))
                print(summary(rows[-1:])[0], flush=True)
                write(args.out, "forward", rows, seed=0, notes=summary(rows), cores=os.cpu_count())


if __name__ == "__main__":
    main()
