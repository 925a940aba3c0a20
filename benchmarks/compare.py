"""What became faster or slower between two result files of the same benchmark.

python benchmarks/compare.py OLD.json NEW.json [--base PROGRAM]

Ends with 1 if something became slower.

Times are compared as ratios to the base of their row, which ran in the same rounds, so that the
speed of the machine cancels; give a rival with --base where the base is a program that may itself
have changed. A program has moved if the 95 % confidence intervals of its median ratio in the two
files are disjoint and the medians differ by more than 2 %.
The intervals are order statistics: the number of rounds above the true median is binomial, whatever
the distribution of times. Below 6 rounds no two of them are so sure, and the whole range is taken.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turns import ratios

CONFIDENCE, LEAST = 0.95, 0.02


def read(path: str, base: str | None = None) -> dict[str, Any]:
    """A result file, its rows against the base given where they have it.

    Raises:
        ValueError: in one line, what is wrong.
    """
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {' '.join(str(error).split())}") from error
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or "benchmark" not in found or not all(map(_is_row, rows)):
        raise ValueError(
            f"{path} is no result file of these benchmarks; see write in benchmarks/turns.py."
        )
    return found | {
        "rows": [row | {"base": base} if base in row["seconds"] else row for row in rows]
    }


def _is_row(row: Any) -> bool:
    seconds = row.get("seconds") if isinstance(row, dict) else None
    if (
        not isinstance(seconds, dict)
        or not {"name", "base"} <= set(row)
        or row["base"] not in seconds
    ):
        return False
    runs = list(seconds.values())
    if not all(isinstance(run, list) and run and len(run) == len(runs[0]) for run in runs):
        return False
    return all(isinstance(x, int | float) and 0 < x < math.inf for run in runs for x in run)


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Order statistics that hold the true median with at least this confidence, or the range."""
    values, count, index = sorted(values), len(values), 0
    outside = 2 * 0.5**count  # chance that the median is below the first or above the last value
    while (more := outside + 2 * math.comb(count, index + 1) * 0.5**count) <= 1 - confidence:
        outside, index = more, index + 1
    return values[index], values[-1 - index]


def moved(old: Sequence[float], new: Sequence[float]) -> str:
    """ "faster", "slower" or "same"."""
    (low, high), (below, above) = interval(old), interval(new)
    change = statistics.median(new) / statistics.median(old) - 1
    if abs(change) <= LEAST or (low <= above and below <= high):
        return "same"
    return "slower" if change > 0 else "faster"


def compare(
    old: Mapping[str, Any], new: Mapping[str, Any]
) -> list[tuple[str, str, float, float, str]]:
    """Row, program, median ratio in both files and verdict; NaN where a file does not have it.

    Raises:
        ValueError: the files have no row in common that has the same base.
    """
    ours, theirs = ({row["name"]: row for row in found["rows"]} for found in (new, old))
    if not any(
        name in theirs and theirs[name]["base"] == row["base"] for name, row in ours.items()
    ):
        raise ValueError(
            f"no row in common with the same base: {sorted(theirs)} and {sorted(ours)}"
        )
    return [
        line for name in {**theirs, **ours} for line in _row(name, theirs.get(name), ours.get(name))
    ]


def _row(
    name: str, old: Mapping | None, new: Mapping | None
) -> list[tuple[str, str, float, float, str]]:
    if old and new and old["base"] != new["base"]:
        return _row(name, old, None) + _row(
            name, None, new
        )  # ratios to different programs say nothing
    sides = [
        {p: ratios(row, p) for p in row["seconds"] if p != row["base"]} if row else {}
        for row in (old, new)
    ]
    lines = []
    for program in {**sides[0], **sides[1]}:
        was, now = (side.get(program) for side in sides)
        verdict = moved(was, now) if was and now else "gone" if was else "new"
        lines.append(
            (name, program, *(statistics.median(x) if x else math.nan for x in (was, now)), verdict)
        )
    return lines


def table(lines: Sequence[tuple[str, str, float, float, str]]) -> str:
    """The comparison in Markdown; ratios are times over the base's."""

    def number(value: float, form: str) -> str:
        return "" if math.isnan(value) else format(value, form)

    cells = [
        (
            row,
            program,
            number(old, ".4g"),
            number(new, ".4g"),
            number(new / old - 1, "+.1%"),
            verdict,
        )
        for row, program, old, new, verdict in lines
    ]
    head = ("row", "program", "old", "new", "change", "verdict")
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *cells))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--base", help="program that ratios are against, in the rows that have it")
    args = parser.parse_args(argv)
    try:
        lines = compare(read(args.old, args.base), read(args.new, args.base))
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    print(table(lines))
    return int(any(verdict == "slower" for *_, verdict in lines))


if __name__ == "__main__":
    sys.exit(main())
