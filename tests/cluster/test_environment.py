"""Whatever a value holds, a task finds it as it was written; and a secret is found nowhere else."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import threading
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jobs import OPTIONS, a_cluster, a_job

from shoestring.cluster import ClusterError, environment
from shoestring.cluster.config.sections import EnvironmentSpec, SecretSpec
from shoestring.cluster.engines.kubernetes import Kubernetes
from shoestring.cluster.engines.pods import literal
from shoestring.cluster.engines.skypilot import SkyPilot
from shoestring.cluster.launch import rendered
from shoestring.cluster.node import ranks

AWKWARD = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40),
    st.text("""$`'"\\ ,;\n\t!#*~=(){}[]<>&|%é∞\r\x1b\x85\u2028""", max_size=30),
)
NAMES = st.from_regex(r"\A[A-Za-z_][A-Za-z0-9_]{0,12}\Z").map(lambda name: f"V_{name}")
VARIABLES = st.dictionaries(NAMES, AWKWARD, min_size=1, max_size=20)


def sourced(shell: str, text: str, folder: Path) -> dict[str, str]:
    """The variables that a program finds behind a shell that has sourced the text."""
    path = folder / "env.sh"
    path.write_text(text, encoding="utf-8", newline="")
    script = f'. "{path}" || exit 3; exec {shutil.which("env")} -0'
    done = subprocess.run([shell, "-c", script], env={"LC_ALL": "C.UTF-8"}, capture_output=True, check=True)
    assert done.stderr == b""
    variables = dict(entry.split("=", 1) for entry in done.stdout.decode().split("\0")[:-1])
    return {name: value for name, value in variables.items() if name.startswith("V_")}


@pytest.mark.parametrize("shell", [path for path in map(shutil.which, ("bash", "dash")) if path])
def test_values_survive_a_shell(shell, tmp_path) -> None:
    @settings(max_examples=25)
    @given(VARIABLES)
    def check(variables: dict[str, str]) -> None:
        assert sourced(shell, environment.exports(variables), tmp_path) == variables

    check()


def test_values_survive_the_manifests(tmp_path) -> None:
    bare = {engine: a_cluster(tmp_path, engine) for engine in ("kubernetes", "skypilot")}

    @settings(max_examples=12)
    @example({"V_A": "\\>>[\x85$", "V_B": "a\u2028b\nc", "V_C": " a \n\n  b\t\n", "V_D": "yes", "V_E": "\r\n"})
    @given(VARIABLES)
    def check(variables: dict[str, str]) -> None:
        kept = {engine: _with(cluster, variables) for engine, cluster in bare.items()}
        text = Kubernetes().render(a_job(tmp_path, "kubernetes", cluster=kept["kubernetes"]))["jobset.yaml"]
        pod = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        env = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
        assert {name: env[name] for name in variables} == {k: literal(v) for k, v in variables.items()}
        task = yaml.safe_load(SkyPilot().render(a_job(tmp_path, "skypilot", cluster=kept["skypilot"]))["task.yaml"])
        assert environment.exports(variables) in task["run"]

    check()


def _with(cluster, variables):
    spec = cluster.environment.model_copy(update={"variables": variables})
    return cluster.model_copy(update={"environment": spec})


def test_a_whole_machine_of_skypilot(tmp_path) -> None:
    """The script of a machine, run: the files it writes and the command that it ends in."""
    recipe = "name: it's $HOME\nnote: |\n  END_OF_FILE\n  `ls` \\n\n"
    job = a_job(tmp_path, "skypilot", recipe=recipe)
    task = yaml.safe_load(SkyPilot().render(job)["task.yaml"])
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "python3"
    command.write_text('#!/bin/sh\nprintf "%s\\n" "$GREETING" "$@"\n')
    command.chmod(0o755)
    env = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    done = subprocess.run(
        ["bash", "-c", task["run"]], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    said = done.stdout.split("\n")
    assert "\n".join(said[:2]) == job.cluster.environment.variables["GREETING"]
    assert "--node=1" in said and "--master=10.0.0.1" in said and said[said.index("--") + 1] == "-m"
    assert (tmp_path / ".shoestring-job" / "recipe.yaml").read_text() == recipe
    assert '"nodes": 2' in (tmp_path / ".shoestring-job" / "job.json").read_text()


@pytest.mark.parametrize("name", ["A B", "1A", "A-B", "A=B", "", "A$(ls)", "Ä", "A\n"])
def test_names_are_names(name) -> None:
    with pytest.raises(ValueError, match=re.escape("variables") + "|pattern"):
        EnvironmentSpec.model_validate({"variables": {name: "x"}})


def test_a_nul_cannot_be_given() -> None:
    with pytest.raises(ClusterError, match="NUL"):
        environment.exports({"A": "b\0c"})


def test_secrets_come_from_where_they_are_kept(tmp_path) -> None:
    (tmp_path / "key").write_text("from a file\n")
    specs = {"A": SecretSpec(env="MINE"), "B": SecretSpec(file=str(tmp_path / "key"))}
    assert environment.resolve(specs, {"MINE": "from here"}) == {"A": "from here", "B": "from a file"}


def test_every_missing_secret_is_one_line(tmp_path) -> None:
    (tmp_path / "empty").write_text("\n")
    specs = {
        "A": SecretSpec(env="MINE"),
        "B": SecretSpec(file="/nowhere/key"),
        "C": SecretSpec(file=str(tmp_path / "empty")),
    }
    with pytest.raises(ClusterError) as caught:
        environment.resolve(specs, {})
    assert str(caught.value).split("\n") == [
        "secrets.A: the environment variable MINE is not set here",
        "secrets.B: /nowhere/key cannot be read (No such file or directory)",
        f"secrets.C: {tmp_path}/empty is empty",
    ]


def test_private_at_every_moment(tmp_path) -> None:
    """A watcher never sees the file open to others, whatever the umask and whatever was there before."""
    path, seen, over = tmp_path / "secrets.sh", set(), threading.Event()

    def record_modes() -> None:
        while not over.is_set():
            try:
                seen.add(stat.S_IMODE(path.stat().st_mode))
            except FileNotFoundError:
                continue

    watcher = threading.Thread(target=record_modes)
    before = os.umask(0)
    try:
        watcher.start()
        for _ in range(300):
            environment.write_private(path, "export A=hush\n")
    finally:
        os.umask(before)
        over.set()
        watcher.join()
    assert seen == {0o600}
    assert path.read_text() == "export A=hush\n"


def test_what_others_can_read_is_replaced_not_filled(tmp_path) -> None:
    path = tmp_path / "secrets.sh"
    path.write_text("old")
    path.chmod(0o644)
    with path.open() as kept:
        environment.write_private(path, "export A=hush\n")
        assert kept.read() == "old"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_values_are_taken_out_of_what_is_said() -> None:
    environ = {"SHOESTRING_SECRETS": "A,B,C", "A": "hush", "B": ""}
    assert environment.redacted("the key is hush, and hush again", environ) == "the key is ***, and *** again"
    assert environment.redacted("nothing", environ) == "nothing"


def test_a_record_of_a_task_has_none(monkeypatch) -> None:
    monkeypatch.setenv("SHOESTRING_SECRETS", "TOKEN")
    monkeypatch.setenv("TOKEN", "hush")
    monkeypatch.setenv("RANK", "0")
    record = ranks.ended(ranks.begun(), 1, "401 for hush", "…\nkey='hush'\n")
    assert "hush" not in record.error + record.traceback and "***" in record.error


def test_the_longer_of_two_secrets_goes_whole() -> None:
    environ = {"SHOESTRING_SECRETS": "A,B", "A": "abc", "B": "abcdef"}
    assert environment.redacted("key abcdef", environ) == "key ***"


def test_no_file_of_a_job_has_a_value(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LAB_TOKEN", "hush")
    for engine in ("local", *(name for name in OPTIONS if name in ("kubernetes", "skypilot"))):
        assert "hush" not in "".join(rendered(a_job(tmp_path, engine)).values())
