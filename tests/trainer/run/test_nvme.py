"""Optimizer state on a drive: what is refused, what a plan counts, and a run that equals the one in host memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shoestring.callbacks import RigL
from shoestring.recipes import RecipeError, load_recipe
from shoestring.trainer import Trainer, plan
from shoestring.trainer.checkpoint.format import Piece
from shoestring.trainer.checkpoint.snapshot import Snapshot
from shoestring.trainer.machine import nvme
from shoestring.trainer.machine.doctor import diagnose
from shoestring.trainer.machine.extensions import ExtensionsError, prebuild

RANKS = Path(__file__).parents[2] / "support" / "nvme_ranks.py"
ZERO3 = ["techniques=[]", "strategy.name=zero3", "strategy.offload=optimizer", "strategy.devices=2"]
real = pytest.mark.skipif("SHOESTRING_NVME_TESTS" not in os.environ, reason="builds async_io: make test-nvme")


def test_without_libaio_the_error_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "false")  # a compiler that finds nothing
    with pytest.raises(ExtensionsError, match="libaio-dev"):
        prebuild(["async_io"])
    findings = {one.name: one for one in diagnose(nvme=tmp_path)}
    assert findings["libaio"].ok is None and "libaio-dev" in findings["libaio"].fix
    assert findings["nvme"].ok is False and "libaio-dev" in findings["nvme"].found


def test_a_folder_in_memory_or_without_room_is_told(tmp_path: Path) -> None:
    assert nvme.problem(tmp_path) is None
    assert "1048576.0 GiB are needed" in str(nvme.problem(tmp_path / "new", 2.0**50))
    if Path("/dev/shm").is_dir():
        assert "is in memory (tmpfs)" in str(nvme.problem(Path("/dev/shm")))
        assert next(one for one in diagnose(nvme=Path("/dev/shm")) if one.name == "nvme").ok is False
        with pytest.raises(nvme.NvmeError, match=r"strategy\.nvme: /dev/shm"):
            nvme.claim(Path("/dev/shm"))


def test_a_process_keeps_its_folder_and_removes_those_of_the_dead(tmp_path: Path) -> None:
    code = f"import os; from shoestring.trainer.machine.nvme import claim; from pathlib import Path; claim(Path({str(tmp_path)!r})); os._exit(1)"  # noqa: E501
    subprocess.run([sys.executable, "-c", code])
    (left,) = tmp_path.glob("shoestring-*")
    first, second = nvme.claim(tmp_path), nvme.claim(tmp_path)
    assert not left.exists() and first.is_dir() and second.is_dir()
    nvme.release(first)
    nvme.release(second)
    assert not list(tmp_path.glob("shoestring-*"))


def test_a_plan_counts_the_drive_and_refuses_what_cannot_lie_there(tmp_path: Path) -> None:
    on_drive = [*ZERO3, f"strategy.nvme={tmp_path}"]
    made = plan(load_recipe("quickstart", on_drive))
    choice = next(each for each in made.choices if each.what == "drive")
    assert choice.value == str(tmp_path) and "a node" in choice.why
    assert made.fitted is not None
    # gradient 4 bytes; master and two moments 12, and 12 more of the copy for a checkpoint
    assert made.fitted.memory.drive == pytest.approx(28 * (made.fitted.inputs.size.trainable or 0))
    names = {term.name for term in made.fitted.memory.device}
    assert "buffers of the drive" in names and "offloaded optimizer states" not in names
    with pytest.raises(RecipeError, match=r"adamw \| adam \| sgd \| lion with strategy\.nvme"):
        plan(load_recipe("quickstart", [*on_drive, "optimizer.name=adamw8bit"]))
    with pytest.raises(RecipeError, match=r"strategy\.nvme.*no folder that can be written to"):
        (tmp_path / "file").touch()
        plan(load_recipe("quickstart", [*ZERO3, f"strategy.nvme={tmp_path}/file"]))


def test_techniques_that_edit_state_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"rigl reads or changes masters.*strategy\.nvme"):
        Trainer(None, [RigL(sparsity=0.5)], "zero3", offload="optimizer", nvme=tmp_path, accelerator="cpu")
    with pytest.raises(Exception, match="nvme is where zero3 keeps"):
        Trainer(None, [], "zero2", offload="optimizer", nvme=tmp_path, accelerator="cpu")


def test_a_snapshot_on_a_drive_is_one(tmp_path: Path) -> None:
    live, taken = torch.arange(6.0), Snapshot()
    first = taken.take([("w", Piece(0, 6, (6,)), live)], tmp_path)["w"][1]
    live += 1
    assert torch.equal(first, torch.arange(6.0)) and not list(tmp_path.iterdir())


def train(run_dir: Path, drive: Path | None, *kill: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RANKS), str(run_dir), str(drive or "-"), *kill]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


@real
def test_a_run_on_a_drive_equals_one_in_memory_and_resumes_to_the_bit(tmp_path: Path) -> None:
    prebuild(["async_io"])
    drive = tmp_path / "drive"
    assert train(tmp_path / "memory", None).returncode == 0
    whole = train(tmp_path / "whole", drive)
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert not list(drive.glob("shoestring-*"))
    assert train(tmp_path / "killed", drive, "5").returncode != 0
    resumed = train(tmp_path / "killed", drive)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert train(tmp_path / "moved", None, "5").returncode != 0  # from host memory to the drive
    assert train(tmp_path / "moved", drive).returncode == 0
    weights = {
        name: (tmp_path / name / "final" / "model.safetensors").read_bytes()
        for name in os.listdir(tmp_path)
        if name != "drive"
    }
    assert weights["memory"] == weights["whole"] == weights["killed"] == weights["moved"]


@real
def test_the_doctor_writes_and_reads(tmp_path: Path) -> None:
    finding = next(one for one in diagnose(nvme=tmp_path) if one.name == "nvme")
    assert finding.ok and "GiB/s written" in finding.found and not list(tmp_path.glob("shoestring-*"))
