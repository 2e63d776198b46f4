"""The best evaluation of a run: its weights are kept beside the last ones, and a run without progress may end."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from math import nan
from typing import Any

import pytorch_lightning as pl

from ...callbacks.accounting.account import Account, Upcoming
from ...callbacks.optimization.other_weights import evaluated_weights
from ...recipes.amounts import judged_by
from ...spelling import did_you_mean
from ..checkpoint.saver import Saver
from ..checkpoint.weights import save_weights
from .evaluations import UnknownMetric
from .records import Records

log = logging.getLogger("shoestring")

FOLDER = "best"  # in the run's home


class Best:
    """Judges evaluations by one metric. What it knows is part of checkpoints, so a resumed run judges alike.

    Args:
        judged: "min METRIC" or "max METRIC"; of a loss the name will do. None: nothing is judged.
        patience: So many evaluations without a better one end the run; None: none do.

    Raises:
        UnknownMetric: There is patience, and no metric.
    """

    def __init__(self, judged: str | None, patience: int | None) -> None:
        if patience and not judged:
            raise UnknownMetric("patience needs best, the metric that evaluations are judged by: best='min val_loss'")
        self.metric: str | None = None
        self.mode = "min"
        if judged:
            self.mode, self.metric = judged_by(judged)
        self.patience = patience
        self.value: float | None = None
        self.step = self.since = 0  # of the best evaluation, and evaluations after it
        self.seconds = 0.0  # that keeping weights has taken, at most

    def check(self, metrics: Mapping[str, Any]) -> None:
        """`UnknownMetric` where the trial before training does not measure it."""
        if self.metric is not None and metrics and self.metric not in metrics:
            legal, hint = ", ".join(sorted(metrics)), did_you_mean(self.metric, metrics)
            said = f"checkpoint.best {self.metric}: an evaluation measures {legal}"
            raise UnknownMetric(said + (f"; {hint}" if hint else ""))

    def judge(self, value: float, step: int) -> bool:
        """Whether the evaluation after `step` is better than all before; one that is not a number never is."""
        best = self.value
        if value == value and (best is None or (value < best if self.mode == "min" else value > best)):
            self.value, self.step, self.since = value, step, 0
            return True
        self.since += 1
        return False

    def evaluated(
        self, trainer: pl.Trainer, module: pl.LightningModule, account: Account, saver: Saver, records: Records
    ) -> None:
        """After an evaluation: keep its weights, or end the run where patience is over. Collective: rank 0 judges."""
        if self.metric is None:
            return
        mine = trainer.callback_metrics.get(self.metric, nan)
        value, before = float(account.agreement.gather(float(mine))[0]), (self.value, self.step, self.since)
        if self.judge(value, account.clock.step):
            if refusal := self._keep(trainer, module, account, saver, records):
                self.value, self.step, self.since = before
                say = log.warning if trainer.is_global_zero else log.debug
                say("the best weights so far, of step %d, cannot be kept: %s", account.clock.step, refusal)
                return
            records.event("best", step=self.step, metric=self.metric, value=value)
        elif self.patience and self.since >= self.patience and not trainer.should_stop:
            account.stopped_by, trainer.should_stop = "patience", True

    def _keep(
        self, trainer: pl.Trainer, module: pl.LightningModule, account: Account, saver: Saver, records: Records
    ) -> str | None:
        began = account.spending.windows.enter("checkpoint")
        with evaluated_weights(trainer, module):
            refusal = save_weights(
                trainer, module, records.run_dir / FOLDER, account.agreement, saver.left_out, saver.base_identity
            )
        self.seconds = max(self.seconds, account.spending.windows.enter("train") - began)
        account.pause_ends(trainer)
        return refusal

    def reshaped(self, trainer: pl.Trainer, records: Records) -> None:
        """The model has other shapes from here on: what was the best before it is another model."""
        self.value, self.step, self.since = None, 0, 0
        if self.metric is not None and trainer.is_global_zero:
            shutil.rmtree(records.run_dir / FOLDER, ignore_errors=True)

    def add_to(self, upcoming: Upcoming, seconds: float) -> None:
        """Every evaluation may be the best. seconds: what keeping weights takes as long as nobody knows."""
        if self.metric is not None and "evaluation" in upcoming.pauses:
            taken = self.seconds or seconds
            upcoming.pauses["best"] = upcoming.pauses["evaluation"][0], taken
            upcoming.after_seconds += taken

    def facts(self) -> dict[str, Any]:
        """For the run's summary; nothing where no evaluation has measured a number."""
        if self.value is None:
            return {}
        return {"best": {"metric": self.metric, "value": self.value, "step": self.step}}

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "mode": self.mode, "value": self.value, "step": self.step, "since": self.since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state and (state["metric"], state["mode"]) == (self.metric, self.mode):  # else it is judged anew
            self.value, self.step, self.since = state["value"], state["step"], state["since"]
