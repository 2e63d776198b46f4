"""Checkpoints on disk under faults: half-written, truncated, flipped, full disk, hostile; and slices cut anew."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning import Callback, LightningModule
from torch.utils.data import DataLoader, TensorDataset

from shoestring.trainer import Budget, Trainer
from shoestring.trainer.checkpoint import format as checkpoint
from shoestring.trainer.checkpoint import pruning
from shoestring.trainer.checkpoint.format import DamagedCheckpoint, Piece
from shoestring.trainer.checkpoint.saver import CannotSave
from shoestring.trainer.checkpoint.weights import weights_problem

pytestmark = pytest.mark.filterwarnings("ignore")


def write(root: Path, step: int, value: float = 1.0) -> Path:
    folder = checkpoint.working_directory(root, step)
    folder.mkdir(parents=True)
    files = checkpoint.write_common(folder, {"step": step})
    files |= checkpoint.write_rank(folder, 0, {"x": 1}, {"master/w": (Piece(0, 64, (8, 8)), torch.full((64,), value))})
    return checkpoint.publish(root, step, files, {"world_size": 1})


def test_written_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path, 7, 2.5)
    assert checkpoint.verify(folder)["step"] == 7
    assert checkpoint.read_state(folder / "state.pt") == {"step": 7}
    assert torch.equal(checkpoint.Pieces(folder).cut("master/w", 10, 5), torch.full((5,), 2.5))
    assert (tmp_path / "latest").read_text() == "000000007"
    assert not list(tmp_path.glob(".writing*"))


def damage_truncate(folder: Path) -> None:
    path = folder / "tensors-00000.safetensors"
    os.truncate(path, path.stat().st_size - 3)


def damage_flip(folder: Path) -> None:
    path = folder / "tensors-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x10
    path.write_bytes(content)


def damage_missing(folder: Path) -> None:
    (folder / "rank-00000.pt").unlink()


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 1, "step"')


def damage_no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def damage_manifest_of_another_kind(folder: Path) -> None:
    (folder / "manifest.json").write_text('["format", 1]')


def damage_manifest_without_sums(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.pt"].pop("sha256")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def damage_manifest_without_files(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def damage_from_the_future(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


DAMAGES = [
    damage_truncate, damage_flip, damage_missing, damage_manifest, damage_no_manifest, damage_manifest_of_another_kind,
    damage_manifest_without_sums, damage_manifest_without_files, damage_from_the_future,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, damage: Any) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    damage(bad)
    newest, problems = checkpoint.newest_intact(tmp_path)
    assert newest == good
    assert len(problems) == 1 and str(bad) in problems[0]
    damage(good)
    with pytest.raises(DamagedCheckpoint, match="no intact checkpoint is left"):
        checkpoint.newest_intact(tmp_path)


def test_leftovers_of_a_killed_writer_are_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1)
    checkpoint.working_directory(tmp_path, 2).mkdir()
    assert checkpoint.steps(tmp_path) == [1]
    pruning.clear_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["000000001"]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 5, 30, 200):
        write(tmp_path, step)
    pruning.prune(tmp_path, 2, newest=200)
    assert checkpoint.steps(tmp_path) == [30, 200]
    pruning.delete_pruned(tmp_path)
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"000000030", "000000200"}


def test_what_a_killed_run_had_not_deleted_to_the_end_goes_before_the_next_is_written(tmp_path: Path) -> None:
    for step in (1, 5):
        write(tmp_path, step)
    pruning.prune(tmp_path, 1, newest=5)
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 2, "out of the way at once, deleted later"
    assert checkpoint.newest_intact(tmp_path)[0] == tmp_path / "000000005"
    pruning.clear_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["000000005"]


@pytest.mark.parametrize(("keep", "left"), [(1, [31]), (2, [30, 31]), (9, [1, 5, 30, 31])])
def test_a_damaged_one_that_was_passed_over_does_not_count_among_the_kept(
    tmp_path: Path, keep: int, left: list[int]
) -> None:
    for step in (1, 5, 30, 200):
        write(tmp_path, step)
    damage_flip(tmp_path / "000000200")
    write(tmp_path, 31)  # the run has gone on from step 30
    pruning.prune(tmp_path, keep, newest=31)
    assert checkpoint.steps(tmp_path) == left
    assert (tmp_path / "000000200.passed-over" / "manifest.json").exists(), "put aside, for whoever can repair it"
    assert checkpoint.newest_intact(tmp_path)[0] == tmp_path / "000000031"
    assert (tmp_path / "latest").read_text() == "000000031"


def test_every_flipped_bit_of_a_manifest_shows(tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    path, whole = folder / "manifest.json", (folder / "manifest.json").read_bytes()
    for position, byte in enumerate(whole):
        for bit in range(8):
            path.write_bytes(whole[:position] + bytes([byte ^ 1 << bit]) + whole[position + 1 :])
            with pytest.raises(DamagedCheckpoint):
                checkpoint.read_manifest(folder)
    path.write_bytes(whole)
    assert checkpoint.verify(folder)["step"] == 7


def test_slices_that_nobody_stored_are_missed(tmp_path: Path) -> None:
    checkpoint.write_rank(tmp_path, 0, {}, {"w": (Piece(0, 3, (8,)), torch.ones(3))})
    checkpoint.write_rank(tmp_path, 1, {}, {"w": (Piece(5, 3, (8,)), torch.ones(3))})
    pieces = checkpoint.Pieces(tmp_path)
    assert "w" in pieces and list(pieces) == ["w"] and pieces.shape("w") == (8,)
    with pytest.raises(DamagedCheckpoint, match="w: 4 of 6 elements are in the checkpoint"):
        pieces.cut("w", 1, 6)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    torch.save({"x": Payload(tmp_path / "owned")}, tmp_path / "state.pt")
    with pytest.raises(DamagedCheckpoint, match="more than tensors and plain data"):
        checkpoint.read_state(tmp_path / "state.pt")
    assert not (tmp_path / "owned").exists()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.lists(st.integers(0, 60), max_size=4), st.lists(st.integers(0, 60), max_size=4))
def test_slices_are_cut_anew_for_any_number_of_ranks(
    tmp_path_factory: pytest.TempPathFactory, numel: int, writers: list[int], readers: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    whole = torch.arange(numel, dtype=torch.float32)

    def parts(cuts: list[int]) -> Iterator[tuple[int, int]]:
        edges = [0, *sorted(min(c, numel) for c in cuts), numel]
        return pairwise(edges)

    for rank, (a, b) in enumerate(parts(writers)):
        held = {"w": (Piece(a, b - a, (numel,)), whole[a:b])} if a < b else {}
        checkpoint.write_rank(folder, rank, {}, held)
    pieces = checkpoint.Pieces(folder)
    for a, b in parts(readers):
        assert torch.equal(pieces.cut("w", a, b - a), whole[a:b])


class Module(LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(8, width)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return torch.nn.functional.dropout(self.net(batch[0]), 0.2).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def run(run_dir: Path, steps: int, width: int = 8, **how: Any) -> Trainer:
    trainer = Trainer(Budget(steps=steps), run_dir=run_dir, accelerator="cpu", checkpoint_every="2 steps", **how)
    trainer.fit(Module(width), DataLoader(TensorDataset(torch.randn(64, 8)), batch_size=4, shuffle=True))
    return trainer


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip], ids=lambda d: d.__name__)
def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one(
    tmp_path: Path, damage: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SHOESTRING_HOME", str(tmp_path / "home"))
    torch.manual_seed(1)
    run(tmp_path / "whole", 10)
    torch.manual_seed(1)
    with pytest.raises(InterruptedError):
        run(tmp_path / "hurt", 10, callbacks=[StopAt(7)])
    damage(tmp_path / "hurt" / "checkpoints" / "000000006")
    torch.manual_seed(1)
    trainer = run(tmp_path / "hurt", 10)
    assert trainer.summary["resumed_from"] == 4
    assert "000000006" in caplog.text
    events = (tmp_path / "hurt" / "events").glob("*.jsonl")
    assert any("checkpoint_damaged" in path.read_text() for path in events)
    ours, theirs = ((tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("hurt", "whole"))
    assert ours == theirs


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB of its own."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place]).returncode:
        pytest.skip("needs root and the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOESTRING_HOME", str(tmp_path / "home"))
    (small_disk / "run").symlink_to(tmp_path / "run")
    (tmp_path / "run" / "events").mkdir(parents=True)
    (small_disk / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(small_disk / "checkpoints")

    class Fill(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 5:
                trainer.monitor.checkpoints.complete(trainer)
                for thread in threading.enumerate():
                    if thread.name == "pruning":  # which makes room
                        thread.join()
                with (small_disk / "filler").open("wb") as file, pytest.raises(OSError, match="No space"):
                    file.write(b"x" * (8 << 20))

    trainer = run(tmp_path / "run", 8, width=8000, callbacks=[Fill()])
    assert trainer.summary["steps"] == 8
    rows = [json.loads(line) for path in (tmp_path / "run" / "events").glob("*.jsonl") for line in path.open()]
    failed = [row for row in rows if row.get("event") == "checkpoint_failed"]
    assert failed and all("No space" in row["reason"] for row in failed)
    newest, problems = checkpoint.newest_intact(small_disk / "checkpoints")
    assert newest is not None and int(newest.name) <= 4
    assert not problems
    assert not list((small_disk / "checkpoints").glob(".writing*"))


def test_a_run_whose_end_finds_no_room_says_so_and_goes_on_once_there_is(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOESTRING_HOME", str(tmp_path / "home"))
    torch.manual_seed(1)
    run(tmp_path / "whole", 8, width=4000)

    class Fill(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 5:
                trainer.monitor.checkpoints.complete(trainer)
                for thread in threading.enumerate():
                    if thread.name == "pruning":  # which makes room
                        thread.join()
                with (small_disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                    while True:
                        file.write(b"x" * 4096)

    torch.manual_seed(1)
    with pytest.raises(CannotSave, match=r"ended at step 8.*final weights cannot be written.*No space.*Make room"):
        run(small_disk / "run", 8, width=4000, callbacks=[Fill()])
    assert checkpoint.newest_intact(small_disk / "run" / "checkpoints")[0].name == "000000004"
    assert not (small_disk / "run" / "final").exists()
    (small_disk / "filler").unlink()
    torch.manual_seed(1)
    assert run(small_disk / "run", 8, width=4000).summary["resumed_from"] == 4
    ours, theirs = (
        (home / "final" / "model.safetensors").read_bytes() for home in (small_disk / "run", tmp_path / "whole")
    )
    assert ours == theirs


def test_state_that_would_not_survive_is_refused_at_the_first_step(tmp_path: Path) -> None:
    class Hoards(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"module": torch.nn.Linear(1, 1)}

    with pytest.raises(CannotSave, match=r"step 1 cannot be read back[\s\S]*only tensors and plain data"):
        run(tmp_path, 8, callbacks=[Hoards()])
    assert run(tmp_path, 8).summary["resumed_from"] is None  # fixed, it starts: nothing unreadable is in the way


@pytest.mark.parametrize(("keep", "left"), [(1, [8]), (3, [4, 6, 8])])
def test_a_run_keeps_as_many_checkpoints_as_requested(tmp_path: Path, keep: int, left: list[int]) -> None:
    run(tmp_path, 8, keep_checkpoints=keep)
    assert checkpoint.steps(tmp_path / "checkpoints") == left


def _stray_file(folder: Path) -> None:
    (folder / "tensors-00007.safetensors").write_bytes(b"left by somebody else")


def _hollow_state(folder: Path) -> None:
    """Damage that whoever did it has sealed again."""
    state = checkpoint.read_state(folder / "state.pt")
    del state["loops"]
    torch.save(state, folder / "state.pt")
    manifest = checkpoint.read_manifest(folder)
    manifest["files"]["state.pt"] = checkpoint.entry_of(folder / "state.pt")
    (folder / "manifest.json").write_text(checkpoint.sealed(manifest))


def _hollow_callbacks(folder: Path) -> None:
    state = checkpoint.read_state(folder / "state.pt")
    state["callbacks"]["Monitor"] = {"clock": {}}
    torch.save(state, folder / "state.pt")
    manifest = checkpoint.read_manifest(folder)
    manifest["files"]["state.pt"] = checkpoint.entry_of(folder / "state.pt")
    (folder / "manifest.json").write_text(checkpoint.sealed(manifest))


def _torn_identity(folder: Path) -> None:
    (folder.parent.parent / "run.json").write_text('{"id": "0123')


@pytest.mark.parametrize(
    ("damage", "resumed_from"), [(_stray_file, 6), (_hollow_state, 4), (_hollow_callbacks, 4), (_torn_identity, 6)]
)
def test_a_run_goes_on_whatever_lies_beside_or_in_its_newest_checkpoint(
    tmp_path: Path, damage: Any, resumed_from: int
) -> None:
    torch.manual_seed(1)
    run(tmp_path / "whole", 10)
    torch.manual_seed(1)
    with pytest.raises(InterruptedError):
        run(tmp_path / "hurt", 10, callbacks=[StopAt(7)])
    before = json.loads((tmp_path / "hurt" / "run.json").read_text())
    damage(tmp_path / "hurt" / "checkpoints" / "000000006")
    torch.manual_seed(1)
    assert run(tmp_path / "hurt", 10).summary["resumed_from"] == resumed_from
    ours, theirs = ((tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("hurt", "whole"))
    assert ours == theirs
    assert json.loads((tmp_path / "hurt" / "run.json").read_text()) == before


@pytest.mark.parametrize("harm", [lambda data: data[:-7], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_damaged_final_weights_are_written_anew_by_the_same_command(tmp_path: Path, harm: Any) -> None:
    run(tmp_path, 4)
    final = tmp_path / "final" / "model.safetensors"
    whole = final.read_bytes()
    assert weights_problem(final.parent) is None
    final.write_bytes(harm(whole))
    assert "model.safetensors" in str(weights_problem(final.parent))
    assert run(tmp_path, 4).summary["resumed_from"] == 4
    assert final.read_bytes() == whole and weights_problem(final.parent) is None
