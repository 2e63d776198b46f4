"""Scale hyper-parameters with the batch: the linear rule for SGD, the square-root rule for Adam."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import pytorch_lightning as pl

from ..accounting.clock import Duration, clock_of
from ..contract import Card, IncompatibleTechniques, Technique, require
from ..sampling.global_batches import GlobalBatches

RULES = ("auto", "linear", "sqrt")
_NOTED = {"initial_lr", "max_lr", "min_lr"}  # what torch's schedulers write into parameter groups


def scaled(group: dict[str, Any], ratio: float, rule: str) -> dict[str, Any]:
    """Return what changes in an optimizer's parameter group when the batch grows `ratio` times.

    linear (SGD, arXiv 1706.02677): lr * ratio.
    sqrt (Adam, arXiv 2205.10287): lr * sqrt(ratio), 1 - beta * ratio for both betas, eps / sqrt(ratio). A beta that
    would fall below 0 is refused: the batch has outgrown the rule.
    """
    if rule == "linear":
        return {"lr": group["lr"] * ratio}
    root = math.sqrt(ratio)
    changed: dict[str, Any] = {"lr": group["lr"] * root}
    if "betas" in group:
        betas = tuple(1.0 - ratio * (1.0 - beta) for beta in group["betas"])
        if min(betas) < 0:
            raise IncompatibleTechniques(
                f"betas {tuple(group['betas'])} cannot be scaled to a batch {ratio:g} times larger"
            )
        changed |= {"betas": betas, "eps": group["eps"] / root}
    return changed


@dataclass(kw_only=True, eq=False, repr=False)
class LRScaling(Technique, pl.Callback):
    """Set the learning rate (and Adam's betas and eps) for this run's global batch from values tuned at another one.

    Source: arXiv 2205.10287.

    Args:
        base_batch: Samples per optimizer step at which the values were tuned; None leaves everything as it is.
        rule: "linear", "sqrt", or "auto": linear for SGD and sqrt for optimizers with betas.
        warmup: Duration over which the factor rises from 1, which large batches need (arXiv 1706.02677 §2.2).

    Example:
        >>> import pytorch_lightning as pl
        >>> from shoestring.callbacks import LRScaling
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[LRScaling(base_batch=256, warmup="5%")])
        >>> scaled({"lr": 0.1}, ratio=4, rule="linear")  # what changes for batches of 1024
        {'lr': 0.4}
    """

    card = Card(
        name="lr_scaling",
        does="scales lr, betas and eps with the global batch and warms up",
        paper="2205.10287",
        saves={"steps", "time"},
        reads={"samples"},
        writes={"lr"},
    )

    base_batch: int | None = None
    rule: str = "auto"
    warmup: str = "0%"

    def check(self) -> None:
        require(self.rule in RULES, self, "rule", " | ".join(RULES))
        require(self.base_batch is None or self.base_batch > 0, self, "base_batch", "a positive number of samples")
        Duration.parse(self.warmup)

    @classmethod
    def example(cls) -> Self:
        return cls(base_batch=4, warmup="25%")

    @classmethod
    def noop(cls) -> Self:
        return cls(base_batch=None)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._applied = False
        self._last: dict[str, tuple[float, float]] = {}  # group -> (rate without warmup, rate written)
        self._warmup = Duration.parse(self.warmup)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ratios: dict[str, float] = {}
        if self.base_batch is None:
            return
        ratio = self._global_batch(trainer) / self.base_batch
        for key, group in _groups(trainer):
            rule = self.rule if self.rule != "auto" else ("sqrt" if "betas" in group else "linear")
            self._ratios[key] = ratio if rule == "linear" else math.sqrt(ratio)
            if not self._applied:  # a resumed run finds the scaled values in its optimizer
                group.update(scaled(group, ratio, rule))
                for noted in _NOTED & group.keys():
                    group[noted] *= self._ratios[key]
        if not self._applied:
            scale_schedulers(trainer, {id(group): self._ratios[key] for key, group in _groups(trainer)})
        self._applied = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._warmup.amount or not self._ratios or batch_idx % trainer.accumulate_grad_batches:
            return
        clock = clock_of(trainer)
        warmed = clock.toward(self._warmup, clock.step + 0.5)
        for key, group in _groups(trainer):
            self._warm(key, group, warmed)

    def _warm(self, key: str, group: dict[str, Any], warmed: float) -> None:
        """From the unscaled rate to the scaled one. A schedule that sets the rate itself reads `warmup_factor`."""
        ratio = self._ratios[key]
        factor = group["warmup_factor"] = (1.0 + warmed * (ratio - 1.0)) / ratio
        plain, written = self._last.get(key, (group["lr"], group["lr"]))
        if group["lr"] != written:  # somebody else has set it since
            plain = group["lr"]
        group["lr"] = plain * factor
        self._last[key] = plain, group["lr"]

    def state_dict(self) -> dict[str, Any]:
        return {"applied": self._applied, "last": {k: list(v) for k, v in self._last.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._applied = state_dict["applied"]
        self._last = {k: (v[0], v[1]) for k, v in state_dict["last"].items()}

    def _global_batch(self, trainer: pl.Trainer) -> int:
        loaders = trainer.fit_loop._combined_loader.flattened if trainer.fit_loop._combined_loader else []
        for loader in loaders:
            batches = getattr(loader, "batch_sampler", None)
            if isinstance(batches, GlobalBatches):
                return batches.global_batch
            if getattr(loader, "batch_size", None):
                return loader.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        raise IncompatibleTechniques("lr_scaling cannot determine the batch size of this loader")


def scale_schedulers(trainer: pl.Trainer, ratios: Mapping[int, float]) -> None:
    """Schedulers of the module have noted the unscaled rates, and would put them back. ratios: by `id` of a group."""
    waiting = [config.scheduler for config in trainer.lr_scheduler_configs]
    while waiting:
        scheduler = waiting.pop()
        waiting += getattr(scheduler, "_schedulers", [])
        if hasattr(scheduler, "base_lrs"):
            groups = scheduler.optimizer.param_groups
            scheduler.base_lrs = [
                lr * ratios.get(id(group), 1.0) for lr, group in zip(scheduler.base_lrs, groups, strict=True)
            ]


def _groups(trainer: pl.Trainer) -> list[tuple[str, dict[str, Any]]]:
    return [(f"{o}.{g}", group) for o, opt in enumerate(trainer.optimizers) for g, group in enumerate(opt.param_groups)]
