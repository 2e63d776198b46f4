"""Requests to stop: a scheduler's warning, its end, Ctrl-C.

    first line of the process ── imports, plan, process group ──┐  a signal ends the process at once, with 85
    on_fit_start: all ranks are connected ── training ──────────┤  a sticky flag, on which the ranks agree at a step
    the run is closed ── report, export ────────────────────────┘  at once again

Nothing is lost where it ends at once: the next start begins at the same place. A thread does it, because Python's own
handlers wait until the main thread has come back from C++, and a rank that waits for others to connect does not come
back for half an hour.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from ...exits import AGAIN, FINISHED

# a scheduler's warning, its end, and Ctrl-C (a second Ctrl-C interrupts at once)
ASKS_TO_STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXITING = 0.5  # seconds that Python has for its own end when all is closed
_LAUNCHER = "SHOESTRING_LAUNCHER"  # process id of the rank that launches the others


class Preempted(SystemExit):
    """The run was asked to stop and goes on when the same command is given again. Exits with 85: all is saved."""

    def __init__(self, code: int = AGAIN) -> None:
        super().__init__(code)


def preempted(code: int = AGAIN) -> Preempted:
    """Return how this rank ends a run that goes on later."""
    # the launcher kills rank 0 when a rank that it started returns anything but 0
    return Preempted(FINISHED) if launched_here() else Preempted(code)


def will_launch() -> None:
    """Mark this process as the one that launches the other ranks, unless it has been launched itself."""
    if "LOCAL_RANK" not in os.environ:
        os.environ[_LAUNCHER] = str(os.getpid())


def started_here() -> bool:
    """Whether rank 0 starts, or has started, the other ranks: true on all of them."""
    return _LAUNCHER in os.environ


def launched_here() -> bool:
    """Whether rank 0 of this run has started this process; else torchrun, Slurm or the user has.

    A process that has trained may start another run, which inherits its mark: only ranks that were launched have a
    LOCAL_RANK other than 0.
    """
    return os.environ.get(_LAUNCHER) == str(os.getppid()) and os.environ.get("LOCAL_RANK", "0") != "0"


def leave_at_once(name: str, code: int = AGAIN) -> None:
    """End this process where nothing is to be saved, and with it all ranks."""
    if launched_here():
        with suppress(ProcessLookupError):
            os.kill(os.getppid(), signal.SIGTERM)  # whose end is the end of all that it has started
        os._exit(FINISHED)
    if int(os.environ.get("RANK", 0)) == 0:
        say = f"stopped by {name} while nothing was to be saved: the same command begins again where this one began\n"
        with suppress(OSError):
            os.write(2, say.encode())
    os._exit(code)


class _Listener:
    """Python's handlers and the thread beside them, for the whole process; `requests` are those of fits under way."""

    def __init__(self) -> None:
        self.requests: list[StopRequest] = []
        self.leave: Callable[[str], None] | None = None  # ends the process, where no fit is under way
        self._before: dict[int, Any] = {}
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._wakeup = -1

    def open(self) -> None:
        """Take the handlers over, where Python allows it: in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in ASKS_TO_STOP:
            if signal.getsignal(number) != self._handle:
                self._before.setdefault(number, signal.signal(number, self._handle))
        if self.leave is not None and self._ends is None:
            self._ends = socket.socketpair()
            self._ends[1].setblocking(False)
            self._wakeup = signal.set_wakeup_fd(self._ends[1].fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(self._ends[0],), name="shoestring-signals", daemon=True).start()

    def close(self) -> None:
        """Give the handlers back, unless somebody still needs them."""
        if self.requests or self.leave is not None or threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}
        if self._ends is not None:
            signal.set_wakeup_fd(self._wakeup)
            for end in self._ends:
                end.close()
            self._ends = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requests:
            for request in self.requests:
                request.receive(number)
        elif self.leave is not None:
            self.leave(signal.Signals(number).name)

    def _watch(self, heard: socket.socket) -> None:
        with suppress(OSError):  # closed
            while number := heard.recv(1):
                if number[0] in ASKS_TO_STOP and not self.requests and self.leave is not None:
                    self.leave(signal.Signals(number[0]).name)

    def in_child(self) -> None:
        """A forked process, a loader's worker say, ends by SIGTERM alone; what is asked of its parent is no matter."""
        if not self._before:
            return
        if self._ends is not None:
            signal.set_wakeup_fd(-1)
        for number in ASKS_TO_STOP:
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
        self.requests, self.leave, self._before, self._ends = [], None, {}, None


_listener = _Listener()
os.register_at_fork(after_in_child=_listener.in_child)


@contextmanager
def listening(leave: Callable[[str], None] = leave_at_once, again: int = AGAIN) -> Iterator[None]:
    """Around all that a process does: before and after a fit, a signal calls `leave`, which ends the process.

    It may be called by a thread. Where a fit has already ended by a signal, later ones change nothing, and the process
    is gone soon, whatever other packages do as Python exits. `again`: its exit code instead of 85.
    """
    before = _listener.leave
    _listener.leave = leave
    _listener.open()
    try:
        yield
    except Preempted as stopped:
        ignore()
        code = again if stopped.code == AGAIN else int(str(stopped.code))
        late = threading.Timer(EXITING, lambda: os._exit(code))
        late.daemon = True
        late.start()
        raise
    finally:
        _listener.leave = before
        _listener.close()


def ignore() -> None:
    """From here on this process ends as it was going to."""
    if threading.current_thread() is threading.main_thread():
        for number in ASKS_TO_STOP:
            signal.signal(number, signal.SIG_IGN)
    _listener._before = {}
    sys.stdout.flush()


class StopRequest:
    """What a fit has been asked. `received` is the first signal's name, or None."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._interrupts = 0

    def listen(self) -> None:
        """From now on a signal is a request, to be met when all ranks can."""
        if self not in _listener.requests:
            _listener.requests.append(self)
        _listener.open()

    def receive(self, number: int) -> None:
        self.received = self.received or signal.Signals(number).name
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt

    def release(self) -> None:
        """A signal ends the process at once again, or does what it did before the fit."""
        if self in _listener.requests:
            _listener.requests.remove(self)
        _listener.close()
