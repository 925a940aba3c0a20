"""Compresses the pretrained ResNet-20 without training, by every selector, budget and scheme.

python benchmarks/compress.py --shared ../shared/data [--budgets 0.5 0.33]
    [--selectors ratio total_energy] [--schemes separable channel mixed]

Writes JSON, a table and a picture. All plans and fits share one calibration.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from lowrank_jax import (
    Budget,
    Calibration,
    Plan,
    calibrate,
    compress,
    data,
    decompose,
    load_weights,
    lowrank,
)
from lowrank_jax.calibration.batch_norm import reestimate
from lowrank_jax.data.datasets import Dataset
from lowrank_jax.factorization.forms import FORMS
from lowrank_jax.io.torch_names import from_torch
from lowrank_jax.models import CifarResNet
from lowrank_jax.planning import selectors as ranks
from lowrank_jax.planning.candidates import Candidates, candidates
from lowrank_jax.planning.planner import calibrated_spectra, layer_weights
from lowrank_jax.planning.sensitivities import divergences
from lowrank_jax.planning.spectra import restrict, spectra
from lowrank_jax.training.evaluation import evaluate
from lowrank_jax.tuning.device import machine

MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
SELECTORS = ("ratio", "energy", "total_energy", "log_energy", "minmax", "sensitivity", "evbmf")
# The forms that a plan may choose, by the name of the column; mixed are all that there are.
SCHEMES = {
    "separable": ("vertical", "horizontal"),
    "channel": ("spatial", "pointwise"),
    "mixed": tuple(FORMS),
}
RESNET_20 = "resnet20_cifar10_torch.npz"
FACTORS = ("plain", "plain, re-estimated", "data-aware", "data-aware, re-estimated")


def normalize(images: jax.Array) -> jax.Array:
    return (jnp.asarray(images, jnp.float32) / 255 - MEAN) / STD


def load(weights: Path, depth: int = 20) -> tuple[CifarResNet, dict]:
    """The network as a Flax model with its pretrained variables."""
    model, image = CifarResNet(depth), jnp.zeros((1, 32, 32, 3))
    target = jax.eval_shape(model.init, jax.random.key(0), image)
    variables, _ = from_torch(load_weights(weights), model.apply, target, image)
    return model, jax.tree.map(jnp.asarray, variables)


def images_of(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """The training and the test images."""
    sets = str(args.shared / "tensorflow_datasets")
    return data.cifar10("train", sets), data.cifar10("test", sets)


def scorer(model: CifarResNet, test: Dataset, count: int) -> Callable[[dict], float]:
    """A function of a tree: its accuracy on the first test images."""
    given = test.images[:count], test.labels[:count]
    return lambda network: evaluate(model.apply, network, *given, preprocess=normalize)


def tables(found: Calibration, scheme: str) -> dict[str, Candidates]:
    """What each layer may become, by the plain and by the whitened singular values."""
    program, forms = found.trace, SCHEMES[scheme]
    plain = spectra(found.network.variables, program, forms=forms)
    whitened = restrict(calibrated_spectra(found), program, forms)
    return {
        "plain": candidates(program, plain),
        "data-aware": candidates(program, whitened, weights=layer_weights(found)),
    }


def losses(calibration: Calibration, images: jax.Array, table: Candidates) -> dict:
    """Squared change of the logits of 256 images at three ranks of each layer and form."""
    found: dict[str, list] = {}
    for path, layer in table.layers.items():
        schemes = [candidate.scheme for candidate in layer if candidate.scheme]
        for first in dict.fromkeys(scheme.first for scheme in schemes):
            known = [scheme.rank for scheme in schemes if scheme.first == first]
            picked = {known[round(share * (len(known) - 1))] for share in (0.15, 0.4, 0.8) if known}
            found.setdefault(path, []).extend((first, rank) for rank in sorted(picked))
    network = calibration.network
    given = network.apply, network.variables, images[:256], table.trace
    return divergences(*given, found, measure="mse")


def plans(
    table: Candidates, plain: Candidates, args: argparse.Namespace, divergence: Callable
) -> Iterator[tuple]:
    """Name, budget and plan. EVBMF has no budget, one plan, and takes the plain singular values."""
    for name in args.selectors:
        if name == "evbmf":
            yield name, None, ranks.evbmf(plain, "macs")
            continue
        for share in args.budgets:
            yield name, share, chosen(name, table, share, divergence)


def chosen(name: str, table: Candidates, share: float, divergence: Callable) -> Plan:
    """The plan of a selector that has a budget."""
    if name == "energy":
        return threshold(table, share)
    extra = (divergence(),) if name == "sensitivity" else ()
    return getattr(ranks, name)(table, *extra, Budget("macs", share))


def threshold(table: Candidates, share: float) -> Plan:
    """The highest threshold of energy, the same for all layers, that meets a share of the macs."""
    low, high = 1e-3, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        total, reached = ranks.energy(table, middle, "macs").total("macs")
        low, high = (middle, high) if reached <= share * total else (low, middle)
    return ranks.energy(table, low, "macs")


def networks(found: Calibration, plan: Plan, kinds: list[str]) -> Iterator[tuple]:
    """The network of a plan with each kind of factors."""
    start = time.perf_counter()
    plain = kinds[0].startswith("plain")
    small = decompose(found.network.variables, plan) if plain else compress(found, plan)
    for kind in kinds:
        if kind.endswith("re-estimated"):
            apply = lowrank(found.network.apply)
            small = reestimate(apply, small, found.inputs, train=True)
        yield kind, small, time.perf_counter() - start


def interval(correct: float, count: int) -> list[float]:
    """Wilson's 95 % interval of a share."""
    z, middle = 1.96, correct + 1.96**2 / (2 * count)
    spread = z * (correct * (1 - correct) / count + z**2 / (4 * count**2)) ** 0.5
    return [(middle - spread) / (1 + z**2 / count), (middle + spread) / (1 + z**2 / count)]


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    about = "folder of the weights and of tensorflow_datasets"
    add("--shared", type=Path, required=True, help=about)
    add("--out", type=Path, default=Path(__file__).parent / "results" / "compress")
    add("--budgets", type=float, nargs="+", default=[0.66, 0.5, 0.33, 0.25])
    add("--selectors", nargs="+", choices=SELECTORS, default=list(SELECTORS))
    add("--factors", nargs="+", choices=FACTORS, default=list(FACTORS))
    add("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    add("--calibration", type=int, default=2048, help="unlabelled training images")
    add("--test", type=int, default=10_000, help="test images")
    return parser.parse_args()


def rows(
    args: argparse.Namespace, found: Calibration, images: jax.Array, accuracy: Callable, scheme: str
) -> Iterator[dict]:
    """What every selector, budget and kind of factors keeps with one scheme."""
    both = tables(found, scheme)
    for table_name, table in both.items():
        kinds = [kind for kind in args.factors if kind.startswith(table_name)]

        @functools.cache
        def divergence(table: Candidates = table) -> dict:
            return losses(found, images, table)

        for name, share, plan in plans(table, both["plain"], args, divergence) if kinds else ():
            total, low = plan.total("macs")
            for kind, network, seconds in networks(found, plan, kinds):
                kept = accuracy(network)
                row = {"scheme": scheme, "selector": name, "factors": kind, "budget": share}
                row |= {"accuracy": kept, "interval": interval(kept, args.test)}
                say = f"{scheme:10} {name:13} {kind:26} {low / total:.2f} {kept:.2%}"
                print(f"{say} {seconds:.0f} s", flush=True)
                yield row | {"reached": low / total, "seconds": seconds}


def main() -> None:
    args = options()
    model, variables = load(args.shared / RESNET_20)
    train, test = images_of(args)
    images = normalize(train.images[: args.calibration])
    accuracy = scorer(model, test, args.test)
    facts = {"machine": machine(), "dense": accuracy(variables), "test": args.test}
    start = time.perf_counter()
    found = calibrate(model.apply, variables, images)
    calibrated_spectra(found)
    facts |= {"calibration": args.calibration, "planning_seconds": time.perf_counter() - start}
    known: list[dict] = []
    for scheme in args.schemes:
        for row in rows(args, found, images, accuracy, scheme):
            known.append(row)
            write(args.out, facts | {"rows": known})
    draw(facts | {"rows": known}).savefig(args.out.with_suffix(".png"), dpi=120)


def draw(found: dict) -> Figure:
    """One panel for each kind of factors, one line for each selector and scheme, with intervals."""
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    lines = dict.fromkeys((row["selector"], row["scheme"]) for row in found["rows"])
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    for axis, kind in zip(panels, FACTORS, strict=True):
        for line in lines:
            own = [
                r
                for r in found["rows"]
                if (r["selector"], r["scheme"], r["factors"]) == (*line, kind)
            ]
            share, accuracy = ([100 * row[key] for row in own] for key in ("reached", "accuracy"))
            spread = [
                [100 * abs(row["interval"][end] - row["accuracy"]) for row in own] for end in (0, 1)
            ]
            axis.errorbar(share, accuracy, spread, fmt="o-", ms=3, lw=1, label=", ".join(line))
        axis.axhline(100 * found["dense"], color="#8c8c8c", ls="--", label="dense")
        axis.set(title=kind, xlabel="macs, % of the dense network", ylabel="accuracy, %")
        axis.label_outer()
    axis.legend(frameon=False)
    return figure


def write(out: Path, found: dict) -> None:
    """The figures so far; a long run that is cut short keeps them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(found["rows"]))


def markdown(rows: list[dict]) -> str:
    """A column for each scheme: the accuracy, the macs reached, the 95 % interval."""
    schemes = list(dict.fromkeys(row["scheme"] for row in rows))
    cells: dict[tuple, dict[str, str]] = {}
    for row in rows:
        asked = "none" if row["budget"] is None else f"{row['budget']:.0%}"
        low, high = row["interval"]
        text = f"{row['accuracy']:.2%} ({row['reached']:.1%}; {low:.2%} to {high:.2%})"
        own = cells.setdefault((row["selector"], row["factors"], asked), {})
        own[row["scheme"]] = text
    lines = [
        "Accuracy (macs reached; 95 % interval), by the scheme that a plan may choose.",
        "",
        f"| selector | factors | macs asked | {' | '.join(schemes)} |",
        f"| --- | --- | ---: |{' --- |' * len(schemes)}",
    ]
    for key, own in cells.items():
        lines.append(f"| {' | '.join((*key, *(own.get(name, '') for name in schemes)))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
