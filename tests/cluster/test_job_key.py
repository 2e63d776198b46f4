"""The key of a job's nodes: made at every launch, given as a secret, and in no file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from jobs import a_job

from shoestring.cluster import registry
from shoestring.cluster.node.rendezvous import KEY

SECRETS = {"TOKEN": "hush"}
KUBECTL = """#!/bin/sh
cat > "$OUT/created-$(ls "$OUT" | wc -l)"
echo '{"apiVersion": "v1", "kind": "JobSet", "metadata": {"name": "digits", "uid": "7"}}'
"""
SKY = f"""#!/bin/sh
echo "$*" > "$OUT/words"
printf '%s' "${KEY}" > "$OUT/key"
echo "Managed Job ID: 7"
"""


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Submits to an engine whose command writes down what it is given, and returns that."""
    for name, script in (("kubectl", KUBECTL), ("sky", SKY)):
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(script)
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def submit(engine: str, turn: int, **more) -> tuple[str, Path]:
        out = tmp_path / f"{engine}-{turn}"
        out.mkdir()
        monkeypatch.setenv("OUT", str(out))
        job, launcher = a_job(tmp_path, engine, **more), registry.engine(engine)
        files = launcher.render(job)
        launcher.submit(job, files, SECRETS)
        return "".join(files.values()), out

    return submit


def test_kubernetes_keeps_it_in_the_jobs_secret(submitted) -> None:
    keys = []
    for turn in range(2):
        text, out = submitted("kubernetes", turn)
        [secret] = [i for i in json.loads((out / "created-1").read_text())["items"] if i["kind"] == "Secret"]
        keys.append(secret["stringData"].pop(KEY))
        assert secret["stringData"] == SECRETS and keys[-1] not in text
    assert len(set(keys)) == 2 and min(map(len, keys)) == 64


def test_skypilot_takes_it_from_the_launchs_environment(submitted) -> None:
    keys = []
    for turn in range(2):
        text, out = submitted("skypilot", turn)
        keys.append((out / "key").read_text())
        words = (out / "words").read_text()
        assert f"--secret {KEY}" in words and keys[-1] not in words + text
    assert len(set(keys)) == 2 and min(map(len, keys)) == 64


@pytest.mark.parametrize("engine", ["kubernetes", "skypilot"])
def test_a_node_alone_needs_none(submitted, engine: str) -> None:
    text, out = submitted(engine, 0, nodes=1)
    assert KEY not in text and KEY not in "".join(p.read_text() for p in out.iterdir() if p.name != "key")
