"""Steps `sharded-state` and `offload`: what techniques see of states that ZeRO keeps elsewhere."""

from __future__ import annotations

import logging
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from checks import Checks, main
from random_tokens import Unsaved
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy import ACCUMULATE, Explode, Exploded, held_out, loader, toy

from shoestring.callbacks.catalog.registry import make
from shoestring.callbacks.contract import Technique
from shoestring.callbacks.parameters.accessor import shards_of
from shoestring.trainer import Trainer


def kept(trainer: pl.Trainer) -> dict[str, tuple[str, torch.Tensor]]:
    """All that techniques keep of parameters: "<technique> <state>" of the last one -> its parameter, the tensor."""
    techniques = [c for c in trainer.callbacks if isinstance(c, Technique)]
    fragments = [(t.card.name, state, named) for t in techniques for state, named in t.fragments().items()]
    return {f"{t} {state} {name}": (name, value) for t, state, named in fragments for name, value in named.items()}


class Look(pl.Callback):
    """After each step: sums over ranks, and where masters, states and what techniques keep of them lie."""

    def __init__(self) -> None:
        self.sums: list[float] = []
        self.apart: set[str] = set()
        self.seen = 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        shards = shards_of(trainer, module)
        name = next(iter(shards.slices))
        self.sums += shards.total(torch.ones(2, device=shards.master(name).device)).tolist()
        for what, (parameter, tensor) in kept(trainer).items():
            self.seen += 1
            if tensor.device != shards.master(parameter).device:
                self.apart.add(f"{what} on {tensor.device}, its master on {shards.master(parameter).device}")


def sharded_state(checks: Checks) -> None:
    looked, resumed = {}, {}
    for offload in ("none", "optimizer"):
        for crash in (5, None):
            look = Look()
            techniques = [make("gradual_pruning", {"sparsity": 0.6, "end": "50%"}), make("weight_averaging", {})]
            trainer = Trainer(
                techniques=techniques, strategy="zero2", offload=offload, devices=1, accelerator=checks.device,
                run_dir=Path(offload), ledger=False, max_steps=8, max_epochs=-1, checkpoint_every="2 steps",
                accumulate_grad_batches=ACCUMULATE, num_sanity_val_steps=0, limit_val_batches=0,
                callbacks=[look, *([Explode(crash)] if crash else [])],
            )  # fmt: skip
            with suppress(Exploded):
                trainer.fit(toy(), loader(1), held_out())
        looked[offload], resumed[offload] = look, trainer.summary.get("resumed_from")
    checks.figure(
        resumed_from=resumed, kept=looked["none"].seen, apart=sorted(set.union(*(k.apart for k in looked.values())))
    )
    checks.holds("sums over one rank are its own", all(set(look.sums) == {1.0} for look in looked.values()))
    checks.holds("resumed with masks and averages", all(step == 4 for step in resumed.values()))
    checks.holds_on_cuda(
        "masks and averages lie where the masters do, offloaded or not",
        lambda: all(look.seen and not look.apart for look in looked.values()), "CUDA: a CPU is one device",
    )  # fmt: skip


class Wide(pl.LightningModule):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.net(batch[0]).float().square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)


class First(pl.Callback):
    """Takes DeepSpeed's waiting for its copies away while techniques act on gradients, if asked to."""

    def __init__(self, waits: bool) -> None:
        self.waits = waits

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if not self.waits:
            trainer.strategy.model.optimizer._wait_for_offload_copies = lambda: None


class Last(pl.Callback):
    """Gives it back, waits itself, and counts gradients that are not zero although they are masked."""

    def __init__(self) -> None:
        self.masked = self.leaked = 0

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        zero = trainer.strategy.model.optimizer
        vars(zero).pop("_wait_for_offload_copies", None)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        shards = shards_of(trainer, module)
        masks = {
            name: mask for c in trainer.callbacks if isinstance(c, Technique)
            for name, mask in c.fragments().get("mask", {}).items()
        }  # fmt: skip
        for name, mask in masks.items() if shards.at_boundary() else ():
            gradient = shards.gradient(name)
            self.masked += int((~mask).sum())
            self.leaked += int((gradient[~mask.to(gradient.device)] != 0).sum())


def offload(checks: Checks) -> None:
    width, layers = (4096, 12) if checks.cuda else (64, 12)
    leaks = {}
    for waits in (True, False) if checks.cuda else (True,):
        torch.manual_seed(0)
        last = Last()
        module = Wide(width, layers)
        trainer = Trainer(
            techniques=[make("gradual_pruning", {"sparsity": 0.5, "start": "0%", "end": "50%", "every": 1})],
            strategy="zero2", offload="optimizer", devices=1, accelerator=checks.device, ledger=False, resume="auto",
            run_dir=Path(f"waits-{waits}"), max_steps=4, max_epochs=-1, num_sanity_val_steps=0, checkpoint_every=None,
            precision="bf16-mixed", callbacks=[First(waits), Unsaved()],
        )  # fmt: skip
        trainer.callbacks.append(last)
        trainer.fit(module, DataLoader(TensorDataset(torch.randn(64, width)), batch_size=8))
        leaks[waits] = last.leaked
        checks.figure(**{f"masked_{'with' if waits else 'without'}_the_wait": last.masked,
                        f"leaked_{'with' if waits else 'without'}_the_wait": last.leaked})  # fmt: skip
        checks.holds("masks were looked at", last.masked > 0)
    checks.figure(parameters=sum(p.numel() for p in module.parameters()))
    checks.holds("no masked gradient arrives with the wait", leaks[True] == 0)
    # how many arrive without it is a figure: none would mean that this machine copies faster than techniques act
    checks.holds_on_cuda("the same without the wait was counted", lambda: False in leaks, "CUDA: copies are at once")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    main({"sharded-state": sharded_state, "offload": offload})
