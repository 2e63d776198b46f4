"""Tokens are those of the data; what rows are padded with is counted apart, whatever is done to a batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from small import QUIET, WIDTH, Small, train
from torch.utils.data import DataLoader, Dataset

from shoestring.callbacks import SequenceLengthWarmup
from shoestring.callbacks.accounting.accountant import Accountant
from shoestring.callbacks.forward.training_step import Chosen, choose_samples
from shoestring.trainer import Budget, Ledger
from shoestring.trainer.data.tokens import PadTokens

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
LENGTHS = np.array([WIDTH, 30, 12, 40, 9, 33, 10, 21])  # of 8 samples, read twice in four steps of four


class Rows(Dataset):
    """Token numbers of LENGTHS; classes: one label a row, so that batches have a mask."""

    deterministic = True

    def __init__(self, *, known: bool, classes: bool = False, group: bool = True) -> None:
        self.classes = classes
        if known:
            self.token_counts, self.group_by_length = LENGTHS, group

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(int(LENGTHS[index]))
        return {"input_ids": ids, "labels": torch.tensor(1) if self.classes else ids.clone()}


def loader(**options: Any) -> DataLoader:
    return DataLoader(Rows(**options), batch_size=4, shuffle=True, collate_fn=PadTokens(0))


def fitted(folder: Path, data: DataLoader, **options: Any) -> dict[str, Any]:
    return train(folder, Budget(steps=4), data=data, **options).summary


@pytest.mark.parametrize("options", [{"known": True}, {"known": False, "classes": True}], ids=["counts", "mask"])
def test_tokens_are_those_of_the_data(tmp_path: Path, options: dict[str, Any]) -> None:
    total = fitted(tmp_path, loader(**options))
    assert total["samples"] == 16 and total["tokens"] == 2 * LENGTHS.sum()
    assert total["padding_share"] == total["padding"] / (total["padding"] + total["tokens"]) > 0.1


def test_without_a_mask_and_without_counts_every_position_is_a_token(tmp_path: Path) -> None:
    total = fitted(tmp_path, loader(known=False))
    assert total["padding"] == 0 and total["tokens"] > 2 * LENGTHS.sum()


def test_grouping_by_length_pads_less_and_the_ledger_shows_it(tmp_path: Path) -> None:
    mixed = fitted(tmp_path / "mixed", loader(known=True, group=False))
    grouped = fitted(tmp_path / "grouped", loader(known=True), ledger=True)
    assert grouped["tokens"] == mixed["tokens"] and grouped["padding"] < mixed["padding"]
    ledger = Ledger()
    ledger.refresh()
    run = next(run for run in ledger.runs() if run.run_dir == str(tmp_path / "grouped"))
    assert run.padding_share == pytest.approx(grouped["padding_share"]) and run.tokens == grouped["tokens"]


@pytest.mark.parametrize("options", [{"known": True}, {"known": False, "classes": True}], ids=["counts", "mask"])
def test_what_a_technique_has_cut_off_is_not_counted(tmp_path: Path, options: dict[str, Any]) -> None:
    warmup = SequenceLengthWarmup(start=16, until="1000000 steps", multiple=8)
    total = fitted(tmp_path, loader(**options), techniques=[warmup])
    assert total["tokens"] == 2 * LENGTHS.clip(max=16).sum()


class Choose(pl.Callback):
    """Trains on some rows of each batch: those that `rows` gives of its inputs."""

    def __init__(self, rows: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.rows = rows

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        choose_samples(pl_module, self)

    def choose(self, step: Any) -> Chosen:
        return Chosen(self.rows(step.batch["input_ids"]))


@pytest.mark.parametrize("options", [{"known": True}, {"known": False, "classes": True}], ids=["counts", "mask"])
def test_rows_that_a_technique_leaves_out_are_not_counted(tmp_path: Path, options: dict[str, Any]) -> None:
    seen: list[int] = []

    def longest(ids: torch.Tensor) -> torch.Tensor:
        lengths = (ids[:, 1:] != 0).sum(1) + 1
        seen.append(int(lengths.max()))
        return lengths.argmax()[None]

    twice = [Choose(longest), Choose(lambda ids: torch.tensor([0]))]
    total = fitted(tmp_path, loader(**options), callbacks=twice)
    assert total["samples"] == 4 and total["tokens"] == sum(seen)


def test_a_plain_trainer_counts_by_the_mask() -> None:
    accountant = Accountant()
    trainer = pl.Trainer(
        max_steps=2, callbacks=[accountant], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Small(), loader(known=False, classes=True))
    assert accountant.clock.spend.tokens == LENGTHS.sum() and accountant.clock.spend.padding > 0
