"""What one node can say of itself: names, disk, memory, devices, and how fast it computes.

Nothing here changes what training will find: no random state, default or thread count is touched, and device memory is
given back.
"""

from __future__ import annotations

import os
import queue
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

PATIENCE = 20.0  # seconds until a file system, a resolver or a driver counts as hung
T = TypeVar("T")


def within(seconds: float, call: Callable[..., T], *arguments: Any) -> T:
    """`call(*arguments)`, or TimeoutError: what hangs in the kernel or a driver is left behind in its thread."""
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((call(*arguments), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=work, daemon=True, name=f"preflight-{call.__name__}").start()
    try:
        value, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


def node_name(environ: Mapping[str, str] = os.environ) -> str:
    """This node as its engine calls it."""
    return environ.get("SLURMD_NODENAME") or environ.get("SHOESTRING_NODE") or socket.gethostname()


def unresolved(names: list[str]) -> list[str]:
    """The names that cannot be resolved here, each with what was said against it."""
    failures = []
    for name in names:
        try:
            within(PATIENCE, socket.getaddrinfo, name, None)
        except (OSError, TimeoutError, UnicodeError) as error:
            failures.append(f"{name} ({error})")
    return failures


def free_disk(folder: Path, label: str) -> int:
    """Free bytes in `folder`, after having written there. OSError if that is refused, TimeoutError if it hangs."""

    def write_and_measure() -> int:
        probe = folder / f".preflight-{label}"
        try:
            with probe.open("wb") as file:
                file.write(b"\0" * 4096)
                file.flush()
                os.fsync(file.fileno())
        finally:
            with suppress(OSError):
                probe.unlink(missing_ok=True)
        return shutil.disk_usage(folder).free

    return within(PATIENCE, write_and_measure)


def sees(path: Path, content: str, patience: float = 5.0) -> bool:
    """Whether `path` comes to hold `content` here: network file systems may take a moment."""
    end = time.monotonic() + patience
    while True:
        with suppress(OSError):
            if path.read_text() == content:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def visible_devices() -> int:
    """GPUs that this process sees."""
    import torch

    return torch.cuda.device_count()


def matmul_speed(device: str, seconds: float = 0.2) -> float:
    """FLOP/s of one device ("cpu", "cuda:3") in the best of many products; on the CPU small ones, which fit between
    what else the machine does."""
    import torch

    size, dtype = (256, torch.float32) if device == "cpu" else (4096, torch.float16)
    draw = torch.Generator(device).manual_seed(0)  # the global one stays where it is
    a, b = (torch.randn(size, size, generator=draw, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    best, end = float("inf"), time.perf_counter() + seconds
    _product(a, b, out)
    while best == float("inf") or time.perf_counter() < end:
        began = time.perf_counter()
        _product(a, b, out)
        best = min(best, time.perf_counter() - began)
    del a, b, out
    if device != "cpu":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * size**3 / best


def _product(a: Any, b: Any, out: Any) -> None:
    import torch

    torch.mm(a, b, out=out)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
