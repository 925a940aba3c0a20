"""Seconds and peak memory of `decompose` and of choosing ranks, against size.

python benchmarks/growth.py [--quick] [--out benchmarks/results/growth.json]

kernel: one (4, 4, c, c) kernel, whose matrix has two equal sides, beside a full SVD of that matrix
    by SciPy.
layers: many kernels of one size. plan: the steps of choosing ranks for a network of many layers.
Writes JSON and a table.

Every point is a process of its own. Peak memory is what the process holds at most while the first
call runs, less what it held before: the arrays it is given are not in it. A small call comes
before, for buffers that stay. The growth between two points is that of the fastest runs, as
exponent of the size. It is measured on one thread unless told otherwise, because it is to show the
work, not how well the work is spread.
"""

import argparse
import gc
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import linen as nn
from rival_svd import half_rank
from turns import check, take_turns, write

from lowrank_jax import decompose, trace
from lowrank_jax.planning.budget import Budget
from lowrank_jax.planning.candidates import candidates
from lowrank_jax.planning.selectors import total_energy
from lowrank_jax.planning.spectra import spectra

SIZES = {
    "kernel": (256, 512, 1024, 2048, 4096),
    "layers": (5, 50, 100, 200, 500),
    "plan": (10, 25, 50, 100, 200),
}
QUICK = {"kernel": (160, 320), "layers": (4, 8), "plan": (2, 4)}
BASES = {"kernel": "SVD", "layers": "SVD", "plan": "spectra"}
SLACK = 0.2  # of an exponent, for noise
SPAN = 3  # sizes that an exponent is checked over: between two of them noise is too large
SHORT = 3  # times as many rounds where a run is short
MATRICES = 3  # of the largest size that decompose may hold beside the tree
Program = Callable[[], object]


def tree(shape: tuple[int, ...], count: int, seed: int) -> tuple[dict, dict[str, int]]:
    """So many layers with Gaussian kernels, and ranks for half the weights."""
    rng = np.random.default_rng(seed)
    params = {
        f"conv_{i}": {"kernel": jnp.asarray(rng.standard_normal(shape, np.float32))}
        for i in range(count)
    }
    return jax.block_until_ready(params), dict.fromkeys(params, half_rank(shape))


def matrices(params: dict) -> list[np.ndarray]:
    kernels = (np.asarray(layer["kernel"]).transpose(0, 2, 1, 3) for layer in params.values())
    return [kernel.reshape(kernel.shape[0] * kernel.shape[1], -1) for kernel in kernels]


def decomposing(
    shape: tuple[int, ...], count: int, seed: int
) -> tuple[dict[str, Program], Program, int, int]:
    """The programs to time, that whose memory counts, bytes of the tree and of a matrix."""
    params, ranks = tree(shape, count, seed)

    def ours():
        return jax.block_until_ready(decompose(params, ranks))

    def svd():  # the library that ours calls, so that one set of threads serves both
        return [
            scipy.linalg.svd(m, full_matrices=False, check_finite=False) for m in matrices(params)
        ]

    size = 4 * math.prod(shape)
    return {"decompose": ours, "SVD": svd}, ours, count * size, size


def planning(count: int, seed: int) -> tuple[dict[str, Program], Program, int, int]:
    """The same for a network of so many convolutions, whose weights need no compilation."""
    model, images = (
        nn.Sequential([nn.Conv(32, (3, 3)) for _ in range(count)]),
        jnp.zeros((1, 8, 8, 32)),
    )
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), shapes
    )
    uses = trace(model.apply, variables, images)
    values = spectra(variables, uses)
    table = candidates(uses, values)
    steps = {
        "trace": lambda: (jax.clear_caches(), trace(model.apply, variables, images)),
        "spectra": lambda: spectra(variables, uses),
        "candidates": lambda: candidates(uses, values),
        "total_energy": lambda: total_energy(table, Budget("macs", 0.5)),
    }
    matrix = 4 * 96 * 96
    return steps, lambda: [step() for step in steps.values()], count * matrix, matrix


