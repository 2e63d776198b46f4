"""Keep DeepSpeed from compiling C++ behind the user's back, and from waiting for ever on a build that is dead.

What DeepSpeed 0.19 does. On CPU, `init_distributed` compiles `deepspeed_shm_comm` (a minute or three) although only
tensor-parallel inference calls it. DeepSpeedCPUAdam compiles `cpu_adam` at its first use. Either way torch serializes
builders with an empty file named `lock` in the build folder, and a killed builder leaves it there: every later start
waits on it for ever, silently.

What this module does.
- CPU: the shared-memory kernel is declined; gloo does all communication, with the same results to the last bit.
- Offload, on CPU and GPU hosts, needs no `cpu_adam`: torch.optim.AdamW(fused=True) steps host memory as fast (14.5
  against 14.2 ms for 20 million parameters on one core; torch without `fused` takes 130 ms). DeepSpeed accepts it with
  `"zero_force_ds_cpu_optimizer": false`. Who passes DeepSpeedCPUAdam all the same gets it built first, aloud.
- Builds live in a folder of our own per torch, DeepSpeed, Python and CPU type (they are compiled for the native CPU).
- A lock nobody holds is removed with a message. A live one is waited for, with a message and a limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ... import ShoestringError
from ...directories import home
from .facts import cpu_flags, version

BUILDERS = {  # extension -> class of DeepSpeed that builds it
    "cpu_adam": "CPUAdamBuilder",
    "cpu_adagrad": "CPUAdagradBuilder",
    "cpu_lion": "CPULionBuilder",
    "pin_memory": "PinMemoryBuilder",
    "async_io": "AsyncIOBuilder",
    "deepspeed_shm_comm": "ShareMemCommBuilder",
}
LIBAIO = "sudo apt-get install libaio-dev g++"
PATIENCE_SECONDS = 900.0  # for a live build; cpu_adam takes one to three minutes
QUIET_SECONDS = 300.0  # after which an unseen builder, on another host, counts as dead
SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "9p", "fuse", "afs", "orangefs")
_BUILD = """
import sys
from deepspeed.accelerator import get_accelerator
builder = get_accelerator().create_op_builder(sys.argv[1])
sys.exit("this DeepSpeed has no such extension for " + get_accelerator().device_name()) if builder is None else None
builder.load(verbose=False)
"""


class ExtensionsError(ShoestringError):
    """A DeepSpeed extension that cannot be built, or a build that does not end."""


def prepare_environment(
    strategy: str, offload: str, accelerator: str, *, ds_optimizer: bool = False, nvme: bool = False
) -> None:
    """Call on every rank before DeepSpeed is initialized; safe to call on all at once and again.

    strategy      a recipe's strategy name; nothing happens unless it is a ZeRO stage
    offload       "none", "optimizer" or "parameters"
    accelerator   "cpu" or "cuda"
    ds_optimizer  whether DeepSpeedCPUAdam steps the offloaded state; torch's optimizers need nothing built
    nvme          whether optimizer state lies on a drive, which takes async_io

    Sets TORCH_EXTENSIONS_DIR (unless set) and DS_ACCELERATOR, and removes stale locks. CPU: imports deepspeed and makes
    it decline its shared-memory kernel. With ds_optimizer: one process builds cpu_adam, the node's other ranks wait.
    """
    if not strategy.startswith("zero"):
        return
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_dir())))
    _choose_accelerator(accelerator)
    for lock in sorted(folder.glob("*/lock")):
        settle(lock)
    if accelerator == "cpu":
        _decline_shared_memory_kernel()
    if offload != "none" and ds_optimizer:
        prebuild(["cpu_adam"])
    if nvme:
        prebuild(["async_io"])


def extensions_dir() -> Path:
    """Private build folder: `$SHOESTRING_HOME/extensions/<torch>-<deepspeed>-<python>-<CPU type>`."""
    native = hashlib.sha1(" ".join((platform.machine(), *sorted(cpu_flags()))).encode()).hexdigest()[:6]
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return home() / "extensions" / f"torch{version('torch')}-deepspeed{version('deepspeed')}-{python}-{native}"


def prebuild(names: Sequence[str], patience: float = PATIENCE_SECONDS) -> dict[str, float | str]:
    """Build DeepSpeed extensions (keys of BUILDERS) now: {name: seconds it took | "present"}.

    One process per machine builds, the others wait their turn and find it present. ExtensionsError carries the
    compiler's last words.
    """
    for name in names:
        if name not in BUILDERS:
            raise ExtensionsError(f"unknown DeepSpeed extension {name!r}. Known: {', '.join(BUILDERS)}.")
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or extensions_dir())
    _same_ninja()
    return {name: _present_or_build(folder, name, patience) for name in names}


def has_libaio() -> bool:
    """Whether the C++ compiler finds libaio, its header too: what async_io is built on."""
    compiler = os.environ.get("CXX") or "c++"
    command = [compiler, "-x", "c++", "-", "-shared", "-fPIC", "-laio", "-o", os.devnull]
    try:
        return subprocess.run(command, input=b"#include <libaio.h>\n", capture_output=True).returncode == 0
    except OSError:
        return False


def is_built(name: str) -> bool:
    """Whether an extension lies ready in the build folder."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or extensions_dir())
    return (folder / f"{name}.built").exists() and (folder / name / f"{name}.so").exists()


