"""The tasks of one node: started by a script of the job, signalled once to save, and ended together.

    python -m shoestring.cluster.node.heartbeat --node-rank 1 --tasks 2 --lead 90 --master 10.0.0.1 -- COMMAND…

Standard input carries the heartbeat. Whoever started the node writes a word in a line every second: `on` while all is
well, `USR1` or `TERM` when the tasks are to save and end, `KILL` when they are to end at once. If the input ends, or is
silent for `SILENCE` seconds, then the one who started the node or the network between them is gone: the tasks save
and end. So nothing has to be left on a machine to look after them, and nothing stays behind there.

COMMAND is torchrun with everything it needs. It dies of signals that come before its tasks are started, and its tasks
die of those that come before they listen; both would look like a failure. So the tasks get one signal, from here, when
every one of them has said that it listens.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from ...exits import AGAIN, FINISHED, KILLED, die_with_parent
from . import ranks

SILENCE = 30.0  # seconds of silence after which the heartbeat counts as lost
POLL = 0.2
AFTERWARDS = 15.0  # seconds for tasks that have saved, and for torchrun, to come to their ends
CONSEQUENCE = 5.0  # tasks that fail within so many seconds of a killed one have failed because of it
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class Heartbeat:
    """The heartbeat of the process that started this one, and its requests: `stop` (save and end) and `kill`."""

    def __init__(self, source: int = 0) -> None:
        self.source: int | None = source
        self.stop = self.kill = False
        self.last_beat = time.monotonic()
        for number in STOP_SIGNALS:
            signal.signal(number, self._signalled)

    def _signalled(self, number: int, frame: object) -> None:
        self.stop = True

    def listen(self, seconds: float) -> None:
        """Take in what comes within `seconds`."""
        if self.source is None:
            time.sleep(seconds)
            return
        if select.select([self.source], [], [], seconds)[0]:
            words = os.read(self.source, 4096)
            self.last_beat = time.monotonic()
            self.stop = self.stop or not words or b"USR1" in words or b"TERM" in words
            self.kill = self.kill or b"KILL" in words
            if not words:
                self.source = None
        if time.monotonic() - self.last_beat > SILENCE:
            self.stop = True


class Tasks:
    """The tasks of this node, by the records they leave."""

    def __init__(self, job_dir: Path, attempt: int, numbers: range) -> None:
        self.job_dir, self.attempt, self.numbers = job_dir, attempt, numbers
        self.pids: dict[int, int] = {}  # by rank
        self.gone: set[int] = set()

    def listening(self) -> bool:
        """Whether every task handles signals by now."""
        if len(self.pids) < len(self.numbers):
            self.pids = {r.rank: r.pid for r in ranks.read(self.job_dir, self.attempt) if r.rank in self.numbers}
        return len(self.pids) == len(self.numbers)

    def note_killed(self) -> None:
        """Write down which tasks were killed, as they cannot: before those that have failed for want of them."""
        gone = {rank for rank, pid in self.pids.items() if rank not in self.gone and not _alive(pid)}
        if not gone:
            return
        self.gone |= gone
        records, now = ranks.read(self.job_dir, self.attempt), time.time()
        first = min((r.ended for r in records if r.ended and r.code not in (None, FINISHED, AGAIN)), default=now)
        ended = first - 0.001 if now - first < CONSEQUENCE else now
        for record in records:
            if record.rank in gone and record.code is None:
                killed = replace(record, code=KILLED, ended=ended, error="killed (out of memory, or by someone)")
                ranks.write(self.job_dir, self.attempt, killed)

    def request_save(self) -> None:
        """Ask every one of them to save and end."""
        for record in ranks.read(self.job_dir, self.attempt):
            with suppress(ProcessLookupError):
                if record.rank in self.numbers and record.code is None:
                    os.kill(record.pid, signal.SIGUSR1)

    def kill(self) -> None:
        """End what is left of them, and what they have started; the next attempt needs their devices."""
        for pid in self.pids.values():
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        end = time.monotonic() + AFTERWARDS
        while any(map(_alive, self.pids.values())) and time.monotonic() < end:
            time.sleep(POLL / 4)


def run(command: Sequence[str], tasks: Tasks, heartbeat: Heartbeat, lead: float) -> int:
    """Run torchrun to its end; its exit code. `lead`: seconds that tasks have for saving."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_parent)
    signalled: float | None = None  # when the tasks got the signal to save
    stop_seen: float | None = None
    while process.poll() is None:
        heartbeat.listen(POLL)
        listening, now = tasks.listening(), time.monotonic()
        stop_seen = stop_seen or (now if heartbeat.stop else None)
        if stop_seen is None:
            tasks.note_killed()
        elif signalled is None and listening:
            tasks.request_save()
            signalled = now
        if heartbeat.kill or now > (signalled or stop_seen or now) + lead + AFTERWARDS:
            process.kill()
            tasks.kill()
            process.wait()
            return KILLED
    if stop_seen is None:
        tasks.note_killed()
    if process.returncode:
        tasks.kill()
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _alive(pid: int) -> bool:
    try:
        if sys.platform == "linux":
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        os.kill(pid, 0)
        return True
    except (OSError, IndexError):
        return False


def interface_to(master: str) -> str:
    """The network interface through which this machine reaches `master`; empty if that cannot be told.

    Gloo would take the address of the machine's own name, which many systems say is 127.0.1.1: the master's own, too,
    which therefore takes the one that leads outside.
    """
    for target in (master, "192.0.2.1"):
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))  # sends nothing
            mine = socket.inet_aton(probe.getsockname()[0])
            interfaces = [name for _, name in socket.if_nameindex() if _address(probe, name) == mine]
            if interfaces and mine[0] != 127:
                return interfaces[0]
    return ""


def _address(probe: socket.socket, interface: str) -> bytes:
    import fcntl

    with suppress(OSError):
        return fcntl.ioctl(probe, 0x8915, struct.pack("256s", interface.encode()[:15]))[20:24]  # SIOCGIFADDR
    return b""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m shoestring.cluster.node.heartbeat", description="For a job's script."
    )
    parser.add_argument("--node-rank", type=int, required=True)
    parser.add_argument("--tasks", type=int, required=True, help="on this node")
    parser.add_argument("--lead", type=float, required=True, help="seconds for saving")
    parser.add_argument("--master", default="127.0.0.1", help="address of the first node")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args(arguments)
    if given.master != "127.0.0.1":
        interface = interface_to(given.master)
        if interface:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # to torchrun 85 is a failure: it would end the tasks that are still busy after having saved
    os.environ[ranks.SAVED_EXIT] = str(FINISHED)
    first = given.node_rank * given.tasks
    job_dir, attempt = Path(os.environ["SHOESTRING_JOB_DIR"]), int(os.environ["SHOESTRING_ATTEMPT"])
    tasks = Tasks(job_dir, attempt, range(first, first + given.tasks))
    with TemporaryDirectory(prefix="shoestring-") as logs:
        os.environ["PET_LOG_DIR"] = logs  # torchrun leaves an empty folder behind
        return run(given.command, tasks, Heartbeat(), given.lead)


if __name__ == "__main__":
    sys.exit(main())
