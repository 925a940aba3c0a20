"""Times every program of single separable layers beside their dense layer and the machine's bound.

python benchmarks/layers.py [--dtypes float32 bfloat16] [--batch 128] [--out
benchmarks/results/layers.json]

The bound of a layer is the larger of its macs over the rate of a large product and its
bytes, without those between the two convolutions, over the rate of a copy; both rates are measured
in the same run.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from turns import quartiles, write

from lowrank_jax.program.compiler import candidate_options
from lowrank_jax.tuning.algorithms import PLAIN, Layer, algorithms_of, factor_shapes
from lowrank_jax.tuning.experimental.roofline import roofline
from lowrank_jax.tuning.timing import throughput

# Name, side of the inputs, channels in, channels out, side of the kernel, rank.
LAYERS = (
    ("experiment, first", 32, 3, 192, 5, 10),
    ("experiment, third", 16, 96, 192, 5, 20),
    ("5x5 192->192", 16, 192, 192, 5, 20),
    ("VGG-16, conv2_2", 112, 128, 128, 3, 48),
    ("VGG-16, conv3_2", 56, 256, 256, 3, 128),
    ("VGG-16, conv4_2", 28, 512, 512, 3, 192),
    ("VGG-16, conv5_2", 14, 512, 512, 3, 320),
)


def layer(side: int, channels: int, features: int, size: int, batch: int, dtype: str) -> Layer:
    half = (size // 2, size // 2)
    return Layer(
        (batch, side, side, channels),
        features,
        (size, size),
        (1, 1),
        (half, half),
        (1, 1),
        (1, 1),
        1,
        dtype,
    )


def compiled(fn: Callable, *args: jax.Array, options: dict | None = None) -> Callable:
    program = jax.jit(fn, compiler_options=options).lower(*args).compile()
    return lambda: jax.block_until_ready(program(*args))


def best(run: Callable, rounds: int = 7) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def peaks(dtype: str) -> tuple[float, float]:
    """Operations a second of a large product, and bytes a second of a copy beyond the caches."""
    gpu = jax.default_backend() == "gpu"
    side, count = (8192, 2**28) if gpu else (2048, 2**26)
    square, long = jnp.ones((side, side), dtype), jnp.ones(count, dtype)
    product = best(compiled(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32), square))
    copy = best(compiled(lambda a: a + 1, long))
    return 2 * side**3 / product, 2 * long.nbytes / copy


def row(name: str, own: Layer, rank: int, rates: tuple[float, float], rounds: int) -> dict:
    """Seconds of every program under each set of compiler options, in turn."""
    shapes = factor_shapes(own, rank, "vertical")
    x, one, two, dense = (
        jnp.full(shape, 0.5, own.dtype) for shape in (own.inputs, *shapes, own.kernel)
    )
    runs = {}
    for index, options in enumerate(candidate_options()):
        end = f" ({index})" if index else ""
        for how in algorithms_of(own, rank):
            run = lambda x, one, two, how=how: own.run(how, "vertical", x, one, two)  # noqa: E731
            runs[how + end] = compiled(run, x, one, two, options=options)
        runs["dense" + end] = compiled(own.convolve, x, dense, options=options)
    found = throughput(runs, items=1, rounds=rounds)
    bound, _ = roofline(own.inputs, *shapes, own.dtype, *rates, padding=own.padding)
    facts = {"inputs": own.inputs, "kernel": own.kernel, "rank": rank, "dtype": own.dtype}
    whole = 2 * math.prod(own.inputs[:3]) * math.prod(own.kernel)
    facts |= {"flops": bound.flops, "dense_flops": whole, "bound_s": bound.seconds}
    return {"name": f"{name}, {own.dtype}", **facts, "seconds": found.seconds, "base": "dense"}


def summary(rows: list[dict]) -> list[str]:
    """The best program of each layer, beside two convolutions, the dense layer and the bound."""
    notes = [
        f"(1) after a program's name: compiled with {options}"
        for options in candidate_options()[1:]
    ]
    for each in rows:
        medians = {name: quartiles(seconds)[1] for name, seconds in each["seconds"].items()}
        low = {
            name: value
            for name, value in medians.items()
            if not name.startswith(("dense", "merged"))
        }
        best, plain, dense = (
            min(value for name, value in medians.items() if name.startswith(start))
            for start in ("", PLAIN, "dense")
        )
        name = min(low, key=lambda key: low[key])
        fall, bound = each["dense_flops"] / each["flops"], low[name] / each["bound_s"]
        notes.append(
            f"{each['name']}: best low-rank {name} {1e3 * low[name]:.2f} ms, "
            f"{plain / low[name]:.2f} times faster than two convolutions, "
            f"{dense / low[name]:.2f} than dense (operations fall {fall:.2f} times); "
            f"{bound:.2f} times the bound; the fastest of all {1e3 * best:.2f} ms"
        )
    return notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "layers.json"
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument(
        "--batch",
        type=int,
        default=128,
        help="of the 16 and 32 pixel layers; an eighth of the others",
    )
    parser.add_argument("--layers", type=int, nargs="+", default=range(len(LAYERS)), help="indices")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    rows = []
    for dtype in args.dtypes:
        rates = peaks(dtype)
        for name, side, channels, features, size, rank in (LAYERS[index] for index in args.layers):
            batch = args.batch if side <= 32 else max(1, args.batch // 8)
            rows.append(
                row(
                    name,
                    layer(side, channels, features, size, batch, dtype),
                    rank,
                    rates,
                    args.rounds,
                )
            )
            rows[-1]["rates"] = rates
            write(args.out, "layers", rows, seed=0, notes=summary(rows))


if __name__ == "__main__":
    main()
