"""Trace, compile, run and memory of `lowrank(model.apply)` beside a handwritten network.

python benchmarks/wrapped.py [--out benchmarks/results/wrapped.json]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from lowrank_jax import lowrank, trace
from lowrank_jax.experiments.cifar10 import PAPER_RANKS
from lowrank_jax.models import NIN
from lowrank_jax.models.imagenet import ResNet50
from lowrank_jax.tuning.device import machine
from lowrank_jax.tuning.timing import throughput


def seconds(step: Callable) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare(batch_size: int, rounds: int) -> dict:
    """Medians in seconds and the ratio wrapped over written, of steps taken in turn."""
    images = jnp.ones((batch_size, 32, 32, 3))
    written = NIN(ranks=PAPER_RANKS)
    variables = written.init(jax.random.key(0), images)
    networks = {"wrapped": lowrank(NIN().apply), "written": written.apply}
    found: dict = {}
    programs = {}
    for _ in range(rounds):
        for name, apply in networks.items():
            jax.clear_caches()
            start = time.perf_counter()
            lowered = jax.jit(apply).lower(variables, images)
            found.setdefault(("trace", name), []).append(time.perf_counter() - start)
            found.setdefault(("compile", name), []).append(
                seconds(lambda low=lowered, n=name: keep(programs, n, low))
            )
    calls = {
        name: lambda p=p: jax.block_until_ready(p(variables, images))
        for name, p in programs.items()
    }
    times = throughput(calls, items=batch_size, rounds=3 * rounds)
    found |= {("run", name): values for name, values in times.seconds.items()}
    steps = {
        step: {name: found[step, name] for name in networks} for step in ("trace", "compile", "run")
    }
    rows = {step: summary(values["wrapped"], values["written"]) for step, values in steps.items()}
    memory = {
        name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()
    }
    return rows | {"temporary_bytes": memory}


def keep(programs: dict, name: str, lowered) -> None:
    programs[name] = lowered.compile()


def summary(wrapped: list[float], written: list[float]) -> dict:
    ratios = [a / b for a, b in zip(wrapped, written, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "wrapped_s": statistics.median(wrapped),
        "written_s": statistics.median(written),
        "ratio": median,
        "ratio_quartiles": [low, high],
    }


def time_trace(rounds: int) -> list[float]:
    """Seconds of `trace` on a ResNet-50 at 224 x 224, each from an empty cache."""
    model, x = ResNet50(), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    found = []
    for _ in range(rounds):
        jax.clear_caches()
        found.append(seconds(lambda: trace(model.apply, variables, x)))
    return sorted(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "wrapped.json"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    result = {
        "machine": machine(),
        **compare(args.batch_size, args.rounds),
        "trace_resnet50_s": time_trace(5),
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
