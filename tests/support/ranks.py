"""What one rank does in the suite over strategies: train every technique, one after another, in one process group.

Everything it saw goes to `<folder>/rank-N.json`, case by case; tensors to compare go to `<folder>/<case>.safetensors`.
"""

import json
import logging
import os
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from toy import ACCUMULATE, DEVICE, STEPS, Explode, Exploded, fingerprint, held_out, loader, toy

from shoestring.callbacks.catalog.registry import make, names, technique_class
from shoestring.callbacks.contract import Technique
from shoestring.callbacks.parameters.accessor import shards_of
from shoestring.callbacks.parameters.spread import here
from shoestring.trainer import Trainer
from shoestring.trainer.checkpoint.weights import load_weights
from shoestring.trainer.ledger import read

CHECKPOINT, CRASH = 5, 6  # step 6 is lost and done again
FEW = 4  # steps are enough to see strength 0 do something
OFFLOADS = {"zero2": "optimizer", "zero3": "parameters"}
# fsdp2 shares its edits with all others, zero1 its accessor with zero2: each technique trains under them, and
# these resume and do nothing too
_SOME = ("gradual_pruning", "weight_averaging")
THOROUGH = {"fsdp2": _SOME, "zero1": _SOME}
CHOSEN = os.environ.get("SHOESTRING_TEST_CASES", "").split(",")  # some of the cases, where time is short; "": all


def thorough(strategy: str, name: str) -> bool:
    """Whether a technique is also crashed and resumed under a strategy, and trained at strength 0."""
    return name in THOROUGH.get(strategy, (name,))


def refused(strategy: str, name: str) -> bool:
    """Whether a technique's card says that it does not go with a strategy."""
    return strategy in technique_class(name).card.refuses


def wanted(case: str) -> bool:
    return CHOSEN == [""] or case in CHOSEN


class Recorder(pl.Callback):
    """Sees every step after all techniques and the monitor have acted."""

    def __init__(self, case: str, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.losses, self.validations, self.leaks = [], [], Counter()
        self.facts = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]) * ACCUMULATE)  # Lightning has divided it
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._weights(trainer, pl_module)

    def on_validation_end(self, trainer, pl_module) -> None:
        self.validations.append((trainer.global_step, float(trainer.callback_metrics["val_loss"])))

    # -- masks -------------------------------------------------------------------------------------------------------
    def _masks(self, trainer) -> dict[str, torch.Tensor]:
        masking = [c for c in trainer.callbacks if isinstance(c, Technique) and "mask" in c.fragments()]
        return {name: mask for c in masking for name, mask in c.fragments()["mask"].items()}

    def _leak(self, kind: str, values: torch.Tensor, mask: torch.Tensor) -> None:
        """Count what is not zero although it is masked, and how often this was looked at."""
        self.leaks[f"{kind} seen"] += int((~mask).sum())
        self.leaks[kind] += int((values[~mask] != 0).sum())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        shards = shards_of(trainer, pl_module)
        for name, mask in self._masks(trainer).items() if shards.at_boundary() else ():
            if mask.numel():
                self._leak("gradients", shards.gradient(name), mask)

    def _weights(self, trainer, pl_module) -> None:
        shards = shards_of(trainer, pl_module)
        for name, mask in self._masks(trainer).items():
            if mask.numel():
                self._leak("masters", shards.master(name), mask)
                for values in shards.state(name).values():
                    self._leak("moments", values, mask)
            p = shards.parameters[name]
            if hasattr(p, "ds_tensor"):  # ZeRO-3 keeps this rank's piece, the others all of it
                self._leak("copies", p.ds_tensor.view(-1)[: mask.numel()], mask)
            elif hasattr(p, "to_local"):
                self._leak("copies", here(p).view(-1), mask)
            else:
                self._leak("copies", p.data, shards.gather(name, mask))

    # -- the end -----------------------------------------------------------------------------------------------------
    def on_train_end(self, trainer, pl_module) -> None:
        shards = shards_of(trainer, pl_module)
        masters = {name: shards.gather(name, shards.master(name)) for name in shards.slices}
        held = sum(
            here(value).numel() * value.element_size()
            for optimizer in shards.optimizers for entries in optimizer.state.values()
            for value in entries.values() if torch.is_tensor(value)
        )  # fmt: skip
        self.facts = {
            "masters": fingerprint(masters),
            "state_bytes": held,
            "copies": str(next(iter(shards.parameters.values())).dtype),
            "whole": all(where.length == where.numel for where in shards.slices.values()),
        }
        first = next(iter(shards.parameters.values()))
        if not (hasattr(first, "ds_tensor") or hasattr(first, "to_local")):  # each rank has a copy of all
            self.facts["here"] = fingerprint({n: p.data + 0.0 for n, p in shards.parameters.items()})  # -0 is 0
            self.facts["rounded"] = fingerprint({n: m.to(shards.parameters[n].dtype) + 0.0 for n, m in masters.items()})
        kept = {
            f"{state}/{name}": shards.gather(name, local).contiguous()
            for c in trainer.callbacks if isinstance(c, Technique)
            for state, named in c.fragments().items() for name, local in named.items()
        }  # fmt: skip
        self.facts["fragments"] = fingerprint(kept)
        self.facts["updates"] = {c.card.name: c.mask_version for c in trainer.callbacks if hasattr(c, "mask_version")}
        if trainer.is_global_zero:
            save_file({**{f"master/{n}": m.contiguous() for n, m in masters.items()}, **kept},
                      self.folder / f"{self.case}.safetensors")  # fmt: skip

    def report(self) -> dict:
        return {"losses": self.losses, "validations": self.validations, "leaks": dict(self.leaks), **self.facts}


