"""A report as one page of HTML, which asks for nothing else: no script, no font, no network."""

import base64
import string
from collections.abc import Mapping, Sequence
from html import escape as escaped
from importlib import resources

from lowrank_jax.report.drawing import NO_PICTURES, Drawn
from lowrank_jax.report.record import Highlight, Picture, Report, Section, Table


def to_html(report: Report, drawn: Mapping[str, Drawn]) -> str:
    """The page.

    Args:
        report: what is shown.
        drawn: name of a picture to its files; empty without matplotlib.

    Example:
        >>> report = Report(title="plan", summary="At most 1 < 2.", machine="cpu")
        >>> "<p class=\\"summary\\">At most 1 &lt; 2.</p>" in to_html(report, {})
        True
    """
    sections = "\n".join(_section(section, drawn) for section in report.sections)
    missing = _paragraphs(NO_PICTURES) if report.pictures and not drawn else ""
    return string.Template(_asset("page.html")).substitute(
        style=_asset("page.css"),
        title=_text(report.title),
        subject=f'<p class="subject">{_text(report.subject)}</p>' if report.subject else "",
        summary=_text(report.summary),
        highlights=_highlights(report.highlights),
        sections=sections + missing,
        machine=_text(report.machine),
    )


def _text(text: str) -> str:
    """Text as HTML, in which no line breaks before a sign of percent."""
    return escaped(text).replace(" %", "&nbsp;%")


def _asset(name: str) -> str:
    return resources.files("lowrank_jax.report").joinpath(name).read_text(encoding="utf-8")


def _highlights(highlights: Sequence[Highlight]) -> str:
    if not highlights:
        return ""
    return f'<dl class="highlights">{"".join(map(_highlight, highlights))}</dl>'


def _highlight(own: Highlight) -> str:
    note = f'<dd class="note">{_text(own.note)}</dd>' if own.note else ""
    return f"<div><dt>{_text(own.label)}</dt><dd>{_text(own.value)}</dd>{note}</div>"


def _section(section: Section, drawn: Mapping[str, Drawn]) -> str:
    parts = [f"<h2>{_text(section.title)}</h2>", _paragraphs(section.text)]
    if section.table:
        parts.append(_table(section.table, section.title))
    if section.code:
        parts.append(f'<pre tabindex="0"><code>{escaped(section.code)}</code></pre>')
    shown = [_picture(own, drawn[own.name]) for own in section.pictures if own.name in drawn]
    if shown:
        parts.append(f'<div class="pictures">{"".join(shown)}</div>')
    alone = len(shown) == 1 and not section.table and not section.code
    return f'<section class="{"beside" if alone else "below"}">{"".join(parts)}</section>'


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{_text(part)}</p>" for part in text.split("\n\n") if part)


def _table(table: Table, title: str) -> str:
    head, *rows = table.rows
    body = "".join(_row(row, table.left) for row in (rows[:-1] if table.sums else rows))
    foot = f"<tfoot>{_row(rows[-1], table.left)}</tfoot>" if table.sums else ""
    cells = "".join(_cell("th", text, i, table.left) for i, text in enumerate(head))
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_text(title)}"><table>'
        f"<thead><tr>{cells}</tr></thead><tbody>{body}</tbody>{foot}</table></div>"
    )


def _row(row: Sequence[str], left: int) -> str:
    first, *others = row
    cells = "".join(_cell("td", text, i, left) for i, text in enumerate(others, 1))
    return f'<tr><th scope="row">{_text(first)}</th>{cells}</tr>'


def _cell(tag: str, text: str, index: int, left: int) -> str:
    side = ' class="left"' if index < left else ""
    return f"<{tag}{side}>{_text(text)}</{tag}>"


def _picture(picture: Picture, drawn: Drawn) -> str:
    return (
        f"<figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data(drawn.dark)}">'
        f'<img alt="{_text(picture.title)}" src="{_data(drawn.bright)}"></picture>'
        f"<figcaption><strong>{_text(picture.title)}.</strong> {_text(picture.about)}"
        f"</figcaption></figure>"
    )


def _data(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
