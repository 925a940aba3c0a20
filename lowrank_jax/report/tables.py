"""Tables and numbers as text."""

from collections.abc import Sequence

from lowrank_jax.report.record import Table

Pair = tuple[float, float]


def markdown_table(table: Table) -> str:
    """A table as Markdown, readable on a terminal too.

    Example:
        >>> print(markdown_table(Table(rows=[("layer", "rank"), ("stem", "10")])))
        | layer | rank |
        | ----- | ---: |
        | stem  |   10 |
    """
    widths = [max(map(len, column)) for column in zip(*table.rows, strict=True)]
    sides = [str.ljust if index < table.left else str.rjust for index in range(len(widths))]
    rules = [
        "-" * width if index < table.left else "-" * (width - 1) + ":"
        for index, width in enumerate(widths)
    ]
    head, *others = [_line(row, widths, sides) for row in table.rows]
    return "\n".join([head, f"| {' | '.join(rules)} |", *others])


def _line(row: Sequence[str], widths: Sequence[int], sides: Sequence) -> str:
    cells = [side(text, width) for side, text, width in zip(sides, row, widths, strict=True)]
    return f"| {' | '.join(cells)} |"


def as_costs(pair: Pair) -> tuple[str, str, str]:
    """Dense, low-rank and their ratio, as the columns of a table.

    Example:
        >>> as_costs((1200, 300))
        ('1,200', '300', '4.00')
    """
    return f"{pair[0]:,}", f"{pair[1]:,}", f"{pair[0] / pair[1]:.2f}"


def share(pair: Pair) -> str:
    """What is left of a cost.

    Example:
        >>> share((1200, 300)), share((0, 0))
        ('25 %', '100 %')
    """
    return f"{100 * (pair[1] / pair[0] if pair[0] else 1):.3g} %"


def percent(part: float) -> str:
    """A share of images.

    Example:
        >>> percent(0.9174)
        '91.7 %'
    """
    return f"{100 * part:.1f} %"


def count(number: float) -> str:
    """A large number in three digits and a word.

    Example:
        >>> count(40_551_424), count(270_896), count(64), count(999_960)
        ('40.6 million', '271 thousand', '64', '1 million')
    """
    for word, unit in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if number >= 0.9995 * unit:
            return f"{number / unit:.3g} {word}"
    return f"{number:.3g}"


def seconds(time: float) -> str:
    """A time in its usual unit.

    Example:
        >>> seconds(0.000123), seconds(0.0456), seconds(3.21)
        ('123 µs', '45.6 ms', '3.21 s')
    """
    for unit, size in (("s", 1), ("ms", 1e-3)):
        if time >= size:
            return f"{time / size:.3g} {unit}"
    return f"{time / 1e-6:.3g} µs"
