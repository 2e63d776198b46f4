"""Process groups for tests: every rank is a process of its own, forked from one that has imported the heavy packages.

Starting Python, torch, Lightning and DeepSpeed takes seven seconds of CPU; a fork server pays them once a session. The
ranks see what torchrun would give them, so Lightning launches nothing itself.
"""

import faulthandler
import gc
import multiprocessing
import os
import random
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from time import monotonic

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "pytest",
        "pytorch_lightning",
        "deepspeed",
        "shoestring.trainer.run.trainer",
        "safetensors.torch",
        "torch._inductor.compile_fx",  # this and the next are imported when DeepSpeed makes its first engine
        "deepspeed.moe.layer",
    ]
)


class RanksFailed(AssertionError):
    """Carries what every rank said last."""


def free_port() -> int:
    """A port below those that the system gives to others meanwhile, and above those that Ray keeps for its workers."""
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
        "SHOESTRING_HOME": os.environ["SHOESTRING_HOME"], "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def run(target: Callable, *args: object, world: int, folder: Path, timeout: float = 100) -> list[int]:
    """Call `target(*args)` on every rank and wait: the exit codes, -9 for a rank that was killed.

    When one is, the others are killed too, as every launcher does. Output goes to `folder`/rank-N.log. A rank that does
    not end in time is killed, and everybody's last words raised.
    """
    os.environ.setdefault(
        "DS_ACCELERATOR", os.environ.get("SHOESTRING_TEST_DEVICE", "cpu")
    )  # DeepSpeed chooses when it is imported, in the fork server
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    ranks = [
        _context.Process(target=_rank, args=(target, args, environment(r, world, port), folder, timeout))
        for r in range(world)
    ]
    for process in ranks:
        process.start()
    end = monotonic() + timeout + 5
    while (alive := [p for p in ranks if p.exitcode is None]) and not _killed(ranks) and monotonic() < end:
        wait([process.sentinel for process in alive], timeout=end - monotonic())
    hung = [] if _killed(ranks) else [r for r, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
        process.join()
    if hung:
        raise RanksFailed(f"ranks {hung} did not end within {timeout:g} s\n{last_words(folder)}")
    return [process.exitcode for process in ranks]


def _killed(ranks: list) -> bool:
    return any((process.exitcode or 0) < 0 for process in ranks)


def succeed(target: Callable, *args: object, world: int, folder: Path, **options: object) -> None:
    """`run`, and every rank must end well."""
    codes = run(target, *args, world=world, folder=folder, **options)
    if any(codes):
        raise RanksFailed(f"exit codes {codes}\n{last_words(folder)}")


def last_words(folder: Path, lines: int = 25) -> str:
    """The end of every log in `folder`."""
    said = []
    for log in sorted(folder.glob("*.log")):
        said += [f"--- {log}", *log.read_text(errors="replace").splitlines()[-lines:]]
    return "\n".join(said)


def _rank(target: Callable, args: tuple, env: dict[str, str], folder: Path, timeout: float) -> None:
    os.environ.update(env)
    log = os.open(folder / f"rank-{env['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    multiprocessing.set_start_method("fork", force=True)  # for loader workers, as in any process that was not forked
    gc.freeze()  # what was imported stays: DeepSpeed collects garbage at every start, which would look at it all
    faulthandler.enable(file=2)
    faulthandler.dump_traceback_later(timeout, exit=True, file=2)
    try:
        target(*args)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stderr.flush()
    os._exit(0)  # nothing that a crashed process would not leave: no exit handlers of the parent's either
