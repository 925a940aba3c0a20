"""Forward passes, dense and low-rank, beside PyTorch with the very same weights.

python benchmarks/forward.py [--torch-python PYTHON] [--networks nin resnet20] [--batches 1 32 256]
    [--dtypes float32 bfloat16] [--largest 256 --search 32] [--keep-memory] [--freeze]
    [--out benchmarks/results/forward.json]

Each network runs as `lowrank_jax.fast` finds it fastest, dense and low-rank alike, and under plain
``jax.jit``; PyTorch runs eager, channels_last. Every program has a process of its own, as a user
runs it: in one process, what the allocator holds for one program slows the next one. All take
turns. Outputs are compared before. JSON and a table are written.
With --keep-memory no process, PyTorch's included, gives freed memory back to the system; with
--freeze `fast` makes the weights constants of its programs.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from networks import NETWORKS, Prepared, prepare
from turns import Worker, quartiles, ratios, take_turns, write

from lowrank_jax import keep_memory
from lowrank_jax.tuning.agreement import agree
from lowrank_jax.tuning.experimental.allocator import SETTINGS

KINDS = ("dense", "low-rank")
KEPT = {name: str(value) for name, (_, value) in SETTINGS.items()}
HERE = Path(__file__).parent
LONG = 60.0  # seconds of a round, which is warm for most of itself: all programs have run before
# Relative difference of outputs: rounding through up to 50 layers.
AGREE = {"float32": 1e-3, "bfloat16": 0.1}


def row(name: str, batch: int, dtype: str, args: argparse.Namespace) -> dict:
    """All programs of one network, batch and type, in turn."""
    own = prepare(name, batch, dtype)
    facts: dict[str, Any] = {"images": batch, "dtype": dtype, "multiply_adds_ratio": own.gain}
    facts["searched_with"] = min(batch, args.search or batch)
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for kind, how in itertools.product(KINDS, ("fast", "jit")):
            workers[f"{how}, {kind}"] = stack.enter_context(
                jax_worker(name, batch, dtype, kind, how, args)
            )
        for kind in KINDS if args.torch_python else ():
            workers[f"PyTorch, {kind}"] = stack.enter_context(
                torch_worker(name, own, kind, dtype, args)
            )
        for kind in KINDS:
            facts[f"fast, {kind}"] = workers[f"fast, {kind}"].facts["found"]
            # XLA's default program is wrong in some of bfloat16.
            agrees = same(workers, kind, "jit", dtype)
            facts[f"jit, {kind}"] = "same outputs" if agrees else "wrong outputs"
            if args.torch_python and not same(workers, kind, "PyTorch", dtype):
                raise ValueError(
                    f"{name}, {kind}: the outputs of PyTorch differ by more than rounding."
                )
        turns = in_turn(workers, args.seconds)
    seconds = {
        key: [value / workers[key].facts["repeats"] for value in values]
        for key, values in turns.items()
    }
    return {
        "name": f"{name}, batch {batch}, {dtype}",
        **facts,
        "seconds": seconds,
        "base": "fast, low-rank",
    }


def jax_worker(
    name: str, batch: int, dtype: str, kind: str, how: str, args: argparse.Namespace
) -> Worker:
    """A program in JAX; it has been searched for and is compiled when it is ready."""
    command = [
        sys.executable,
        str(HERE / "forward_worker.py"),
        "--network",
        name,
        "--batch",
        str(batch),
    ]
    command += ["--dtype", dtype, "--tree", kind]
    given = {"--fast": how == "fast", "--freeze": args.freeze}
    command += [flag for flag, wanted in given.items() if wanted]
    named = {"--times": args.times, "--search": args.search}
    command += [part for flag, value in named.items() if value for part in (flag, str(value))]
    return Worker(command, env=memory(args))


def torch_worker(
    name: str, own: Prepared, kind: str, dtype: str, args: argparse.Namespace
) -> Worker:
    """A program in PyTorch; it has read its weights when it is ready."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "weights.npz")
        np.savez(weights, images=np.asarray(own.images), **flat(own.trees[kind]))
        command = [
            args.torch_python,
            str(HERE / "rival_torch.py"),
            str(weights),
            "--network",
            NETWORKS[name].rival,
        ]
        return Worker([*command, "--dtype", dtype], env=memory(args))


