"""The mirror on Weights & Biases: fed from the side, allowed to fail.

wandb alone loses up to 15 s of rows when it is killed, raises into the training loop when its helper process dies, and
waits for ever for a server that does not answer. Here it runs in a thread of its own behind a bounded queue, writes its
file every second, falls back to that file when the server cannot be reached, and is given up when it breaks. The
journal keeps every row whatever happens here, and `replay` (wandb_replay.py) sends it again later.

The step is a metric called `step`, not wandb's own counter: after a resume steps are done again, and wandb drops rows
whose counter runs backwards.
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from time import monotonic
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

from .identity import RunIdentity

CAPACITY = 10_000  # rows that may wait: enough for a slow start of wandb, a few megabytes
CONNECT_SECONDS = 3.0
INIT_SECONDS = 8.0
UPLOAD_SECONDS = 10.0  # what wandb may spend on uploading after the last row
FAILURES = 3  # rows refused in a row before wandb counts as broken

log = logging.getLogger("shoestring.ledger")


class WandbSink:
    """A W&B run that rows can be put into; no method raises, none blocks beyond its timeout.

    `mode` is "offline" or "online", and turns into "offline" if the server cannot be reached. The run's files lie in
    `directory/wandb/`. `dropped` counts the rows W&B did not take, `delivered` those it did. It prints nothing but one
    warning, and sends neither console output nor code nor git state. Needs no API key offline; online it uses the one
    of `wandb login`. A run of the user's own in the same process is left alone.
    """

    def __init__(
        self,
        mode: Literal["offline", "online"],
        project: str,
        run_identity: RunIdentity,
        config: Mapping[str, Any],
        directory: Path,
        *,
        capacity: int = CAPACITY,
    ) -> None:
        self.mode: str = mode
        self.dropped = self.delivered = 0
        self.broken = False
        self._project, self._identity = project, run_identity
        self._config, self._directory = dict(config), Path(directory)
        self._capacity = capacity
        self._queue: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self._cores: set[int] = set()  # the wandb-core processes that this sink has started
        self._foreign: set[int] | None = None  # those of others, while it starts one
        self._ended = self._warned = False
        self._thread = threading.Thread(target=self._work, name="shoestring-wandb", daemon=True)
        self._thread.start()

    def put(self, step: int, row: Mapping[str, Any]) -> None:
        """Hand over one row, a few microseconds; dropped and counted if the queue is full or W&B is broken."""
        if self.broken or self._ended or self._queue.qsize() >= self._capacity:
            self.dropped += 1
        else:
            self._queue.put(("row", {**row, "step": step}))

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Hand over rows with equal keys, to be shown as a table."""
        if not (self.broken or self._ended):
            self._queue.put(("table", (step, name, list(rows))))

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Set the run's summary values, shown in W&B's table of runs."""
        if not (self.broken or self._ended):
            self._queue.put(("summary", dict(values)))

    def finish(self, timeout: float = 20.0, *, exit_code: int = 0) -> bool:
        """Deliver what is queued and close the run, in at most `timeout` seconds; whether W&B has all of it.

        W&B marks a run with a nonzero `exit_code` as failed. What is late is abandoned, with wandb's helper process.
        """
        end = monotonic() + timeout
        if not self._ended:
            self._ended = True
            self._queue.put(("end", exit_code))
        self._thread.join(timeout - min(1.0, timeout / 4))
        if self._thread.is_alive():
            self._break(f"it did not finish within {timeout:.0f} s")
        if self.broken:
            self._abandon_cores(max(0.1, end - monotonic()))
        atexit.unregister(self._at_exit)
        return not self.broken and not self.dropped

    def _at_exit(self) -> None:
        self.finish(exit_code=1)  # nobody called `finish`: the run ended by an error

    def pending(self) -> int:
        """Rows that wait to be handed to W&B."""
        return self._queue.qsize()

    def _work(self) -> None:
        try:
            self._pump(self._open())
        except BaseException as error:  # whatever happens in here, the training must not hear of it
            self._break(str(error) or type(error).__name__)
            while not self._queue.empty():
                self.dropped += self._queue.get()[0] == "row"

    def _pump(self, run: Any) -> None:
        failures = 0
        while True:
            what, value = self._queue.get()
            if what == "end":
                run.finish(exit_code=value)
                return
            try:
                if what == "summary":
                    run.summary.update(value)
                else:
                    run.log(value if what == "row" else _as_table(*value))
                self.delivered += what == "row"
                failures = 0
            except Exception:
                self.dropped += what == "row"
                failures += 1
                if failures == FAILURES:
                    raise

    def _open(self) -> Any:
        # wandb reports its own errors to its makers, from offline runs too; a user who wants that can say so
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._foreign = _core_processes()
        try:
            if self.mode == "online":
                try:
                    return self._online(wandb)
                except Exception as error:
                    self.mode = "offline"
                    self._warn(
                        f"W&B cannot be used online ({_first_line(error)}). This run's W&B files are kept in "
                        f"{self._directory / 'wandb'} and can be sent later; training is not affected."
                    )
            return self._offline(wandb)
        finally:
            self._cores, self._foreign = _core_processes() - self._foreign, None
            atexit.register(self._at_exit)  # after wandb has registered its own, so this one is called first

    def _online(self, wandb: Any) -> Any:
        _hush(wandb)
        _connect(wandb.setup().settings.base_url)
        if not wandb.login(prompt=False):  # never ask for a key at a terminal that shows a progress bar
            raise ConnectionError("no API key: run `wandb login`")
        return self._init(wandb, mode="online", resume="allow")

    def _offline(self, wandb: Any) -> Any:
        try:
            return self._init(wandb, mode="offline")
        except Exception:
            # a helper process that died earlier, or whose address was inherited from a dead parent: start another
            _tear_down()
            os.environ.pop("WANDB_SERVICE", None)
            return self._init(wandb, mode="offline")

    def _init(self, wandb: Any, **how: Any) -> Any:
        if self.broken:  # the helper it was starting has been abandoned
            raise ConnectionError("given up")
        _hush(wandb)
        self._directory.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, save_code=False, x_save_requirements=False,
            x_transaction_log_flush_interval=1.0, init_timeout=INIT_SECONDS, finish_timeout=UPLOAD_SECONDS,
        )  # fmt: skip
        run = wandb.init(
            project=self._project, id=self._identity.id, name=self._identity.name, config=self._config,
            dir=str(self._directory), settings=settings, reinit="create_new", **how,
        )  # fmt: skip
        for handler in logging.getLogger("wandb").handlers:  # its log: a full disk has been told of already
            handler.handleError = lambda record: None  # type: ignore[method-assign]
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _break(self, why: str) -> None:
        self.broken = True
        self._warn(f"W&B was turned off ({why}). The journal has every row, and training is not affected.")

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s", text)

    def _abandon_cores(self, seconds: float) -> None:
        """End the helper that does not end by itself: wandb would wait for it without limit as Python exits."""
        import psutil

        if self._foreign is not None:
            self._cores = _core_processes() - self._foreign
        for pid in self._cores:
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.ppid() == os.getpid():
                    process.kill()
        if self._cores:
            # lets wandb forget the dead helper, which it would else report at exit and use for the next run
            undoing = threading.Thread(target=_tear_down, daemon=True)
            undoing.start()
            undoing.join(min(seconds, 2.0))
            self._cores = set()


def _as_table(step: int, name: str, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    import wandb

    columns: list[str | int] = list(rows[0])
    return {"step": step, name: wandb.Table(columns=columns, data=[list(row.values()) for row in rows])}


def _tear_down() -> None:
    import wandb

    with suppress(BaseException):
        wandb.teardown()


def _hush(wandb: Any) -> None:
    if wandb.run is None:  # else the user has set it up, and it is the user's choice what it prints
        wandb.setup(settings=wandb.Settings(silent=True))


def _connect(url: str) -> None:
    """Raise at once if nothing listens at `url`; wandb itself would try for the whole of its init timeout."""
    parts = urlsplit(url)
    if parts.scheme not in getproxies():
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), CONNECT_SECONDS).close()


def _core_processes() -> set[int]:
    import psutil

    pids = set()
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "wandb" in child.name():
                pids.add(child.pid)
    return pids


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