def _same_ninja() -> None:
    """Have one ninja, activated or not: another version would build everything anew, within the run."""
    beside, path = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    if Path(beside, "ninja").exists() and not path.startswith(beside):
        os.environ["PATH"] = f"{beside}{os.pathsep}{path}"


def settle(lock: Path, patience: float = PATIENCE_SECONDS) -> None:
    """Return once torch's build lock is gone: removed here if nobody holds it, else waited for.

    ExtensionsError after `patience` seconds.
    """
    started, reported = time.monotonic(), False
    while (seen := _stat(lock)) is not None:
        holder = lock_holder(lock)
        if holder is None:
            # the same file as before we looked, so it is not one that a new builder has just made
            if _stat(lock) == seen:
                lock.unlink(missing_ok=True)
                _say(f"removed the stale build lock {lock}: the build that made it is dead.")
            continue
        waited = time.monotonic() - started
        if waited > patience:
            raise ExtensionsError(
                f"{lock.parent.name} is still being built by {holder} after {patience:.0f} s. "
                f"If that build hangs, end it and remove {lock}."
            )
        if not reported:
            _say(f"waiting for {holder}, which is building {lock.parent.name} ...")
            reported = True
        time.sleep(0.2)


def lock_holder(lock: Path) -> str | None:
    """Return who is building under this lock, in words; None if it is stale.

    torch's builder keeps the file open for as long as it builds, and ninja runs in the folder, so on one Linux host
    /proc answers exactly. On a shared file system the builder may sit on another host: a folder in which something
    was written within QUIET_SECONDS counts as live. (A builder in another container with the same folder is not seen.)
    """
    pid = _local_holder(lock)
    if pid is not None:
        return f"process {pid}"
    if _is_shared(lock.parent) or not Path("/proc/self").exists():
        newest = max((path.stat().st_mtime for path in lock.parent.iterdir()), default=0.0)
        if time.time() - newest < QUIET_SECONDS:
            return f"an unseen process (wrote {time.time() - newest:.0f} s ago)"
    return None


def _local_holder(lock: Path) -> int | None:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone by now, or somebody else's
            opened = {os.readlink(link) for link in (process / "fd").iterdir()}
            ninja = (process / "comm").read_text().startswith("ninja")  # it outlives a builder that was killed alone
            if str(lock.resolve()) in opened or (ninja and (process / "cwd").samefile(lock.parent)):
                return int(process.name)
    return None


