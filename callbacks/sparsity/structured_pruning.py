"""Structured pruning: cut whole channels, neurons and heads out of the model and its optimizer, within one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ..accounting.clock import Duration, clock_of
from ..contract import MIXING, Card, Effect, IncompatibleTechniques, Resuming, Technique, Workload, require
from ..forward.isolated_step import isolated_training_step, loss_of
from ..parameters.accessor import shards_of
from ..parameters.cut import rebuild_model, update_configurations
from ..parameters.layers import check_skip
from ..parameters.shards import Shards
from .reshape import reshape
from .structured_check import CannotTrace
from .structured_groups import choose, torch_pruning

IMPORTANCES = ("magnitude", "taylor", "lasso")
MEMORY = 0.9  # share of the Taylor saliency that a step keeps of the ones before it
REFRESH = 10  # steps between two looks at the norms of the rows, which are spread over ranks


def row_norms(shards: Shards, names: Sequence[str]) -> dict[str, Tensor]:
    """The norm of every row (index of the first dimension) of the weights `names`. One sum over ranks where sharded."""
    squares = []
    for name in names:
        master = shards.master(name).float()
        rows = torch.zeros(shards.slices[name].shape[0], device=master.device)
        squares.append(rows.index_add_(0, _rows(shards, name, master.device), master.square()))
    device = max((s.device for s in squares), key=lambda d: d.type != "cpu")
    total = shards.total(torch.cat([s.to(device) for s in squares]))
    return dict(zip(names, total.sqrt().split([len(s) for s in squares]), strict=True))


def _rows(shards: Shards, name: str, device: torch.device) -> Tensor:
    """Which row each of this rank's elements is in."""
    where = shards.slices[name]
    each = where.numel // where.shape[0]
    return torch.arange(where.offset, where.offset + where.length, device=device) // each


def try_out(module: pl.LightningModule, batch: Any) -> None:
    """Raise `CannotTrace` if the module that has been cut does not run."""
    with isolated_training_step(module), torch.no_grad():
        try:
            loss_of(module, batch)
        except Exception as error:
            raise CannotTrace(
                f"the model does not run with fewer channels: {type(error).__name__}: {error}. "
                "Some layer's width is written into its forward: name its parameters in structured_pruning's `skip`."
            ) from error


