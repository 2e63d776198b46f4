"""What one rank does to show how precisely gradients are summed: a model whose gradient is its input, to the bit."""

import json
import logging
import os
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toy import DEVICE

from shoestring.callbacks.parameters.accessor import shards_of
from shoestring.strategies import Sharding
from shoestring.trainer import Trainer

MICRO_BATCHES, WIDTHS = 16, {"wide": 301, "narrow": 77}  # no size divides evenly among ranks
SMALL = {"reduce_bucket": 100, "overlap": True}  # elements: one parameter has more
OTHERS = {"zero1": {"allgather_bucket": 50}, "zero2": {"allgather_bucket": 50}, "zero3": {"prefetch": 50}}


def inputs(world: int) -> Tensor:
    """One sample for each micro-batch of each rank: numbers of bfloat16, all of a size, as gradients of weights are."""
    draw = torch.Generator().manual_seed(3)
    numbers = 1 + torch.rand((MICRO_BATCHES * world, sum(WIDTHS.values())), generator=draw)
    return numbers.to(torch.bfloat16).float()


class Sums(pl.LightningModule):
    """loss = w x, so a micro-batch's gradient is x, which bfloat16 holds exactly; Lightning divides by a power of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = (nn.Linear(width, 1, bias=False) for width in WIDTHS.values())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        wide, narrow = batch[0].split(list(WIDTHS.values()), dim=1)
        return self.wide(wide).sum() + self.narrow(narrow).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Look(pl.Callback):
    """The gradient before the step, and what the step made of the weights."""

    def __init__(self) -> None:
        self.gradients, self.before, self.moved = {}, {}, {}

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        shards = shards_of(trainer, pl_module)
        if not shards.at_boundary() or self.gradients:
            return
        for name in shards.slices:
            local, master = shards.gradient(name), shards.master(name)
            self.gradients[name] = shards.gather(name, torch.zeros_like(master) if local is None else local.float())
            self.before[name] = shards.whole(name).clone()

    @torch.no_grad()
    def on_train_end(self, trainer, pl_module) -> None:
        shards = shards_of(trainer, pl_module)
        self.moved = {name: self.before[name] - shards.whole(name) for name in shards.slices}


def error(gradients: dict[str, Tensor], truth: Tensor) -> float:
    """The largest one, as a share of the number."""
    whole = torch.cat([gradients[f"{name}.weight"].double().view(-1) for name in WIDTHS])
    return float(((whole - truth) / truth).abs().max())


def main(cases: list[tuple[str, str, str, str]], folder: Path) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    world, errors = int(os.environ["WORLD_SIZE"]), {}
    numbers = inputs(world)
    truth = numbers.double().mean(0)
    for strategy, offload, dtype, buckets in cases:
        look, case = Look(), f"{strategy} {offload} {dtype} {buckets}"
        sizes = {**SMALL, **OTHERS[strategy]} if buckets == "small" else {}
        sharding = Sharding(gradient_dtype=dtype, **sizes)
        trainer = Trainer(
            strategy=strategy, devices=world, offload=offload, sharding=sharding, precision="bf16-mixed",
            accumulate_grad_batches=MICRO_BATCHES, run_dir=folder / case, ledger=False, accelerator=DEVICE,
            max_steps=1, max_epochs=-1, num_sanity_val_steps=0, limit_val_batches=0, checkpoint_every=None,
            callbacks=[look],
        )  # fmt: skip
        torch.manual_seed(7)
        trainer.fit(Sums(), DataLoader(TensorDataset(numbers), batch_size=1))
        moved = {name: step / 0.5 for name, step in look.moved.items()}
        errors[case] = {"gradient": error(look.gradients, truth), "step": error(moved, truth)}
        print(case, errors[case], flush=True)
    if os.environ["RANK"] == "0":
        (folder / "errors.json").write_text(json.dumps(errors))
