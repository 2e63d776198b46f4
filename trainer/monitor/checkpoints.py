"""When a run is saved: at its first and last step, every interval, before it changes shape, and when it is told to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytorch_lightning as pl

from ...callbacks.accounting.account import Account, Upcoming
from ...callbacks.accounting.clock import MEASURED, Duration
from ...callbacks.contract import Technique
from ...callbacks.parameters.buffers import agree_buffers
from ..checkpoint import format as checkpoint
from ..checkpoint.saver import CannotResume, Saver
from ..checkpoint.weights import save_weights, weights_problem
from .intervals import UNTIL_MEASURED, best_interval, between_failures, interval, passed, steps_in
from .records import Records


@dataclass(frozen=True)
class Outcome:
    """What a stopped attempt leaves on the disk, in words, and whether another attempt has anything from it."""

    kept: bool
    said: str


class Checkpoints:
    """Decides when the `Saver` saves, and keeps the whole weights at the end.

    Args:
        account: Of this attempt.
        every: A duration such as "10 min", or "auto"; None: at the first and the last step only.
        keep: How many stay on disk.
        mtbf: Mean seconds between failures and preemptions, for "auto"; None: see `intervals.between_failures`.
    """

    def __init__(self, account: Account, every: str | None, keep: int, mtbf: float | None = None) -> None:
        self.account = account
        self.auto, self.mtbf = every == "auto", mtbf
        self.every = Duration(UNTIL_MEASURED, "seconds") if self.auto else interval(every) if every else None
        self.keep = keep
        self.saved_step = self.tried_step = -1  # the newest of this attempt that is on the disk, and that should be
        self.refusal = ""  # what the disk said against the newest
        self.under_way = False  # the newest is being written while training goes on
        self._stall = 0.0  # the longest that one has held training up
        self._next = 0.0
        self._techniques: list[Technique] = []

    def open(self, trainer: pl.Trainer, records: Records, about: Callable[[pl.Trainer], dict[str, Any]]) -> None:
        """The run's home is known. about: facts for the manifest."""
        self.saver = Saver(records.run_dir / "checkpoints", self.keep, self.account.agreement, records.event)
        self._records, self._about = records, about
        self._techniques = [c for c in trainer.callbacks if _may_reshape(c)]

    def restore(
        self, trainer: pl.Trainer, module: pl.LightningModule, resume: Literal["auto", "must", False], accept: bool
    ) -> tuple[dict[str, Any], Any] | None:
        """Put the newest intact checkpoint back: its manifest and random states; None where there is none. Collective.

        Raises:
            CannotResume: There is one and none is wanted, or the other way round.
        """
        home = self._records.run_dir
        if not resume and self.account.agreement.gather(checkpoint.steps(self.saver.root))[0]:
            raise CannotResume(f"{home} holds a run: resume it, or choose another run directory")
        restored = self.saver.restore(trainer, module, accept)
        if restored is None and resume == "must":
            raise CannotResume(f"{home} has no checkpoint to resume from")
        return restored

    def start(self) -> None:
        if self.auto:
            self._next = self.account.clock.spend.seconds
        else:
            self._next = passed(self.account.clock, self.every) if self.every else 0

    def _choose(self, trainer: pl.Trainer) -> None:
        """The interval that costs least, by what saving has cost and how often runs are interrupted."""
        mtbf = self.mtbf or between_failures(
            self.account.clock.spend.seconds, self._records.attempts_before, trainer.num_nodes
        )
        seconds = best_interval(self._stall or self.saver.seconds, mtbf)
        self.every = Duration(seconds, "seconds")

    def due(self, trainer: pl.Trainer) -> bool:
        """After a step, alike on all ranks; an interval of a measured amount passes when rank 0 says so."""
        account = self.account
        if self._waits(trainer):
            return True
        if self.every is None:
            return False
        if self.auto:
            over = account.clock.spend.seconds - self._next >= self.every.amount
        else:
            over = passed(account.clock, self.every) > self._next
        if self.every.counts not in MEASURED:
            return over
        account.spending.mine.save = float(trainer.is_global_zero and over)
        return account.save_requested

    def _waits(self, trainer: pl.Trainer) -> bool:
        """Whether what is saved after this step must be on the disk before anything else happens: the first of an
        attempt, which proves that it can be saved; the last; and what is saved on request."""
        ends = trainer.should_stop or self.account.stopped_by is not None
        # the last step in these shapes
        last = bool(self._techniques) and any(technique.reshapes_next(trainer) for technique in self._techniques)
        return self.tried_step < 0 or ends or self.account.stop_requested or last

    def save(self, trainer: pl.Trainer, module: pl.LightningModule, wait: bool = False) -> None:
        """Save this step, unless that has been tried. Collective.

        wait: until it is published, which is also done where it must be; else it is written while training goes on.
        """
        account, step = self.account, self.account.clock.step
        if self.tried_step == step:
            if self.under_way and (wait or self._waits(trainer)):
                self.complete(trainer)
            return
        began = account.spending.windows.enter("checkpoint")
        self._complete(trainer)
        agree_buffers(module)
        self._records.sync()
        account.receive(account.agreement.settle())  # the sums of this very step belong to it
        wait = wait or self._waits(trainer)  # these sums may be what asks to stop
        self.tried_step, account.save_requested, account.spending.mine.save = step, False, 0.0
        write = self.saver.save if wait else self.saver.begin
        self.refusal = write(trainer, module, step, self._about(trainer)) or ""
        self.under_way = not wait and not self.refusal
        if wait and not self.refusal:
            self.saved_step = step
        self.start()
        account.all_written, account.spending.mine.written = False, 0.0
        self._pause_ends(trainer, began, wait)

    def advance(self, trainer: pl.Trainer) -> None:
        """After a step, while a checkpoint is being written: publish it once all ranks know that all have written."""
        account, written = self.account, self.saver.written
        account.spending.mine.written = float(written)
        if account.all_written or (written and account.agreement.world_size == 1):
            self.complete(trainer)

    def complete(self, trainer: pl.Trainer) -> None:
        """Wait for the checkpoint under way, and publish it. Collective."""
        began = self.account.spending.windows.enter("checkpoint")
        self._complete(trainer)
        self._pause_ends(trainer, began)

    def abandon(self) -> None:
        """The fit has failed: this rank ends what it is writing, alone."""
        if self.under_way:
            self.under_way = False
            self.saver.abandon()

    def _complete(self, trainer: pl.Trainer) -> None:
        if not self.under_way:
            return
        self.under_way = False
        self.refusal = self.saver.complete(trainer) or ""
        if not self.refusal:
            self.saved_step = self.tried_step

    def _pause_ends(self, trainer: pl.Trainer, began: float, waited: bool = False) -> None:
        ended = self.account.spending.windows.enter("train")
        if not waited:
            self._stall = max(self._stall, ended - began)
        if self.auto:
            self._choose(trainer)
        self.account.pause_ends(trainer)

    def keep_weights(self, trainer: pl.Trainer, module: pl.LightningModule, resumed_from: int | None) -> str | None:
        """Save the last step, and the whole weights for others; what the disk said against the latter. Collective."""
        account, step, final = self.account, self.account.clock.step, self._records.run_dir / "final"
        done = resumed_from == step and account.agreement.gather(weights_problem(final))[0] is None
        if done or not step:
            return None
        if resumed_from != step:
            self.save(trainer, module, wait=True)
            account.spending.windows.enter("other")
        self.saver.require_finite(step)
        agree_buffers(module)
        saver = self.saver
        return save_weights(trainer, module, final, account.agreement, saver.left_out, saver.base_identity)

    def outcome(self, step: int, resumed_from: int | None) -> Outcome:
        """For an attempt that began at `resumed_from` and stops after `step`."""
        if not self.refusal:
            return Outcome(True, f"step {step} is saved" if step else "nothing was to be saved yet")
        newest = self.saved_step if self.saved_step > 0 else resumed_from
        said = f"step {step} could not be saved ({self.refusal}); "
        said += f"step {newest} is the newest that is saved" if newest else "no step is saved"
        return Outcome(self.saved_step > (resumed_from or 0), said)

    def add_to(self, upcoming: Upcoming) -> Upcoming:
        """Return the costs to come, with checkpoints."""
        account, seconds = self.account, self.saver.seconds
        stall = self._stall or seconds
        # the final weights take no longer than a checkpoint; the same again for a machine that is slow just then
        account.closing_seconds = 2 * seconds
        upcoming.after_seconds += seconds + account.closing_seconds
        if self.every is not None:
            upcoming.after_seconds += seconds  # one may still be being written
            upcoming.pauses["checkpoint"] = (steps_in(account.clock, self.every), stall)
        return upcoming


def _may_reshape(callback: Any) -> bool:
    return isinstance(callback, Technique) and type(callback).reshapes_next is not Technique.reshapes_next
