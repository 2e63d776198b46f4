"""Low-rank factorization: train two low-rank factors in place of one matrix (arXiv 2103.03936, 1404.0736)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import pytorch_lightning as pl
from torch import nn

from ... import ShoestringError
from ..contract import Card, Effect, IncompatibleTechniques, Technique, Workload, require
from ..parameters.layers import check_skip
from ..parameters.spread import in_parts
from .factors import apply_low_rank, factorable, merge_, ranks_for_budget, ranks_for_energy, singular_values

log = logging.getLogger("shoestring")


class OtherRanks(ShoestringError):
    """The factors of a checkpoint are not of the ranks that this run has chosen."""


@dataclass(kw_only=True, eq=False, repr=False)
class LowRank(Technique, pl.Callback):
    """Replace linear layers by factors of their weights' truncated SVD before training starts, and train these.

    The optimizer, DDP and ZeRO see only the factors, and so does `final/`; `factors.apply_low_rank` makes a
    module fit to load them. Ranks follow from the initial weights, so a run resumes from the command that began it;
    rank 0 decides for all. Only layers that shrink are replaced.

    Source: arXiv 2103.03936.

    Args:
        energy: Share of the squared singular values that every layer keeps, in (0, 1]; 1 is off.
        budget: Where given, it decides instead of `energy`: the share of the parameters of all these layers together,
            allotted where they keep the most energy.
        skip: Patterns of layer names to leave as they are.
        keep_factors: Leave the factors in the module after the fit; by default it has its own layers back, with the
            product of the factors as weight. Under ZeRO-3 the factors stay in any case: there a module is left in
            pieces, and the file is the result.

    Example:
        >>> import pytorch_lightning as pl
        >>> from shoestring.callbacks import LowRank
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[LowRank(energy=0.9, skip=["*.head"])])
    """

    card = Card(
        name="low_rank",
        does="replaces linear layers by two low-rank factors of their weights, and trains those",
        paper="2103.03936",
        saves={"flops", "memory", "communication", "size"},
        writes={"modules", "weights"},
        refuses={"model.adapter"},  # the layers that it would replace are frozen
    )

    energy: float = 0.9
    budget: float | None = None
    skip: Sequence[str] = ()
    keep_factors: bool = False

    def check(self) -> None:
        require(0 < self.energy <= 1, self, "energy", "a share in (0, 1]; 1 is off")
        require(self.budget is None or 0 < self.budget <= 1, self, "budget", "a share in (0, 1], or None")

    def predict(self, workload: Workload) -> Effect:
        """Predict the saving of `budget`; that of `energy` depends on the weights, which are not known yet."""
        share = 1.0 if self.budget is None else self.budget
        return Effect(flops=share, states=share, communication=share)

    @classmethod
    def example(cls) -> Self:
        return cls(energy=0.7)

    @classmethod
    def noop(cls) -> Self:
        return cls(energy=1.0)

    # -- hooks ------------------------------------------------------------------------------------------------------
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before the strategy wraps the module and before `configure_optimizers`: both see the factors."""
        self._replaced: dict[str, nn.Linear] = {}
        if stage != "fit" or (self.budget is None and self.energy == 1):
            return
        self._ranks: dict[str, int] = trainer.strategy.broadcast(self._choose(pl_module))
        if not self._ranks and trainer.is_global_zero:
            log.warning("low_rank leaves every layer as it is: %r has no rank that saves parameters", self)
        self._replaced = apply_low_rank(pl_module, self._ranks)
        for layer in self._replaced.values():
            layer.weight.data = layer.weight.data.new_empty(0)  # its place is kept, its memory is not

    def _choose(self, module: nn.Module) -> dict[str, int]:
        check_skip(module, self.skip, self.card.name, layers=True)
        layers = factorable(module, self.skip)
        if not layers:
            raise IncompatibleTechniques(
                f"low_rank finds no linear layer of {type(module).__name__} that is trained, not shared and not among "
                f"skip={list(self.skip)}"
            )
        if self.budget is None:
            return ranks_for_energy(layers, self.energy)
        shapes = {name: layer.weight.shape for name, layer in layers.items()}
        return ranks_for_budget({n: singular_values(layer) for n, layer in layers.items()}, shapes, self.budget)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A module that chose its parameters when it was made would train none of the factors."""
        trained = {id(p) for optimizer in trainer.optimizers for p in _parameters(optimizer)}
        for name in self._replaced:
            factors = pl_module.get_submodule(name)
            if not all(id(p) in trained for p in factors.parameters() if p.requires_grad):
                raise IncompatibleTechniques(
                    f"low_rank: the optimizer does not train {name}, which has been replaced by its factors. Choose "
                    f"the parameters in configure_optimizers, not before, or add {name!r} to skip."
                )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        replaced, self._replaced = getattr(self, "_replaced", {}), {}
        if not (self.keep_factors or in_parts(pl_module)):
            merge_(pl_module, replaced)

    # -- what others may ask ----------------------------------------------------------------------------------------
    def ranks(self) -> dict[str, int]:
        """The rank of every layer that was replaced, by its name."""
        return dict(getattr(self, "_ranks", {}))

    # -- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {"ranks": self.ranks()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (saved := state_dict["ranks"]) != self.ranks():
            raise OtherRanks(
                f"the checkpoint has the ranks {saved}, and these initial weights and settings give {self.ranks()}. "
                "Resume with the settings, the initial weights and the kind of machine that the run began with."
            )


def _parameters(optimizer: Any) -> list[nn.Parameter]:
    """What an optimizer steps; DeepSpeed's flatten them and keep lists of their own."""
    groups = getattr(optimizer, "bit16_groups", None) or getattr(optimizer, "fp16_groups", None)
    return [p for group in groups or [g["params"] for g in optimizer.param_groups] for p in group]
