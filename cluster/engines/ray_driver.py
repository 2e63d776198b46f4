"""The driver of a job on Ray: `python -m shoestring.cluster.engines.ray_driver JOB_DIR`, which `job.sh` becomes.

For each attempt it waits for a placement group of one bundle a node, runs `node.sh` in an actor on each, passes on what
they say, and asks `attempts` what comes next. SIGTERM (`ray job stop`): everybody saves, and the job ends. SIGUSR1:
everybody saves, and the next attempt begins.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ... import exits
from ..node import attempts

POLL = 1.0  # seconds
CHUNK = 1 << 20  # bytes of output a node hands over at a time
GIVES_UP = 60  # seconds after which a node that should have saved and ended is killed
NOTICES = 30  # seconds in which Ray finds out that a machine is gone


def bundle(facts: Mapping[str, Any]) -> dict[str, float]:
    """Return what a job reserves on each of its nodes; from `Job.facts`."""
    tasks, options = facts["devices_per_node"], facts["options"]
    gpus = {"GPU": tasks} if facts["hardware"] != "cpu" else {}
    return {"CPU": tasks * options["cpus_per_task"], **gpus, **options["resources"]}


class JobSignals:
    """The requests of signals to the job: to end after saving (`cancelled`), or to save and run again."""

    def __init__(self) -> None:
        self.cancelled = self.again = False

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.again = True
        self.cancelled = self.cancelled or number != signal.SIGUSR1

    @property
    def signal(self) -> str:
        """The signal to send to the nodes; empty: none."""
        return "SIGTERM" if self.cancelled else "SIGUSR1" if self.again else ""


class NodeActor:
    """The actor of one node. Ray's workers need not have this package: nothing of it is used here."""

    def where(self) -> tuple[str, int]:
        """(The address of this node, a port that is free on it)."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return ray.util.get_node_ip_address(), port

    def start(self, command: list[str]) -> None:
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 - as long as this actor
        # its input ends with this process, by which it knows (see node.sh)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self.output, stderr=self.output, start_new_session=True
        )

    def poll(self, offset: int) -> tuple[bytes, int | None]:
        """(What has been said from `offset` on, the exit code once it has ended and this is the rest)."""
        code = self.process.poll()
        said = os.pread(self.output.fileno(), CHUNK, offset)  # the offset of the file itself is the writer's
        return said, code if len(said) < CHUNK else None

    def signal_tasks(self, name: str) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.Signals[name])


class RayNode:
    """One node of an attempt, seen from the driver. `code` None: it runs; `died`: its actor is gone."""

    def __init__(self, actor: Any, id: str, label: str) -> None:
        self.actor, self.id, self.label = actor, id, label
        self.code: int | None = None
        self.died = False
        self._read, self._rest = 0, b""
        self._answer: Any = None

    def look(self) -> None:
        """Take what the node has said since, if it has answered; never waits."""
        import ray

        if self.code is not None:
            return
        self._answer = self._answer or self.actor.poll.remote(self._read)
        if not ray.wait([self._answer], timeout=0)[0]:
            return
        answer, self._answer = self._answer, None
        try:
            said, self.code = ray.get(answer)
        except ray.exceptions.ActorUnavailableError:
            return  # for a while, says Ray: it is asked again
        except ray.exceptions.RayError:
            said, self.code, self.died = b"", 1, True
        self._read += len(said)
        self._show(said)

    def _show(self, said: bytes) -> None:
        *lines, self._rest = (self._rest + said).split(b"\n")
        if self.code is not None and self._rest:
            lines.append(self._rest)
        for line in lines:
            print(f"{self.label}{line.decode(errors='replace')}")
        sys.stdout.flush()

    def kill(self) -> None:
        """End the actor, which ends what it runs."""
        import ray

        ray.kill(self.actor)
        self.code = 137 if self.code is None else self.code


def wait_for_group(facts: Mapping[str, Any], job_dir: Path, request: JobSignals) -> Any:
    """A placement group on nodes that are not excluded; None if the job is cancelled before there is one."""
    from ray.util.placement_group import placement_group, remove_placement_group

    selector = dict(facts["options"]["labels"])
    bad = [id for id, name in names().items() if name in attempts.excluded(job_dir)]
    if bad:
        selector["ray.io/node-id"] = f"!in({','.join(bad)})"
    nodes = facts["nodes"]
    group = placement_group([bundle(facts)] * nodes, "STRICT_SPREAD", bundle_label_selector=[selector] * nodes)
    while not request.cancelled:
        if group.wait(POLL):
            return group
    remove_placement_group(group)
    return None


def names() -> dict[str, str]:
    """Ray's id of each node that is alive -> its name: as `ray start` was given it, else its address."""
    import ray

    alive = {node["NodeID"]: node["NodeName"] for node in ray.nodes() if node["Alive"]}
    several = list(alive.values())
    return {id: name if several.count(name) == 1 else f"{name}-{id[:8]}" for id, name in alive.items()}


