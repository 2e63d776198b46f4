"""Low-bit LoRA training with two ranks: frozen bases, in 32 and 16 bits, sharded or not."""

import json
import os
import warnings

import pytest
import pytorch_lightning as pl
import torch
from processes import succeed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from shoestring.callbacks import IncompatibleTechniques
from shoestring.callbacks.catalog.registry import make
from shoestring.trainer import Trainer

STEPS = 30


class Adapted(pl.LightningModule):
    """A frozen net with LoRA adapters that learns a linear map."""

    def __init__(self):
        super().__init__()
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(9, 15), nn.ReLU(), nn.Linear(15, 5))
        self.net = get_peft_model(net, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = ((self.net(batch[0]).float() - batch[1]) ** 2).mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-2)


def rank(strategy, folder):
    warnings.simplefilter("ignore")
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 9, generator=draw)
    data = TensorDataset(x, x @ torch.randn(9, 5, generator=draw) / 3)

    def train(case, *techniques):
        module = Adapted()
        Trainer(
            techniques=techniques, strategy=strategy, devices=2, accelerator="cpu", run_dir=folder / case, ledger=False,
            max_steps=STEPS, max_epochs=-1,
        ).fit(module, DataLoader(data, batch_size=16))  # fmt: skip
        return module.losses

    bits = {"weight_bits": 4, "activation_bits": 8}
    losses = {
        "plain": train("plain"),
        "apart": train("apart", make("quantization_aware", bits)),
        "bf16": train("bf16", make("mixed_precision"), make("quantization_aware", bits)),
    }
    try:
        losses["merged"] = train("merged", make("quantization_aware", {**bits, "adapters": "merged"}))
    except IncompatibleTechniques as refusal:
        losses["merged"] = str(refusal)
    (folder / f"told-{os.environ['RANK']}.json").write_text(json.dumps(losses))


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_adapters_learn_under_every_sharding(strategy, tmp_path):
    succeed(rank, strategy, tmp_path, world=2, folder=tmp_path, timeout=150)
    for each in range(2):
        report = json.loads((tmp_path / f"told-{each}.json").read_text())
        if strategy == "zero3":
            assert "zero3 gathers them one after another" in report["merged"]
        cases = {name: losses for name, losses in report.items() if not isinstance(losses, str)}
        assert len(cases) == (3 if strategy == "zero3" else 4)
        for name, losses in cases.items():
            assert len(losses) == STEPS and sum(losses[-4:]) < 0.6 * sum(losses[:4]), name
            assert (losses[0] == report["plain"][0]) == (name == "plain"), "it acts from the first step"
        assert abs(report["apart"][0] - report["plain"][0]) < 0.1 * report["plain"][0]
