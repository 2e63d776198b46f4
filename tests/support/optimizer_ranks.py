"""What one rank does in the suite over optimizers: train a small network with each, whole and in two halves."""

import json
import logging
import os
import shutil
import traceback
import warnings
from pathlib import Path
from time import sleep

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy import DEVICE, fingerprint

from shoestring.callbacks import GradualPruning
from shoestring.callbacks.optimization.averaged_point import AveragedPoint
from shoestring.callbacks.parameters.accessor import shards_of
from shoestring.callbacks.parameters.spread import here
from shoestring.recipes.schema import OptimizerSpec
from shoestring.trainer import Trainer
from shoestring.trainer.checkpoint.weights import load_weights
from shoestring.trainer.tasks.optimizers.cards import OPTIMIZERS, optimizer_card
from shoestring.trainer.tasks.optimizers.low_rank import GaLore
from shoestring.trainer.tasks.optimizers.make import build_optimizer
from shoestring.trainer.tasks.optimizers.soap import SOAP
from shoestring.trainer.tasks.optimizers.stepping import Stepping

STEPS, HALF = 8, 4
STABLE = {"soap": "few_sides", "galore": "few_directions"}  # where the rank of eight samples' gradients is enough
FAULTY = {"Forgetful": "single", "OfWholes": "zero2"}  # what the suite must find, and where


class Forgetful(Stepping):
    """Keeps its momentum where nobody saves it."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.hidden = {}

    def update(self, p, grad, state, group):
        kept = self.hidden.setdefault(p, torch.zeros_like(p))
        p.sub_(kept.lerp_(grad, 0.1), alpha=10 * group["lr"])


class OfWholes(Stepping):
    """Divides by a norm of the parameter, which a shard does not have."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def update(self, p, grad, state, group):
        p.sub_(grad / grad.norm().clamp(min=1e-6), alpha=group["lr"])


class FewSides(SOAP):
    largest_side = 4


class FewDirections(GaLore):
    share = 16


def few_sides(parameters, settings):
    """Turns only what has eigenvectors that rounding does not choose."""
    return FewSides(parameters, settings)


def few_directions(parameters, settings):
    """Keeps only singular vectors that rounding does not choose."""
    return FewDirections(parameters, settings)


class Net(pl.LightningModule):
    """One of its matrices, and each of two shards, has more elements than an 8-bit optimizer leaves alone."""

    def __init__(self, settings) -> None:
        super().__init__()
        self.settings = settings
        self.net = nn.Sequential(nn.Linear(32, 65), nn.Tanh(), nn.Linear(65, 130), nn.Tanh(), nn.Linear(130, 4))

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def configure_optimizers(self):
        return build_optimizer(self.named_parameters(), self.settings)


class Recorder(pl.Callback):
    """Losses, validations, and at the end what the optimizer holds and the weights that it steps."""

    def __init__(self) -> None:
        self.seen = {"losses": [], "validations": []}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        shards = shards_of(trainer, pl_module)
        gradients = [shards.gradient(name) for name in shards.slices] if shards.at_boundary() else []
        self.seen["gradients"] = sum(4 * grad.numel() for grad in gradients if grad is not None)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen["losses"].append(float(outputs["loss"]))

    def on_validation_end(self, trainer, pl_module) -> None:
        self.seen["validations"].append(float(trainer.callback_metrics["val_loss"]))

    def on_train_end(self, trainer, pl_module) -> None:
        shards = shards_of(trainer, pl_module)
        kept = [v for o in shards.optimizers for entries in o.state.values() for v in entries.values()]
        self.seen["held"] = sum(here(v).nbytes for v in kept if torch.is_tensor(v) and v.numel() > 1)
        self.seen["masters"] = sum(shards.master(name).nbytes for name in shards.slices) * (not shards.replicated)
        stored = [getattr(p, "ds_tensor", here(p)).numel() for p in pl_module.parameters()]
        self.seen["weights"] = 4 * sum(stored)
        of_all = {name: shards.state(name) | shards.scalars(name) for name in shards.slices}
        self.seen["states"] = fingerprint(
            {f"{name} {key}": torch.as_tensor(v) for name, kept in of_all.items() for key, v in kept.items()}
        )


def train(strategy: str, name: str, run_dir: Path, steps: int, micro: int | None = None, **options) -> dict:
    world = int(os.environ["WORLD_SIZE"])
    settings = OptimizerSpec(name=name, lr=3e-3, momentum=0.9, betas=(0.9, 0.99), eps=1e-4)
    recorder = Recorder()
    averaged = [AveragedPoint(settings.betas[0])] if optimizer_card(name).averages else []
    trainer = Trainer(
        strategy=strategy, devices=world, run_dir=run_dir, ledger=False, accelerator=DEVICE, callbacks=averaged,
        max_steps=steps, max_epochs=-1, num_sanity_val_steps=0, val_check_interval=HALF,
        **{"checkpoint_every": None, "gradient_clip_val": 1.0, **options},
    )  # fmt: skip
    trainer.callbacks.append(recorder)
    torch.manual_seed(7)
    module, x, y = Net(settings), torch.randn(64, 32), torch.randn(64, 4)
    data = TensorDataset(x, y + x[:, :4])
    trainer.fit(module, DataLoader(data, batch_size=micro or 8 // world, shuffle=True), DataLoader(data, batch_size=8))
    final = run_dir / "final"
    return {**recorder.seen, "final": fingerprint(load_weights(final)) if trainer.is_global_zero else None}


def one(strategy: str, name: str, folder: Path) -> dict:
    label = name.rpartition(":")[2]
    whole, again = folder / f"{label}-whole", folder / f"{label}-again"
    seen = train(strategy, name, whole, STEPS, checkpoint_every=f"{HALF} steps")
    if label in STABLE.values():
        return {"whole": seen}
    if os.environ["RANK"] == "0":  # as a run that was killed after its half
        shutil.copytree(whole, folder / label, ignore=shutil.ignore_patterns(f"{STEPS:09d}", "latest", "final*"))
        (folder / label).rename(again)
    while not again.exists():
        sleep(0.01)
    return {"whole": seen, "resumed": train(strategy, name, again, STEPS)}


def main(strategy: str, folder: Path) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    names = {name: name for name in OPTIMIZERS if strategy in OPTIMIZERS[name].strategies}
    faulty = {label: f"optimizer_ranks:{label}" for label in FAULTY if strategy in ("single", FAULTY[label])}
    results = {}
    faulty |= {label: f"optimizer_ranks:{label}" for label in STABLE.values()}
    for label, name in (names | faulty).items():
        try:
            results[label] = one(strategy, name, folder)
        except Exception:
            results[label] = {"error": traceback.format_exc()}
            print(traceback.format_exc(), flush=True)
    for name in names if strategy == "zero2" else ():  # whose shards have parts of several parameters
        if name not in GradualPruning.card.refuses:
            pruning = GradualPruning(sparsity=0.6, start="10%", end="50%", every=1, skip=["net.4.*"])
            train(strategy, name, folder / f"{name}-pruned", STEPS, techniques=[pruning])
    if strategy == "single":
        results["bf16"] = train(strategy, "adamw", folder / "bf16", HALF, precision="bf16-mixed")
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(results))
