"""Folders of reports, which appear whole or not at all."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowrank_jax.planning.plans import Plan
from lowrank_jax.training.experiment import machine


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Gives a scratch folder that becomes ``out`` at the end, or vanishes if anything fails."""
    out = Path(out).resolve()
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    scratch.chmod(0o755)
    try:
        yield scratch
        if out.exists():
            shutil.rmtree(out)
        scratch.rename(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def check_out(out: Path) -> None:
    """Raises unless the folder is new, empty or an earlier report, which alone may be replaced."""
    if out.is_file() or (
        out.is_dir() and any(out.iterdir()) and not (out / "report.json").exists()
    ):
        raise FileExistsError(
            f"{out} exists and is no report of an earlier run; give another folder with --out."
        )


def write_plan(folder: Path, plan: Plan, facts: Mapping[str, Any]) -> None:
    """Writes plan.json, report.md and report.json into an existing folder.

    Args:
        folder: where.
        plan: what was chosen.
        facts: for the report, among them the name of the "command".
    """
    plan.save(folder / "plan.json")
    (folder / "report.md").write_text(f"# {facts['command']}\n\n```\n{plan}\n```\n")
    totals = {measure: plan.total(measure) for measure in ("parameters", "macs", "bytes")}
    found = {**facts, **totals, "machine": machine()}
    (folder / "report.json").write_text(json.dumps(found, indent=1) + "\n")
