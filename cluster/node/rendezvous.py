"""How the nodes of an attempt stay in touch: each keeps a connection to node 0, and says a JSON line now and then.

Only for nodes that nobody else holds together (run.py). A connection that breaks means that the other end is lost:
keepalives find out within half a minute where a machine dies without a word.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

GATHER = 1800.0  # seconds for all nodes to come: images are pulled, machines are started
RETRY = 1.0
DECISION_SECONDS = 5.0  # for a last line to reach everybody


class Lost(Exception):
    """The other end is gone."""


class Line:
    """One connection, read without waiting."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        connection.setblocking(False)
        self.connection, self.rest = connection, b""

    def send(self, **said: Any) -> None:
        try:
            self.connection.sendall(json.dumps(said).encode() + b"\n")
        except OSError as error:
            raise Lost(str(error)) from None

    def receive(self) -> dict[str, Any] | None:
        """What the other end has said, a line at a time; None: nothing yet. `Lost` if it is gone."""
        with suppress(BlockingIOError):
            try:
                read = self.connection.recv(4096)
            except BlockingIOError:
                raise
            except OSError as error:
                raise Lost(str(error)) from None
            if not read and b"\n" not in self.rest:
                raise Lost("the connection was closed")
            self.rest += read
        line, found, rest = self.rest.partition(b"\n")
        if not found:
            if len(line) > 4096:
                raise Lost("it does not say what a node says")
            return None
        self.rest = rest
        try:
            said: dict[str, Any] = json.loads(line)
        except ValueError:
            raise Lost("it does not say what a node says") from None
        return said

    def wait(self, seconds: float, stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not stop():
            said = self.receive()
            if said is not None:
                return said
            time.sleep(0.05)
        raise Lost(f"nothing was said within {seconds:.0f} s")

    def close(self) -> None:
        self.connection.close()


class Followers:
    """Node 0's side. `lost`: names of nodes that are gone; `failed`: of those whose tasks have failed."""

    def __init__(self, job: str, count: int, port: int) -> None:
        self.job, self.count = job, count
        self.lines: dict[int, Line] = {}
        self._names: dict[int, str] = {}
        self._done: set[int] = set()
        self.lost: set[str] = set()
        self.failed: set[str] = set()
        self.server = socket.create_server(("", port), backlog=max(count, 1)) if count else None

    @property
    def names(self) -> list[str]:
        return [self._names[node] for node in sorted(self._names)]

    @property
    def address(self) -> str:
        """Where the others have found this node."""
        for line in self.lines.values():
            return str(line.connection.getsockname()[0])
        return "127.0.0.1"

    def wait(self, attempt: int, seconds: float, stop: Callable[[], bool]) -> bool:
        """Until everybody is here, who then are told which attempt this is. False: not all came, or `stop` said so."""
        until = time.monotonic() + min(GATHER, seconds)
        while len(self.lines) < self.count and time.monotonic() < until and not stop():
            self._accept()
        if len(self.lines) < self.count:
            return False
        for line in self.lines.values():
            with suppress(Lost):  # `listen` will say so
                line.send(attempt=attempt)
        return True

    def _accept(self) -> None:
        assert self.server is not None
        self.server.settimeout(RETRY)
        with suppress(TimeoutError):
            line = Line(self.server.accept()[0])
            try:
                said = line.wait(RETRY)
                if said.get("job") != self.job or not 1 <= int(said["node"]) <= self.count:
                    raise Lost("it is of another job")
            except (Lost, KeyError, ValueError, TypeError, AttributeError):
                line.close()
                return
            if int(said["node"]) in self.lines:
                self.lines[int(said["node"])].close()  # it has come back
            self.lines[int(said["node"])] = line
            self._names[int(said["node"])] = str(said["name"])

    def listen(self) -> None:
        """Hear how the others are."""
        for node, line in self.lines.items():
            if self._names[node] in self.lost:
                continue
            try:
                said = line.receive()
            except Lost:
                if node not in self._done:
                    self.lost.add(self._names[node])
                continue
            if said is not None:
                self._done.add(node)
                if not said.get("well"):
                    self.failed.add(self._names[node])

    def busy(self) -> bool:
        """Whether somebody's tasks still run."""
        return any(node not in self._done and self._names[node] not in self.lost for node in self.lines)

    def decide(self, code: int) -> None:
        """Tell everybody the code to exit with, and see them go."""
        for line in self.lines.values():
            with suppress(Lost):
                line.send(exit=code)
        until = time.monotonic() + DECISION_SECONDS
        for line in self.lines.values():
            with suppress(Lost):
                while time.monotonic() < until:
                    line.receive()
                    time.sleep(0.02)

    def __enter__(self) -> Followers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for line in self.lines.values():
            line.close()
        if self.server is not None:
            self.server.close()


class Leader:
    """Another node's side: a connection to node 0, made as soon as node 0 is there. `Lost` if it does not come."""

    def __init__(self, job: str, host: str, port: int, node: int, name: str, stop: Callable[[], bool]) -> None:
        until = time.monotonic() + GATHER
        while True:
            try:
                self.line = Line(socket.create_connection((host, port), timeout=10))
                self.line.send(job=job, node=node, name=name)
                self.attempt = int(self.line.wait(max(RETRY, until - time.monotonic()), stop)["attempt"])
                break
            except KeyError:
                raise Lost("node 0 has ended the attempt before it began") from None
            except (OSError, Lost) as error:
                if stop() or time.monotonic() > until:
                    raise Lost(f"node 0 is not to be found at {host}:{port}: {error}") from None
                time.sleep(RETRY)
        self.address = str(self.line.connection.getpeername()[0])

    def send(self, *, well: bool) -> None:
        self.line.send(well=well)

    def decision(self) -> int | None:
        """The code to exit with, once node 0 has decided."""
        said = self.line.receive()
        return None if said is None else int(said["exit"])

    def __enter__(self) -> Leader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.line.close()
