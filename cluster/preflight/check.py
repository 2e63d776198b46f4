"""Pre-flight: before any training, the nodes of a job are checked together, and a bad one is found by name.

Node 0 coordinates through a small store next to the job's port (MASTER_PORT + 1, or the next free one); the first task
of each other node answers its requests, and all other tasks only wait for the verdict:

    every node   names resolve, disk, memory, devices, a timed product -> its report; who sends none in time is bad
    node 0       asks each for its clock; judges; asks again who computed slowly
    pairs        a timed all-reduce with both neighbours of a ring; suspects once more with others; then all together
    node 0       writes `attempts/K/preflight.json`, prints the table, and gives the verdict

Every wait has an end. A node that cannot reach node 0 obeys what node 0 has written down, else names node 0.
Drill: the variable `SHOESTRING_FAIL_PREFLIGHT=n2,n5` makes the nodes of these names fail.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from ...cgroups import available_memory
from ..config.document import ClusterError
from ..config.sections import PreflightSpec
from ..node import ranks
from ..node.attempts import history
from . import health
from .coordinator import Coordinator
from .verdict import NodeReport, PreflightTask, Verdict

DRILL = "SHOESTRING_FAIL_PREFLIGHT"
OBEY = 10.0  # seconds in which node 0 may still write its verdict down


class BadNodes(ClusterError):
    """Some nodes of the job have failed their checks: exit with 86."""


def this_task(
    job_dir: Path, attempt: int, facts: Mapping[str, Any], environ: Mapping[str, str] = os.environ
) -> PreflightTask:
    """Return the task that this process is, by the variables every engine sets and the facts of its job."""
    rank, local = int(environ["RANK"]), int(environ.get("LOCAL_RANK", 0))
    node = environ.get("NODE_RANK", environ.get("GROUP_RANK"))
    port = int(environ.get("MASTER_PORT", 29500))
    listed = next((a.nodes for a in history(job_dir) if a.number == attempt), ())
    return PreflightTask(
        rank=rank, local_rank=local, node=int(node) if node is not None else rank // facts["devices_per_node"],
        nodes=facts["nodes"], devices=facts["devices_per_node"], master=environ.get("MASTER_ADDR", "127.0.0.1"),
        ports=range(port + 1, port + 5), token=f"{job_dir} {attempt}", name=health.node_name(environ),
        on_gpus=facts["hardware"] != "cpu", run_dir=Path(facts["run_dir"]),
        folder=ranks.attempt_dir(job_dir, attempt), listed=listed,
        limits=PreflightSpec.model_validate(facts["preflight"]),
    )  # fmt: skip


def check(task: PreflightTask) -> Verdict:
    """Take part in the pre-flight of a job; every task calls it. The verdict is the same on all.

    Raises BadNodes where a node is bad, ClusterError where the checks themselves could not be done.
    """
    import torch.distributed as dist

    began = time.monotonic()
    task.folder.mkdir(parents=True, exist_ok=True)
    try:
        verdict = _take_part(task)
    except dist.DistError as error:
        verdict = _without_node_0(task, error)
    if verdict.error:
        raise ClusterError(verdict.error)
    verdict.seconds = time.monotonic() - began
    if verdict.bad:
        raise BadNodes(verdict.why())
    return verdict


def _take_part(task: PreflightTask) -> Verdict:
    store = _store(task)
    if task.rank == 0:
        return Coordinator(task, store, Verdict(), answer).run(lambda: report(task, store))
    if task.local_rank == 0:
        _serve(task, store)
    elif task.on_gpus:
        store.set(f"device/{task.rank}", json.dumps(_speed(task)))
    store.wait(["verdict"], timedelta(seconds=3 * task.timeout + 60))
    verdict = Verdict(**json.loads(store.get("verdict")))
    store.add("read", 1)
    return verdict


def _store(task: PreflightTask) -> Any:
    """Where nodes tell one another; rank 0 keeps it, on the first free port of a few. DistError if there is none, or
    if it cannot be reached within the timeout."""
    import torch.distributed as dist

    if task.nodes * task.devices == 1:
        return dist.HashStore()
    for port in task.ports if task.rank == 0 else ():
        with suppress(dist.DistNetworkError):
            store = dist.TCPStore(task.master, port, None, True, timedelta(seconds=task.timeout), False)
            store.set("job", task.token)
            return store
    end, said = time.monotonic() + task.timeout, "all ports are taken"
    while task.rank and time.monotonic() < end:
        for port in task.ports:
            try:
                return _joined(task, port)
            except (OSError, dist.DistError) as error:
                said = str(error).splitlines()[0]
        time.sleep(0.2)
    raise dist.DistNetworkError(said)


def _joined(task: PreflightTask, port: int) -> Any:
    """The store of this very attempt at `port`; OSError or DistError if that is not there."""
    import socket

    import torch.distributed as dist

    socket.create_connection((task.master, port), timeout=2).close()  # refused at once, where a store would wait
    store = dist.TCPStore(task.master, port, None, False, timedelta(seconds=5), False)
    store.wait(["job"], timedelta(seconds=5))
    if store.get("job").decode() != task.token:
        raise OSError(f"port {port} belongs to another job")
    store.set_timeout(timedelta(seconds=task.timeout))
    return store


def _without_node_0(task: PreflightTask, error: Exception) -> Verdict:
    """Node 0 cannot be reached: do what it has written down, or else it is the bad one."""
    path = task.folder / "preflight.json"
    end = time.monotonic() + min(OBEY, 3 * task.timeout)
    while not path.exists() and task.rank and time.monotonic() < end:
        time.sleep(0.1)
    name = task.listed[0] if len(task.listed) == task.nodes else task.name if task.rank == 0 else task.master
    ports = f"{task.ports[0]}-{task.ports[-1]}"
    fault = f"cannot be reached at {task.master}:{ports} ({str(error).splitlines()[0]})"
    outcome = Verdict([name], [{"node": 0, "name": name, "faults": [fault]}])
    with suppress(OSError), path.open("x") as file:  # another node may have said so first
        json.dump(outcome.__dict__, file)
    with suppress(OSError, ValueError):
        return Verdict(**json.loads(path.read_text()))
    return outcome


# -- a node --------------------------------------------------------------------------------------------------------
def report(task: PreflightTask, store: Any) -> NodeReport:
    """Look at this node; the first of its tasks does, with the others' figures where each has a GPU."""
    problems = []
    if task.name in os.environ.get(DRILL, "").split(","):
        problems.append(f"fails on purpose: {DRILL} names it")
    disk, memory = None, None
    try:
        disk = health.free_disk(task.run_dir, f"{task.folder.name}-{task.node}")
        problems += _shared(task, store)
    except (OSError, TimeoutError) as error:
        problems.append(f"disk: {task.run_dir} cannot be written: {error}")
    with suppress(OSError, ImportError):
        memory = available_memory()
    problems += _names(task)
    matmul, wrong = _devices(task, store)
    return NodeReport(
        node=task.node, name=task.name, problems=(*problems, *wrong), disk=disk, memory=memory, matmul=matmul
    )


