"""What one rank sees under FSDP2: which weights are whole while a block computes, in which dtype, and what is kept."""

import json
import logging
import os
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from toy import ACCUMULATE, DEVICE, held_out, loader, toy

from shoestring.callbacks.parameters.accessor import shards_of
from shoestring.trainer import Trainer
from shoestring.trainer.run.fully_sharded import CannotSave

STEPS = 3


class Look(pl.Callback):
    """In a block's forward: whether this block's and the other one's weights are whole, and their dtype."""

    def __init__(self) -> None:
        self.whole: list[list[bool]] = []
        self.dtypes: set[str] = set()

    def on_train_start(self, trainer, pl_module) -> None:
        for block in pl_module.blocks:
            block.norm.register_forward_pre_hook(lambda *_: self.see(pl_module))

    def see(self, module) -> None:
        weights = [block.wide.weight for block in module.blocks]
        self.whole.append([not hasattr(weight, "to_local") for weight in weights])
        self.dtypes |= {str(weight.dtype) for weight in weights if not hasattr(weight, "to_local")}


def tied(share: bool) -> pl.LightningModule:
    """The toy; `share`: one of its blocks has a weight of the other, and then neither can be gathered alone."""
    module = toy(dropout=0.0)
    if share:
        module.blocks[1].wide.weight = module.blocks[0].wide.weight
    return module


def train(strategy: str, precision: str, share: bool, folder: Path) -> dict:
    look, losses = Look(), []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            losses.append(float(outputs["loss"]))

    world = int(os.environ["WORLD_SIZE"])
    trainer = Trainer(
        strategy=strategy, devices=world, run_dir=folder / f"{strategy} {precision} {share}", ledger=False,
        accelerator=DEVICE, max_steps=STEPS, max_epochs=-1, accumulate_grad_batches=ACCUMULATE, precision=precision,
        num_sanity_val_steps=0, checkpoint_every=None, gradient_clip_val=0.5, callbacks=[look, Losses()],
        val_check_interval=STEPS * ACCUMULATE,
    )  # fmt: skip
    module = tied(share)
    trainer.fit(module, loader(world), held_out())
    shards, seen = shards_of(trainer, module), {"losses": losses, "whole": look.whole, "dtypes": sorted(look.dtypes)}
    seen["masters"] = sorted({str(shards.master(name).dtype) for name in shards.slices})
    seen["held"] = sum(where.length for where in shards.slices.values())
    seen["parameters"] = sum(where.numel for where in shards.slices.values())
    seen["layout"] = shards.layout
    if strategy == "fsdp2":
        try:
            trainer.save_checkpoint(folder / "lightnings.ckpt")
        except CannotSave as error:
            seen["refused"] = str(error)
    last = float(trainer.callback_metrics["val_loss"])
    again = trainer.validate(module, held_out(), verbose=False)[0]["val_loss"]
    return {**seen, "validated": [last, again]}


def main(cases: list[tuple[str, str, bool]], folder: Path) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    seen = {" ".join(map(str, case)): train(*case, folder) for case in cases}
    torch.distributed.barrier()
    (folder / f"seen-{os.environ['RANK']}.json").write_text(json.dumps(seen))