def _is_shared(folder: Path) -> bool:
    """Whether other hosts may see this folder."""
    return filesystem(folder).startswith(SHARED)


def filesystem(folder: Path) -> str:
    """What kind it is of: that of the mount with the longest matching prefix; empty where that cannot be told."""
    kind, longest, path = "", -1, str(folder.resolve())
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, mount, mounted = line.split()[:3]
            if len(mount) >= longest and (mount == "/" or path == mount or path.startswith(mount + "/")):
                kind, longest = mounted, len(mount)
    return kind


def _stat(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_ctime_ns


def _present_or_build(folder: Path, name: str, patience: float) -> float | str:
    folder.mkdir(parents=True, exist_ok=True)
    with _turn(folder / f"{name}.turn", name, patience):
        settle(folder / name / "lock", patience)
        built = folder / f"{name}.built"  # a library alone may be half linked
        if built.exists() and (folder / name / f"{name}.so").exists():
            return "present"
        if name == "async_io" and not has_libaio():
            raise ExtensionsError(
                "optimizer state on a drive needs libaio and a C++ compiler, and there is no libaio.h that it finds: "
                f"{LIBAIO}. Or leave strategy.nvme out: the state is in host memory then."
            )
        _say(f"building DeepSpeed's {name} once for this machine, one to three minutes, into {folder} ...")
        started = time.monotonic()
        _build(folder, name, patience)
        built.touch()
        _say(f"built {name} in {time.monotonic() - started:.0f} s.")
        return time.monotonic() - started


def _build(folder: Path, name: str, patience: float) -> None:
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder)}
    command = [sys.executable, "-c", _BUILD, BUILDERS[name]]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=patience)
    except BaseException as stopped:  # the compilers are the builder's children: end the whole group
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(stopped, subprocess.TimeoutExpired):
            raise ExtensionsError(f"building {name} took more than {patience:.0f} s and was ended.") from None
        raise
    if process.returncode != 0:
        raise ExtensionsError(f"building DeepSpeed's {name} failed. The end of its output:\n{output[-2000:]}")


@contextlib.contextmanager
def _turn(path: Path, name: str, patience: float) -> Iterator[None]:
    """One builder at a time. The kernel drops this lock with its process, so it cannot go stale."""
    from filelock import FileLock, Timeout

    turn = FileLock(path)
    try:
        turn.acquire(blocking=False)
    except Timeout:
        _say(f"waiting for another process to build {name} ...")
        try:
            turn.acquire(timeout=patience)
        except Timeout:
            raise ExtensionsError(f"another process has been building {name} for {patience:.0f} s.") from None
    try:
        yield
    finally:
        turn.release()


def _choose_accelerator(accelerator: str) -> None:
    os.environ["DS_ACCELERATOR"] = accelerator
    loaded = sys.modules.get("deepspeed.accelerator")
    chosen = loaded.get_accelerator().device_name() if loaded else accelerator
    if chosen.split(":")[0] != accelerator:  # DeepSpeed fixes its device for good when it is imported
        raise ExtensionsError(
            f"deepspeed was imported for {chosen!r} and cannot train on {accelerator!r} in this process. "
            f"Set DS_ACCELERATOR={accelerator} before the program starts."
        )


def _decline_shared_memory_kernel() -> None:
    """`deepspeed.comm.torch.build_shm_op` asks this table, the only reader of it, before it compiles.

    DeepSpeed fills the table on first access by running the compiler for each extension it knows, and keeps edits to
    it; written beforehand, neither happens. Only `inference_all_reduce` would use the kernel, and falls back to gloo.
    """
    import deepspeed.ops

    vars(deepspeed.ops)["__compatible_ops__"] = dict.fromkeys(BUILDERS, False)


def _say(message: str) -> None:
    print(f"shoestring: {message}", file=sys.stderr, flush=True)
