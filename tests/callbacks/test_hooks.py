"""The whole order of a two-step fit as one text: what a technique may rely on. SHOESTRING_GOLDEN=write rewrites it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from shoestring.callbacks.contract import Card, Technique
from shoestring.trainer import Budget, Trainer

pytestmark = pytest.mark.filterwarnings("ignore")
GOLDEN = Path(__file__).parents[1] / "golden" / "hooks.txt"
HOOKS = [n for n in dir(pl.Callback) if n.startswith(("on_", "setup", "teardown")) and "checkpoint" not in n]


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 2)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def spy(said: list[str]) -> Technique:
    def note(hook: str) -> Any:
        return lambda self, *args, **kwargs: said.append(hook)

    members: dict[str, Any] = {hook: note(hook) for hook in HOOKS}
    members |= {"card": Card(name="spy", does="listens"), "__init__": lambda self: None}
    members["state_dict"] = lambda self: said.append("state_dict") or {}
    return type("Spy", (Technique, pl.Callback), members)()


def test_hooks_come_in_the_golden_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOESTRING_HOME", str(tmp_path / "home"))
    said: list[str] = []
    data = DataLoader(TensorDataset(torch.ones(16, 4)), batch_size=2)
    trainer = Trainer(
        Budget(steps=2), [spy(said)], run_dir=tmp_path / "run", accelerator="cpu", accumulate_grad_batches=2,
        num_sanity_val_steps=0, limit_val_batches=1,
    )  # fmt: skip
    trainer.fit(Module(), data, data)
    text = "\n".join(said) + "\n"
    if os.environ.get("SHOESTRING_GOLDEN") == "write":
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()
