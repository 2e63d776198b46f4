"""Save and resume a run: every rank writes its part, rank 0 makes it one checkpoint, damaged ones are passed over."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from time import perf_counter, time
from typing import Any

import pytorch_lightning as pl

from ... import ShoestringError, __version__
from ...callbacks.accounting.agreement import Agreement
from ...callbacks.parameters.accessor import shards_anew
from ...exits import FAILURE
from . import base, changes, state
from . import format as checkpoint
from .pruning import clear_leftovers, delete_pruned, prune
from .snapshot import Snapshot, Writing

log = logging.getLogger("shoestring")


class CannotSave(ShoestringError):
    """The state of this run would not survive a checkpoint."""


class CannotResume(ShoestringError):
    """This run directory cannot be continued as asked."""


class NotFinite(ShoestringError):
    """The run computes no numbers any more."""

    exit_code = FAILURE


def no_room(step: int, reason: str, run_dir: Path) -> CannotSave:
    """The error of a run that cannot write its final weights."""
    return CannotSave(
        f"the run has ended at step {step}, but its final weights cannot be written: {reason}. "
        f"Make room in {run_dir} and give the same command: it continues from the last checkpoint."
    )


def same_samples(manifest: Mapping[str, Any], seed: int, global_batch: int | None, run_dir: Path) -> None:
    """The samples of every step depend on the seed and the global batch: neither may change within a run."""
    where, before = f"the run in {run_dir}", manifest["global_batch"]
    if manifest["seed"] != seed:
        raise CannotResume(f"{where} has seed={manifest['seed']}, and this one {seed}. Choose another run directory.")
    if global_batch is not None and before not in (None, global_batch):
        raise CannotResume(
            f"{where} has {before} samples a step, and this loader makes {global_batch}. "
            "Choose batch size x ranks x accumulation to match."
        )


class Saver:
    """Checkpoints of one run under `root`, the newest `keep` of them.

    `report(event, **facts)` hears of every checkpoint written, failed, skipped as damaged or restored.
    """

    def __init__(self, root: Path, keep: int, agreement: Agreement, report: Callable[..., None]) -> None:
        self.root, self.keep, self.agreement, self.report = root, keep, agreement, report
        self.seconds = 0.0  # the dearest checkpoint so far, without reading it back
        self.not_finite: str | None = None  # what the newest state has that is not finite, so that it was not saved
        self._first: list[str] = []  # what trained when the fit began
        self._settings: dict[str, Any] = {}  # what it was made of
        self.base: base.FrozenBase | None = None  # what checkpoints of this run leave out
        self.base_identity: dict[str, Any] | None = None
        self._snapshot = Snapshot()
        self._writing: Writing | None = None  # the checkpoint that has begun
        self._step = -1  # whose it is
        self._proven = False  # one checkpoint of this attempt has been read back

    @property
    def written(self) -> bool:
        """Whether this rank has nothing more to write of the checkpoint that `begin` has begun."""
        return self._writing is not None and not self._writing.is_alive()

    def save(self, trainer: pl.Trainer, module: pl.LightningModule, step: int, about: dict[str, Any]) -> str | None:
        """Write a checkpoint of `step` on all ranks. Returns why there is none, which is also reported: what the disk
        said against it, or weights that are not finite, which would displace some that are."""
        began = perf_counter()
        refused = self.begin(trainer, module, step, about)
        if refused is None:
            refused = self.complete(trainer)
        if trainer.global_rank == 0:
            delete_pruned(self.root)
        if refused is None:
            self.seconds = max(self.seconds, perf_counter() - began)
        return refused

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule, step: int, about: dict[str, Any]) -> str | None:
        """Copy the state of `step` on all ranks; a thread of each writes it. `complete` must follow before the next.

        Returns what the disk said against it, which is also reported.
        """
        rank = trainer.global_rank
        folder = checkpoint.working_directory(self.root, step)
        refused = self._agree(self._attempt(lambda: self._make_room(folder) if rank == 0 else None))[0]
        if refused:
            return self._refused(step, refused, rank == 0)
        about = {**about, "world_size": trainer.world_size, "version": __version__, "created": time()}
        if self.base is not None:
            about["base"] = self.base_identity
        states = {checkpoint.rank_file(rank): checkpoint.packed(state.rank_state(trainer, module))}
        common = state.common_state(trainer, module, self._first, self._settings)
        if rank == 0:
            states["state.pt"] = checkpoint.packed(common)
        drive = shards_anew(trainer, module).drive
        pieces = self._attempt(lambda: self._snapshot.take(state.tensors(trainer, module, self.left_out), drive))
        if drive is not None:  # which may be full
            full = next((said for said in self._agree(pieces if isinstance(pieces, str) else None) if said), None)
            if full is not None:
                return self._refused(step, f"{drive}: {full}", rank == 0)
        self._writing, self._step = Writing(folder, rank, states, pieces, about if rank == 0 else None), step
        return None

    def complete(self, trainer: pl.Trainer) -> str | None:
        """Wait for what every rank writes, and make it one checkpoint. Collective. Returns as `save` does."""
        writing, step, first = self._writing, self._step, trainer.global_rank == 0
        assert writing is not None
        reports = self._agree(writing.finish())
        self._writing = None
        self.not_finite = next((r["not_finite"] for r in reports if r["not_finite"]), None)
        reason = f"{self.not_finite} is not finite" if self.not_finite else None
        reason = reason or next((r["refusal"] for r in reports if r["refusal"]), None)
        if reason is None:
            reason = self._agree(self._attempt(lambda: self._publish(writing, reports)) if first else None)[0]
        if reason is not None:
            if first:
                shutil.rmtree(writing.folder, ignore_errors=True)
            return self._refused(step, reason, first)
        self._prove(step, first)
        if first:
            prune(self.root, self.keep, step)
            Thread(target=delete_pruned, args=(self.root,), name="pruning").start()
        self.report("checkpoint", step=step, seconds_taken=perf_counter() - writing.began)
        return None

    def abandon(self) -> None:
        """The fit fails while a checkpoint is being written: wait for this rank's part, and publish what is whole."""
        if self._writing is not None:
            self._writing.join()
            if self._writing.rank == 0:
                checkpoint.complete_interrupted(self.root)
            self._writing = None

    def _make_room(self, folder: Path) -> None:
        clear_leftovers(self.root)
        folder.mkdir(parents=True)

    def _publish(self, writing: Writing, reports: list[dict[str, Any]]) -> None:
        files = {name: entry for report in reports for name, entry in report["files"].items()}
        checkpoint.publish(self.root, self._step, files, writing.about or {})

    @property
    def left_out(self) -> frozenset[str]:
        """The frozen weights that are not saved."""
        return self.base.weights if self.base is not None else frozenset()

    def require_finite(self, step: int) -> None:
        """`NotFinite` where the run has come to its end at `step` with weights that could not be saved."""
        if self.not_finite is not None:
            raise NotFinite(
                f"the run has ended at step {step}, and its weights are not finite ({self.not_finite}): they are not "
                f"kept. The checkpoints in {self.root} are from before. Lower the learning rate or clip gradients."
            )

    def _refused(self, step: int, reason: str, first: bool) -> str:
        self.report("checkpoint_failed", step=step, reason=reason)
        say = log.warning if first else log.debug
        say("no checkpoint of step %d in %s: %s. Earlier ones are kept.", step, self.root, reason)
        return reason

    def _prove(self, step: int, first: bool) -> None:
        """Read the first checkpoint of an attempt back: what cannot be loaded must fail now, not after the money."""
        if self._proven:
            return
        self._proven = True
        problem = None
        if first:
            folder = self.root / f"{step:09d}"
            try:
                state.check(folder, hashes=False)  # each rank has hashed what it wrote
            except Exception as error:
                problem = f"the checkpoint of step {step} cannot be read back: {error}"
                shutil.rmtree(folder)  # or the next attempt would stumble over it
        if problem := self.agreement.gather(problem)[0]:
            raise CannotSave(
                f"{problem}\nCallbacks and modules may keep only tensors and plain data in their state "
                "(numbers, strings, lists, dicts)."
            )

    def restore(
        self, trainer: pl.Trainer, module: pl.LightningModule, accept_changes: bool = False
    ) -> tuple[dict[str, Any], Any] | None:
        """Resume from the newest intact checkpoint: (its manifest, random states or None). None if there is none."""
        self._first, self._settings = state.trainable(module), changes.settings_of(trainer, module)
        self.base = base.left_out(trainer, module)
        self.base_identity = base.agreed_identity(base.of_module(module), trainer, self.agreement)
        unusable: dict[int, str] = {}
        while True:
            choice: Any = None
            if trainer.global_rank == 0:
                try:
                    checkpoint.complete_interrupted(self.root)
                    folder, problems = checkpoint.newest_intact(self.root, state.check, unusable)
                    choice = (folder and folder.name, problems)
                except checkpoint.DamagedCheckpoint as error:
                    choice = error
            choice = self.agreement.gather(choice)[0]
            if isinstance(choice, Exception):
                raise choice
            name, problems = choice
            if name is None:
                return None
            folder = self.root / name
            manifest = checkpoint.read_manifest(folder)
            base.require(manifest.get("base"), self.base_identity, folder)
            if "base" not in manifest:
                self.base = None  # it holds weights of its own, which may be others
            before = checkpoint.read_state(folder / "state.pt")["settings"]
            changed = changes.check(before, self._settings, accept_changes)
            fault = None
            try:
                rng = state.restore(trainer, module, folder)
            except (KeyError, TypeError, IndexError, AttributeError, checkpoint.DamagedCheckpoint) as error:
                fault = f"{folder}: what it holds cannot be put back ({error!r})"
            fault = next((one for one in self.agreement.gather(fault) if one is not None), None)
            if fault is None:
                break
            unusable[int(name)] = fault
        for problem in problems:
            self.report("checkpoint_damaged", reason=problem)
            say = log.warning if trainer.global_rank == 0 else log.debug
            say("%s; the one before it is used", problem)
        changes.apply(trainer, before, self._settings)
        if changed and trainer.is_global_zero:
            log.warning("resumed with changes, which act from here on: %s", "; ".join(changed))
        return manifest, rng

    def _attempt(self, action: Callable[[], Any]) -> Any:
        """The result of `action`, or what the disk said against it."""
        try:
            return action()
        except OSError as error:
            return f"{error.strerror or error}"

    def _agree(self, outcome: Any) -> list[Any]:
        return self.agreement.gather(outcome)
