"""Signals that end a run: they wait for the end of a step, so that it is saved."""

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

LOG = logging.getLogger("lowrank_jax")
TERMINATED = 128 + signal.SIGTERM  # exit status of a run that SIGTERM ended: 143


class Signals:
    """Within it, SIGTERM and Ctrl-C are only noted; a second signal acts at once.

    Outside the main thread, where Python handles no signals, nothing is noted.

    Attributes:
        given: the first signal; None before one comes.

    Example:
        >>> import os
        >>> with Signals() as signals:
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     signals.given.name
        'SIGTERM'
    """

    def __init__(self) -> None:
        self.given: signal.Signals | None = None
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for one in (signal.SIGTERM, signal.SIGINT):
                self._old[one] = signal.signal(one, self._note)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.given = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for one, handler in self._old.items():
            signal.signal(one, handler)

    def stop(self, message: str) -> None:
        """Ends the process as the signal asks, with status 143 after SIGTERM.

        Raises:
            SystemExit: after SIGTERM.
            KeyboardInterrupt: after Ctrl-C.
        """
        if self.given == signal.SIGTERM:
            LOG.warning("Stopped by SIGTERM: %s.", message)
            raise SystemExit(TERMINATED)
        raise KeyboardInterrupt(message)
