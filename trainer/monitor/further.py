"""What an evaluation asks of the model besides validation, like completed prompts: timed, and in the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

import pytorch_lightning as pl
import torch

from ...callbacks.accounting.account import Account, Upcoming
from ...callbacks.forward.isolated_step import evaluating, uncompiled
from ...callbacks.optimization.other_weights import evaluated_weights
from ..checkpoint import random_states
from .records import Records
from .stopping import Stopping

SLOWER = 1.5  # than its trial an evaluation may be, on a machine that others use too


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation has found.

    metrics: by name. samples: texts that the model has written, each with its `prompt` and `text`.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)


class FurtherEvaluation(Protocol):
    """Something to find out about a model. It draws no random numbers of the run's, and changes nothing."""

    def metrics(self) -> list[str]:
        """The names of what it measures."""
        ...

    def units(self) -> int:
        """How many units of work it has, about as long as one another."""
        ...

    def run(self, go_on: Callable[[], None]) -> EvaluationResult:
        """Find it out, in the model's evaluation mode; `go_on` is called between units of work, and may end it."""
        ...


class _Cut(Exception):
    """The budget, or somebody, has ended the evaluation; or a trial has seen enough."""


def _stop() -> None:
    raise _Cut


class FurtherEvaluations:
    """Runs them after each validation, on rank 0, or on all ranks alike where each keeps a part of the model.

    Ranks that have nothing to compute hear after each unit of work how it goes, so all know of a signal to any of them.
    """

    def __init__(self, account: Account, stopping: Stopping, records: Records) -> None:
        self.account, self.stopping, self.records = account, stopping, records
        self.each: list[FurtherEvaluation] = []
        self.together = False  # a rank alone cannot compute
        self._seconds = 0.0  # that they take, as a trial says, or have taken at most

    def metrics(self) -> list[str]:
        return [name for one in self.each for name in one.metrics()]

    def run(self, trainer: pl.Trainer, module: pl.LightningModule) -> bool:
        """After a validation: run all, add their metrics to the trainer's. False where they were cut. Collective."""
        if not self.each:
            return True
        account = self.account
        began = account.spending.windows.enter("evaluation")
        account.evaluation.begin(began)
        with _as_evaluated(trainer, module):
            result = self._computed(trainer) if self.together or trainer.is_global_zero else self._wait()
        if result is not None:
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in result.metrics.items()})
            self.records.samples(account.clock.step, result.samples)
            self._seconds = max(self._seconds, account.spending.windows.enter("train") - began)
        else:
            for name in self.metrics():  # what an earlier one has found says nothing of these weights
                trainer.callback_metrics.pop(name, None)
            self.records.evaluation_cut(account.clock.step, account.evaluation.batches)
        account.spending.windows.enter("train")
        account.pause_ends(trainer)
        return result is not None

    def trial(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Before training: the first unit of each, by which the budget keeps back the time of all."""
        if not self.each or not (self.together or trainer.is_global_zero):
            return
        windows, before = self.account.spending.windows, self.account.spending.windows.current
        windows.enter("evaluation")
        with _as_evaluated(trainer, module):
            for one in self.each:
                start = perf_counter()
                with suppress(_Cut):
                    one.run(_stop)
                self._seconds += SLOWER * one.units() * (perf_counter() - start)
        windows.enter(before)

    def _computed(self, trainer: pl.Trainer) -> EvaluationResult | None:
        first = trainer.is_global_zero

        def go_on() -> None:
            if self._unit_ends(first) is not None:
                raise _Cut

        try:
            every = [one.run(go_on) for one in self.each]
        except _Cut:
            return None
        metrics = {name: value for one in every for name, value in one.metrics.items()}
        result = EvaluationResult(metrics, [sample for one in every for sample in one.samples])
        self.account.agreement.gather((False, result))
        return result

    def _wait(self) -> EvaluationResult | None:
        while (heard := self._unit_ends(first=False)) is None:
            pass
        return heard[0]

    def _unit_ends(self, first: bool) -> tuple[EvaluationResult | None] | None:
        """A unit of work has ended. None: go on. Else what has been found, None where it has been cut."""
        self.account.evaluation.batch()
        over = first and self.account.over_budget(late=0)
        replies: list[tuple[bool, Any]] = self.account.agreement.gather((self.stopping.wanted > 0 or over, None))
        if isinstance(replies[0][1], EvaluationResult):
            return (replies[0][1],)
        return (None,) if any(stop for stop, _ in replies) else None

    def add_to(self, upcoming: Upcoming) -> None:
        """Every evaluation has them after it."""
        if self.each and "evaluation" in upcoming.pauses:
            upcoming.pauses["further evaluation"] = upcoming.pauses["evaluation"][0], self._seconds
            upcoming.after_seconds += self._seconds


@contextmanager
def _as_evaluated(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """The model as an evaluation sees it; random states are afterwards as they were. Collective."""
    state = random_states.rng_state()
    with ExitStack() as stack:
        stack.enter_context(evaluated_weights(trainer, module))
        stack.enter_context(evaluating(module))
        stack.enter_context(uncompiled())
        stack.enter_context(torch.no_grad())
        stack.enter_context(trainer.precision_plugin.forward_context())
        yield
    random_states.set_rng_state(state)
