"""Nodes that meet over sockets of this machine: who is let in, who is missed, and what strangers can do."""

from __future__ import annotations

import pickle
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path

import pytest

from shoestring.cluster.node import rendezvous
from shoestring.cluster.node.rendezvous import KEY, Followers, Leader, Lost, take_key

SECRET = b"of this job"


def never() -> bool:
    return False


def after(seconds: float):
    """A `stop` that comes true."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as threads:
        yield threads


def join(pool, port: int, node: int, key: bytes = SECRET, stop=None):
    return pool.submit(Leader, key, "127.0.0.1", port, node, f"n{node}", stop or after(30))


def meet(pool, port: int, count: int):
    """Node 0 and the others, who have met."""
    first = Followers(SECRET, count, port)
    coming = [join(pool, port, node) for node in range(1, count + 1)]
    assert first.wait(3, 20, never)
    return first, [each.result(10) for each in coming]


def until(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def names_after(first: Followers, state: str) -> list[str]:
    first.listen()
    return first.names(state)


def test_all_get_the_attempt_and_the_decision(pool, port: int) -> None:
    first, others = meet(pool, port, 3)
    with closing(first):
        assert first.names() == ["n1", "n2", "n3"] and first.address == "127.0.0.1"
        assert {(other.attempt, other.address, other.decision()) for other in others} == {(3, "127.0.0.1", None)}
        others[0].send(well=True)
        others[1].send(well=False)
        until(lambda: names_after(first, "well") == ["n1"] and names_after(first, "failed") == ["n2"])
        assert first.names("running") == ["n3"]
        deciding = pool.submit(first.decide, 85)
        for other in others:
            until(lambda other=other: other.decision() == 85)
            other.close()
        deciding.result(2)  # it goes as soon as all have gone


def test_a_node_that_goes_is_lost_unless_its_tasks_have_ended(pool, port: int) -> None:
    first, (one, two) = meet(pool, port, 2)
    with closing(first):
        one.send(well=True)
        until(lambda: names_after(first, "well") == ["n1"])
        one.close()
        two.close()
        until(lambda: names_after(first, "lost") == ["n2"])
        assert first.names("well") == ["n1"] and not first.names("running")


def test_node_0_that_goes_is_noticed(pool, port: int) -> None:
    first, (other,) = meet(pool, port, 1)
    first.close()
    with pytest.raises(Lost, match="closed"), closing(other):
        until(lambda: other.decision() is not None)


def test_who_comes_early_waits_for_node_0(pool, port: int) -> None:
    coming = join(pool, port, 1)
    time.sleep(0.3)
    with closing(Followers(SECRET, 1, port)) as first:
        assert first.wait(0, 20, never)
        coming.result(10).close()


def test_who_does_not_come_is_not_waited_for_too_long(pool, port: int) -> None:
    with closing(Followers(SECRET, 2, port)) as first:
        coming = join(pool, port, 1, stop=after(1.0))
        assert not first.wait(0, 20, after(1.5))
        with pytest.raises(Lost, match="not all nodes have joined"):
            coming.result(10)
        assert not first.wait(0, 0.1, never)


def test_a_node_that_comes_back_takes_its_own_place(pool, port: int) -> None:
    with closing(Followers(SECRET, 2, port)) as first:
        waiting = pool.submit(first.wait, 0, 20, never)
        with Client(("127.0.0.1", port), authkey=SECRET) as gone:
            gone.send_bytes(b'{"node": 1, "name": "n1"}')
            until(lambda: first.names() == ["n1"])
        coming = [join(pool, port, 2), join(pool, port, 1)]
        assert waiting.result(20)
        for each in coming:
            each.result(10).close()


def test_another_jobs_node_gets_the_reason(pool, port: int) -> None:
    with closing(Followers(SECRET, 1, port)) as first:
        stranger = join(pool, port, 1, key=b"of another job", stop=after(1.0))
        assert not first.wait(0, 2.5, never) and not first.names()
        with pytest.raises(Lost, match=f"127.0.0.1:{port}: it has another job's key"):
            stranger.result(20)


@pytest.mark.parametrize("says", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x00\x00\x00\x14half a frame", b"\xff" * 64])
@pytest.mark.parametrize("stays", [True, False])
def test_strangers_delay_the_rendezvous_and_do_no_more(pool, port: int, says: bytes, stays: bool) -> None:
    with closing(Followers(SECRET, 1, port)) as first:
        stranger = socket.create_connection(("127.0.0.1", port))
        if not stays:  # and the connection is reset, not closed
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stranger.sendall(says)
        if not stays:
            stranger.close()
        coming = join(pool, port, 1)
        began = time.monotonic()
        assert first.wait(0, 20, never) and first.names() == ["n1"]
        assert time.monotonic() - began < 8
        coming.result(10).close()
        stranger.close()


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_nobody_unpickles_what_a_node_says(pool, port: int, tmp_path: Path) -> None:
    """Not even of one that has the key; what is no message is a lost node."""
    mark = tmp_path / "exploded"
    with closing(Followers(SECRET, 1, port)) as first:
        waiting = pool.submit(first.wait, 0, 20, never)
        with Client(("127.0.0.1", port), authkey=SECRET) as other:
            other.send_bytes(b'{"node": 1, "name": "n1"}')
            assert waiting.result(20)
            other.send(Bomb(mark))
            until(lambda: names_after(first, "lost") == ["n1"])
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()


def test_both_ends_prove_that_they_have_the_key(pool, port: int) -> None:
    """A node 0 that lets everybody in is not believed; `Client` is the standard library's own."""
    with closing(Followers(SECRET, 1, port)) as first:
        waiting = pool.submit(first.wait, 0, 3, never)
        with pytest.raises(AuthenticationError):
            Client(("127.0.0.1", port), authkey=b"guessed")
        assert not waiting.result(10)
    with socket.create_server(("127.0.0.1", port)) as impostor:
        coming = join(pool, port, 1, stop=after(0.5))
        end, _ = impostor.accept()
        end.sendall(b"\x00\x00\x00\x10" + b'{"attempt": 0}  ')
        with pytest.raises(Lost, match="no attempt began"):
            coming.result(20)
        end.close()


def test_the_key_is_the_launchers_or_else_the_jobs_id() -> None:
    environ = {KEY: "s3cret", "PATH": "/bin"}
    assert take_key("digits-0a1b2c", environ) == b"s3cret" and environ == {"PATH": "/bin"}
    assert take_key("digits-0a1b2c", environ) == b"digits-0a1b2c"
    assert rendezvous.GATHER > 60
