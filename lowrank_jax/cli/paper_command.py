"""The command `paper`: costs and speed of the authors' networks at the authors' ranks."""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.cli.options import new_command, positive
from lowrank_jax.experiments.cifar10 import machine
from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.io.folders import whole_folder
from lowrank_jax.models.published import PUBLISHED, Published
from lowrank_jax.program.kernel_use import Trace
from lowrank_jax.program.tracing import trace
from lowrank_jax.program.transform import lowrank
from lowrank_jax.report.journey import costs, table
from lowrank_jax.tree.decomposing import decompose
from lowrank_jax.tuning.timing import compile_fastest, throughput

HEAD = ("layer", "rank", "parameters", "low-rank", "factor", "macs", "low-rank", "factor")


def add_command(commands: Any) -> None:
    """Adds `paper` to the subcommands of ``lowrank-jax``."""
    about = "print costs and speed of the networks of Tai et al. at their ranks, beside their own"
    command = new_command(commands, "paper", about, run)
    add = command.add_argument
    add("--networks", nargs="+", choices=PUBLISHED, default=list(PUBLISHED), metavar="NAME",
        help=f"of {', '.join(PUBLISHED)}")  # fmt: skip
    add("--batch", type=positive, default=8, help="images in a forward pass")
    add("--rounds", type=positive, default=5, help="passes of each network that count, 2 or more")
    add("--out", type=Path, default=Path("lowrank-jax-paper"), help="folder for the report")


def run(args: argparse.Namespace) -> None:
    """Prints a table for each network, and writes a report."""
    found = {}
    for name in args.networks:
        facts = network_facts(PUBLISHED[name], args.batch, max(args.rounds, 2))
        found[name] = facts
        print(f"\n## {name}\n\n{markdown(facts)}", flush=True)
    report = {"command": "lowrank-jax paper", "machine": machine(), "networks": found}
    with whole_folder(args.out) as folder:
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        texts = [f"## {name}\n\n{markdown(facts)}\n" for name, facts in found.items()]
        (folder / "report.md").write_text("# lowrank-jax paper\n\n" + "\n".join(texts))


def network_facts(network: Published, batch: int, rounds: int) -> dict[str, Any]:
    """Costs of the convolutions for one image, and the measured gain of a forward pass.

    The weights are random: neither costs nor times depend on them.
    """
    model = network.build()
    one = jnp.zeros((1, network.size, network.size, 3))
    variables = jax.jit(model.init)(jax.random.key(0), one)
    program = trace(model.apply, variables, one)
    schemes = schemes_of(program, network)
    layers = [
        {
            "layer": use.path,
            "rank": network.ranks.get(use.path),
            "parameters": [use.parameters, _parameters(use, schemes.get(use.path))],
            "macs": [use.macs, _macs(use, schemes.get(use.path))],
        }
        for use in program
        if use.kind != "product"
    ]
    small = decompose(variables, schemes, program)
    gain = _gain(model.apply, variables, small, jnp.ones((batch, *one.shape[1:])), rounds)
    published = {"compression": network.compression, "speed_up": network.speed_up}
    return {"layers": layers, "batch": batch, "speed_up": gain, "published": published}


def schemes_of(program: Trace, network: Published) -> dict[str, Scheme]:
    """The authors' ranks, each divided by the groups of its layer."""
    uses = {path: program.at(path)[0] for path in network.ranks}
    return {path: use.scheme(network.ranks[path] // use.groups) for path, use in uses.items()}


def markdown(facts: dict[str, Any]) -> str:
    """The costs as a table, and the factors beside the published ones."""
    rows = [HEAD]
    for layer in facts["layers"]:
        rank = "dense" if layer["rank"] is None else str(layer["rank"])
        rows.append((layer["layer"], rank, *costs(layer["parameters"]), *costs(layer["macs"])))
    parameters, macs = (_total(facts, measure) for measure in ("parameters", "macs"))
    rows.append(("convolutions", "", *costs(parameters), *costs(macs)))
    low, median, high = facts["speed_up"]
    published = facts["published"]
    lines = [
        table(rows),
        "",
        f"Weights: {parameters[0] / parameters[1]:.3f} times fewer"
        + _beside(published["compression"]),
        f"Multiply-adds: {macs[0] / macs[1]:.2f} times fewer",
        f"Forward pass of {facts['batch']} images: {median:.2f} times as fast "
        f"(quartiles {low:.2f} to {high:.2f})" + _beside(published["speed_up"]),
    ]
    return "\n".join(lines)


def _beside(published: float | None) -> str:
    return "" if published is None else f"; published: {published:.2f}"


def _parameters(use: Any, scheme: Scheme | None) -> int:
    return use.parameters if scheme is None else use.parameters_at(scheme)


def _macs(use: Any, scheme: Scheme | None) -> int:
    return use.macs if scheme is None else use.macs_at(scheme)


def _gain(apply: Any, dense: Any, small: Any, images: jax.Array, rounds: int) -> list[float]:
    """Quartiles of the low-rank network's speed over that of the dense one."""
    programs = {
        "dense": compile_fastest(apply, dense, images),
        "low-rank": compile_fastest(lowrank(apply), small, images),
    }
    times = throughput(programs, items=len(images), rounds=rounds)
    return list(times.ratio("low-rank", "dense"))


def _total(facts: dict[str, Any], measure: str) -> list[int]:
    return [sum(layer[measure][i] for layer in facts["layers"]) for i in (0, 1)]
