"""How the nodes of an attempt stay in touch: each keeps a connection to node 0, and sends a message now and then.

Only for nodes that nobody else holds together (run.py). Messages are JSON in frames of `multiprocessing.connection`,
whose pickles nobody here reads, and nobody is heard who does not have the job's key. A connection that breaks means
that the other end is lost: keepalives find out within half a minute where a machine dies without a word.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any, Literal

KEY = "SHOESTRING_JOB_KEY"  # variable with the secret of the job's nodes
GATHER = 1800.0  # seconds for all nodes to come: images are pulled, machines are started
RETRY = 1.0  # also how long a stranger can keep node 0 waiting
CONNECT = 5.0
DECISION_SECONDS = 5.0  # for a last message to reach everybody
LONGEST = 4096  # bytes of a message
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


class Lost(Exception):
    """The other end is gone."""


@contextmanager
def _or_lost() -> Iterator[None]:
    try:
        yield
    except EOFError:
        raise Lost("the connection was closed") from None
    except AuthenticationError:
        raise Lost("it has another job's key") from None
    except (OSError, ValueError, AssertionError) as error:
        raise Lost(str(error) or "it does not answer like a node") from None


def take_key(job: str, environ: MutableMapping[str, str] = os.environ) -> bytes:
    """The secret that the launching machine gave this job's nodes; what they start does not find it any more.

    Without one, under an engine that gives none, it is the job's id: that keeps jobs apart, but no attacker away.
    """
    return (environ.pop(KEY, "") or job).encode()


class Peer:
    """Another node of the job, at the other end of a connection. No call waits long: `patience` for each read."""

    def __init__(self, end: socket.socket, patience: float, key: bytes, *, challenge_first: bool) -> None:
        seconds = struct.pack("ll", int(patience), 0)
        with _or_lost(), end:
            end.setblocking(True)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
            for option, value in KEEPALIVE.items():
                if hasattr(socket, option):
                    end.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            self.here, self.there = (str(name[0]) for name in (end.getsockname(), end.getpeername()))
            # as Listener and Client do it, but those would wait for ever for who connects and says nothing
            self.connection = Connection(end.detach())
            for prove in (deliver_challenge, answer_challenge)[:: 1 if challenge_first else -1]:
                prove(self.connection, key)

    def send(self, **message: Any) -> None:
        with _or_lost():
            self.connection.send_bytes(json.dumps(message).encode())

    def receive(self, seconds: float = 0.0) -> dict[str, Any] | None:
        """The next message, waited for so long; None: nothing yet. `Lost` if the other end is gone."""
        with _or_lost():
            if not self.connection.poll(seconds):
                return None
            message: dict[str, Any] = json.loads(self.connection.recv_bytes(LONGEST))
            return message


@dataclass
class Follower:
    """A node that has come, as node 0 knows it."""

    name: str
    peer: Peer
    state: Literal["running", "well", "failed", "lost"] = "running"


class Followers:
    """Node 0's side: the other nodes by number."""

    def __init__(self, key: bytes, count: int, port: int) -> None:
        self.key, self.count = key, count
        self.members: dict[int, Follower] = {}
        self.server = socket.create_server(("", port), backlog=max(count, 1)) if count else None

    def names(self, state: str | None = None) -> list[str]:
        """Return the names of the nodes in this state, or of all; in the order of their numbers."""
        return [member.name for _, member in sorted(self.members.items()) if state in (None, member.state)]

    @property
    def address(self) -> str:
        """The address at which the others reach this node."""
        return next((member.peer.here for member in self.members.values()), "127.0.0.1")

    def wait(self, attempt: int, seconds: float, stop: Callable[[], bool]) -> bool:
        """Until everybody is here, who then are told which attempt this is. False: not all came, or `stop` said so."""
        until = time.monotonic() + min(GATHER, seconds)
        while len(self.members) < self.count and time.monotonic() < until and not stop():
            self._accept()
            self.listen()
            # who has gone by now is started again, and waited for again
            self.members = {node: member for node, member in self.members.items() if member.state != "lost"}
        if len(self.members) < self.count:
            return False
        self._broadcast(attempt=attempt)
        return True

    def _accept(self) -> None:
        assert self.server is not None
        self.server.settimeout(RETRY)
        with suppress(OSError, Lost):  # nobody, or a stranger
            peer = Peer(self.server.accept()[0], RETRY, self.key, challenge_first=True)
            message = peer.receive(RETRY)
            if message is not None and 1 <= message["node"] <= self.count:
                self.members[message["node"]] = Follower(message["name"], peer)

    def _broadcast(self, **message: Any) -> None:
        for member in self.members.values():
            with suppress(Lost):  # `listen` will say so
                member.peer.send(**message)

    def listen(self) -> None:
        """Receive the states of the others."""
        for member in self.members.values():
            if member.state == "running":
                try:
                    message = member.peer.receive()
                except Lost:
                    member.state = "lost"
                else:
                    if message is not None:
                        member.state = "well" if message["well"] else "failed"

    def decide(self, code: int) -> None:
        """Tell everybody the code to exit with, and see them go."""
        self._broadcast(exit=code)
        until = time.monotonic() + DECISION_SECONDS
        for member in self.members.values():
            with suppress(Lost):
                while time.monotonic() < until:
                    member.peer.receive(0.02)

    def close(self) -> None:
        for member in self.members.values():
            member.peer.connection.close()
        if self.server is not None:
            self.server.close()


class Leader:
    """Another node's side: a connection to node 0, made as soon as node 0 is there. `Lost` if it does not come."""

    def __init__(self, key: bytes, host: str, port: int, node: int, name: str, stop: Callable[[], bool]) -> None:
        until, message = time.monotonic() + GATHER, None
        while message is None:
            try:
                self.peer = Peer(socket.create_connection((host, port), CONNECT), CONNECT, key, challenge_first=False)
                self.peer.send(node=node, name=name)
                while message is None:
                    if stop() or time.monotonic() > until:
                        raise Lost("not all nodes have joined")
                    message = self.peer.receive(0.05)
            except (OSError, Lost) as error:
                if stop() or time.monotonic() > until:
                    raise Lost(f"no attempt began with node 0 at {host}:{port}: {error}") from None
                time.sleep(RETRY)
        if "attempt" not in message:
            raise Lost("node 0 has ended the attempt before it began")
        self.attempt, self.address = int(message["attempt"]), self.peer.there

    def send(self, *, well: bool) -> None:
        self.peer.send(well=well)

    def decision(self) -> int | None:
        """The code to exit with, once node 0 has decided."""
        message = self.peer.receive()
        return None if message is None else int(message["exit"])

    def close(self) -> None:
        self.peer.connection.close()
