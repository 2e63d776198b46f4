"""Where a run is written down: its journal, the ledger's index, W&B, and what the terminal shows."""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from math import isfinite
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl

from ... import ShoestringError
from ...callbacks.accounting.clock import Spend
from ...callbacks.contract import Technique
from ...cluster.environment import SECRET_NAMES, redacted_values
from ..ledger import Journal, Ledger, Row, RunIdentity, WandbSink, next_attempt, read, write_summary
from ..ledger.wandb_replay import missed_rows, note_missed
from .display import Display

if TYPE_CHECKING:
    from ...recipes import Recipe

log = logging.getLogger("shoestring")

# a killed attempt may have worked this long after its last row, and it is charged for it
UNSEEN_SECONDS = 0.25
# for the ledger and W&B: a scheduler gives 30 s from its signal to its kill, and most of these are for saving
LEAVING, FINISHING = 2.5, 20.0
_TOTALS = ("seconds", "device_seconds", "usd", "kwh")


# sections that may change between attempts of one run
MUTABLE_SECTIONS = frozenset(
    {"name", "budget", "strategy", "cluster", "tracking", "checkpoint", "evaluation", "goal", "export"}
)


class AnotherRun(ShoestringError):
    """The run directory belongs to a run of another recipe."""


class Records:
    """One run's records. Rank 0 keeps steps and events; every rank keeps a journal of its attempts."""

    def __init__(
        self,
        run_dir: str | os.PathLike[str] | None,
        *,
        name: str | None = None,
        recipe: Recipe | None = None,
        ledger: bool = True,
        wandb: Mapping[str, Any] | str | bool | None = None,
        estimates: Iterable[Mapping[str, Any]] = (),
        hardware: str = "",
        accept_changes: bool = False,
    ) -> None:
        self.given = Path(run_dir) if run_dir is not None else None
        self.name, self.recipe, self.hardware = name, recipe, hardware
        self.ledger, self.estimates, self.accept_changes = ledger, list(estimates), accept_changes
        self.wandb = _wandb(wandb)
        self.display: Display | None = None
        self.keeps = False  # this rank writes rows
        self._journal: Journal | None = None
        self._sink: WandbSink | None = None
        self._before: list[tuple[str, dict[str, Any]]] = []

    @property
    def run_dir(self) -> Path:
        assert self.given is not None, "known once the run has started"
        return self.given

    def open(self, trainer: pl.Trainer) -> None:
        """All ranks: agree on the run's home, take its identity, and start this attempt's journal."""
        if self.name is None:
            named = self.given.resolve().name if self.given is not None else ""
            self.name = named or type(trainer.lightning_module).__name__
        fresh = Path("runs") / f"{self.name}-{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
        self.given = Path(trainer.strategy.broadcast(str(self.given or fresh)))
        recipe = self.recipe
        self.identity = RunIdentity.create_or_load(
            self.run_dir,
            name=self.name,
            recipe_hash=recipe.hash if recipe is not None else "",
            recipe=recipe.model_dump(mode="json") if recipe is not None else None,
        )
        self._same_run(recipe)
        events = self.run_dir / "events"
        self._attempt = trainer.strategy.broadcast(next_attempt(events))
        self.attempts_before = self._attempt
        self._journal = Journal(events, rank=trainer.global_rank, attempt=self._attempt)
        self.keeps, self._rank = trainer.is_global_zero, trainer.global_rank
        if self.keeps and self.ledger:
            Ledger().announce(self.run_dir)
        for kind, fields in self._before:
            self._journal.write(kind, **fields)
        self._before.clear()

    def _same_run(self, recipe: Recipe | None) -> None:
        """A run may go on with more or less budget; with anything else changed it would be another run."""
        if recipe is None or self.identity.recipe_hash in ("", recipe.hash):
            return
        before, now = dict(self.identity.recipe), recipe.model_dump(mode="json")
        changed = sorted(
            k for k in before.keys() | now.keys() if k not in MUTABLE_SECTIONS and before.get(k) != now.get(k)
        )
        if changed and self.accept_changes:
            self.event("accepted", changed=changed)
        elif changed:
            raise AnotherRun(
                f"{self.run_dir} holds the run of another recipe ({self.identity.name}, {self.identity.recipe_hash}); "
                f"this one is {recipe.name} ({recipe.hash}), and they differ in: {', '.join(changed)}. "
                "Say --accept-changes to go on with them, or give another run directory."
            )

    def spent(self, checkpointed: Spend) -> Spend:
        """Return what all attempts have cost: time, money and energy lost since the checkpoint stay spent."""
        spend = Spend.from_dict(checkpointed.as_dict())
        rows = [r for r in read(self.run_dir / "events", rank=0) if r.attempt < self._attempt]
        timed = [r for r in rows if r.kind in ("step", "event") and isinstance(r.fields.get("seconds"), int | float)]
        if not timed:
            return spend
        last = max(timed, key=lambda r: float(r.fields["seconds"]))  # type: ignore[arg-type]
        for field in _TOTALS:
            setattr(spend, field, max(getattr(spend, field), float(last.fields.get(field) or 0)))  # type: ignore[arg-type]
        if spend.seconds:
            unseen = 1 + _unseen(rows, last) / spend.seconds
            for field in _TOTALS:
                setattr(spend, field, getattr(spend, field) * unseen)
        return spend

    def started(self, trainer: pl.Trainer, resumed_from: int | None, strategy: str, totals: Mapping[str, Any]) -> None:
        techniques = [c for c in trainer.callbacks if isinstance(c, Technique)]
        if self.wandb and self.keeps:
            self._sink = WandbSink(
                self.wandb["mode"], self.wandb.get("project", "shoestring"), self.identity,
                self._config(techniques), self.run_dir,
            )  # fmt: skip
            for row in missed_rows(self.run_dir):
                self._sink.put(int(str(row.fields.get("step", row.seq))), row.fields)
        self.event(
            "start" if resumed_from is None else "resume",
            step=resumed_from or 0,
            hostname=os.uname().nodename,
            strategy=strategy,
            world_size=trainer.world_size,
            hardware=self.hardware,
            techniques=[t.card.name for t in techniques],
            **totals,
        )
        if self.keeps and resumed_from is None:
            for technique in techniques:
                self._write("claim", **_claim(technique))
            for estimate in self.estimates:
                self._write("estimate", **estimate)

    def step(self, step: int, row: Mapping[str, Any]) -> None:
        if not self.keeps:
            return
        self._write("step", **row)
        if self._sink is not None:
            self._sink.put(step, row)
        if self.display is not None:
            self.display.step(row)

    def event(self, event: str, **fields: Any) -> None:
        self._write("event", event=event, **fields)

    def nonfinite(self, step: int, batch: int, loss: float, skipped: bool) -> None:
        """A step of this rank whose loss, or gradients, were not finite."""
        what = "a loss that is not finite" if not isfinite(loss) else "gradients that are not finite"
        done = "the step was skipped" if skipped else "its gradients were finite, so the step was made"
        log.warning("rank %d, step %d: %s (loss %g, micro-batch %d): %s", self._rank, step, what, loss, batch, done)
        self.event("nonfinite", step=step, batch=batch, loss=str(loss), skipped=skipped)

    def evaluation_cut(self, step: int, batches: int) -> None:
        """The budget has ended an evaluation."""
        self.event("evaluation_cut", step=step, batches=batches)
        say = log.warning if self.keeps else log.debug
        say("the budget ended the evaluation early: its metrics cover %d batches only", batches)

    def samples(self, step: int, samples: Sequence[Mapping[str, str]]) -> None:
        """What the model has written after `step`, each with its `prompt` and `text`."""
        if not (self.keeps and samples):
            return
        self.event("samples", step=step, samples=list(samples))
        if self._sink is not None:
            self._sink.table(step, "samples", samples)
        if self.display is not None:
            self.display.samples(step, samples)

    def measurement(self, **fields: Any) -> None:
        """A window that was measured elsewhere."""
        self._write("measurement", **fields)

    def sync(self) -> None:
        if self._journal is not None:
            self._journal.sync()

    def finished(self, summary: Mapping[str, Any], windows: Mapping[str, float]) -> None:
        if self.keeps:
            for window, seconds in windows.items():
                self._write("measurement", window=window, seconds=seconds)
            self._write("measurement", window="run", **{k: v for k, v in summary.items() if k != "windows"})
            self._write("verdict", stopped_by=summary["stopped_by"], goal=summary.get("goal"),
                        reached=summary.get("goal_reached"), budget=summary["budget"])  # fmt: skip
            try:
                write_summary(self.run_dir, summary)
            except OSError as error:
                log.warning("summary.json could not be written (%s); the journal has the same", error)
        self.event("stop", **{k: v for k, v in summary.items() if k not in ("windows", "budget")})
        self._close(0, summary, FINISHING)

    def failed(self, step: int, reason: str | None, totals: Mapping[str, Any]) -> None:
        if reason is not None:
            self.event("error", step=step, reason=reason[:2000], **totals)
        self._close(1, {}, LEAVING)

    def _close(self, code: int, summary: Mapping[str, Any], seconds: float) -> None:
        """Close all within `seconds`: first the journal, which has every row; what is late for that is caught up."""
        end = monotonic() + seconds
        if self.display is not None:
            self.display.close()
        if self._journal is not None:
            self._journal.close()
        indexed = self._start_index() if self.keeps and self.ledger else None
        if self._sink is not None:
            flat = {k: v for k, v in summary.items() if isinstance(v, int | float | str)}
            self._sink.summarize({**flat, **summary.get("metrics", {})})
            note_missed(self.run_dir, self._attempt, missed=not self._sink.finish(end - monotonic(), exit_code=code))
        if indexed is not None:
            indexed.join(max(0.1, end - monotonic()))
            if indexed.is_alive():
                log.warning("the ledger is busy: `shoestring runs list` adds this run later, its journal is complete")
        self.keeps = False

    def _start_index(self) -> Thread:
        """In a thread, for a ledger may be locked for long; the process ends without it."""

        def index() -> None:
            try:
                Ledger().index(self.run_dir)
            except Exception as error:  # the journal has everything; the index can be built again
                log.warning("the ledger could not be updated (%s); the run's own journal is complete", error)

        thread = Thread(target=index, name="shoestring-ledger", daemon=True)
        thread.start()
        return thread

    def _write(self, kind: str, **fields: Any) -> None:
        if SECRET_NAMES in os.environ:
            fields = redacted_values(fields)
        if self._journal is None:
            self._before.append((kind, fields))
        else:
            self._journal.write(kind, **fields)

    def _config(self, techniques: Iterable[Technique]) -> dict[str, Any]:
        recipe = json.loads(self.recipe.model_dump_json()) if self.recipe is not None else {}
        return {"recipe": recipe, "techniques": {t.card.name: repr(t) for t in techniques}}


def _unseen(rows: Iterable[Row], last: Row) -> float:
    """Seconds that killed attempts have worked after `last`, the row with the highest totals."""
    seconds = 0.0
    lived = (row for row in rows if row.kind != "measurement")  # a finished run's model may be measured later
    for attempt, group in groupby(lived, key=lambda row: row.attempt):
        *_, end = own = list(group)
        if attempt >= last.attempt and end.fields.get("event") not in ("stop", "preempted", "error"):
            seconds += end.mono - (last if attempt == last.attempt else own[0]).mono + UNSEEN_SECONDS
    return seconds


def _wandb(given: Mapping[str, Any] | str | bool | None) -> Mapping[str, Any] | None:
    """Settings of the sink from what a user may write: a mode, a mapping with mode and project, or "off"."""
    if given in (None, False, "off"):
        return None
    return {"mode": given} if isinstance(given, str) else dict(given)  # type: ignore[arg-type]


def _claim(technique: Technique) -> dict[str, Any]:
    card = technique.card
    return {
        "technique": card.name, "does": card.does, "paper": card.paper, "saves": sorted(card.saves),
        "keeps": card.keeps, "settings": {k: str(v) for k, v in technique.settings().items()},
    }  # fmt: skip