def memory(name: str) -> int:
    """Bytes that this process holds ("VmRSS", without files "RssAnon") or held ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def peak(program: Program) -> int | None:
    """Bytes that a run takes at most.

    getrusage cannot tell: it counts the parent until this process began.
    """
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():  # not Linux
        return None
    gc.collect()
    clear.write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    program()
    return memory("VmHWM") - before


def point(kind: str, size: int, rounds: int, seed: int) -> dict:
    """Everything measured at one size, in this process."""
    small = {
        "kernel": partial(decomposing, (3, 3, 48, 48), 1),
        "layers": partial(decomposing, (3, 3, 48, 48), 1),
    }
    made = {
        "kernel": lambda: decomposing((4, 4, size // 4, size // 4), 1, seed),
        "layers": lambda: decomposing((3, 3, 64, 64), size, seed),
        "plan": lambda: planning(size, seed),
    }
    small.get(kind, partial(planning, 1))(seed)[1]()
    programs, whole, tree_bytes, matrix_bytes = made[kind]()
    found = {"peak_bytes": peak(whole), "tree_bytes": tree_bytes, "matrix_bytes": matrix_bytes}
    rounds *= 1 if kind == "kernel" else SHORT
    return found | {"seconds": take_turns(programs, rounds, settle=0)}


def run_point(kind: str, size: int, rounds: int, seed: int, threads: int) -> dict:
    """The same in a process of its own, as a row."""
    command = [sys.executable, str(Path(__file__).resolve()), "--point", kind, str(size)]
    command += ["--rounds", str(rounds), "--seed", str(seed), "--threads", str(threads)]
    env = os.environ | {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "OPENBLAS", "MKL")}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{kind} {size} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    row = {"name": f"{kind} {size}", "kind": kind, "size": size, "base": BASES[kind]}
    return row | json.loads(done.stdout.splitlines()[-1])


def exponent(old: dict, new: dict, name: str) -> float:
    """The growth of the fastest run of a program between two rows, as exponent of the size."""
    growth = min(new["seconds"][name]) / min(old["seconds"][name])
    return math.log(growth) / math.log(new["size"] / old["size"])


def exponents(rows: list[dict]) -> dict[tuple[str, str], float]:
    """(row, program) to the growth since the row before."""
    pairs = [(old, new) for old, new in itertools.pairwise(rows) if old["kind"] == new["kind"]]
    return {
        (new["name"], name): exponent(old, new, name)
        for old, new in pairs
        for name in new["seconds"]
    }


def described(rows: list[dict]) -> list[dict]:
    """The rows with columns for growth and memory, memory beside the first program."""
    growth, found = exponents(rows), []
    for row in rows:
        columns: dict[str, dict] = {name: {} for name in row["seconds"]}
        sizes = {key: row[f"{key}_bytes"] for key in ("peak", "tree", "matrix")}
        next(iter(columns.values())).update(
            {f"{key} MB": size / 1e6 for key, size in sizes.items() if size is not None}
        )
        for name in columns:
            columns[name] |= (
                {"exponent": growth[row["name"], name]} if (row["name"], name) in growth else {}
            )
        found.append(row | {"programs": columns})
    return found


def limit(row: dict) -> int:
    """Bytes that decompose may take at most."""
    return MATRICES * row["matrix_bytes"] + row["tree_bytes"]


def checks(rows: list[dict]) -> list[dict]:
    """No step grows faster than the decompositions do, and memory stays within few matrices."""
    found = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        last = [row for row in rows if row["kind"] == kind][-SPAN:]
        old, new = last[0], last[-1]
        growth = {name: exponent(old, new, name) for name in new["seconds"]}
        most = max(3.0, growth["SVD"]) if kind == "kernel" else 1.0
        for name in [name for name in growth if name != "SVD"]:
            what = f"{kind} {old['size']} to {new['size']}: exponent of {name}"
            found.append(check(what, growth[name], most + SLACK))
    for row in rows:
        if row["kind"] != "plan" and row["peak_bytes"] is not None:
            found.append(check(f"{row['name']}: peak bytes", row["peak_bytes"], limit(row)))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "growth.json"
    )
    parser.add_argument("--quick", action="store_true", help="two small sizes of each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--point", nargs=2, metavar=("KIND", "SIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.point:
        if hasattr(
            os, "sched_setaffinity"
        ):  # `decompose` takes all cores that it may, whatever the libraries' threads
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
        print(json.dumps(point(args.point[0], int(args.point[1]), args.rounds, args.seed)))
        return
    rows = []
    for kind, sizes in (QUICK if args.quick else SIZES).items():
        for size in sizes:
            rows.append(run_point(kind, size, args.rounds, args.seed, args.threads))
            print(rows[-1], flush=True)
    write(args.out, "growth", described(rows), args.seed, checks=checks(rows))
    print(args.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