def memory(args: argparse.Namespace) -> dict[str, str]:
    """The allocator's settings, which a process reads when it starts, for either library."""
    return KEPT if args.keep_memory else {}


def flat(variables: Any) -> dict[str, np.ndarray]:
    """Arrays by their path without the collection, as rival_torch.py takes them."""
    return {"/".join(path[1:]): np.asarray(leaf) for path, leaf in flatten_dict(variables).items()}


def same(workers: dict[str, Worker], kind: str, how: str, dtype: str) -> bool:
    """Whether a program's first outputs are those of `fast`, to rounding."""
    mine, other = (
        np.asarray(workers[f"{each}, {kind}"].facts["outputs"]) for each in ("fast", how)
    )
    return agree(mine, other, AGREE[dtype])


def in_turn(programs: dict[str, Worker], budget: float) -> dict[str, list[float]]:
    """One round to warm up, then 3 to 15 as the seconds allow; a round of minutes counts."""
    start = time.perf_counter()
    first = take_turns(programs, 1)
    elapsed = time.perf_counter() - start
    if elapsed < LONG:
        return take_turns(programs, int(np.clip(budget / elapsed, 3, 15)))
    others = take_turns(programs, 2)
    return {name: values + others[name] for name, values in first.items()}


def summary(rows: list[dict]) -> list[str]:
    """Speed-ups of the low-rank network, and images a second over PyTorch's."""
    notes = []
    for each in rows:
        gain, plain = (
            quartiles(ratios(each, f"{how}, dense", f"{how}, low-rank")) for how in ("fast", "jit")
        )
        spread = f"{gain[1]:.2f} ({gain[0]:.2f} to {gain[2]:.2f})"
        text = f"{each['name']}: low-rank {spread} times the images/s of dense, "
        text += f"plain jit {plain[1]:.2f}; macs fall {each['multiply_adds_ratio']:.2f} times"
        if wrong := [key for key, value in each.items() if value == "wrong outputs"]:
            text += f"; wrong outputs: {' and '.join(wrong)}"
        if "PyTorch, dense" in each["seconds"]:
            over = [
                quartiles(ratios(each, f"PyTorch, {kind}", f"fast, {kind}"))[1]
                for kind in reversed(KINDS)
            ]
            own = quartiles(ratios(each, "PyTorch, dense", "PyTorch, low-rank"))[1]
            text += f"; over PyTorch {over[0]:.2f} low-rank, {over[1]:.2f} dense, "
            text += f"whose own gain is {own:.2f}"
        notes.append(text)
    return notes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "forward.json")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument(
        "--torch-python", help="an interpreter that has PyTorch; without it there is no rival"
    )
    parser.add_argument("--times", help="JSON file that keeps the measured times of layers")
    parser.add_argument(
        "--seconds", type=float, default=20, help="of the counted rounds of a row, 3 to 15 rounds"
    )
    parser.add_argument(
        "--largest", type=int, default=32, help="largest batch of the networks with 224 pixels"
    )
    parser.add_argument(
        "--search",
        type=int,
        help="images that `fast` searches with at most; what it finds takes any",
    )
    parser.add_argument(
        "--keep-memory", action="store_true", help="as `lowrank_jax.keep_memory`, in every process"
    )
    parser.add_argument(
        "--freeze", action="store_true", help="the weights are constants of the programs of `fast`"
    )
    args = parser.parse_args()
    if args.keep_memory and not keep_memory():
        parser.error("--keep-memory: this C library has no such settings; leave it out")
    os.environ.setdefault(
        "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
    )  # on a GPU, which all processes use
    rows: list[dict] = []
    for name in args.networks:
        for dtype in args.dtypes:
            for batch in args.batches:
                if NETWORKS[name].side == 224 and batch > args.largest:
                    continue
                rows.append(row(name, batch, dtype, args))
                print(summary(rows[-1:])[0], flush=True)
                write(args.out, "forward", rows, seed=0, notes=summary(rows), cores=os.cpu_count())


if __name__ == "__main__":
    main()
