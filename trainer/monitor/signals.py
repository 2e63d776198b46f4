"""Signals become a sticky flag; the ranks agree on it at a step boundary (see callbacks/accounting/agreement.py)."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from ...exits import AGAIN, FINISHED

# a scheduler's warning, its end, and Ctrl-C (a second Ctrl-C interrupts at once)
ASKS_TO_STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_LAUNCHER = "SHOESTRING_LAUNCHER"  # process id of the rank that launches the others


class Preempted(SystemExit):
    """The run was asked to stop, has saved, and goes on when the same command is given again. Exits with 85."""

    def __init__(self, code: int = AGAIN) -> None:
        super().__init__(code)


def preempted() -> Preempted:
    """Return how this rank ends a run that goes on later."""
    # the launcher kills rank 0 when a rank that it started returns anything but 0
    return Preempted(FINISHED) if launched_here() else Preempted()


def will_launch() -> None:
    """Mark this process as the one that launches the other ranks, unless it has been launched itself."""
    if "LOCAL_RANK" not in os.environ:
        os.environ[_LAUNCHER] = str(os.getpid())


def launched_here() -> bool:
    """Whether rank 0 of this run has started this process; else torchrun, Slurm or the user has."""
    return os.environ.get(_LAUNCHER) == str(os.getppid())


_EARLY: list[str] = []  # what came before any fit listened


def listen_early() -> None:
    """Keep signals for the fit that is to come, while the process still imports and prepares."""
    for number in ASKS_TO_STOP:
        signal.signal(number, lambda number, frame: _EARLY.append(signal.Signals(number).name))


class StopRequest:
    """Listens for signals. `received` is the first one's name, or None."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Take over the handlers; again after Lightning has put in its own, which communicate inside the handler."""
        if threading.current_thread() is not threading.main_thread():
            return
        if _EARLY:
            self.received = self.received or _EARLY[0]
        for number in ASKS_TO_STOP:
            current = signal.getsignal(number)
            if current != self._handle:
                self._before.setdefault(number, current)
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name

    def release(self) -> None:
        """Give the handlers back."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}
