"""What a rank does in the tests of frozen low-bit bases: train adapters beside each, whole, crashed and resumed."""

import json
import logging
import traceback
import warnings
from contextlib import suppress
from pathlib import Path

import pytorch_lightning as pl
import torch
from fits import llama
from torch.utils.data import DataLoader
from toy import Explode, Exploded, fingerprint

from shoestring.callbacks import GradientCheckpointing, MixedPrecision
from shoestring.recipes.schema import AdapterSpec, OptimizerSpec
from shoestring.trainer import Trainer
from shoestring.trainer.checkpoint.weights import load_weights
from shoestring.trainer.tasks.language import CausalLM
from shoestring.trainer.tasks.lora import add_adapter
from shoestring.trainer.tasks.quantized_loading import make_quantized

STEPS, CRASH, EVERY = 6, 4, 3
KINDS = {"single": ("nf4", "int8", "bf16"), "ddp": ("nf4",), "zero2": ("nf4", "bf16"), "zero3": ("nf4",)}
KINDS["fsdp2"] = ("bf16", "nf4")


def rows() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [{"input_ids": (ids := torch.randint(1, 32, (12,), generator=draw)), "labels": ids} for _ in range(64)]


def adapted(kind: str) -> CausalLM:
    """A small model whose linear layers are kept in `kind`, with adapters that drop and see dropout."""
    model = llama().bfloat16() if kind == "bf16" else make_quantized(lambda: llama().bfloat16(), kind)
    torch.manual_seed(3)
    lora = add_adapter(model, AdapterSpec(rank=2, dropout=0.1), "causal-lm")
    return CausalLM(lora, OptimizerSpec(lr=1e-2))


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen.append(float(outputs["loss"]))


def train(strategy: str, world: int, kind: str, run_dir: Path, *callbacks: pl.Callback) -> dict:
    losses, techniques = Losses(), [MixedPrecision(dtype="bf16"), GradientCheckpointing()]
    trainer = Trainer(
        techniques=techniques, strategy=strategy, devices=world, run_dir=run_dir, ledger=False, accelerator="cpu",
        checkpoint_every=f"{EVERY} steps", callbacks=[losses, *callbacks], max_steps=STEPS, max_epochs=-1,
        accumulate_grad_batches=2,
    )  # fmt: skip
    module = adapted(kind)
    trainer.fit(module, DataLoader(rows(), batch_size=4 // world, shuffle=True))
    saved = load_weights(run_dir / "final") if trainer.is_global_zero else {}
    masters = {str(t.dtype) for name, t in saved.items() if "lora_" in name}
    return {"losses": losses.seen, "final": fingerprint(saved), "masters": sorted(masters)}


def main(strategy: str, world: int, folder: Path) -> None:
    """Each kind: the whole run, and the one that crashed once."""
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    results = {}
    for kind in KINDS[strategy]:
        try:
            whole = train(strategy, world, kind, folder / f"{kind}-whole")
            with suppress(Exploded):
                train(strategy, world, kind, folder / kind, Explode(CRASH))
            results[kind] = {"whole": whole, "resumed": train(strategy, world, kind, folder / kind)}
        except Exception:
            results[kind] = {"error": traceback.format_exc()}
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    (folder / f"seen-{rank}.json").write_text(json.dumps(results))