def _names(task: PreflightTask) -> list[str]:
    """gloo and NCCL ask for the own host's address, unless they have been told their interface."""
    import socket

    chosen = any(f"{library}_SOCKET_IFNAME" in os.environ for library in ("GLOO", "NCCL"))
    wanted = [task.master] if chosen or task.nodes == 1 else [socket.gethostname(), task.master]
    return [f"names: cannot resolve {name}" for name in health.unresolved(wanted)]


def _shared(task: PreflightTask, store: Any) -> list[str]:
    """Whether this node sees in the run's folder what node 0 has just written there."""
    path = task.folder / "token"
    if task.node == 0:
        token = f"{task.name} {os.getpid()} {time.time_ns()}"
        try:
            health.within(health.PATIENCE, path.write_text, token)
        finally:
            store.set("token", token)
        return []
    store.wait(["token"], timedelta(seconds=task.timeout))
    token_of_node_0 = store.get("token").decode()
    if health.within(health.PATIENCE, health.sees, path, token_of_node_0):
        return []
    return [f"disk: {task.run_dir} is not the folder that node 0 sees: the run's folder must be on shared storage"]


def _devices(task: PreflightTask, store: Any) -> tuple[tuple[float, ...], list[str]]:
    """The speed of each device of this node, and what is wrong with them."""
    if task.on_gpus:
        seen = health.within(health.PATIENCE * 3, health.visible_devices)
        if seen < task.devices:
            return (), [f"devices: {seen} of {task.devices} GPUs are visible"]
    speeds = [_speed(task)]
    for other in range(1, task.devices if task.on_gpus else 1):
        key = f"device/{task.rank + other}"
        try:
            store.wait([key], timedelta(seconds=task.timeout / 2))
            speeds.append(json.loads(store.get(key)))
        except Exception as error:
            speeds.append(f"its task sent no result ({str(error).splitlines()[0]})")
    wrong = [f"devices: device {i}: {one}" for i, one in enumerate(speeds) if isinstance(one, str)]
    return tuple(one for one in speeds if not isinstance(one, str)), wrong


def _speed(task: PreflightTask) -> float | str:
    """FLOP/s of this task's device, or what is wrong with it."""
    try:
        if not task.on_gpus:
            return health.matmul_speed("cpu")
        return health.within(health.PATIENCE * 3, health.matmul_speed, task.device)
    except Exception as error:  # whatever a driver says
        return f"cannot compute: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _serve(task: PreflightTask, store: Any) -> None:
    """Send this node's report, then do what node 0 asks until it asks no more."""
    store.set(f"report/{task.node}", json.dumps(report(task, store).__dict__))
    number = 0
    while True:
        key = f"request/{task.node}/{number}"
        store.wait([key], timedelta(seconds=2 * task.timeout + 60))
        request = json.loads(store.get(key))
        if request["what"] == "end":
            return
        store.set(f"reply/{task.node}/{number}", json.dumps(answer(task, store, request)))
        number += 1


def answer(task: PreflightTask, store: Any, request: Mapping[str, Any]) -> Any:
    """Answer a request of node 0: a clock's time, FLOP/s, or bytes a second (0: the all-reduce has failed)."""
    if request["what"] == "clock":
        return time.time()
    if request["what"] == "matmul":
        return _speed(task)
    from .allreduce import bandwidth

    try:
        group = request["where"], request["place"], request["size"]
        return bandwidth(store, *group, task.device, request["times"], request["timeout"])
    except Exception as error:
        print(f"[shoestring] pre-flight, {task.name}: all-reduce {request['where']}: {error}", flush=True)
        return 0.0
