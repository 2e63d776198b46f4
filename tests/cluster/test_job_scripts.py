"""The scripts of jobs on this machine and over ssh: what bash and ssh say of them, and what is refused."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from shoestring.cluster import ClusterError
from shoestring.cluster.job import Job, make_job
from shoestring.cluster.launch import rendered
from shoestring.cluster.load import load_cluster

SSH = """
name: team
engine: ssh
nodes: 2
devices_per_node: 4
hardware: cpu
price: {kind: own}
limits: {hours: 1}
interconnect: {interface: "eth 0"}
secrets: {TOKEN: {env: TOKEN}}
options:
  hosts: [n1, n2, 10.0.0.3, n1]
  user: trainer
  port: 2222
  identity: ~/keys/it's mine
  ssh_options: ["ServerAliveInterval=30", "ProxyCommand=nc -X 5 %h %p"]
  addresses: {n2: 10.0.0.2}
"""


def job(folder: Path, text: str, **sizes: int) -> Job:
    folder.mkdir(exist_ok=True)
    (folder / "cluster.yaml").write_text(text)
    run = str(folder / "it's a $RUN")
    return make_job(
        load_cluster(folder / "cluster.yaml"), name="r", recipe="name: r\n", run_dir=run, workdir=str(folder), **sizes
    )


def test_bash_and_ssh_understand_them_whatever_the_paths_are(tmp_path: Path) -> None:
    local = SSH[: SSH.index("options")].replace("ssh", "local").replace("nodes: 2", "nodes: 1")
    for text in (SSH, local, SSH.replace('interconnect: {interface: "eth 0"}', "environment: {modules: [cuda/12]}")):
        files = rendered(job(tmp_path / "here", text))
        for name in ("job.sh", "node.sh"):
            done = subprocess.run(["bash", "-n"], input=files[name], capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, ""), files[name]
    key = tmp_path / "it's mine"
    key.touch()
    script = rendered(job(tmp_path / "here", SSH.replace("~/keys/it's mine", str(key))))["job.sh"]
    assert "HOSTS=(n1 n2 10.0.0.3)\n" in script
    words = shlex.split(re.search(r"^SSH=\((.*)\)$", script, re.MULTILINE)[1])  # type: ignore[index]
    said = subprocess.run([*words, "-F", "none", "-G", "n1"], capture_output=True, text=True, check=True).stdout
    wanted = {"user trainer", "port 2222", "serveraliveinterval 30", "batchmode yes", "proxycommand nc -X 5 %h %p"}
    assert wanted <= set(said.splitlines())
    assert f"identityfile {key}" in said


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("hosts: [n1, n2, 10.0.0.3, n1]", "hosts: [n1, n1]", "2 nodes; allowed on team: 1 (options.hosts)"),
        ("hosts: [n1,", "hosts: ['-oProxyCommand=x',", "options.hosts"),
        ("port: 2222", "port: 0", "options.port: found 0; allowed: null, or a port from 1 to 65535"),
        ("user: trainer", "usr: trainer", "options.usr: found an unknown key"),
        ('["ServerAliveInterval=30"', '["-v"', "options.ssh_options"),
        ("limits:", "environment: {container: {image: i}}\nlimits:", "environment.container: found i"),
        ("engine: ssh", "engine: local", "options.hosts: found an unknown key"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path: Path, before: str, after: str, said: str) -> None:
    assert before in SSH
    with pytest.raises(ClusterError, match=re.escape(said)):
        rendered(job(tmp_path, SSH.replace(before, after)))


def test_one_machine_is_one_machine(tmp_path: Path) -> None:
    text = SSH[: SSH.index("options")].replace("ssh", "local")
    with pytest.raises(ClusterError, match="2 nodes; allowed with engine local: 1"):
        rendered(job(tmp_path, text))
