"""A Ray cluster: `ray job submit`, and a driver (ray_driver.py) that holds one placement group an attempt.

The dashboard's Jobs API answers for the job afterwards. Ray shows a job's runtime environment to everybody who can open
the dashboard, so variables and secrets go through files on the shared storage, as on every engine.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ..config.document import ClusterError
from ..config.sections import Count, Line, Section
from ..engine import EngineStatus, JobRecord, call
from ..job import Job
from ..node import attempts
from . import background
from .ray_driver import GIVES_UP, bundle
from .scripts import WAIT, head, torchrun

ENDS = {"SUCCEEDED": "finished", "FAILED": "failed", "STOPPED": "cancelled"}
DEFAULT = "http://127.0.0.1:8265"
INSTALL = 'ray is not installed here: pip install "shoestring[ray]" (the version of the cluster)'
POLL = 2.0  # seconds between questions while a log is followed
Amount = Annotated[float, Field(gt=0, strict=False)]


class RayOptions(Section):
    """Options of a Ray cluster. `resources` and `labels`: of every node, beside its CPUs and GPUs."""

    address: Annotated[str, Field(pattern=r"^https?://[^\s/]+")] | None = Field(
        None, description=f"null (RAY_API_SERVER_ADDRESS, else {DEFAULT}), or the dashboard, like http://head:8265"
    )
    namespace: Line | None = Field(None, description="null, or a Ray namespace")
    cpus_per_task: Count = Field(1, description="a whole number from 1: CPUs that Ray reserves for a task")
    resources: dict[Line, Amount] = Field(default={}, description="a mapping of resource names to amounts above 0")
    labels: dict[Line, Line] = Field(
        default={}, description="a mapping of node labels to values, like {ray.io/accelerator-type: H200}"
    )


class Ray:
    name = "ray"
    shares_filesystem = True
    Options = RayOptions

    def render(self, job: Job) -> dict[str, str]:
        image = job.cluster.environment.container
        if image:
            raise ClusterError(
                f"environment.container: found {image.image}; allowed with engine ray: null. Ray's nodes use "
                "the environment that they were started in"
            )
        return {"job.sh": _driver_script(job), "node.sh": _node_script(job)}

    def remarks(self, job: Job) -> list[str]:
        address = _address(job.cluster.options.address)
        try:
            _request(address, "/api/version", timeout=5)
            # how many nodes Ray has is asked of an interface that may change; without an answer nothing is said
            nodes = _request(address, "/api/v0/nodes?detail=true&limit=10000", timeout=10)["data"]["result"]["result"]
            return _too_small(job, [node for node in nodes if node["state"] == "ALIVE"])
        except ClusterError as error:
            return [str(error)]
        except (KeyError, TypeError):
            return []

    def submit(self, job: Job, files: Mapping[str, str], secrets: Mapping[str, str]) -> str:
        address, ray = _address(job.cluster.options.address), _command()
        _request(address, "/api/version")  # Ray's own command takes long to say in many lines that nobody answers
        # Ray kills what it stops after 3 s, if it is not told here to wait for a checkpoint
        runtime = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(job.lead_seconds + 2 * GIVES_UP)}}
        try:
            call(
                [
                    ray, "job", "submit", "--no-wait", "--submission-id", job.id, "--address", address,
                    "--runtime-env-json", json.dumps(runtime), "--", "bash", f"{job.job_dir}/job.sh",
                ],
                environ=_environ(address),
            )  # fmt: skip
        except BaseException:
            with suppress(ClusterError):  # it may have come through all the same
                _request(address, f"/api/jobs/{job.id}/stop", method="POST")
            raise
        return f"{address}/#/jobs/{job.id}"

    def query_status(self, record: JobRecord) -> EngineStatus:
        if not record.engine_id:
            return EngineStatus("queued")
        job = _job(record)
        if job is None:
            return EngineStatus("gone", detail="Ray no longer lists this job")
        status, last = job["status"], attempts.history(record.job_dir)[-1:]
        if status in ENDS:
            said = str(job.get("message") or "").partition("\n")[0]
            return EngineStatus("gone", detail=f"{status} ({said})" if said else status, ended=ENDS[status])  # type: ignore[arg-type]
        if status == "RUNNING" and last and last[0].ended is None:
            return EngineStatus("running", detail=status, nodes=last[0].nodes)
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in bundle(record.facts).items())
        return EngineStatus("queued", detail=f"{status}: waits for {record.facts['nodes']} nodes with {wanted}")

    def logs(self, record: JobRecord, follow: bool) -> Iterator[str]:
        log = Path(record.job_dir) / background.LOG
        yield from background.lines(log, follow, lambda: self.query_status(record).state == "gone", POLL)
        if not log.exists():  # the job never came to write it; Ray may know why
            address, job = _of(record)
            yield from str(_request(address, f"/api/jobs/{job}/logs").get("logs", "")).splitlines()

    def cancel(self, record: JobRecord) -> None:
        state = _job(record)
        if state is None or state["status"] in ENDS:
            raise ClusterError(f"{record.id} is not running any more")
        address, job = _of(record)
        call([_command(), "job", "stop", "--no-wait", "--address", address, job], environ=_environ(address))


def _driver_script(job: Job) -> str:
    return (
        f"{head(job, f'Job {job.id}: Ray runs this on its head node; the tasks run in node.sh.')}"
        # what the job says is to be found beside the run too; the signals are for the driver
        f"exec > >(trap '' TERM INT USR1; exec tee -a \"$JOB/{background.LOG}\") 2>&1\n"
        'exec "$PYTHON" -m shoestring.cluster.engines.ray_driver "$JOB"\n'
    )


def _node_script(job: Job) -> str:
    start = torchrun(job, str(job.nodes), '"$node_rank"', '"$master"', '"$port"')
    return (
        f"{head(job, f'One node of job {job.id}: {job.devices_per_node} tasks; ray_driver.py calls it.')}"
        "export SHOESTRING_ATTEMPT=$1\n"
        "seconds=$2 node_rank=$4 master=$5 port=$6\n"
        "IFS=, read -ra nodes <<<$3\n"
        'export SHOESTRING_NODE="${nodes[node_rank]}"\n'
        "child=\n"
        'trap \'[ -n "$child" ] && kill -USR1 "$child"\' USR1\n'
        'trap \'[ -n "$child" ] && kill -TERM "$child"\' TERM\n'
        "exec 3<&0\n"
        f"{start}"
        # the input ends when the actor does, however it does: nothing may outlive it, but all may save
        '{ read -r -u 3; kill -TERM "$child"; } 2>/dev/null &\n'
        "guard=$!\n"
        f"{WAIT}"
        'kill "$guard" 2>/dev/null\n'
        'exit "$code"\n'
    )


def _too_small(job: Job, nodes: list[Mapping[str, Any]]) -> list[str]:
    wanted, labels = bundle(job.facts()), job.cluster.options.labels
    fit = [
        node for node in nodes
        if all(node["resources_total"].get(name, 0) >= amount for name, amount in wanted.items())
        and all(node["labels"].get(label) == value for label, value in labels.items())
    ]  # fmt: skip
    if len(fit) >= job.nodes:
        return []
    each = ", ".join([*(f"{amount:g} {n}" for n, amount in wanted.items()), *(f"{k}={v}" for k, v in labels.items())])
    return [f"{len(fit)} of Ray's {len(nodes)} nodes have {each}; the job wants {job.nodes}; it waits for more"]


def _command() -> str:
    """Ray's own command: of this environment, or of the path."""
    beside = Path(sys.executable).with_name("ray")
    path = str(beside) if beside.exists() else shutil.which("ray")
    if not path:
        raise ClusterError(INSTALL)
    return path


