"""Save and resume a run: every rank writes its part, rank 0 makes it one checkpoint, damaged ones are passed over."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter, time
from typing import Any

import pytorch_lightning as pl
import torch

from ... import ShoestringError, __version__
from ...callbacks.accounting.agreement import Agreement
from ...exits import FAILURE
from . import base, changes, state
from . import format as checkpoint

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
        self._proven = False  # one checkpoint of this attempt has been read back

    def save(self, trainer: pl.Trainer, module: pl.LightningModule, step: int, about: dict[str, Any]) -> str | None:
        """Write a checkpoint of `step` on all ranks. Returns why there is none, which is also reported: what the disk
        said against it, or weights that are not finite, which would displace some that are."""
        began = perf_counter()
        pieces = state.tensors(trainer, module, self.left_out)
        found = self.agreement.gather(next((name for name, (_, piece) in pieces.items() if _spoilt(name, piece)), None))
        self.not_finite = next((name for name in found if name is not None), None)
        if self.not_finite is not None:
            return self._refused(step, f"{self.not_finite} is not finite", trainer.global_rank == 0)
        folder = checkpoint.working_directory(self.root, step)
        first = trainer.global_rank == 0
        if first:
            checkpoint.clear_leftovers(self.root)
        refused = self._agree(self._attempt(lambda: folder.mkdir(parents=True) if first else None))[0]
        reports = (
            [refused] if refused else self._agree(self._attempt(lambda: self._write(trainer, module, folder, pieces)))
        )
        failed = [r for r in reports if isinstance(r, str)]
        if not failed and first:
            files = {name: entry for report in reports for name, entry in report.items()}
            about = {**about, "world_size": trainer.world_size, "version": __version__, "created": time()}
            if self.base is not None:
                about["base"] = self.base_identity
            failed = [
                r for r in [self._attempt(lambda: checkpoint.publish(self.root, step, files, about))] if type(r) is str
            ]
        failed = self.agreement.gather(failed)[0]
        if failed:
            if first:
                shutil.rmtree(folder, ignore_errors=True)
            return self._refused(step, failed[0], first)
        self.seconds = max(self.seconds, perf_counter() - began)
        self._prove(step, first)
        if first:
            checkpoint.prune(self.root, self.keep, step)
        self.report("checkpoint", step=step, seconds_taken=perf_counter() - began)
        return None

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

    def _write(
        self, trainer: pl.Trainer, module: pl.LightningModule, folder: Path, pieces: Mapping[str, Any]
    ) -> dict[str, Any]:
        rank = trainer.global_rank
        common = state.common_state(trainer, module, self._first, self._settings)
        files = checkpoint.write_common(folder, common) if rank == 0 else {}
        mine = checkpoint.write_rank(folder, rank, state.rank_state(trainer, module), pieces)
        return {**files, **mine}

    def _prove(self, step: int, first: bool) -> None:
        """Read the first checkpoint of an attempt back: what cannot be loaded must fail now, not after the money."""
        if self._proven:
            return
        self._proven = True
        problem = None
        if first:
            folder = self.root / f"{step:09d}"
            try:
                state.check(folder)
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
            found = None
            try:
                rng = state.restore(trainer, module, folder)
            except (KeyError, TypeError, IndexError, AttributeError, checkpoint.DamagedCheckpoint) as error:
                found = f"{folder}: what it holds cannot be put back ({error!r})"
            found = next((one for one in self.agreement.gather(found) if one is not None), None)
            if found is None:
                break
            unusable[int(name)] = found
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


def _spoilt(name: str, tensor: torch.Tensor) -> bool:
    """Whether a piece of a checkpoint is a weight or a moment that is not finite, or a buffer with a NaN.

    Buffers hold infinities on purpose, as attention masks do; what techniques keep is theirs to judge.
    """
    kind = name.partition("/")[0]
    if not tensor.is_floating_point() or kind not in ("master", "optimizer", "buffer"):
        return False
    return bool((tensor.isnan() if kind == "buffer" else ~tensor.isfinite()).any())
