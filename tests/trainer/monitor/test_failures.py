"""Many ranks fail together, and one of them says why."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from processes import last_words, run
from small import QUIET, Small, loader

from shoestring.exits import FAILURE
from shoestring.trainer import Budget, Trainer
from shoestring.trainer.ledger import read

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


class Fail(pl.Callback):
    def __init__(self, ranks: tuple[int, ...], how: str) -> None:
        self.ranks, self.how = ranks, how

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 3 and trainer.global_rank in self.ranks:
            if self.how == "gone":
                os._exit(9)
            raise ArithmeticError("these numbers are odd")


def fails(folder: Path, ranks: tuple[int, ...], how: str) -> None:
    trainer = Trainer(
        Budget(steps=8), run_dir=folder, accelerator="cpu", ledger=False, strategy="ddp", devices=2,
        callbacks=[Fail(ranks, how)],
    )  # fmt: skip
    trainer.fit(Small(), loader())


def test_the_rank_that_fails_is_the_one_that_speaks(tmp_path: Path) -> None:
    assert run(fails, tmp_path / "run", (1,), "raise", world=2, folder=tmp_path) == [FAILURE, FAILURE]
    survivor, failed = ((tmp_path / f"rank-{rank}.log").read_text() for rank in (0, 1))
    assert "these numbers are odd" in failed
    assert "Traceback" not in survivor and "lost another rank" not in survivor, survivor
    (row,) = [row.fields for row in read(tmp_path / "run" / "events", rank=0) if row.fields.get("event") == "error"]
    assert row["reason"] == "rank 1 has failed"


def test_a_rank_that_is_gone_is_said_in_a_line(tmp_path: Path) -> None:
    assert run(fails, tmp_path / "run", (1,), "gone", world=2, folder=tmp_path) == [FAILURE, 9], last_words(tmp_path)
    survivor = (tmp_path / "rank-0.log").read_text()
    assert survivor.count("lost another rank") == 1 and "Traceback" not in survivor, survivor
