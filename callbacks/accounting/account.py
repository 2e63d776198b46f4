"""One attempt's account: what it spends, what the ranks agree on, and the step at which it must end.

It is no callback. One that owns it calls it at the moments that its methods are named for: `Accountant` in anybody's
`pl.Trainer`, the monitor in ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl

from .agreement import Agreement
from .budget import Budget, ImpossibleBudget, refuse_spent, refuse_uncounted
from .clock import Clock
from .horizon import Horizon
from .meter import EvaluationTimer, whole_batches
from .spending import Spending
from .tally import FIELDS, Tally


@dataclass
class Upcoming:
    """The costs of a run that are still to come, besides steps.

    after_seconds: after the last step. pauses: before it, by name: (every so many steps, seconds each).
    """

    after_seconds: float = 0.0
    pauses: dict[str, tuple[float, float]] = field(default_factory=dict)


class Account:
    """Puts `Spending`, `Horizon` and the ranks' `Agreement` together.

    Args:
        budget: what ends the run; see `Budget`.
        usd_per_device_hour, watts_per_device, count_flops: as of `Spending`.
        startup_seconds: that were spent before this object existed.
    """

    def __init__(
        self,
        budget: Budget | None = None,
        *,
        usd_per_device_hour: float = 0.0,
        watts_per_device: float | None = None,
        count_flops: bool = True,
        startup_seconds: float = 0.0,
    ) -> None:
        self.budget = budget or Budget()
        if self.budget.usd is not None and not usd_per_device_hour:
            raise ImpossibleBudget(f"budget usd={self.budget.usd:g} needs a price: give usd_per_device_hour")
        self.clock = Clock()
        self.spending = Spending(
            self.clock, usd_per_device_hour=usd_per_device_hour, watts_per_device=watts_per_device,
            count_flops=count_flops,
        )  # fmt: skip
        self.spending.windows.seconds["startup"] = startup_seconds
        self.horizon = Horizon(self.clock, self.budget, lambda step, last: self.moved(step, last))
        self.moved: Callable[[int, int], None] = lambda step, last: None  # hears of every move of the end
        self.upcoming: Callable[[pl.Trainer], Upcoming] = self.evaluations_to_come
        self.evaluation = EvaluationTimer()
        self.stopped_by: str | None = None
        self.stop_requested = False  # some rank has been asked to stop, and all ranks know it
        self.save_requested = False  # rank 0 wants a checkpoint, and all ranks know it
        self.all_written = False  # every rank has written its part of the checkpoint under way
        self.evaluation_cut = False  # the budget has ended the evaluation
        self.closing_seconds = 0.0  # of what comes after the final evaluation
        self.nonfinite_steps = 0  # of this attempt, on any rank
        self._first = True  # no step of this attempt has ended
        self.cut_window = 0  # micro-batches of the accumulation window that the epoch cuts short with this one
        self._steps = False  # the optimizer steps after the micro-batch under way
        self._manual = False  # the module steps its optimizers itself, once in a batch or not
        self._steps_before = 0  # of the trainer that are none of this clock

    # -- start ------------------------------------------------------------------------------------------------------
    def begin(self, startup_seconds: float = 0.0) -> None:
        """An attempt begins: what is spent from here on is its own."""
        self.spending.begin(startup_seconds)
        self.stopped_by = None
        self.stop_requested = self.save_requested = self.evaluation_cut = self.all_written = False
        self._first = True

    def open(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The fit has begun, and its process group stands."""
        trainer._shoestring_clock = self.clock  # type: ignore[attr-defined]
        self.agreement = Agreement(len(FIELDS))
        self.horizon.lag = self.agreement.lag
        self.spending.open(trainer, module)
        self._manual = not module.automatic_optimization
        self._hear_of_batches(trainer)

    def start(self, trainer: pl.Trainer) -> None:
        """Training begins, from wherever it was restored to."""
        self.spending.start()
        self.spending.listen(trainer.lightning_module)
        self._steps_before = trainer.global_step - self.clock.step
        self.horizon.set_limits(trainer, trainer.num_training_batches)
        self.spending.refresh()
        if not self.clock.step:
            first = trainer.is_global_zero  # ranks began at different moments; one of them decides
            refuse_spent(self.clock.limits, self.agreement.gather(self.clock.spend if first else None)[0])
        self.horizon.guard.skip(self.clock)
        self.spending.windows.enter("train")
        self.spending.wait_for_data()

    # -- the step ---------------------------------------------------------------------------------------------------
    def batch_begins(self, trainer: pl.Trainer, batch: Any, batch_idx: int, lengths: Any = None) -> None:
        done = (batch_idx + 1) % trainer.accumulate_grad_batches
        self._steps = done == 0 or trainer.is_last_batch or self._manual  # the last of an epoch ends a partial window
        self.cut_window = done if self._steps and not self._manual else 0
        self.spending.batch_begins(batch, self._steps, lengths)

    def batch_ends(self, trainer: pl.Trainer) -> bool:
        """Count a micro-batch. True where the optimizer has stepped after it: a step has ended."""
        self.spending.batch_ends()
        step = self.clock.step + self._steps if not self._manual else trainer.global_step - self._steps_before
        if step == self.clock.step:
            self.spending.wait_for_data()
            return False
        self.clock.step = step
        if self._manual:
            self.horizon.learn_steps_per_batch(trainer)
        self.spending.refresh()
        return True

    @property
    def begun(self) -> bool:
        """Whether a step of this attempt has ended, on all ranks."""
        return not self._first

    def agree(self) -> None:
        """Learn what all ranks have spent and want: as of the step before, after the first step as of this one."""
        mine = self.spending.mine
        if self._first:  # ranks wait for one another once, so that all know the horizon
            self.clock.count()
            self.receive(self.agreement.now(mine.as_list()))
            refuse_uncounted(self.clock.limits, self.spending.this_attempt())
            return
        alone = self.agreement.world_size == 1
        if not alone:
            self.receive(self.agreement.settle())
        self.clock.count()
        if alone:
            self._receive(mine)

    def replan(self, trainer: pl.Trainer) -> None:
        """Rank 0 moves the end of the run where steps cost something else than planned; the others will follow."""
        first, self._first = self._first, False
        mine, vote = self.spending.mine, 0.0
        if trainer.is_global_zero:
            vote = self.horizon.first_vote(lambda: self.update_reserve(trainer)) if first else self.horizon.vote()
        if first:
            self.horizon.follow(self.agreement.now([vote])[0])
            return
        mine.horizon = vote
        if self.agreement.world_size == 1:
            self.horizon.follow(vote)
        else:
            self.agreement.start(mine.as_list())

    def stop_at_horizon(self, trainer: pl.Trainer) -> None:
        """Ask the trainer to stop where the run has reached its end; Lightning ends by itself what has its own end."""
        if not trainer.should_stop and (binding := self.horizon.reached()):
            self.stopped_by, trainer.should_stop = binding, binding not in ("max_steps", "max_epochs")

    def receive(self, sums: list[float] | None) -> None:
        """Return the result of an exchange; None where none was under way."""
        if sums is not None:
            self._receive(Tally(*sums))

    def _receive(self, total: Tally) -> None:
        self.spending.receive(total)
        if total.exhausted:
            self.evaluation_cut = True
        elif self.agreement.world_size > 1:
            self.horizon.follow(total.horizon)
        self.stop_requested = self.stop_requested or total.stop > 0
        self.save_requested = self.save_requested or total.save > 0
        self.all_written = total.written >= self.agreement.world_size
        self.nonfinite_steps += total.nonfinite > 0

    # -- pauses -----------------------------------------------------------------------------------------------------
    def evaluation_begins(self) -> None:
        self.evaluation.begin(self.spending.windows.enter("evaluation"))
        self.evaluation_cut = False

    def evaluation_batch_ends(self, trainer: pl.Trainer) -> None:
        """Count it, and hear from the other ranks whether to go on: `evaluation_cut`, `stop_requested`."""
        self.evaluation.batch()
        if trainer.sanity_checking:
            return
        mine = self.spending.mine
        mine.horizon = mine.save = mine.nonfinite = 0.0
        mine.exhausted = float(trainer.is_global_zero and self.over_budget(self.agreement.lag))
        self.receive(self.agreement.exchange(mine.as_list()))
        mine.exhausted = 0.0

    def over_budget(self, late: int) -> bool:
        """Whether another evaluation batch would go over a limit, for a reserve that turned out too small.

        late: so many batches go on before all ranks hear of it.
        """
        self.spending.refresh()
        ahead = (1 + late) * self.evaluation.mean() + self.closing_seconds
        return self.horizon.guard.is_overrun(self.clock, ahead)

    def evaluation_ends(self, trainer: pl.Trainer) -> None:
        now = self.spending.windows.enter("startup" if trainer.sanity_checking else "train")
        self.evaluation.end(now, whole_batches(trainer.num_val_batches))
        if not trainer.sanity_checking:
            self.pause_ends(trainer)

    def pause_ends(self, trainer: pl.Trainer) -> None:
        """What happened since the last step was not the cost of a step."""
        self.spending.refresh()
        self.horizon.guard.skip(self.clock)
        self.update_reserve(trainer)
        self.spending.wait_for_data()

    def update_reserve(self, trainer: pl.Trainer) -> None:
        """Tell the guard what is still to be paid for besides steps."""
        guard, upcoming = self.horizon.guard, self.upcoming(trainer)
        guard.reserve_seconds = upcoming.after_seconds
        guard.pauses.update(upcoming.pauses)

    def evaluations_to_come(self, trainer: pl.Trainer, every: float | None = None) -> Upcoming:
        """The final evaluation and those before it. every: steps between them; None: as Lightning was told."""
        if not trainer.enable_validation:
            return Upcoming()
        seconds = self.evaluation.seconds
        if not seconds:  # none has run yet: a batch costs at most what training on one costs
            micro = self.horizon.guard.step_seconds() / trainer.accumulate_grad_batches
            seconds = micro * whole_batches(trainer.num_val_batches)
        return Upcoming(
            seconds, {"evaluation": (self._evaluation_interval(trainer) if every is None else every, seconds)}
        )

    def _evaluation_interval(self, trainer: pl.Trainer) -> float:
        """Steps between evaluations; infinity if the only one is at the end."""
        batches, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch or 1
        if batches is None or batches == float("inf"):
            return (self.clock.steps_per_epoch or float("inf")) * epochs
        return max(1.0, batches * epochs / trainer.accumulate_grad_batches)

    def reshaped(self, trainer: pl.Trainer) -> None:
        """The model has other shapes now (see sparsity/reshape.py): its steps cost something else."""
        self.spending.reshaped()
        self.pause_ends(trainer)

    # -- end --------------------------------------------------------------------------------------------------------
    def close(self, trainer: pl.Trainer) -> None:
        """Training has ended: the last sums, energy read exactly."""
        self._leave(trainer)
        self.spending.windows.enter("other")
        self.spending.mine.clear_requests()
        self.agreement.settle()
        self.sum_up()

    def sum_up(self) -> None:
        """Bring the totals of all ranks up to now. Collective; after `close`."""
        self.spending.refresh(exact=True)
        self.receive(self.agreement.now(self.spending.mine.as_list()))
        self.spending.refresh()

    def abort(self, trainer: pl.Trainer) -> None:
        """The fit has failed, maybe in the middle of a step."""
        self._leave(trainer)
        self.spending.abort()

    def _hear_of_batches(self, trainer: pl.Trainer) -> None:
        """The wait for data ends where Lightning has fetched a batch, before any technique acts on it."""
        loop, spending = trainer.fit_loop.epoch_loop, self.spending
        fetched = loop._on_after_fetch

        def after_fetch() -> None:
            fetched()
            spending.batch_arrives()

        loop._on_after_fetch = after_fetch  # type: ignore[method-assign]

    def _leave(self, trainer: pl.Trainer) -> None:
        vars(trainer.fit_loop.epoch_loop).pop("_on_after_fetch", None)

    # -- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {
            "clock": self.clock.state_dict(), "evaluation_seconds": self.evaluation.seconds,
            "guard": self.horizon.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clock.load_state_dict(state["clock"])
        self.evaluation.seconds = state["evaluation_seconds"]
        self.horizon.load_state_dict(state["guard"])
