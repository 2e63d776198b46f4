"""SkyPilot: a managed job on whatever cloud has the machines, driven by the `sky` command.

Every machine runs `cluster/node/run.py`; SkyPilot finds new machines when spot ones are taken and after exit codes 85
(saved) and 86 (a machine has failed its checks: new ones are other ones). It gives machines no time to save when it
ends them itself, so a cancelled job goes back to its last checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ...exits import AGAIN, BAD_INPUT, BAD_NODE
from ...yaml_writer import write_yaml
from ..config.document import ClusterError
from ..config.hardware import hardware
from ..config.sections import Line, Section
from ..engine import EngineStatus, JobRecord, call
from ..environment import exports, quoted, variables
from ..job import Job
from .background import streamed
from .remote import facts_file, node_words, secret_names, there, train_words, with_key

FILES = ".shoestring-job"  # below the folder in which SkyPilot starts the script
LAUNCH_SECONDS = 900.0  # the first launch of all also starts SkyPilot's controller
ENDS: dict[str, Literal["finished", "failed", "cancelled"]] = {
    "SUCCEEDED": "finished", "CANCELLED": "cancelled", "CANCELLING": "cancelled",
}  # fmt: skip
WAITING = ("PENDING", "SUBMITTED", "STARTING", "RECOVERING", "DEPRECATED_SUBMITTED")

# names that SkyPilot has for devices, where they are not ours in capitals
NAMES = {
    "h100-sxm": "H100", "h100-nvl": "H100-NVL", "h100-pcie": "H100-PCIE", "a100-80gb-sxm": "A100-80GB",
    "a100-80gb-pcie": "A100-80GB", "a100-40gb-sxm": "A100", "a100-40gb-pcie": "A100", "v100-16gb": "V100",
    "v100-32gb": "V100-32GB", "rtx-6000-ada": "RTX6000-Ada", "rtx-pro-6000": "RTXPRO6000", "rtx-a6000": "RTXA6000",
    "rtx-5090": "RTX5090", "rtx-4090": "RTX4090", "rtx-3090": "RTX3090",
}  # fmt: skip


class SkyPilotOptions(Section):
    """Options of the machines, and of the storage of the run: a volume, or a bucket."""

    infra: Line | None = Field(None, description="null (wherever it is cheapest), or a place like aws/us-east-1 or k8s")
    accelerators: Line | None = Field(None, description="null (from hardware), or SkyPilot's own words, like H100:8")
    instance_type: Line | None = Field(None, description="null, or the cloud's name of a machine")
    cpus: Annotated[str, Field(pattern=r"^[0-9]+\+?$")] | None = Field(None, description='null, or a number like "32+"')
    memory: Annotated[str, Field(pattern=r"^[0-9]+\+?$")] | None = Field(None, description='null, or GiB like "128+"')
    disk_gb: int | None = Field(None, ge=20, le=60_000, description="null, or the size of a machine's disk in GB")
    mount: Annotated[str, Field(pattern=r"^/[^\x00-\x1f:$]+$")] = Field(
        "/runs", description="an absolute path: where the volume or the bucket appears, and runs are kept"
    )
    volume: Line | None = Field(None, description="null, or a SkyPilot volume that all machines can mount")
    bucket: Line | None = Field(None, description="null, or a bucket like s3://team-runs")
    mode: Literal["MOUNT", "MOUNT_CACHED"] = "MOUNT_CACHED"
    setup: str = Field("", description="shell commands that put shoestring on a fresh machine")
    strategy: Literal["FAILOVER", "EAGER_NEXT_REGION"] = "EAGER_NEXT_REGION"

    @model_validator(mode="after")
    def _one(self) -> SkyPilotOptions:
        if (self.volume is None) == (self.bucket is None):
            raise ValueError("exactly one of volume and bucket, to keep the run on")
        return self


class SkyPilot:
    name = "skypilot"
    Options = SkyPilotOptions
    shares_filesystem = False

    def render(self, job: Job) -> dict[str, str]:
        return {"task.yaml": write_yaml(task(job))}

    def remarks(self, job: Job) -> list[str]:
        chosen = _options(job)
        remarks = [f"the machines keep the run in {there(job, [chosen.mount]).run_dir}"]
        if chosen.bucket and job.nodes > 1:
            remarks.append(
                "checkpoints of more than one machine need storage that all of them write to at once: a bucket often "
                "is not; use options.volume where there are volumes"
            )
        remarks.append("SkyPilot stops machines without warning: steps since the last checkpoint are repeated")
        return remarks

    def submit(self, job: Job, files: Mapping[str, str], secrets: Mapping[str, str]) -> str:
        if not shutil.which("sky"):
            raise ClusterError("sky is not installed here: pip install 'skypilot[all]', or launch where it is")
        secrets = with_key(job, secrets)
        named = [word for name in secrets for word in ("--secret", name)]  # values come from the environment
        command = ["sky", "jobs", "launch", "--yes", "--detach-run", *named, str(Path(job.job_dir, "task.yaml"))]
        done = subprocess.run(
            command, env={**os.environ, **secrets}, capture_output=True, text=True, timeout=LAUNCH_SECONDS
        )
        said = done.stdout + done.stderr
        match = re.search(r"(?:Managed )?Job ID:?\s*(?:\x1b\[[0-9;]*m)*(\d+)", said, re.I)
        if done.returncode or not match:
            raise ClusterError(f"sky jobs launch ended with {done.returncode} and no job: {said.strip()[-2000:]}")
        return match[1]

    def query_status(self, record: JobRecord) -> EngineStatus:
        output = call(["sky", "jobs", "queue", "--all", "--output", "json"], timeout=120)
        return status_from(record.engine_id, output)

    def logs(self, record: JobRecord, follow: bool) -> Iterator[str]:
        yield from streamed(["sky", "jobs", "logs", "--follow" if follow else "--no-follow", record.engine_id])

    def cancel(self, record: JobRecord) -> None:
        call(["sky", "jobs", "cancel", "--yes", record.engine_id], timeout=120)


def status_from(engine_id: str, output: str) -> EngineStatus:
    """Read the state of one job from `sky jobs queue`; notices around its JSON are passed over."""
    try:
        rows, _ = json.JSONDecoder().raw_decode(output[output.index("[") :])
    except ValueError:
        raise ClusterError(f"cannot read the output of sky jobs queue: {output.strip()[-500:]}") from None
    for row in rows:
        if str(row.get("job_id")) == engine_id:
            status = str(row.get("status", "")).rpartition(".")[2]
            if status == "RUNNING":
                return EngineStatus(
                    "running", detail=status, nodes=tuple(filter(None, [row.get("infra") or row.get("region")]))
                )
            if status in WAITING:
                return EngineStatus("queued", detail=status)
            reason = row.get("failure_reason")
            return EngineStatus("gone", detail=f"{status} {reason or ''}".strip(), ended=ENDS.get(status, "failed"))
    return EngineStatus("gone", detail="SkyPilot does not list it any more")


def _options(job: Job) -> SkyPilotOptions:
    chosen = job.cluster.options
    assert isinstance(chosen, SkyPilotOptions)
    return chosen


def task(job: Job) -> dict[str, Any]:
    """The task that SkyPilot is given."""
    chosen = _options(job)
    if job.cluster.environment.modules:
        raise ClusterError(
            "environment.modules: cloud machines have no environment modules; use options.setup or an image"
        )
    remote = there(job, [chosen.mount])
    made: dict[str, Any] = {"name": job.id, "num_nodes": job.nodes, "resources": _resources(job)}
    if chosen.volume:
        made["volumes"] = {chosen.mount: chosen.volume}
    else:
        made["file_mounts"] = {chosen.mount: {"source": chosen.bucket, "mode": chosen.mode}}
    if names := secret_names(job):
        made["secrets"] = dict.fromkeys(names)  # null: given by name at the launch
    if chosen.setup:
        made["setup"] = chosen.setup
    made["run"] = _run(remote)
    return made


def _resources(job: Job) -> dict[str, Any]:
    chosen = _options(job)
    device = NAMES.get(job.cluster.hardware, hardware(job.cluster.hardware).name.upper())
    accelerators = chosen.accelerators or (f"{device}:{job.devices_per_node}" if job.on_gpus else None)
    container = job.cluster.environment.container
    amounts = {
        "infra": chosen.infra,
        "accelerators": accelerators,
        "instance_type": chosen.instance_type,
        "cpus": chosen.cpus or (None if job.on_gpus or chosen.instance_type else f"{job.devices_per_node}+"),
        "memory": chosen.memory,
        "disk_size": chosen.disk_gb,
        "image_id": f"docker:{container.image}" if container else None,
        "use_spot": job.cluster.price.kind == "spot",
        "job_recovery": {
            "strategy": chosen.strategy,
            "max_restarts_on_errors": 0,
            "recover_on_exit_codes": [AGAIN, BAD_NODE],
        },
    }
    return {key: value for key, value in amounts.items() if value is not None}


def _run(job: Job) -> str:
    """The script of every machine."""
    environment = job.cluster.environment
    lines = [
        f"# Job {job.id}, one of {job.nodes} machines: {AGAIN} saved, run me again; {BAD_NODE} this machine is bad"
    ]
    if job.cluster.workdir:
        lines.append(f"cd {quoted(job.cluster.workdir)} || exit {BAD_INPUT}")
    lines += [
        f"mkdir -p {FILES} || exit {BAD_INPUT}",
        _heredoc(f"{FILES}/recipe.yaml", job.recipe) + _heredoc(f"{FILES}/job.json", facts_file(job)).rstrip("\n"),
        exports(variables(job)).rstrip("\n"),
        'export SHOESTRING_NODE="$(hostname)"',
    ]
    if environment.venv:
        lines.append(f". {quoted(environment.venv.rstrip('/') + '/bin/activate')} || exit {BAD_INPUT}")
    place = '--node="$SKYPILOT_NODE_RANK" --master="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"'
    own, train = (" ".join(map(shlex.quote, words(job, FILES))) for words in (node_words, train_words))
    python = environment.python or "python3"  # not the launching machine's
    lines.append(f"exec {quoted(python)} {own} {place} \\\n  {train}")
    return "\n".join(lines) + "\n"


def _heredoc(path: str, text: str) -> str:
    end = "END_OF_FILE"
    while end in text:
        end += "_"
    return f"cat > {path} <<'{end}'\n{text.rstrip(chr(10))}\n{end}\n"