def _environ(address: str) -> dict[str, str]:
    # what these variables say goes before --address
    return {**os.environ, "RAY_API_SERVER_ADDRESS": address, "RAY_ADDRESS": address}


def _address(given: str | None) -> str:
    """The dashboard's address; `RAY_ADDRESS` may also be the cluster's own, which is of no use here."""
    named = [given, *(os.environ.get(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"))]
    return next((url.rstrip("/") for url in named if url and url.startswith(("http://", "https://"))), DEFAULT)


def _of(record: JobRecord) -> tuple[str, str]:
    address, _, job = record.engine_id.partition("/#/jobs/")
    return address, job


def _job(record: JobRecord) -> dict[str, Any] | None:
    address, job = _of(record)
    return _request(address, f"/api/jobs/{job}", missing=True)


def _request(address: str, path: str, *, method: str = "GET", timeout: float = 30, missing: bool = False) -> Any:
    """What the dashboard answers; None for `missing` where there is nothing; ClusterError if it does not."""
    request = urllib.request.Request(address + path, method=method, headers=_headers())
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        if missing and error.code == 404:
            return None
        said = error.read(300).decode(errors="replace").strip()
        raise ClusterError(f"Ray's dashboard at {address} refuses {path}: {error.code} {said}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ClusterError(
            f"Ray's dashboard at {address} does not answer ({reason}); allowed: the address of one that does "
            "(options.address, or RAY_API_SERVER_ADDRESS)"
        ) from None


def _headers() -> dict[str, str]:
    """What Ray's own commands add for clusters that want to know who asks."""
    headers: dict[str, str] = {}
    with suppress(ValueError):
        headers.update(json.loads(os.environ.get("RAY_JOB_HEADERS") or "{}"))
    if os.environ.get("RAY_AUTH_MODE") == "token":
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        token = os.environ.get("RAY_AUTH_TOKEN") or (path.read_text().strip() if path.exists() else "")
        headers.setdefault("Authorization", f"Bearer {token}")
    return headers
