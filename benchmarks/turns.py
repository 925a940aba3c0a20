"""Programs that are timed in turn, rivals in their own processes, and the benchmarks' result file.

Every library keeps idle threads spinning for a while after its work. In one process they would hold
the cores against the next library, so that a rival runs as a `Worker`, with an interpreter and
threads of its own, and a turn starts only when the threads of the one before are asleep. Needs
nothing but Python, for interpreters that have only a rival.
"""

import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SETTLE = 0.2  # seconds until idle threads sleep
LONG = 10.0  # seconds: a run that takes so long needs none before it to be warm


class Worker:
    """A program in a process of its own; a call runs it and returns its seconds.

    It is started and warm once this is made. The process prints the line ``{"ready": facts}``, and
    for each line ``run`` on its input the seconds, as JSON; see `serve`.

    Attributes:
        facts: what the process said when it was ready.

    Raises:
        RuntimeError: the process ended or said something else; holds its error output.
    """

    def __init__(
        self,
        command: Sequence[str],
        cwd: str | os.PathLike | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.command = list(command)
        # A file: a pipe that nobody reads would block the process.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                self.command, cwd=cwd, env={**os.environ, **(env or {})}, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            )  # fmt: skip
        except OSError as error:
            self._errors.close()
            raise RuntimeError(f"{self.command[0]} does not start: {error}") from error
        try:
            self.facts = self._answer()["ready"]
        except BaseException as error:
            self.close()
            raise (
                error
                if isinstance(error, RuntimeError)
                else RuntimeError(f"not a worker: {command}")
            ) from error

    def __call__(self) -> float:
        with contextlib.suppress(OSError):  # it has ended, which its answer tells
            print("run", file=self._process.stdin, flush=True)
        return float(self._answer())

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        try:
            return json.loads(line)
        except ValueError:
            self._process.kill()
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read()[-4000:] or "nothing"
        raise RuntimeError(
            f"{' '.join(self.command)} gave {line!r} and ended; its error output:\n{said}"
        )

    def close(self) -> None:
        """Ends the process."""
        try:
            self._process.communicate(timeout=10)
        except (subprocess.TimeoutExpired, ValueError, OSError):
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            stream.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(prepare: Callable[[], tuple[Any, Callable[[], object]]]) -> None:
    """The other side of a `Worker`: says the facts, then runs the program when asked."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    facts, program = prepare()
    print(json.dumps({"ready": facts}), file=out, flush=True)
    for _ in sys.stdin:
        print(json.dumps(timed(program)), file=out, flush=True)


def timed(program: Callable[[], object]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    program()
    return time.perf_counter() - start


def repeated(
    program: Callable[[], object], seconds: float = 0.25
) -> tuple[Callable[[], None], int]:
    """A program that runs another so often that a turn takes about so long, and how often that is.

    A turn begins with cold caches and sleeping threads, which a user of many batches does not meet.
    """
    took = timed(program)
    took = took if took > LONG else timed(program)
    count = max(1, round(seconds / took))

    def run() -> None:
        for _ in range(count):
            program()

    return run, count


def take_turns(
    programs: Mapping[str, Callable], rounds: int, settle: float = SETTLE
) -> dict[str, list[float]]:
    """Seconds of every run; each round runs all programs and starts with the next one."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    names = list(programs)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(settle)
            program = programs[name]
            seconds[name].append(program() if isinstance(program, Worker) else timed(program))
    return seconds


def used_by_others() -> float | None:
    """CPU seconds of all processes so far but this one and its ended children, if known."""
    try:
        _, user, nice, system, _, _, *interrupts = (
            Path("/proc/stat").read_text().splitlines()[0].split()[:8]
        )
    except OSError:
        return None
    all_of_them = sum(map(int, (user, nice, system, *interrupts))) / os.sysconf("SC_CLK_TCK")
    return all_of_them - sum(os.times()[:4])


def ratios(row: Mapping[str, Any], program: str, base: str | None = None) -> list[float]:
    """Time of a program over that of the base, in each round."""
    seconds = row["seconds"]
    return [
        mine / other
        for mine, other in zip(seconds[program], seconds[base or row["base"]], strict=True)
    ]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive")
        if len(values) > 1
        else 3 * list(values)
    )
    return low, median, high


def check(what: str, value: float, limit: float) -> dict:
    """A value that must not be above a limit."""
    return {"what": what, "value": value, "limit": limit, "reached": bool(value <= limit)}


def told(options: Any) -> dict[str, str]:
    """The options of a command that say what was measured; its paths are those of a machine."""
    own = vars(options).items()
    return {name: str(value) for name, value in own if not isinstance(value, Path)}


def write(path: Path, benchmark: str, rows: list[dict], seed: int, **more: Any) -> dict:
    """Writes a result file and a Markdown table beside it.

    Args:
        path: of the JSON file; the table gets the suffix .md.
        benchmark: its name.
        rows: ``{"name": str, "seconds": {program: [seconds of each round]}, "base": program that
            the ratios are against}`` and facts; of these ``"programs": {program: {column: value}}``
            become columns of the table.
        seed: of every random number.
        more: such as ``notes``, a list of lines, and ``checks``, a list of `check`.
    """
    from lowrank_jax.tuning.device import machine  # a rival's interpreter has no JAX

    command = shlex.join(
        ["python", *(Path(word).name if Path(word).is_absolute() else word for word in sys.argv)]
    )
    found = {
        "benchmark": benchmark,
        "command": command,
        "seed": seed,
        "machine": machine(),
        **more,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(found))
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """The tables of a result: times, checks, notes."""
    columns = list(
        dict.fromkeys(
            key for row in found["rows"] for v in row.get("programs", {}).values() for key in v
        )
    )
    head = ["row", "program", "median s", "quartiles", "time over base", "quartiles", *columns]
    lines = [
        f"# {found['benchmark']}",
        "",
        f"`{found['command']}`, seed {found['seed']}, {found['machine']}",
        "",
    ]
    lines += _table(
        head, [_cells(row, name, columns) for row in found["rows"] for name in row["seconds"]]
    )
    if checks := found.get("checks"):
        cells = [
            [c["what"], _show(c["value"]), _show(c["limit"]), "yes" if c["reached"] else "NO"]
            for c in checks
        ]
        lines += ["", *_table(["check", "value", "at most", "reached"], cells)]
    notes = [f"- {note}" for note in found.get("notes", [])]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _cells(row: Mapping[str, Any], name: str, columns: Sequence[str]) -> list[str]:
    (low, middle, high), (below, ratio, above) = (
        quartiles(row["seconds"][name]),
        quartiles(ratios(row, name)),
    )
    facts = row.get("programs", {}).get(name, {})
    base = (
        ["base", ""] if name == row["base"] else [_show(ratio), f"{_show(below)} to {_show(above)}"]
    )
    extra = [_show(facts[column]) if column in facts else "" for column in columns]
    return [row["name"], name, _show(middle), f"{_show(low)} to {_show(high)}", *base, *extra]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _show(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
