"""Machines that one can log in to: torchrun on each over OpenSSH, led by a script on the machine that launches.

All of them see the run directory, the working directory and Python under the same paths, and let this machine in
without a password. Nothing of ours stays on them: when a connection ends, so do the tasks behind it, after saving. A
machine that stops to answer is not used again by the job, and the run goes on with a spare from its last checkpoint.
"""

from __future__ import annotations

import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ..config.document import ClusterError
from ..config.sections import Line, Section
from ..environment import exports, quoted, variables
from ..job import Job
from .background import InBackground
from .scripts import controller, node_script

HostName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:-]*$")]
PATIENCE = 20  # seconds for a machine to answer what is asked before a launch
CHECKED = 16  # machines, all at once

# what the user's own options, which come first, can change; nothing may ask questions
DEFAULTS = (
    "BatchMode=yes", "ConnectTimeout=15", "ServerAliveInterval=10", "ServerAliveCountMax=3", "ControlPath=none",
    "ForwardAgent=no", "ForwardX11=no",
)  # fmt: skip


class SSHOptions(Section):
    """The machines, and how `ssh` reaches them."""

    hosts: Annotated[tuple[HostName, ...], Field(strict=False, min_length=1)] = Field(
        description="a list of names or addresses that ssh knows; more than a job's nodes are its spares"
    )
    user: HostName | None = Field(None, description="null (ssh's own choice), or the user to log in as")
    port: Annotated[int, Field(ge=1, le=65535)] | None = Field(None, description="null, or a port from 1 to 65535")
    identity: Line | None = Field(None, description="null (the agent's and ssh's own), or the file of a private key")
    config: Line | None = Field(None, description="null (~/.ssh/config), or an ssh configuration file")
    ssh_options: Annotated[tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9]+=[^\x00-\x1f\x7f]+$")], ...],
                           Field(strict=False)] = Field(
        (), description='a list like ["ServerAliveInterval=30"], as in ssh_config'
    )  # fmt: skip
    addresses: dict[HostName, HostName] = Field(
        default={}, description="a mapping of hosts to the addresses by which the other nodes find them"
    )


class SSH(InBackground):
    name = "ssh"
    Options = SSHOptions

    def render(self, job: Job) -> dict[str, str]:
        options: SSHOptions = job.cluster.options
        hosts = tuple(dict.fromkeys(options.hosts))
        if len(hosts) < job.nodes:
            raise ClusterError(f"{job.nodes} nodes; allowed on {job.cluster.name}: {len(hosts)} (options.hosts)")
        spares = f", {len(hosts) - job.nodes} to spare" if len(hosts) > job.nodes else ""
        title = f"Job {job.id}: {job.nodes} nodes x {job.devices_per_node} tasks over ssh{spares}."
        script = controller(job, title, " ".join(map(quoted, hosts)), _engine(job, options))
        return {"job.sh": script, "node.sh": node_script(job)}

    def remarks(self, job: Job) -> list[str]:
        """Return what machines lack: an answer, the working directory, the run's storage, Python, shoestring.

        Only the first few are checked, for many would take minutes; each checks itself when an attempt starts."""
        options: SSHOptions = job.cluster.options
        hosts = list(dict.fromkeys(options.hosts))
        with ThreadPoolExecutor(CHECKED) as pool:
            remarks = [
                remark for lines in pool.map(lambda h: _lacks(job, options, h), hosts[:CHECKED]) for remark in lines
            ]
        return remarks if len(hosts) <= CHECKED else [*remarks, f"{CHECKED} of the {len(hosts)} machines were checked"]


def command(options: SSHOptions) -> list[str]:
    """`ssh` and its options; a host and a command are still to come."""
    words = ["ssh", "-T"]
    if options.config:
        words += ["-F", str(Path(options.config).expanduser())]
    if options.identity:
        words += ["-i", str(Path(options.identity).expanduser())]
    if options.user:
        words += ["-l", options.user]
    if options.port:
        words += ["-p", str(options.port)]
    for option in (*options.ssh_options, *DEFAULTS):
        words += ["-o", option]
    return words


def _engine(job: Job, options: SSHOptions) -> str:
    """The functions of the shell that `controller` wants."""
    known = "".join(f"    {quoted(host)}) echo {quoted(at)}; return ;;\n" for host, at in options.addresses.items())
    interface = job.cluster.interconnect.interface
    if job.nodes == 1:
        address, known = "  echo 127.0.0.1\n", ""
    elif interface:
        query = quoted(f"ip -o -4 address show dev {quoted(interface)}")
        address = f"""  "${{SSH[@]}}" "$1" {query} </dev/null | awk '{{ sub("/.*", "", $4); print $4; exit }}'\n"""
    else:
        address = """  "${SSH[@]}" -G "$1" | awk '$1 == "hostname" { print $2; exit }'\n"""
    several = '> >(label "$2: ") 2>&1 ' if job.nodes > 1 else ""
    return (
        f"SSH=({shlex.join(command(options))})\n"
        "address() {\n"
        f"{f'  case $1 in{chr(10)}{known}  esac{chr(10)}' if known else ''}"
        f"{address}"
        "}\n"
        "node() {\n"
        f'  exec "${{SSH[@]}}" "$2" "{_shell(job)} ${{JOB@Q}}/node.sh $1 $3 $4 $SHOESTRING_ATTEMPT" '
        f"{several}\n"
        "}\n"
    )


def _shell(job: Job) -> str:
    """Only a login shell knows `module`."""
    return "bash -l" if job.cluster.environment.modules else "bash"


def _lacks(job: Job, options: SSHOptions, host: str) -> list[str]:
    """One line for everything that a machine lacks."""
    storage = next(place for place in (Path(job.run_dir), *Path(job.run_dir).parents) if place.exists())
    environment = job.cluster.environment
    script = (
        f"{exports(variables(job))}"
        f"{f'. {quoted(environment.venv)}/bin/activate{chr(10)}' if environment.venv else ''}"
        f"cd {quoted(job.workdir)} 2>/dev/null || echo {quoted(f'there is no {job.workdir}')}\n"
        f"[ -d {quoted(str(storage))} ] || echo {quoted(f'there is no {storage}, in which the run is to be stored')}\n"
        f"if ! command -v {quoted(job.python)} >/dev/null; then echo {quoted(f'there is no {job.python}')}\n"
        f"elif ! {quoted(job.python)} -c 'import shoestring.cluster' 2>/dev/null; then\n"
        f"echo {quoted(f'{job.python} cannot import shoestring')}; fi\n"
    )
    if environment.modules:
        script = f"module load {shlex.join(environment.modules)}\n{script}"
    try:
        # the script through the pipe: on the command line everybody could read the variables
        done = subprocess.run(
            [*command(options), host, f"{_shell(job)} -s"],
            input=script,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    except FileNotFoundError:
        return [f"{host}: ssh is not installed here"]
    except subprocess.TimeoutExpired:
        return [f"{host}: does not answer within {PATIENCE} s"]
    if done.returncode == 255:
        return [f"{host}: {(done.stderr.strip().splitlines() or ['does not answer'])[-1]}"]
    return [f"{host}: {line}" for line in done.stdout.splitlines()]
