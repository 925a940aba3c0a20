"""One program of forward.py in a process of its own: `fast`, or plain ``jax.jit``.

A worker process (turns.py).

python benchmarks/forward_worker.py --network nin --batch 32 --dtype float32 --tree low-rank
    [--fast] [--freeze] [--times FILE] [--search 32]
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from networks import NETWORKS, prepare
from turns import repeated, serve

from lowrank_jax import Timer, fast, lowrank
from lowrank_jax.tuning.result import Fast


def start(args: argparse.Namespace) -> tuple[dict[str, Any], Callable]:
    """Facts of the program, its first outputs among them, and a run of a quarter of a second."""
    own = prepare(args.network, args.batch, args.dtype)
    tree, facts = own.trees[args.tree], dict[str, Any]()
    if args.fast:
        timers = functools.partial(Timer, path=args.times)
        begin, given = time.perf_counter(), (own.model.apply, tree, own.images[: args.search])
        run = fast(*given, timers=timers, freeze=args.freeze)
        facts = {"search_s": time.perf_counter() - begin, **describe(run)}
    else:
        run = jax.jit(lowrank(own.model.apply))
    inputs = (None if args.fast and args.freeze else tree, own.images)
    first = np.asarray(jnp.asarray(run(*inputs)[0], jnp.float32)).reshape(-1)[:1000]
    once, count = repeated(lambda: jax.block_until_ready(run(*inputs)))
    return {"outputs": first.tolist(), "repeats": count, "found": facts}, once


def describe(own: Fast) -> dict[str, Any]:
    """What `fast` found, for the result file."""
    programs = {
        f"{layer.inputs} {layer.kernel} {f'rank {scheme.rank}' if scheme else 'dense'}": how
        for (layer, scheme), how in own.algorithms.items()
    }
    pools = {f"{pool.kind} {pool.inputs} {pool.window}": how for pool, how in own.pools.items()}
    facts = {"options": dict(own.options), "slice": own.size, "tried_s": dict(own.seconds)}
    return facts | {"programs": programs, "pools": pools, "left_out": dict(own.left_out)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--tree", choices=("dense", "low-rank"), required=True)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--freeze", action="store_true")
    parser.add_argument("--times", help="JSON file that keeps the measured times of layers")
    parser.add_argument("--search", type=int, help="images to search with at most")
    args = parser.parse_args()
    serve(lambda: start(args))


if __name__ == "__main__":
    main()
