"""A run's figures where people look for them: W&B's own file, the summary, the ledger."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
from pytorch_lightning import LightningModule
from torch.utils.data import DataLoader, Dataset

from shoestring.trainer import Budget, Ledger, Trainer

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))
from wandb_reader import history

pytestmark = pytest.mark.filterwarnings("ignore")


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(index, index + 16) % 32
        return {"input_ids": ids, "labels": ids}


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Embedding(32, 16), torch.nn.Linear(16, 32))

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.net(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def run(home: Path, monkeypatch: pytest.MonkeyPatch, **how: object) -> Trainer:
    monkeypatch.setenv("SHOESTRING_HOME", str(home / "home"))
    trainer = Trainer(
        Budget(steps=30), run_dir=home / "run", usd_per_device_hour=1.0, accelerator="cpu", **how,  # type: ignore[arg-type]
    )  # fmt: skip
    trainer.fit(Tiny(), DataLoader(Rows(), batch_size=8))
    return trainer


def test_wandb_offline_holds_what_the_run_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = run(tmp_path, monkeypatch, wandb="offline")
    [file] = (tmp_path / "run").rglob("*.wandb")
    rows = [row for row in history(file) if "loss" in row]
    assert rows[-1]["step"] == 30
    for key in ("loss", "tokens_per_second", "mfu", "usd", "kwh"):
        assert all(isinstance(row[key], float) and row[key] > 0 for row in rows[1:]), key
    assert rows[-1]["usd"] <= trainer.summary["usd"]
    assert rows[0]["loss"] > rows[-1]["loss"]


def test_a_run_completes_with_wandb_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    began = time.monotonic()
    trainer = run(tmp_path, monkeypatch, wandb="online")
    assert trainer.summary["steps"] == 30
    assert time.monotonic() - began < 60  # W&B's own wait for a server is 90 s
    [file] = (tmp_path / "run").rglob("*.wandb")
    assert any("loss" in row for row in history(file))


def test_the_summary_and_the_ledger_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = run(tmp_path, monkeypatch).summary
    assert summary["tokens"] == 30 * 8 * 16
    assert summary["samples"] == 30 * 8
    # 16 x 32 weights: 2 FLOPs forward, 2 for the weights' and 2 for the inputs' gradient, a token
    assert summary["flops_counted"] == summary["flops_realised"] == 6 * 16 * 32 * summary["tokens"]
    assert sum(summary["windows"].values()) == pytest.approx(summary["seconds"], rel=0.05)
    assert summary["usd"] == pytest.approx(summary["device_seconds"] / 3600)
    [row] = Ledger(tmp_path / "home" / "ledger.sqlite").runs()
    assert (row.steps, row.tokens, row.status) == (30, 30 * 8 * 16, "finished")
    assert row.usd == pytest.approx(summary["usd"])
    assert row.kwh_source == summary["kwh_source"]
