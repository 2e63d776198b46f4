"""An attempt that is asked to stop: what it saves, what it says, and with which code it ends."""

from __future__ import annotations

import logging

import pytorch_lightning as pl

from ...callbacks.accounting.account import Account
from ...exits import FAILURE
from ..machine.signals import StopRequest, preempted
from .checkpoints import Checkpoints
from .records import Records
from .totals import Totals

log = logging.getLogger("shoestring")


class Stopping:
    """Hears of a request on any rank, and ends all of them alike.

    Attributes:
        request: This rank's signals.
    """

    def __init__(self, account: Account, checkpoints: Checkpoints, records: Records, totals: Totals) -> None:
        self.request = StopRequest()
        self._account, self._checkpoints, self._records, self._totals = account, checkpoints, records, totals

    @property
    def wanted(self) -> float:
        """What this rank adds to the ranks' sum: 1 where it has been asked."""
        return float(self.request.received is not None)

    def before_training(self, trainer: pl.Trainer, resumed_from: int | None) -> None:
        """Stop here where any rank has been asked. Collective; nothing is to be saved yet."""
        if any(self._account.agreement.gather(self.request.received)):
            raise self.end(trainer, resumed_from)

    def asked_before_training(self) -> bool:
        """Whether this rank was asked to stop before the first step of this attempt had ended."""
        return self.request.received is not None and not self._account.begun

    def end(self, trainer: pl.Trainer, resumed_from: int | None) -> BaseException:
        """What ends this rank, once saved: with 85, or with 1 where the disk has kept nothing of this attempt."""
        step, signal = self._account.clock.step, self.request.received or "on another rank"
        outcome = self._checkpoints.outcome(step, resumed_from)
        if outcome.kept:
            self._records.event("preempted", step=step, signal=signal, **self._totals.so_far())
            say = log.warning if trainer.is_global_zero else log.debug
            say("stopped on request: %s; the same command continues from there", outcome.said)
            return preempted()
        self._records.event("error", step=step, signal=signal, reason=outcome.said, **self._totals.so_far())
        say = log.error if trainer.is_global_zero else log.debug
        say("stopped on request, and %s. Make room in %s first.", outcome.said, self._checkpoints.saver.root)
        return preempted(FAILURE)
