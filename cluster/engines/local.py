"""This machine: torchrun, in the background, attempt after attempt until the run is finished."""

from __future__ import annotations

from ..config.document import ClusterError
from ..config.sections import Section
from ..job import Job
from .background import InBackground
from .scripts import controller, node_script

ENGINE = """address() { echo 127.0.0.1; }
node() { exec bash "$JOB/node.sh" "$1" "$3" "$4" "$SHOESTRING_ATTEMPT"; }
"""


class LocalOptions(Section):
    """Nothing: this machine has no settings of its own."""


class Local(InBackground):
    name = "local"
    Options = LocalOptions

    def render(self, job: Job) -> dict[str, str]:
        if job.nodes != 1:
            raise ClusterError(f"{job.nodes} nodes; allowed with engine local: 1. For more machines use engine ssh")
        title = f"Job {job.id}: {job.devices_per_node} tasks on this machine."
        return {"job.sh": controller(job, title, '"$(hostname)"', ENGINE), "node.sh": node_script(job)}

    def remarks(self, job: Job) -> list[str]:
        return []
