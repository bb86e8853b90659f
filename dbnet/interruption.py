"""Signals that end a run: taken note of, so that the optimizer step is finished and the run saved first."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

_ECHO_SECONDS = 1.0  # torchrun passes on the Ctrl-C that its processes get from the terminal as well


class Interrupted(SystemExit):
    """The end that a signal asked for, with its customary exit status: 130 for SIGINT, 143 for SIGTERM."""


class Interruption:
    """While its block runs, SIGINT (Ctrl-C) and SIGTERM only set `signal`; a second SIGINT stops at once.

    Data workers that are forked meanwhile let both pass: they end with the process that they work for.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._at_once = False
        self._noted = 0.0

    def __enter__(self) -> Self:
        self._process = os.getpid()
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop(self) -> None:
        """End the process as the signal asked for."""
        raise Interrupted(128 + self.signal)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Work that leaves nothing half done when it is cut short: a signal ends it without waiting for its end."""
        self._at_once = True
        try:
            if self.signal:
                self.stop()
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        echo = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._noted < _ECHO_SECONDS
        if self.signal and number == signal.SIGINT and not echo:
            raise KeyboardInterrupt
        self.signal, self._noted = self.signal or number, time.monotonic()
        if self._at_once:
            self.stop()


def let_workers_die_quietly() -> None:
    """Undo what a DataLoader sets up when it starts: that the death of a worker raises an error in whatever the main
    thread is doing. Without it the loader sees the death as well, where it waits for the next batch."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