def ids_of(group: Any) -> list[str]:
    """Ray's id of the node of each bundle."""
    from ray.util.placement_group import placement_group_table

    where = placement_group_table(group)["bundles_to_node_id"]
    return [where[rank] for rank in range(len(where))]


def start_nodes(facts: Mapping[str, Any], group: Any, ids: Sequence[str], command: Sequence[str]) -> list[RayNode]:
    """An actor in each bundle, which runs `command` with its rank, and the address and a port of the first node."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    ray.cloudpickle.register_pickle_by_value(sys.modules[NodeActor.__module__])
    wanted = bundle(facts)
    custom = {name: amount for name, amount in wanted.items() if name not in ("CPU", "GPU")}
    options = {"num_cpus": wanted["CPU"], "num_gpus": wanted.get("GPU", 0), "resources": custom}
    nodes = []
    for rank, id in enumerate(ids):
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
        actor = ray.remote(NodeActor).options(scheduling_strategy=place, **options).remote()
        nodes.append(RayNode(actor, id, f"{rank}: " if len(ids) > 1 else ""))
    address, port = ray.get(nodes[0].actor.where.remote())
    begun = []
    for rank, node in enumerate(nodes):
        begun.append(node.actor.start.remote([*command, str(rank), address, str(port)]))
    ray.get(begun)
    return nodes


def watch(nodes: Sequence[RayNode], seconds: int, lead: int, request: JobSignals) -> None:
    """Pass on what the nodes say and what signals ask, until all have ended.

    Where one has failed, the others, which may wait for it for ever, get `lead` seconds and are then told to end; where
    one has died, at once.
    """
    sent, latest, failed = "", time.monotonic() + seconds + GIVES_UP, 0.0
    while any(node.code is None for node in nodes):
        now = time.monotonic()
        if any(node.code for node in nodes):
            failed = failed or now
        alone = any(node.died for node in nodes) or (failed and now > failed + lead)
        name = "SIGTERM" if alone else request.signal
        if name and sent != "SIGTERM" and name != sent:
            sent, latest = name, min(latest, now + lead + GIVES_UP)
            for node in nodes:
                if node.code is None:
                    node.actor.signal_tasks.remote(name)
        for node in nodes:
            node.look()
            if now > latest:
                node.kill()
        time.sleep(POLL)


def lost(suspects: Sequence[str]) -> list[str]:
    """Which of these nodes (ids) are gone; Ray finds out some time after their actors have died."""
    until = time.monotonic() + NOTICES
    while any(id in names() for id in suspects) and time.monotonic() < until:
        time.sleep(POLL)
    alive = names()
    return [id for id in suspects if id not in alive]


def attempt(job_dir: Path, number: int, facts: Mapping[str, Any], group: Any, request: JobSignals) -> tuple[str, int]:
    """One attempt on the nodes of `group`: what comes next, and the exit code."""
    import ray

    known, ids = names(), ids_of(group)
    on = [known.get(id, id) for id in ids]
    seconds = attempts.begin(job_dir, number, on)
    if not seconds:
        return "exhausted", exits.AGAIN
    nodes: list[RayNode] = []
    try:
        command = ["bash", str(job_dir / "node.sh"), str(number), str(seconds), ",".join(on)]
        nodes = start_nodes(facts, group, ids, command)
        watch(nodes, seconds, facts["lead_seconds"], request)
        code = next((node.code for node in nodes if node.code), 0)
        gone = lost([node.id for node in nodes if node.died])
    except ray.exceptions.RayError as error:  # before anything ran
        print(f"[shoestring] {error}", file=sys.stderr, flush=True)
        code, gone = 1, lost(ids)
    warned = any(node.code == 124 for node in nodes)
    names_gone = [on[ids.index(id)] for id in gone]
    return attempts.end(job_dir, number, code, cancelled=request.cancelled, warned=warned, lost=names_gone)


def run(job_dir: Path, request: JobSignals) -> int:
    """Attempt after attempt; the exit code of the last."""
    from ray.util.placement_group import remove_placement_group

    facts, number = attempts.job_facts(job_dir), len(attempts.history(job_dir))
    while True:
        group = wait_for_group(facts, job_dir, request)
        if group is None:  # an attempt of no time, so that the record says how the job ended
            attempts.begin(job_dir, number)
            return attempts.end(job_dir, number, 0, cancelled=True)[1]
        request.again = False
        after, code = attempt(job_dir, number, facts, group, request)
        remove_placement_group(group)
        if after != "requeue":
            return code
        number += 1


def main() -> int:
    request = JobSignals()
    request.listen()
    try:
        import ray
    except ImportError:
        print('[shoestring] ray is not installed for this Python: pip install "shoestring[ray]"', file=sys.stderr)
        return 1
    job_dir = Path(sys.argv[1])
    namespace = attempts.job_facts(job_dir)["options"]["namespace"]
    ray.init(namespace=namespace, log_to_driver=False, logging_level=logging.WARNING)
    request.listen()  # Ray has put in its own
    return run(job_dir, request)


if __name__ == "__main__":
    sys.exit(main())