class Group:
    """One strategy's process group, and the trainings in it."""

    def __init__(self, strategy: str, folder: Path) -> None:
        self.strategy, self.folder = strategy, folder
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def train(
        self, case: str, *techniques: Technique, dropout: float = 0.1, optimizer: str = "adamw",
        every: int | None = None, callbacks: tuple = (), run: str | None = None, steps: int = STEPS, **options: object,
    ) -> dict:  # fmt: skip
        """Train the toy and report. `run` is the run's folder, the case's own if not given."""
        recorder = Recorder(case, self.folder)
        run_dir = self.folder / "runs" / (run or case)
        trainer = Trainer(
            techniques=techniques, strategy=self.strategy, devices=self.world, run_dir=run_dir, ledger=False,
            checkpoint_every=f"{every} steps" if every else None, callbacks=list(callbacks), accelerator=DEVICE,
            max_steps=steps, max_epochs=-1, accumulate_grad_batches=ACCUMULATE, num_sanity_val_steps=0,
            val_check_interval=8, log_every=1, **options,
        )  # fmt: skip
        trainer.callbacks.append(recorder)
        trainer.fit(toy(dropout=dropout, optimizer=optimizer), loader(self.world), held_out())
        final = fingerprint(load_weights(run_dir / "final")) if self.rank == 0 else None
        spent = {key: trainer.summary[key] for key in ("steps", "samples", "tokens", "stopped_by", "resumed_from")}
        rows = [row.fields["loss"] for row in read(run_dir / "events", rank=0) if "loss" in row.fields]
        return {**recorder.report(), "rows": rows, "final": final, **spent}

    def resume(self, case: str, make_technique, **options: object) -> dict:
        """The same run uninterrupted, and crashed and resumed in a new trainer."""
        whole = self.train(f"{case}-whole", *make_technique(), every=CHECKPOINT, **options)
        run = f"{case}-broken"
        with suppress(Exploded):
            self.train(run, *make_technique(), every=CHECKPOINT, callbacks=(Explode(CRASH),), **options)
        resumed = self.train(f"{case}-resumed", *make_technique(), every=CHECKPOINT, run=run, **options)
        return {"whole": whole, "resumed": resumed}

    def technique(self, name: str) -> dict:
        cls = technique_class(name)
        if not thorough(self.strategy, name):
            return {"whole": self.train(f"{name}-whole", cls.example(), dropout=0.0)}
        # without dropout, so that one training is compared both with its resumption and with one device
        return {
            **self.resume(name, lambda: [cls.example()], dropout=0.0),
            "noop": self.train(f"{name}-noop", cls.noop(), steps=FEW),
        }

    def absent(self) -> dict:
        return {
            **self.resume("absent", list),
            "short": self.train("absent-short", steps=FEW),
            "still": self.train("absent-still", dropout=0.0),
            # unlike Adam's, these steps are as large as the gradients
            "sgd": self.train("absent-sgd", dropout=0.0, optimizer="sgd"),
            "sgd-clipped": self.train("absent-sgd-clipped", dropout=0.0, optimizer="sgd", gradient_clip_val=0.5),
        }

    def masks(self) -> dict:
        """Pruning under clipping, in 32 and 16 bits."""
        pruning = technique_class("gradual_pruning")
        clip = {"dropout": 0.0, "gradient_clip_val": 0.05}
        return {
            "clipped": self.train("masks-clipped", pruning.example(), **clip),
            "bf16": self.train("masks-bf16", pruning.example(), make("mixed_precision"), **clip),
        }

    def topology(self) -> dict:
        """Fifty steps in which connections move three times."""
        settings = {"sparsity": 0.6, "drop_fraction": 0.5, "every": 12}
        return {n: self.train(f"topology-{n}", make(n, settings), dropout=0.0, steps=50) for n in ("set", "rigl")}

    def offload(self) -> dict:
        offload = OFFLOADS[self.strategy]
        pruning = technique_class("gradual_pruning").example()
        return {
            "still": self.train("offload-still", dropout=0.0, offload=offload),
            "clipped": self.train("offload-clipped", pruning, dropout=0.0, gradient_clip_val=0.05, offload=offload),
            **self.resume("offload", list, offload=offload),
        }

    def tokens(self) -> dict:
        """A schedule that waits for tokens, which the ranks must first sum; saving must not make them known earlier."""
        technique = lambda: make("lr_schedule", {"warmup": "900 tokens"})  # noqa: E731
        whole = self.train("tokens-whole", technique())
        with suppress(Exploded):
            self.train("tokens-broken", technique(), every=CHECKPOINT, callbacks=(Explode(CRASH),))
        return {"whole": whole, "resumed": self.train("tokens-resumed", technique(), every=2, run="tokens-broken")}

    def double(self) -> dict:
        """What rounds activations, in double precision: sums in another order then move no code to the next level."""
        aware = technique_class("quantization_aware").example()
        return self.train("double", aware, dropout=0.0, precision="64-true")

    def collectives(self) -> dict:
        """What Python asks of torch.distributed in the middle of a run, per optimizer step."""
        counts: Counter = Counter()

        class Middle(pl.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                counts["on"] = int(2 <= trainer.global_step < 8)

        with counted(counts):
            self.train("collectives", callbacks=(Middle(),), limit_val_batches=0)
        return {"per_step": {k: n / 6 for k, n in counts.items() if k != "on"}}


@contextmanager
def counted(counts: Counter):
    """Count calls of torch.distributed's collectives while `counts["on"]`, blocking ones apart."""
    plain = {name: getattr(dist, name) for name in ("all_reduce", "broadcast", "barrier", "all_gather", "reduce",
                                                    "all_gather_object", "broadcast_object_list")}  # fmt: skip

    def wrapped(name, call):
        def counting(*args, **kwargs):
            if counts["on"]:
                counts[name if kwargs.get("async_op") else f"{name} blocking"] += 1
            return call(*args, **kwargs)

        return counting

    for name, call in plain.items():
        setattr(dist, name, wrapped(name, call))
    try:
        yield
    finally:
        for name, call in plain.items():
            setattr(dist, name, call)


def main(strategy: str, folder: Path) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    group = Group(strategy, folder)
    cases = {"absent": group.absent, **{name: (lambda name=name: group.technique(name)) for name in names()}}
    cases = {name: case for name, case in cases.items() if name == "absent" or not refused(strategy, name)}
    cases["masks"] = group.masks
    if strategy != "fsdp2":  # which test_kill_resume.py moves a run to and from
        cases["topology"] = group.topology
    if strategy in OFFLOADS:
        cases["offload"] = group.offload
    if strategy in ("single", "ddp"):  # DeepSpeed has no double precision
        cases["double"] = group.double
    if strategy == "ddp":
        cases |= {"tokens": group.tokens, "collectives": group.collectives}
    results = {}
    for case, action in cases.items():
        if not wanted(case):
            continue
        started = perf_counter()
        try:
            results[case] = action()
        except Exception:
            results[case] = {"error": traceback.format_exc()}
        results[case]["seconds"] = perf_counter() - started
        print(case, f"{results[case]['seconds']:.1f} s", results[case].get("error", ""), flush=True)
        (folder / f"rank-{group.rank}.json").write_text(json.dumps(results))
