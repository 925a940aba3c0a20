"""`write_report`: the page, the Markdown with its pictures, and the JSON, from one record."""

import json
from collections.abc import Mapping
from pathlib import Path

from lowrank_jax.io.atomic import whole_file
from lowrank_jax.report.drawing import NO_PICTURES, Drawn, draw_all
from lowrank_jax.report.page import to_html
from lowrank_jax.report.record import Picture, Report, Section
from lowrank_jax.report.tables import markdown_table


def write_report(folder: Path, report: Report) -> None:
    """Writes report.html, report.md with its pictures as PNG, and report.json.

    The page needs no other file and no network. Without matplotlib there are no pictures, and one
    sentence says so.

    Args:
        folder: that exists.
        report: what is written.

    Example:
        >>> import tempfile
        >>> report = Report(title="lowrank-jax plan", summary="Half of the macs.", machine="cpu")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_report(Path(folder), report)
        ...     print(*sorted(path.name for path in Path(folder).iterdir()))
        report.html report.json report.md
    """
    drawn = draw_all(report.pictures)
    files = {
        "report.html": to_html(report, drawn).encode(),
        "report.md": to_markdown(report, drawn).encode(),
        "report.json": (json.dumps(to_json(report), indent=1) + "\n").encode(),
        **{f"{name}.png": own.png for name, own in drawn.items()},
    }
    for name, content in files.items():
        with whole_file(folder / name) as scratch:
            scratch.write_bytes(content)


def to_json(report: Report) -> dict:
    """The facts of a report, with its title, its summary and the machine."""
    names = ("subject", "summary", "machine")
    own = {name: getattr(report, name) for name in names}
    return {"command": report.title, **own, **report.facts}


def to_markdown(report: Report, drawn: Mapping[str, Drawn]) -> str:
    """The report as Markdown, whose pictures are files beside it.

    Example:
        >>> print(to_markdown(Report(title="plan", summary="Half.", machine="cpu"), {}))
        # plan
        <BLANKLINE>
        Half.
        <BLANKLINE>
        Machine: cpu
        <BLANKLINE>
    """
    parts = [*filter(None, [f"# {report.title}", report.subject, report.summary])]
    for section in report.sections:
        parts += _section(section, drawn)
    if report.pictures and not drawn:
        parts.append(NO_PICTURES)
    return "\n\n".join([*parts, f"Machine: {report.machine}"]) + "\n"


def _section(section: Section, drawn: Mapping[str, Drawn]) -> list[str]:
    parts = [f"## {section.title}", section.text]
    if section.table:
        parts.append(markdown_table(section.table))
    if section.code:
        parts.append(f"```\n{section.code}\n```")
    shown = [picture for picture in section.pictures if picture.name in drawn]
    return [*filter(None, parts), *map(_picture, shown)]


def _picture(picture: Picture) -> str:
    return f"![{picture.title}]({picture.name}.png)\n\n{picture.about}"
