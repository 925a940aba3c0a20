"""A report as data, from which the page, the Markdown and the JSON are written."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Json = str | int | float | bool | None | Sequence["Json"] | Mapping[str, "Json"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text; the first one is the head.

    Attributes:
        rows: all of one length.
        left: columns that are aligned to the left; numbers stand to the right.
        sums: whether the last row is the sum of those above.
    """

    rows: Sequence[Sequence[str]]
    left: int = 1
    sums: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of matplotlib, drawn for paper, for bright and for dark screens.

    Attributes:
        name: of its file, without the end.
        title: what it shows, in a few words.
        about: the sentences under it, which say how to read it.
        draw: makes the figure; called where `lowrank_jax.report.drawing.STYLE` holds.
    """

    name: str
    title: str
    about: str
    draw: Callable[[], "Figure"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a report under one title, in the order of its attributes.

    Attributes:
        title: in a few words.
        text: paragraphs, with an empty line between two.
        table: its numbers.
        code: commands or Python, to be copied.
        pictures: side by side where there is room.
    """

    title: str
    text: str = ""
    table: Table | None = None
    code: str = ""
    pictures: Sequence[Picture] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Highlight:
    """A figure that is shown large.

    Attributes:
        label: what it is.
        value: the figure with its unit.
        note: what it is to be held against.
    """

    label: str
    value: str
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a command was asked and what it reached.

    Attributes:
        title: the command.
        subject: the network that it worked on; empty where it is told by the summary.
        summary: one or two sentences: what was asked and what was reached.
        highlights: the figures of these sentences.
        sections: from the result to what comes next.
        facts: the same figures as plain data, for the JSON.
        machine: the device and the versions that the figures depend on.

    Example:
        >>> Report(title="lowrank-jax plan", summary="Half of the macs.", machine="cpu").sections
        ()
    """

    title: str
    summary: str
    machine: str
    subject: str = ""
    highlights: Sequence[Highlight] = ()
    sections: Sequence[Section] = ()
    facts: Mapping[str, Json] = dataclasses.field(default_factory=dict)

    @property
    def pictures(self) -> list[Picture]:
        """The pictures of all sections, in their order."""
        return [picture for section in self.sections for picture in section.pictures]
