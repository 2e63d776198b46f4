"""Checkpoints that are written while training goes on: published when all ranks know, waited for where they must be."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import kills_while_writing
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning import Callback, LightningModule
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from shoestring.trainer import Trainer
from shoestring.trainer.checkpoint import format as checkpoint
from shoestring.trainer.checkpoint import snapshot, state
from shoestring.trainer.checkpoint.format import Piece
from shoestring.trainer.checkpoint.hashed_files import safetensors_parts, write_hashed

pytestmark = pytest.mark.filterwarnings("ignore")


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(8, 8)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return torch.nn.functional.dropout(self.net(batch[0]), 0.2).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def run(run_dir: Path, steps: int = 9, *callbacks: Callback) -> Trainer:
    trainer = Trainer(
        run_dir=run_dir, ledger=False, accelerator="cpu", checkpoint_every="3 steps", max_steps=steps, max_epochs=-1,
        callbacks=list(callbacks),
    )  # fmt: skip
    torch.manual_seed(1)
    trainer.fit(Module(), DataLoader(TensorDataset(torch.randn(64, 8)), batch_size=4, shuffle=True))
    return trainer


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing of step 3 is written until this is set."""
    gate, write = threading.Event(), checkpoint.write_tensors

    def late(folder: Path, *args: Any) -> Any:
        if folder.name.endswith("000000003"):
            assert gate.wait(60)
        return write(folder, *args)

    monkeypatch.setattr(checkpoint, "write_tensors", late)
    return gate


class At(Callback):
    """Does something after a step, before the trainer saves it."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.act(trainer)


def test_training_goes_on_while_it_is_written_and_what_was_then_is_saved(held: threading.Event, tmp_path: Path) -> None:
    there: list[list[int]] = []

    def look(trainer: Any) -> None:
        assert trainer.monitor.checkpoints.under_way
        there.append(checkpoint.steps(tmp_path / "checkpoints"))
        held.set()

    then: list[torch.Tensor] = []

    def compare(trainer: Any) -> None:
        trainer.monitor.checkpoints.complete(trainer)
        saved = checkpoint.Pieces(tmp_path / "checkpoints" / "000000003").cut("master/net.weight", 0, 64)
        now = trainer.lightning_module.net.weight.detach().reshape(-1)
        assert torch.equal(saved, then[0].reshape(-1)) and not torch.equal(saved, now)

    keep = At(3, lambda trainer: then.append(trainer.lightning_module.net.weight.detach().clone()))
    trainer = run(tmp_path, 7, keep, At(5, look), At(6, compare))
    assert there == [[1]], "steps 4 and 5 did not wait"
    assert checkpoint.steps(tmp_path / "checkpoints") == [6, 7]
    rows = [json.loads(line) for path in (tmp_path / "events").glob("*.jsonl") for line in path.open()]
    assert [row["step"] for row in rows if row.get("event") == "checkpoint"] == [1, 3, 6, 7]
    assert trainer.summary["windows"]["checkpoint"] > 0


def test_a_failure_amid_a_write_keeps_what_is_whole(held: threading.Event, tmp_path: Path) -> None:
    def fail(trainer: Any) -> None:
        held.set()
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run(tmp_path / "broken", 9, At(5, fail))
    assert checkpoint.steps(tmp_path / "broken" / "checkpoints") == [1, 3]
    assert run(tmp_path / "broken").summary["resumed_from"] == 3
    run(tmp_path / "whole")
    ours, theirs = ((tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("broken", "whole"))
    assert ours == theirs


def test_what_is_not_finite_is_not_published(tmp_path: Path) -> None:
    folder = checkpoint.working_directory(tmp_path, 4)
    folder.mkdir()
    spoilt = {"master/w": (Piece(0, 3, (3,)), torch.tensor([1.0, float("inf"), 0.0]))}
    written = snapshot.Writing(folder, 0, {}, spoilt, None).finish()
    assert written == {"files": {}, "not_finite": "master/w", "refusal": None}
    assert not list(folder.iterdir())


def test_a_refusal_of_the_disk_is_told(tmp_path: Path) -> None:
    written = snapshot.Writing(tmp_path / "nowhere", 0, {"rank-00000.pt": b"x"}, {}, None).finish()
    assert written["refusal"] == "No such file or directory"


@pytest.mark.parametrize("missing", [None, "written-00000.json", "written-00001.json"])
def test_what_all_ranks_had_written_is_published_by_the_next_attempt(missing: str | None, tmp_path: Path) -> None:
    (tmp_path / "000000001").mkdir()  # the first of a run is waited for
    folder = checkpoint.working_directory(tmp_path, 4)
    folder.mkdir()
    for rank in range(2):
        files = checkpoint.write_states(folder, {f"rank-{rank:05d}.pt": checkpoint.packed({"rank": rank})})
        checkpoint.write_note(folder, rank, files, {"world_size": 2, "seed": 5} if rank == 0 else None)
    if missing is None:
        assert checkpoint.complete_interrupted(tmp_path) == 4
        manifest = checkpoint.verify(tmp_path / "000000004")
        assert manifest["seed"] == 5 and set(manifest["files"]) == {"rank-00000.pt", "rank-00001.pt"}
        assert not list((tmp_path / "000000004").glob("written-*"))
    else:
        (folder / missing).unlink()
        assert checkpoint.complete_interrupted(tmp_path) is None
    assert checkpoint.complete_interrupted(tmp_path) is None


def test_a_snapshot_is_apart_from_what_trains_and_takes_no_new_memory() -> None:
    live, taken = torch.arange(4.0), snapshot.Snapshot()
    first = taken.take([("w", Piece(0, 4, (4,)), live)])["w"][1]
    live += 1
    assert torch.equal(first, torch.arange(4.0))
    second = taken.take([("w", Piece(0, 4, (4,)), live)])["w"][1]
    assert second.data_ptr() == first.data_ptr() and torch.equal(second, live)


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)), max_size=6))
def test_its_library_reads_what_is_written(tmp_path_factory: pytest.TempPathFactory, given: list[Any]) -> None:
    tensors = {f"t{i}": torch.randint(0, 2, shape).to(dtype) for i, (dtype, shape) in enumerate(given)}
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    entry = write_hashed(path, safetensors_parts(tensors, {"pieces": "{}"}))
    assert entry == checkpoint.entry_of(path)
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(t.dtype == read[n].dtype and torch.equal(t.float(), read[n].float()) for n, t in tensors.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["pieces"] == "{}"


def test_killed_while_writing_leaves_an_intact_one(tmp_path: Path) -> None:
    draw, kills = random.Random(0), kills_while_writing.Found()
    (tmp_path / "run").mkdir()
    for _ in range(3):
        kills_while_writing.kill(tmp_path, draw, kills)
    assert not kills.wrong and kills.left["while writing"] + kills.left["between writes"] == 3, kills
    newest, problems = checkpoint.newest_intact(tmp_path / "run" / "checkpoints", state.check)
    assert newest is not None and not problems
