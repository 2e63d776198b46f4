"""Averages are taken in float32 whatever the weights are in, and of models whose every number they average."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from shoestring.callbacks import LRSchedule, MovementPruning, WeightAveraging
from shoestring.callbacks.contract import IncompatibleTechniques
from shoestring.callbacks.optimization.weight_averaging import ema_, kept, normalized_by_batch
from shoestring.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class Rising(pl.LightningModule):
    """Its weights rise by 1/64 a step, which bfloat16 holds exactly."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.net = nn.Linear(4, 8, bias=False)
        nn.init.ones_(self.net.weight)
        self.norm = norm or nn.Identity()

    def training_step(self, batch, batch_idx):
        return -self.norm(self.net(torch.ones_like(batch[0]))).sum() / len(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1 / 64)


def train(tmp_path, module, *techniques, steps, **options) -> Trainer:
    data = DataLoader(TensorDataset(torch.ones(64, 4)), batch_size=2)
    schedule = [LRSchedule(shape="constant")]
    trainer = Trainer(
        techniques=[*techniques, *schedule], run_dir=tmp_path, ledger=False, accelerator="cpu", max_steps=steps,
        max_epochs=-1, **options,
    )  # fmt: skip
    trainer.monitor.totals.peak_flops = 1e9
    trainer.fit(module, data)
    return trainer


def test_a_thousandth_is_added_to_an_average_of_bfloat16_weights():
    weights = torch.ones(3, dtype=torch.bfloat16)
    average = kept(weights)
    for _ in range(100):
        ema_(average, weights + 1, 0.999)
    assert average.dtype == torch.float32
    assert torch.allclose(average, torch.tensor(2 - 0.999**100))
    assert kept(weights.double()).dtype == torch.float64


def test_averages_and_movement_scores_of_a_run_in_bfloat16(tmp_path):
    module = Rising()
    averaging, movement = WeightAveraging(decay=0.99), MovementPruning(sparsity=0.5, start="90%", end="95%")
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(float(pl_module.net.weight[0, 0]))

        def on_train_end(self, trainer, pl_module):
            self.scores = movement.fragments()["score"]["net.weight"]
            self.average = averaging.fragments()["ema"]["net.weight"].clone()

    watch = Watch()
    train(tmp_path, module, averaging, movement, steps=40, precision="bf16-true", callbacks=[watch])
    wanted, scores = seen[0], [1.0, *seen]
    for weight in seen[1:]:
        wanted = 0.99 * wanted + 0.01 * weight
    assert watch.average.dtype == watch.scores.dtype == torch.float32
    assert torch.allclose(watch.average[0], torch.tensor(wanted), rtol=1e-5)
    assert torch.allclose(watch.scores[0], torch.tensor(sum(scores[:-1])), rtol=1e-5)  # - w dL/dw, dL/dw = -1


def test_running_statistics_of_batches_belong_to_no_average(tmp_path):
    assert normalized_by_batch(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))) == "1"
    still = nn.BatchNorm1d(2, track_running_stats=False)
    assert normalized_by_batch(nn.Sequential(nn.LayerNorm(2), nn.GroupNorm(1, 2), still)) is None
    with pytest.raises(IncompatibleTechniques, match=r"'norm' normalises by running statistics"):
        train(tmp_path / "on", Rising(nn.BatchNorm1d(8)), WeightAveraging(), steps=1)
    trainer = train(tmp_path / "off", Rising(nn.BatchNorm1d(8)), WeightAveraging.noop(), steps=1)
    assert trainer.summary["steps"] == 1
