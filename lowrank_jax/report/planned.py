"""What `plan` and `compress` write into a folder of results."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_jax.experiments.cifar10 import machine
from lowrank_jax.planning.plans import Plan


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
