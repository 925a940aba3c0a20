"""Everything that is to be measured on a GPU, in one call; prints one table last.

python benchmarks/gpu.py [--wheels FOLDER] [--batch 1024] [--out benchmarks/results/gpu]

The experiment's decomposed layers by every program, the fused kernel among them, against the bound
of the machine; then its whole network. On a machine without a package index, FOLDER has the wheels
that are missing there, as ``pip wheel flax optax chex orbax-checkpoint tqdm -w FOLDER`` makes them
where there is one; JAX is not replaced.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def install(wheels: Path) -> None:
    """The wheels of packages that this interpreter lacks; none of those that it has."""
    present = {"jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "opt_einsum"}
    names = {wheel.name.split("-")[0].lower(): wheel for wheel in sorted(wheels.glob("*.whl"))}
    missing = [
        str(wheel) for name, wheel in names.items() if name not in present and not _found(name)
    ]
    if missing:
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", *missing],
            check=True,
        )


def _found(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--wheels", type=Path, help="folder of wheels to install where a package is missing"
    )
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["float32", "bfloat16"]
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu")
    args = parser.parse_args()
    if args.wheels:
        install(args.wheels)
    common, batch = ["--dtypes", *args.dtypes], str(args.batch)
    steps = {
        "layers": ["--batch", batch, "--layers", "0", "1", "2", "--rounds", str(args.rounds)],
        "forward": ["--networks", "nin", "nin, no batch norm", "--batches", batch],
    }
    for name, options in steps.items():
        out = ["--out", str(args.out / f"{name}.json")]
        command = [sys.executable, str(HERE / f"{name}.py"), *common, *options, *out]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(HERE.parent)})
    for name in steps:
        print((args.out / f"{name}.md").read_text())


if __name__ == "__main__":
    main()
