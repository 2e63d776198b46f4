"""What one rank does in the tests of teachers under several ranks; everything it saw goes to `rank-N.json`."""

import json
import os
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn
from toy import DEVICE, LENGTH, STEPS, VOCAB, Toy, fingerprint, loader, toy

from shoestring.callbacks.compression.distillation import Distillation
from shoestring.trainer import Trainer
from shoestring.trainer.checkpoint.weights import load_weights
from shoestring.trainer.machine.extensions import prepare_environment

EPOCH = 18  # steps, of four of 72 samples
WIDE = 400  # its square is above DeepSpeed's 100 000 elements, below which a parameter is not cut


class WideTeacher(nn.Module):
    """A teacher of the toy, large enough to be worth cutting."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.embed = nn.Embedding(VOCAB, WIDE)
        self.first, self.second = (nn.Linear(WIDE, WIDE, bias=False) for _ in range(2))
        self.head = nn.Linear(WIDE, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids[:, :LENGTH]).mean(1)
        return self.head(torch.relu(self.second(torch.relu(self.first(20 * x)))))


class Late(Toy):
    """Builds its layers where ZeRO-3 cuts them as they are made."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.lr, self.optimizer = 1e-2, "adamw"

    def configure_model(self) -> None:
        if hasattr(self, "embed"):
            return
        lightning = dict(vars(self))
        torch.manual_seed(7)
        built = Toy(dropout=0.0)
        for name, value in vars(built)["_modules"].items():
            setattr(self, name, value)
        self.positions, self.gain = built.positions, built.gain
        self.register_buffer("seen", built.seen)
        assert lightning.keys() <= vars(self).keys()


class Recorder(pl.Callback):
    """The losses, and at the first batch how many of the teacher's elements this rank holds and of which it is made."""

    def __init__(self, distillation: Distillation) -> None:
        self.distillation, self.losses, self.facts = distillation, [], {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.losses:
            return
        parameters = dict(self.distillation._teacher.module.named_parameters())
        pieces = [getattr(p, "ds_tensor", p.data) for p in parameters.values()]
        wholes = [getattr(p, "ds_numel", p.numel()) for p in parameters.values()]
        self.facts = {"held": sum(p.numel() for p in pieces), "of": sum(wholes)}
        self.facts["teachers_in_student"] = len({id(p) for p in pl_module.parameters()} & set(map(id, pieces)))
        if not hasattr(next(iter(parameters.values())), "ds_tensor"):
            self.facts["teacher"] = fingerprint({name: p.data for name, p in parameters.items()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))


def train(
    folder: Path, strategy: str, world: int, module: pl.LightningModule, technique: Distillation, steps: int = STEPS
) -> dict:
    recorder = Recorder(technique)
    trainer = Trainer(
        techniques=[technique], strategy=strategy, devices=world, run_dir=folder, ledger=False, accelerator=DEVICE,
        max_steps=steps, max_epochs=-1, checkpoint_every=None, callbacks=[], limit_val_batches=0,
    )  # fmt: skip
    trainer.callbacks.append(recorder)
    trainer.fit(module, loader(world, words={"noise": 0.0}))
    final = load_weights(folder / "final") if trainer.global_rank == 0 else {}
    return {
        "losses": recorder.losses,
        "final": fingerprint(final),
        "names": sorted(final),
        "forwards": technique.teacher_forwards,
        **recorder.facts,
    }


def main(strategy: str, folder: Path) -> None:
    warnings.simplefilter("ignore")
    prepare_environment("zero3", "none", DEVICE)  # under ddp nobody else does, and DeepSpeed would compile for a minute
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    settings = {"teacher": WideTeacher(), "weight": 1.0, "teacher_dtype": "float32"}
    results = {}
    for name, sharded in (("replicated", False), ("sharded", True)):
        technique = Distillation(**settings, shard_teacher=sharded)
        results[name] = train(folder / name, strategy, world, toy(dropout=0.0), technique)
    torch.manual_seed(13)  # the same teachers on all ranks
    initial = {"weight": 1.0, "teacher_dtype": "float32"}
    results["early"] = train(folder / "early", strategy, world, toy(dropout=0.0), Distillation(**initial))
    results["late"] = train(folder / "late", strategy, world, Late(), Distillation(**initial))
    results["hidden"] = train(
        folder / "hidden", strategy, world, toy(dropout=0.0),
        Distillation(teacher=Toy(dropout=0.0), hidden=1.0, teacher_dtype="float32"),
    )  # fmt: skip
    cached = Distillation(**initial, cache=str(folder / "cache"))
    results["cached"] = train(folder / "cached", strategy, world, toy(dropout=0.0), cached, 2 * EPOCH)
    (folder / f"rank-{rank}.json").write_text(json.dumps(results))
