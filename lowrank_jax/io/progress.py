"""Progress of long work: a bar on a screen, lines of the log elsewhere, with the time left.

The level of the logger "lowrank_jax" says how much is seen. At ``logging.ERROR`` all is silent:
``logging.getLogger("lowrank_jax").setLevel("ERROR")``. At ``logging.INFO`` there are lines where
there is no screen. Commands use ``logging.INFO``, and with ``--quiet`` they use ``logging.ERROR``.
"""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

LOG = logging.getLogger("lowrank_jax")
EVERY = 10.0  # seconds between two lines
DELAY = 1.0  # seconds of work that show no bar, which would stay in the outputs of a notebook
Item = TypeVar("Item")


class Progress:
    """Counts the steps of one piece of work.

    Args:
        what: name of the work.
        total: steps of the whole; None where they are not known.
        done: steps that were done before.

    Example:
        >>> with Progress("adding", total=3) as progress:
        ...     sum(progress.over([1, 2, 3]))
        6
    """

    def __init__(self, what: str, total: int | None = None, done: int = 0) -> None:
        options = dict(initial=done, leave=False, delay=DELAY, disable=not on_screen())
        self._bar = tqdm(desc=what, total=total, **options)
        self._what, self._total, self._start, self._done = what, total, done, done
        self._begin = self._said = time.monotonic()
        self._note, self._first = "", 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; each counts as a step when the next one is asked for."""
        for item in items:
            yield item
            self.update()

    def update(self) -> None:
        """Counts a step."""
        self._done += 1
        self._bar.update()
        now = time.monotonic()
        if self._done == self._start + 1:
            self._first = now - self._begin
        if self._bar.disable and now - self._said >= EVERY:
            self._said = now
            LOG.info("%s: %s", self._what, self.line(now - self._begin))

    def extend(self, steps: int) -> None:
        """Adds steps to the whole."""
        self._total = self._bar.total = (self._total or 0) + steps

    def note(self, text: str) -> None:
        """Says something at the end of the bar, and of the next lines."""
        self._note = text
        shown = time.monotonic() - self._begin >= DELAY
        self._bar.set_postfix_str(text, refresh=shown)

    def line(self, seconds: float) -> str:
        """How far the work is after so many seconds, and how long the rest takes.

        The first step does not count for the rate, because programs are compiled in it.

        Example:
            >>> progress = Progress("adding", total=8)
            >>> progress.update(), progress.update(), progress.line(20.0)
            (None, None, '2 of 8 in 00:20, about 02:00 left')
        """
        later, total = self._done - self._start - 1, self._total
        parts = [f"{self._done}{f' of {total}' if total else ''} in {_time(seconds)}"]
        if total and later > 0:
            rate = (seconds - self._first) / later
            parts.append(f"about {_time(round(rate * (total - self._done)))} left")
        return ", ".join(parts + [self._note] * bool(self._note))


def on_screen() -> bool:
    """Whether a bar is seen: on a terminal and in a notebook, unless all is silent."""
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    return watched and LOG.isEnabledFor(logging.WARNING)


def _time(seconds: float) -> str:
    return tqdm.format_interval(seconds)
