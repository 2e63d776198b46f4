"""Our callbacks in somebody's own `pl.Trainer`, around somebody's own module: no recipe, no run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from shoestring.callbacks import (
    Accountant,
    Budget,
    GradualPruning,
    LRScaling,
    LRSchedule,
    WeightAveraging,
    clock_of,
)

pytestmark = pytest.mark.filterwarnings("ignore")


class Foreign(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
        self.rates: list[float] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader() -> DataLoader[Any]:
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=8)


def plain(*callbacks: pl.Callback, **how: Any) -> tuple[pl.Trainer, Foreign]:
    settings = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False, **how,
    }  # fmt: skip
    trainer, module = pl.Trainer(callbacks=list(callbacks), **settings), Foreign()
    trainer.fit(module, loader())
    return trainer, module


def test_a_schedule_follows_lightnings_own_end() -> None:
    _, module = plain(LRSchedule(shape="linear"), max_epochs=2)
    assert module.rates == pytest.approx([1e-2 * (1 - (k + 0.5) / 16) for k in range(16)])


def test_a_budget_ends_the_run_annealed() -> None:
    accountant = Accountant(Budget(samples=8 * 21))
    trainer, module = plain(LRSchedule(), accountant, max_epochs=-1)
    assert trainer.global_step == 21
    assert accountant.clock.spend.samples == 8 * 21
    assert accountant.stopped_by == "samples"
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0
    assert module.rates[-1] < 0.05 * module.rates[0]


def test_techniques_together() -> None:
    pruning = GradualPruning(sparsity=0.75, start="0%", end="50%", every=2)
    _, module = plain(LRScaling(base_batch=4), pruning, WeightAveraging(decay=0.5), max_epochs=3)
    for layer in (module.net[0], module.net[2]):
        assert (layer.weight == 0).float().mean() == pytest.approx(0.75, abs=0.01)
        assert (layer.bias != 0).all()
    assert module.rates[0] == pytest.approx(1e-2 * 2**0.5)


def test_masks_and_averages_survive_lightnings_own_checkpoint(tmp_path: Path) -> None:
    def callbacks() -> list[pl.Callback]:
        return [GradualPruning(sparsity=0.5, start="0%", end="50%", every=2), WeightAveraging(decay=0.8)]

    keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    _, whole = plain(*callbacks(), keep, max_steps=16, enable_checkpointing=True)
    path = tmp_path / "step=8.ckpt"
    resumed = pl.Trainer(
        callbacks=callbacks(), max_steps=16, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    module = Foreign()
    resumed.fit(module, loader(), ckpt_path=path)
    for ours, theirs in zip(whole.parameters(), module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Steps(pl.Callback):
    """(clock step, horizon, progress) after every optimizer step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int | None, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        clock = clock_of(trainer)
        if not self.seen or self.seen[-1][0] != clock.step:
            self.seen.append((clock.step, clock.horizon, clock.progress))


@pytest.mark.parametrize("with_accountant", [False, True])
@pytest.mark.parametrize(
    ("how", "end"),
    [
        ({"max_steps": 12}, 12),
        ({"max_epochs": 3, "accumulate_grad_batches": 3}, 9),  # eight batches: windows of three, three and two
        ({"max_epochs": 3, "max_steps": 4, "accumulate_grad_batches": 3}, 4),
        ({"max_epochs": 2, "limit_train_batches": 5}, 10),
        ({"max_steps": 7, "max_epochs": -1}, 7),
    ],
    ids=str,
)
def test_the_clock_ends_with_anybodys_trainer(how: dict[str, Any], end: int, with_accountant: bool) -> None:
    steps = Steps()
    trainer, _ = plain(*([Accountant()] if with_accountant else []), steps, **how)
    assert trainer.global_step == end
    assert [step for step, _, _ in steps.seen][-1] == end
    assert {horizon for _, horizon, _ in steps.seen} == {end}
    assert steps.seen[-1][2] == 1.0 and steps.seen[0][2] == pytest.approx(steps.seen[0][0] / end)


def test_spend_goes_on_in_lightnings_own_checkpoint(tmp_path: Path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    first = Accountant(Budget(samples=8 * 12), usd_per_device_hour=3600.0)
    plain(LRSchedule(), first, keep, max_epochs=-1, enable_checkpointing=True)
    again = Accountant(Budget(samples=8 * 20), usd_per_device_hour=3600.0)
    resumed = pl.Trainer(
        callbacks=[LRSchedule(), again], max_epochs=-1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    resumed.fit(Foreign(), loader(), ckpt_path=tmp_path / "step=8.ckpt")
    assert again.clock.spend.samples == 8 * 20 and resumed.global_step == 20
    assert again.clock.spend.usd == pytest.approx(again.clock.spend.seconds)
    assert (
        again.clock.spend.seconds > again.account.spending.windows.total()
    )  # what the first attempt had spent at its checkpoint
    assert resumed.optimizers[0].param_groups[0]["lr"] == 0


def test_manual_optimization_has_a_budget_too() -> None:
    class Manual(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()

    accountant = Accountant(Budget(samples=8 * 5))
    trainer = pl.Trainer(
        callbacks=[LRSchedule(), accountant], max_epochs=-1, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Manual(), loader())
    assert (trainer.global_step, accountant.clock.step, accountant.clock.spend.samples) == (5, 5, 40)
