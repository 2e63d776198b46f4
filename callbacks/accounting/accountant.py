"""A budget, a clock and honest totals in anybody's `pl.Trainer`; `shoestring.trainer` has a monitor of its own.

pl.Trainer(max_epochs=-1, callbacks=[LRSchedule(), Accountant(Budget(hours=2))])
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from ..contract import ReshapeListener, silence
from .account import Account
from .budget import Budget
from .clock import Clock


@silence
class Accountant(ReshapeListener, pl.Callback):
    """Counts what a run spends and stops it at the budget's end, on every rank at the same step.

    It has to be the last callback, so that at the end of a batch it sees what every technique has done.

    Args:
        budget: Ends the run when its first limit is reached. None: counts only.
        usd_per_device_hour: What a device costs; a budget in dollars needs it.
        watts_per_device: What a device draws, for energy where no counter can be read.
        count_flops: Count matrix FLOPs of every new kind of step.
        startup_seconds: Spent before, to be charged to the run.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(max_epochs=-1, callbacks=[Accountant(Budget(hours=2))], logger=False)
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
        self._fits = 0
        self.account = Account(
            budget, usd_per_device_hour=usd_per_device_hour, watts_per_device=watts_per_device,
            count_flops=count_flops, startup_seconds=startup_seconds,
        )  # fmt: skip

    @property
    def clock(self) -> Clock:
        """The run's clock; `clock.spend` is what has been spent."""
        return self.account.clock

    @property
    def stopped_by(self) -> str | None:
        """The limit that has ended the run; None where something else did."""
        return self.account.stopped_by

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._fits += 1
        if self._fits > 1:  # the first one began when this object was made
            self.account.begin()
        self.account.open(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.account.start(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.account.batch_begins(trainer, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        account = self.account
        if not account.batch_ends(trainer):
            return
        account.agree()
        account.replan(trainer)
        account.stop_at_horizon(trainer)
        account.spending.wait_for_data()

    # `trainer.validate` is no part of the run
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.account.evaluation_begins()

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.state.fn != "fit":
            return
        self.account.evaluation_batch_ends(trainer)
        if self.account.evaluation_cut:
            raise StopIteration  # Lightning ends the evaluation with what it has seen

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.account.evaluation_ends(trainer)

    def on_reshape(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.account.reshaped(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.account.close(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.account.abort(trainer)

    def state_dict(self) -> dict[str, Any]:
        return self.account.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.account.load_state_dict(state_dict)
