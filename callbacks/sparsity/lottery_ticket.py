"""Lottery tickets: prune after training, rewind what is left to where it was, and train again (arXiv 1803.03635)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import pytorch_lightning as pl
import torch
from torch import Tensor

from ..accounting.clock import Duration, clock_of
from ..contract import MIXING, Card, Effect, Workload, require
from ..parameters.shards import Shards
from . import distributions, schedules
from .masks import Masking, require_distribution, select


@dataclass(kw_only=True, eq=False, repr=False)
class LotteryTicket(Masking):
    """Prune by magnitude in rounds, and after each rewind what is left to its early values: all inside one budget.

    The run has `rounds` + 1 equal parts. After each but the last, the smallest weights go, an equal share of what is
    left, until `sparsity`; all parameters return to what they were after `rewind` and the optimizer starts afresh. Give
    the learning rate its cycles too: `lr_schedule` with cycles = rounds + 1. Keeps one more copy of the weights.

    Source: arXiv 1803.03635.

    Args:
        sparsity: Share of weights that are 0 in the end, in [0, 1).
        rounds: How often is pruned.
        rewind: Duration after which weights are noted for the return: 0% is initialization; a little later suits larger
            models (arXiv 1912.05671).
        distribution: global (all layers ranked together) | uniform | erk, or name patterns with each its own sparsity.
        skip: Patterns of parameter names to leave dense.

    Example:
        >>> import pytorch_lightning as pl
        >>> from shoestring.callbacks import LotteryTicket, LRSchedule
        >>> tickets = [LotteryTicket(sparsity=0.9, rounds=4), LRSchedule(cycles=5)]
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=tickets)
    """

    card = Card(
        name="lottery_ticket",
        does="prunes after training, rewinds what is left and trains it again",
        paper="1803.03635",
        saves={"size"},
        writes={"weights", "gradients", "optimizer"},
        refuses=MIXING | {"schedule_free_adamw"},  # zero is no place for its second copy of a weight
    )

    sparsity: float = 0.8
    rounds: int = 3
    rewind: str = "2%"
    distribution: str | Mapping[str, float] = "global"
    skip: Sequence[str] = ()

    def check(self) -> None:
        super().check()
        require(self.rounds > 0, self, "rounds", "a positive number")
        require_distribution(self, self.distribution, distributions.NAMES)
        early = Duration.parse(self.rewind)
        legal = early.counts != "progress" or early.amount < 1 / (self.rounds + 1)
        require(legal, self, "rewind", f"a moment before the first of {self.rounds} rounds ends")

    def predict(self, workload: Workload) -> Effect:
        return Effect(states=1 + 4 / 16)

    @classmethod
    def example(cls) -> Self:
        return cls(sparsity=0.6, rounds=2, rewind="1 steps")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._rewound: dict[str, Tensor] = {}  # this rank's slices of all parameters as they were
        self._done = 0
        self._rewind = Duration.parse(self.rewind)

    def update_masks(self, trainer: pl.Trainer, shards: Shards) -> dict[str, Tensor] | None:
        clock = clock_of(trainer)
        if not self._rewound and clock.toward(self._rewind) >= 1.0:
            self._rewound = {name: shards.master(name).clone() for name in shards.slices}
        if self._done >= self.rounds or clock.progress < (self._done + 1) / (self.rounds + 1):
            return None
        self._done += 1
        target = schedules.rounds(self._done, self.rounds, self.sparsity)
        scores = {name: self.among_kept(name, shards.master(name)) for name in self._names}
        masks = select(shards, scores, self.distribution, target)
        self._return(shards)
        return masks

    def _return(self, shards: Shards) -> None:
        """Parameters as they were, the optimizer as new, and no step on gradients of weights that are gone."""
        for name, before in self._rewound.items():
            shards.master(name).copy_(before)
            for state in shards.state(name).values():
                state.zero_()
            for key, value in shards.scalars(name).items():
                if torch.is_tensor(value):
                    value.zero_()
                elif key == "step":
                    shards.restore(name, {}, {key: type(value)(0)})
            if (gradient := shards.gradient(name)) is not None:
                shards.set_gradient(name, torch.zeros_like(gradient))

    # -- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "done": getattr(self, "_done", 0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._done = state_dict["done"]

    def fragments(self) -> dict[str, dict[str, Tensor]]:
        rewound = getattr(self, "_rewound", {})
        return {**super().fragments(), **({"rewound": dict(rewound)} if rewound else {})}

    def load_fragments(self, fragments: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().load_fragments(fragments)
        self._rewound = dict(fragments.get("rewound", {}))
