"""Times the demo as a second process and the decomposition of its network; writes JSON.

python benchmarks/journey.py [--out benchmarks/results/journey.json]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from lowrank_jax import decompose
from lowrank_jax.data import pretrained
from lowrank_jax.experiments import cifar10 as experiment
from lowrank_jax.tuning.timing import throughput


def time_decompose(rounds: int) -> dict:
    """Seconds of `decompose` on the embedded network: a first call, then eager and compiled."""
    params = jax.device_put(pretrained()["params"])
    start = time.perf_counter()
    jax.block_until_ready(decompose(params, experiment.PAPER_RANKS))
    first = time.perf_counter() - start
    compiled = jax.jit(lambda tree: decompose(tree, experiment.PAPER_RANKS)).lower(params).compile()
    programs = {
        "eager": lambda: jax.block_until_ready(decompose(params, experiment.PAPER_RANKS)),
        "compiled": lambda: jax.block_until_ready(compiled(params)),
    }
    times = throughput(programs, items=1, rounds=rounds)
    return {"first": first} | {name: sorted(values) for name, values in times.seconds.items()}


def time_demo() -> dict:
    """The demo's own figures and its wall time, process start included."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "lowrank_jax.cli.main", "demo", "--out", f"{folder}/demo"],
            check=True,
        )
        return {"wall": time.perf_counter() - start} | json.loads(
            Path(folder, "demo", "report.json").read_text()
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "journey.json"
    )
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    found = {"demo": time_demo(), "decompose_seconds": time_decompose(args.rounds)}
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(
        json.dumps(found["decompose_seconds"], indent=1), f"\ndemo: {found['demo']['wall']:.0f} s"
    )
