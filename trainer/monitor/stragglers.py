"""Which rank slows the others down: what each does without waiting for anybody, compared every half minute.

The time of a rank is that of waiting for its data and of its forward passes, until backward begins; from there on ranks
wait for one another, and all seem equally slow. Under ZeRO-3 (and wherever else the forward pass gathers weights) a
slow forward pass makes everybody's slow: then only a rank that waits for its data is found.

Nothing here waits or synchronizes: clocks are read on the host, on CUDA events are recorded and read a window later,
and the ranks' times travel in one asynchronous gather a window, heard at the end of the next. Two function calls a
micro-batch; with one rank nothing at all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch

from ...callbacks.contract import silence
from ...cluster.preflight.health import node_name

if TYPE_CHECKING:
    from .monitor import Monitor

log = logging.getLogger("shoestring")

RATIO = 1.3  # to the median of the ranks, in RUNNING windows one after the other
RUNNING = 2
SHARE = 0.05  # of the time of a step that it costs the others, at least: below that nobody would notice
LEAST = 16  # steps of a window, so that one hiccup in it tells nothing; the first one has as many
GROWTH = 8  # of a window over the one before, at most
TIMED = 64  # forward passes a window that are timed on CUDA


def slow_ranks(busy: Sequence[float], seconds: float) -> dict[int, float]:
    """The ranks that hold others up, with their ratio to the median; `seconds` is what the window took all in all.

    >>> slow_ranks([1.0, 1.0, 2.0], seconds=4.0)
    {2: 2.0}
    """
    usual = max(median(busy), 1e-9)
    return {rank: own / usual for rank, own in enumerate(busy) if own > RATIO * usual and own - usual > SHARE * seconds}


def next_window(steps: int, seconds: float, every: float) -> int:
    """Return the steps of the next window, to last about `every` seconds, after one of `steps` that took `seconds`."""
    wanted = round(every * steps / max(seconds, 1e-9))
    return max(LEAST, min(wanted, GROWTH * steps))


class Streaks:
    """Turns windows into news: a rank slow in RUNNING windows one after the other is a straggler until a window in
    which it is not."""

    def __init__(self) -> None:
        self.lengths: dict[int, int] = {}

    def update(self, slow: Sequence[int]) -> tuple[list[int], list[int]]:
        """(ranks that have just become stragglers, ranks that have just ceased to be)."""
        over = [rank for rank, length in self.lengths.items() if length >= RUNNING and rank not in slow]
        self.lengths = {rank: self.lengths.get(rank, 0) + 1 for rank in slow}
        return [rank for rank, length in self.lengths.items() if length == RUNNING], over


@dataclass
class Window:
    """A rank's own time in some steps."""

    steps: int
    waited: float = 0.0
    forward: float = 0.0  # on the host's clock
    passes: int = 0
    timed: list[tuple[Any, Any]] = field(default_factory=list)  # CUDA events around forward passes

    def seconds(self) -> float:
        """Waiting for data and forward passes; waits for nothing: events that are not over yet do not count."""
        over = [began.elapsed_time(ended) / 1000 for began, ended in self.timed if ended.query()]
        return self.waited + self.forward + (sum(over) / len(over) * self.passes if over else 0.0)


@silence
class Stragglers(pl.Callback):
    """Watches the ranks of a run; `Trainer` adds it where there is more than one. `every`: seconds a window lasts.

    Writes the events `straggler` and `straggler_over` to the journal of rank 0.
    """

    def __init__(self, monitor: Monitor, every: float = 30.0) -> None:
        self.monitor, self.every = monitor, every
        self.streaks = Streaks()
        self._began: Any = None
        self._hook: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.trainer = trainer
        self.hosts = self.monitor.account.agreement.gather(node_name())
        self.cuda = trainer.strategy.root_device.type == "cuda"
        self._under_way: tuple[Callable[[], list[list[float]]], int] | None = None  # the answer, its window's steps
        self._last: Window | None = None
        self._open(LEAST)
        # a wrapper (DDP) has spread rank 0's buffers by then, for which the others wait
        self._hook = pl_module.register_forward_pre_hook(self._before_forward())
        self.monitor.each_step = self.step

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self.monitor.each_step = None

    def _open(self, steps: int) -> None:
        self.window = Window(steps)
        self._left = steps
        self._waited, self._trained = (
            self.monitor.account.spending.data_wait,
            self.monitor.account.spending.windows.spent("train"),
        )

    def _before_forward(self) -> Callable[[Any, Any], None]:
        """A hook that copies of the module share; a method would take the whole trainer into the copy."""

        def note(module: Any, inputs: Any) -> None:
            if self._began is None and self.trainer.training:  # a module that calls itself does so later
                self._began = self._now()

        return note

    # -- in the step -------------------------------------------------------------------------------------------------
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        began, self._began = self._began, None
        if began is None:
            return
        self.window.passes += 1
        if not self.cuda:
            self.window.forward += perf_counter() - began
        elif len(self.window.timed) < TIMED:
            self.window.timed.append((began, self._now()))

    def _now(self) -> Any:
        if not self.cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step(self) -> None:
        """An optimizer step has ended, on every rank."""
        self._left -= 1
        if not self._left:
            self._look()

    # -- between windows ---------------------------------------------------------------------------------------------
    def _look(self) -> None:
        """Start telling the others how this window went, and hear how the last one went."""
        account, window = self.monitor.account, self.window
        window.waited = account.spending.data_wait - self._waited
        trained = account.spending.windows.spent("train") - self._trained
        measured = self._last if self.cuda else window
        busy = measured.seconds() if measured is not None else 0.0
        before, self._last = self._under_way, window
        self._under_way = account.agreement.start_gather([busy, trained]), window.steps
        self._open(window.steps if before is None else self._compare(before[0](), before[1]))

    def _compare(self, by_rank: Sequence[Sequence[float]], steps: int) -> int:
        """What every rank told of a window of `steps`; how many the next one has, the same on all ranks."""
        busy, seconds = [own for own, _ in by_rank], by_rank[0][1]
        slow = slow_ranks(busy, seconds)
        new, over = self.streaks.update(list(slow))
        for rank, event in [*((rank, "straggler") for rank in new), *((rank, "straggler_over") for rank in over)]:
            self._report(event, rank, busy, steps)
        return next_window(steps, seconds, self.every)

    def _report(self, event: str, rank: int, busy: Sequence[float], steps: int) -> None:
        if not self.trainer.is_global_zero:
            return
        usual = max(median(busy), 1e-9)
        ratio, host = busy[rank] / usual, self.hosts[rank]
        self.monitor.records.event(
            event, step=self.monitor.account.clock.step, rank=rank, host=host, ratio=round(ratio, 3),
            window_steps=steps,
            own_seconds_a_step=busy[rank] / steps, median_seconds_a_step=usual / steps,
        )  # fmt: skip
        if event == "straggler":
            log.warning("rank %d on %s slows the others down: %.1f times the median of the ranks", rank, host, ratio)
