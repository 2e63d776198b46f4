"""The weights of a small Llama, written by ranks in parts of a few kilobytes, and in one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import adapted
import pytorch_lightning as pl
import torch
import transformers
from torch.utils.data import DataLoader

from shoestring.callbacks.accounting.agreement import Agreement
from shoestring.recipes.schema import OptimizerSpec
from shoestring.trainer import Budget, Trainer
from shoestring.trainer.checkpoint import weights
from shoestring.trainer.tasks.language import CausalLM

PART = 100_000


class Alone(Agreement):
    """Of one rank, outside of a process group."""

    def __init__(self) -> None:
        super().__init__(1)


class Keep(pl.Callback):
    def __init__(self, home: Path) -> None:
        self.home = home

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        agreement, rank = Agreement(1), trainer.global_rank
        assert weights.save_weights(trainer, pl_module, self.home / "whole", agreement) is None
        weights.PART_BYTES = PART
        written, most = [], 0
        write = weights.write_hashed

        def noted(path: Path, parts: Any) -> dict[str, Any]:
            nonlocal most
            entry = write(path, parts)
            written.append(path.name)
            most = max(most, entry["bytes"] - 4096)  # but for the header
            return entry

        weights.write_hashed = noted
        assert weights.save_weights(trainer, pl_module, self.home / "parts", agreement) is None
        (self.home / f"wrote-{rank}.json").write_text(json.dumps(written))
        (self.home / f"held-{rank}.json").write_text(json.dumps(most))
        if rank == 0:
            pl_module.model.config.save_pretrained(self.home / "parts")


def main(strategy: str, home: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=320, **adapted.SHAPE))
    rows = [{"input_ids": (ids := torch.randint(1, 320, (16,))), "labels": ids} for _ in range(16)]
    trainer = Trainer(
        Budget(steps=2), strategy=strategy, devices=2, run_dir=home / "run", ledger=False, accelerator="cpu",
        callbacks=[Keep(home)],
    )  # fmt: skip
    trainer.fit(CausalLM(model, OptimizerSpec(lr=1e-2)), DataLoader(rows, batch_size=4))