@dataclass(kw_only=True, eq=False, repr=False)
class StructuredPruning(Technique, pl.Callback):
    """Cut the least important channels, neurons and attention heads out of every layer, in the middle of a run.

    Weights, optimizer states, averages and masks are cut by the same indices, and training goes on: nothing is masked,
    so the saving is realised. Outputs, the residual stream of transformers and attention of unknown make stay whole.
    Configurations of Hugging Face models keep describing the whole model and carry the cuts as `structured_cut`, for
    `rebuild_model`.

    Source: arXiv 1608.08710.

    Args:
        ratio: Share of the channels, neurons and heads that are cut, in [0, 1); 0 is off.
        at: Duration after which they are cut; of several rising ones, each cuts an equal part.
        importance: "magnitude", the norm of a group of weights that go together; "taylor", the first-order change of
            the loss without it (arXiv 1906.10771), averaged exponentially over the steps before; "lasso", the norm
            after a group lasso in the steps before.
        strength: Of "lasso": each step takes `strength` x learning rate off the norm of every row of every layer (the
            proximal step, arXiv 1608.03665).
        round_to: Widths stay multiples of this where they have as many.
        skip: Patterns of parameter names that keep their shapes.

    Example:
        >>> import pytorch_lightning as pl
        >>> from shoestring.callbacks import StructuredPruning
        >>> pruning = StructuredPruning(ratio=0.5, at=["20%", "40%"], importance="taylor")
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[pruning])
    """

    card = Card(
        name="structured_pruning",
        does="cuts whole channels, neurons and attention heads out of the model and its optimizer",
        paper="1608.08710",
        saves={"flops", "time", "memory", "communication", "size"},
        writes={"modules", "weights", "optimizer", "activations"},
        # the states of these optimizers go with no element; codes of a quantized base with no row and column
        # under fsdp2 no rank has the whole layers that are cut
        refuses=MIXING | {"adafactor", "adamw8bit", "adamw4bit", "apollo", "model.dtype nf4 or int8", "fsdp2"},
    )

    ratio: float = 0.5
    at: str | Sequence[str] = "50%"
    importance: str = "magnitude"
    strength: float = 0.1
    round_to: int = 16
    skip: Sequence[str] = ()

    def check(self) -> None:
        require(0 <= self.ratio < 1, self, "ratio", "a share in [0, 1)")
        require(self.importance in IMPORTANCES, self, "importance", " | ".join(IMPORTANCES))
        require(self.strength >= 0, self, "strength", "a number >= 0")
        require(self.round_to > 0, self, "round_to", "a positive number of channels")
        moments = self._durations()
        rising = all(a.counts == b.counts and a.amount < b.amount for a, b in pairwise(moments))
        require(bool(moments) and rising, self, "at", "a moment, or rising moments in one unit")
        later = moments[0].amount > 0 or self.importance == "magnitude"
        require(later, self, "at", f"a moment after the start: {self.importance} needs steps to see")

    def _durations(self) -> list[Duration]:
        return [Duration.parse(at) for at in ([self.at] if isinstance(self.at, str) else self.at)]

    def predict(self, workload: Workload) -> Effect:
        done = [d.amount if d.counts == "progress" else 0.5 for d in self._durations()]
        share = self.ratio * sum(1 - min(1.0, d) for d in done) / len(done)
        return Effect(flops=1 - share, activations=1.0, communication=1 - share)  # memory peaks before the cut

    @classmethod
    def example(cls) -> Self:
        return cls(ratio=0.5, at="25%")

    @classmethod
    def noop(cls) -> Self:
        return cls(ratio=0.0)

    # -- shapes of a run that goes on -------------------------------------------------------------------------------
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._cuts: list[dict[str, Any]] = []
        self._saliency: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}
        self._moments = self._durations()
        self._waiting: Any = None
        if not self.ratio:
            return
        torch_pruning()
        if isinstance(trainer, Resuming):
            self.rebuild(pl_module, trainer.saved_state(self.state_key) or {})
            return

        def before_loading(module: nn.Module, *_: Any) -> None:
            loaded = trainer._checkpoint_connector._loaded_checkpoint or {}
            self.rebuild(module, loaded.get("callbacks", {}).get(self.state_key, {}))

        self._waiting = pl_module.register_load_state_dict_pre_hook(before_loading)

    def rebuild(self, pl_module: nn.Module, state: Mapping[str, Any]) -> None:
        if cuts := state.get("cuts"):
            update_configurations(rebuild_model(pl_module, cuts), cuts)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_waiting()
        if not self.ratio:
            return
        if not pl_module.automatic_optimization:
            raise IncompatibleTechniques(
                "structured_pruning traces training_step, which must leave the optimizer to Lightning"
            )
        if hasattr(trainer.strategy, "deepspeed_engine") and not isinstance(trainer, Resuming):
            raise IncompatibleTechniques(
                "structured_pruning rebuilds DeepSpeed's engine: use shoestring.trainer.Trainer for it"
            )

    def _stop_waiting(self) -> None:
        if getattr(self, "_waiting", None) is not None:
            self._waiting.remove()
        self._waiting = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop_waiting()

    # -- before the cut ---------------------------------------------------------------------------------------------
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_skip(pl_module, self.skip, self.card.name)
        kinds = (nn.Linear, nn.modules.conv._ConvNd)
        layers = {id(p) for part in pl_module.modules() if isinstance(part, kinds) for p in part.parameters()}
        self._names = [name for name, p in pl_module.named_parameters() if id(p) in layers and p.requires_grad]
        device = pl_module.device
        self._saliency = {name: value.to(device) for name, value in self._saliency.items()}
        self._norms = {name: value.to(device) for name, value in self._norms.items()}

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.importance == "magnitude" or not self.ratio or len(self._cuts) == len(self._moments):
            return
        shards = shards_of(trainer, pl_module)
        if not shards.at_boundary():
            return
        if self.importance == "taylor":
            self._accumulate_saliency(shards)
        else:
            self._group_lasso_step(shards, trainer.global_step, optimizer.param_groups[0]["lr"])

    def _accumulate_saliency(self, shards: Shards) -> None:
        """Average (weight x gradient)^2 of this rank's elements."""
        for name in self._names:
            gradient = shards.gradient(name)
            if not shards.slices[name].length:
                self._saliency[name] = shards.master(name)  # nothing, but named: ranks gather the same names
            elif gradient is not None:
                master = shards.master(name)
                change = (master.float() * gradient.to(master.device, torch.float32)).square()
                if name in self._saliency:
                    self._saliency[name].lerp_(change, 1 - MEMORY)
                else:
                    self._saliency[name] = change

    def _group_lasso_step(self, shards: Shards, step: int, rate: float) -> None:
        """The group lasso's proximal step: take strength x rate off the norm of every row, as last seen."""
        weights = [name for name in self._names if len(shards.slices[name].shape) > 1]
        if step % REFRESH == 0 or not self._norms:
            self._norms = row_norms(shards, weights)
        for name in weights:
            master = shards.master(name)
            left = (1 - self.strength * rate / self._norms[name].clamp(min=1e-12)).clamp(min=0.0)
            if master.numel():
                master.mul_(left.to(master)[_rows(shards, name, master.device)])

    # -- the cut ----------------------------------------------------------------------------------------------------
    def reshapes_next(self, trainer: pl.Trainer) -> bool:
        """Whether the next step begins with a cut."""
        if not self.ratio or len(self._cuts) == len(self._moments):
            return False
        return clock_of(trainer).toward(self._moments[len(self._cuts)]) >= 1.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches or not self.reshapes_next(trainer):
            return
        shards = shards_of(trainer, pl_module)
        scores = {name: shards.gather(name, local).clone() for name, local in self._saliency.items()}

        def chosen(masters: Mapping[str, Tensor]) -> dict[str, Any]:
            squares = scores if self.importance == "taylor" else {n: w.square() for n, w in masters.items()}
            with isolated_training_step(pl_module):
                cut = choose(pl_module, lambda: loss_of(pl_module, batch), squares, ratio=self._part(),
                             round_to=self.round_to, skip=self.skip)  # fmt: skip
            return cut.state()

        state = reshape(trainer, pl_module, chosen, lambda: try_out(pl_module, batch))
        assert state is not None
        self._cuts = [*self._cuts, dict(state)]
        self._norms = {}
        if len(self._cuts) == len(self._moments):
            self._saliency = {}
        update_configurations(pl_module, self._cuts)

    def _part(self) -> float:
        """The share of what is left that goes now, so that equal parts of the whole go each time."""
        done, all_of_them = len(self._cuts), len(self._moments)
        return 1 - (1 - self.ratio * (done + 1) / all_of_them) / (1 - self.ratio * done / all_of_them)

    # -- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        norms = {name: value.tolist() for name, value in getattr(self, "_norms", {}).items()}
        return {"cuts": getattr(self, "_cuts", []), "norms": norms}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._cuts = list(state_dict["cuts"])
        self._norms = {name: torch.tensor(values) for name, values in state_dict["norms"].items()}

    def fragments(self) -> dict[str, dict[str, Tensor]]:
        return {"saliency": dict(self._saliency)} if getattr(self, "_saliency", None) else {}

    def load_fragments(self, fragments: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._saliency = dict(fragments.get("saliency", {}))
