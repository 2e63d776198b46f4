"""What one rank does to show that the accessor keeps to devices: DeepSpeed's real engine, told that it is on another.

The engine trains on the host. Before its step, `engine.device` becomes the second device, and so do masters and
gradients where they are not offloaded; then techniques' own functions run on what the accessor gives them.
"""

import json
import logging
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from second_device import THERE, Elsewhere, There
from toy import held_out, loader, toy

from shoestring.callbacks.parameters.accessor import shards_of
from shoestring.callbacks.parameters.shards import Shards, Slice
from shoestring.callbacks.sparsity.masks import mask_gradients, select
from shoestring.callbacks.sparsity.structured_pruning import row_norms
from shoestring.trainer import Trainer

ABSENT = "head.weight"  # this rank holds nothing of it, as most ranks hold nothing of most parameters


class Landing:
    """A copy to the host that has not landed until somebody waits for it, as an event of a stream would have it."""

    def __init__(self, target: torch.Tensor) -> None:
        self.target, self.values = target, target.clone()
        target.fill_(torch.nan)

    def synchronize(self) -> None:
        self.target.copy_(self.values)


class Look(pl.Callback):
    def __init__(self, offload: str) -> None:
        self.offload, self.seen = offload, {}

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == 0 or not shards_of(trainer, pl_module).at_boundary():  # counted by a mode of its own
            return
        shards = shards_of(trainer, pl_module)
        real, zero = shards.engine.device, shards.zero
        kept = _leave(shards)
        if self.offload == "none":
            _move(shards)
        shards.engine.device = THERE
        try:
            with Elsewhere():
                self.seen = _look(shards)
        finally:
            shards.engine.device = real
            kept()
        if hasattr(zero, "_pending_offload_events") and self.offload != "none":
            name = next(iter(shards.slices))
            zero._pending_offload_events["a stream"] = Landing(shards.gradient(name))
            self.seen["landed"] = bool(shards.gradient(name).isfinite().all())


def _leave(shards: Shards):
    """Let this rank hold nothing of `ABSENT`; call what is returned to hold it again."""
    p, where, mapping = shards.parameters[ABSENT], shards.slices[ABSENT], None
    shards.slices[ABSENT] = Slice(where.numel, 0, where.shape)
    if hasattr(p, "_hp_mapping"):
        mapping, p._hp_mapping = p._hp_mapping, None

    def back() -> None:
        shards.slices[ABSENT] = where
        if mapping is not None:
            p._hp_mapping = mapping

    return back


def _move(shards: Shards) -> None:
    """Masters are read through the engine's lists, and gradients through its engine: both are there from now on."""
    masters = {name: There(shards.master(name).clone()) for name in shards.slices if name != ABSENT}
    gradients = {name: There(shards.gradient(name).clone()) for name in masters}
    plain = shards.master
    shards._flats = lambda: list(masters.values())
    shards.master = lambda name: masters[name] if name in masters else plain(name)
    shards.gradient = lambda name: gradients.get(name)


def _look(shards: Shards) -> dict:
    names = [name for name in shards.slices if name.endswith("weight") and "norm" not in name]
    present = next(name for name in names if name != ABSENT)
    scores = {name: shards.master(name).abs() for name in names}
    masks = select(shards, scores, "uniform", 0.5)
    mask_gradients(shards, masks)
    restored = shards.beside_masters({name: torch.ones(shards.slices[name].length) for name in names})
    norms = getattr(shards.zero, "norm_for_param_grads", {})
    return {
        "masters": sorted({str(shards.master(name).device) for name in names}),
        "masks": sorted({str(mask.device) for mask in masks.values()}),
        "kept": {name: int(mask.sum()) / max(1, mask.numel()) for name, mask in masks.items()},
        "gathered": str(shards.gather(present, shards.master(present)).device),
        "summed": shards.total(torch.tensor([3])).tolist(),
        "rows": sorted({str(norm.device) for norm in row_norms(shards, names).values()}),
        "averaged": sorted({str((restored[n] + shards.master(n)).device) for n in names}),
        "norms": sorted({str(norm.device) for norm in norms.values() if isinstance(norm, There)}),
    }


def main(cases: list[tuple[str, str]], folder: Path) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    seen = {}
    for strategy, offload in cases:
        look = Look(offload)
        trainer = Trainer(
            strategy=strategy, devices=1, offload=offload, run_dir=folder / f"{strategy}-{offload}", ledger=False,
            accelerator="cpu", max_steps=2, max_epochs=-1, num_sanity_val_steps=0, limit_val_batches=0,
            checkpoint_every=None, callbacks=[look],
        )  # fmt: skip
        trainer.fit(toy(), loader(), held_out())
        seen[f"{strategy} {offload}"] = look.seen
    (folder / "seen.json").write_text(json.dumps(seen))
