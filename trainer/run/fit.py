"""`fit(plan)`: build the task, train it, and report what it cost and reached."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Unpack

from ... import ShoestringError
from ...callbacks.accounting.budget import Budget
from ..ledger.report import Report
from ..machine import local_ranks
from ..machine.facts import is_first
from ..machine.imports import lightened_imports
from ..machine.quiet import quiet
from ..planning.planner import Plan
from .options import LightningOptions

if TYPE_CHECKING:
    from ...recipes import Recipe
    from ..monitor.records import Display

log = logging.getLogger(__name__)
LEFT_OUT = ("rows_bad", "rows_without_text", "rows_cut", "rows_without_target")  # of a task's facts


class NoRunDirectory(ShoestringError):
    """The run's home cannot be written."""


def fit(
    plan: Plan,
    *,
    run_dir: Path | str | None = None,
    display: Display | None = None,
    startup_seconds: float = 0.0,
    weights: Mapping[str, Any] | None = None,
    accept_changes: bool = False,
    measurements: Iterable[Mapping[str, Any]] = (),
    **lightning: Unpack[LightningOptions],
) -> Report | None:
    """Run a plan to the end of its budget; resumes what `run_dir` holds.

    Exits with 85 when asked to stop: everything is saved, and the same call goes on.

    Args:
        plan: What to run.
        run_dir: The run's home; by default runs/<recipe name>.
        display: What the terminal shows of every step.
        startup_seconds: Spent before this call, to be charged to the run.
        weights: The module's state dict to begin with, where the recipe's own model is not to begin from scratch.
        accept_changes: Go on although data, code, settings or packages are not those that the run began with.
        measurements: What has been measured beforehand (`window` names it), for the journal.
        **lightning: Further arguments of `pl.Trainer`.

    Returns:
        The report on rank 0 and None on the others.

    Example:
        >>> import tempfile
        >>> from shoestring.recipes import load_recipe
        >>> from shoestring.trainer import plan
        >>> changes = ["budget={steps: 3}", "strategy.name=single", "tracking.ledger=false", "evaluation.at_end=false"]
        >>> report = fit(plan(load_recipe("digits", changes)), run_dir=tempfile.mkdtemp())
        >>> report.summary["steps"]
        3
    """
    began = time.monotonic() - startup_seconds
    if not is_first():  # what is worth saying is said once
        logging.getLogger("shoestring").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
    quiet()
    if plan.accelerator == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for others, and say what it lacks
    _import(plan)
    local_ranks.wait()
    from ...callbacks.optimization.averaged_point import AveragedPoint
    from ...callbacks.optimization.lr_schedule import LRSchedule
    from ..monitor.afterwards import Afterwards
    from ..monitor.profile import Profile
    from ..monitor.records import Records
    from ..tasks.build import TaskData, build_task
    from ..tasks.module import TaskModule
    from ..tasks.optimizers.cards import optimizer_card
    from ..tasks.own_code_checks import CheckBatch, check_own_module
    from ..tasks.shared_weights import keep_from_sending
    from .deliverables import Deliverables, describe
    from .determinism import deterministic_algorithms
    from .evaluation import further_evaluations
    from .inputs import inputs_of, keep_or_compare
    from .out_of_memory import explained
    from .trainer import Trainer

    quiet()  # importing torch has set its loggers anew
    options: dict[str, Any] = {**lightning}
    recipe = plan.recipe
    run_dir = Path(run_dir or Path("runs") / recipe.name)
    _writable(run_dir)
    with explained(plan):
        task = build_task(recipe, workdir=run_dir, precision=plan.precision, cuts=plan.strategy == "zero3")
    inputs = inputs_of(recipe, task)
    changed = keep_or_compare(run_dir, inputs, task.keep_tokenizer, accept=accept_changes, first=is_first())
    local_ranks.release()
    if plan.nodes == 1:
        keep_from_sending(task.module)
    check_own_module(recipe, task.module)
    left_out = {key: task.facts[key] for key in LEFT_OUT if task.facts.get(key)}
    if is_first():
        _say_left_out(recipe, left_out)
        if display is not None and (receipt := task.receipt()) is not None:
            display.receipt(receipt.as_dict())
    if weights is not None:
        task.module.load_state_dict(weights)
        task.module.frozen_base = None  # type: ignore[assignment]  # these are not the recipe's own
    records = Records(
        run_dir,
        name=recipe.name,
        recipe=recipe,
        ledger=recipe.tracking.ledger,
        wandb=_wandb(recipe),
        estimates=[plan.as_dict()],
        hardware=plan.hardware,
        accept_changes=accept_changes,
    )
    records.display = display
    if changed:
        records.event("accepted", changed=changed)
    if left_out:
        records.event("left_out", **left_out)
    for row in measurements:
        records.measurement(**row)
    if "SHOESTRING_JOB_DIR" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        from pytorch_lightning.plugins.environments import LightningEnvironment

        # RANK and its like are set; Lightning would look at Slurm's own and ask them to agree with its arguments
        options.setdefault("plugins", []).append(LightningEnvironment())
    techniques = plan.techniques
    for technique in techniques:  # a schedule that nobody has chosen leaves the rate to a task's own schedulers
        if isinstance(technique, LRSchedule):
            technique.gives_way = _has_default_schedule(recipe)
    trainer = Trainer(
        plan.budget or Budget(),
        techniques,
        strategy=plan.strategy,
        devices=plan.devices,
        num_nodes=plan.nodes,
        seed=recipe.seed,
        checkpoint_every=recipe.checkpoint.every,
        mtbf=recipe.checkpoint.mtbf,
        keep_checkpoints=recipe.checkpoint.keep,
        best=recipe.checkpoint.best,
        patience=recipe.checkpoint.patience,
        offload=plan.offload,
        nvme=recipe.strategy.nvme,
        sharding=plan.sharding,
        usd_per_device_hour=plan.usd_per_device_hour,
        watts_per_device=plan.watts_per_device,
        log_every=recipe.tracking.log_every,
        hang_after=recipe.strategy.hang_after,
        nonfinite_steps=recipe.optimizer.nonfinite_steps,
        step_in_backward=recipe.optimizer.in_backward,
        records=records,
        accelerator="gpu" if plan.accelerator == "cuda" else "cpu",
        accumulate_grad_batches=plan.accumulate,
        gradient_clip_val=recipe.optimizer.clip,
        num_sanity_val_steps=2,
        **{**_evaluation(plan, task), **options},
    )
    if optimizer_card(recipe.optimizer.name).averages:
        trainer.callbacks.insert(0, AveragedPoint(recipe.optimizer.betas[0]))  # type: ignore[attr-defined]
    local_ranks.hand_over(trainer)
    trainer.monitor.evaluations.plan_every(recipe.evaluation.every, at_end=recipe.evaluation.at_end)
    trainer.monitor.evaluations.goal = recipe.goal
    trainer.monitor.further.each = further_evaluations(recipe, task)
    trainer.monitor.further.together = plan.strategy in ("zero3", "fsdp2")
    trainer.batches_planned = task.train is not None
    if isinstance(task.module, TaskModule):
        trainer.monitor.account.spending.trained_tokens = task.module.trained_tokens
    delivered = Deliverables(recipe, run_dir, task)
    if delivered.wanted:
        trainer.monitor.afterwards = Afterwards(delivered.make, delivered.seconds)
    if task.train is None:
        trainer.callbacks.insert(0, CheckBatch(recipe))  # type: ignore[attr-defined]
    data = task.datamodule if task.train is None else TaskData(task, plan.micro_batch, recipe.data.workers)
    if recipe.tracking.profile is not None:
        trainer.callbacks.insert(0, Profile(int(recipe.tracking.profile), run_dir))  # type: ignore[attr-defined]
    with explained(plan), deterministic_algorithms(recipe.deterministic):
        trainer.fit(task.module, datamodule=data, startup_seconds=time.monotonic() - began)
    if not trainer.is_global_zero:
        return None
    if trainer.monitor.afterwards is not None and trainer.monitor.afterwards.error is not None:
        raise trainer.monitor.afterwards.error
    for weights_folder in (run_dir / "final", run_dir / "best"):
        if weights_folder.exists():
            describe(task, weights_folder)
    delivered.write_card()
    report = Report(
        run_dir=run_dir,
        summary=trainer.summary,
        baselines=task.facts.get("baselines", {}),
        goal_reached=trainer.summary.get("goal_reached"),
        sample=delivered.sample,
        exported=delivered.exported,
        recipe_hash=recipe.hash,
        left_out=left_out,
        details=task.details,
    )
    report.save()
    return report


def _writable(run_dir: Path) -> None:
    """Make the run's home, and say so where nothing can be written there."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise NoRunDirectory(f"cannot write in {run_dir}: {error.strerror}. Choose another --run-dir.") from error


def _say_left_out(recipe: Recipe, left_out: Mapping[str, Any]) -> None:
    """What of the data is not trained on."""
    if bad := left_out.get("rows_bad"):
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in bad.items())
        log.warning("data: %s left out that cannot be read: %s", _rows(sum(bad.values())), reasons)
    if empty := left_out.get("rows_without_text"):
        log.warning("data: %s without text left out", _rows(empty))
    if cut := left_out.get("rows_cut"):
        longer = "is" if cut == 1 else "are"
        log.warning("data: %s %s cut at sequence_length %s", _rows(cut), longer, f"{recipe.data.sequence_length:,}")
    if lost := left_out.get("rows_without_target"):
        log.warning("data: %s left out, whose answers begin after %s tokens", _rows(lost), recipe.data.sequence_length)


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _import(plan: Plan) -> None:
    """What the run needs that takes seconds to import, while ranks have nothing else to do."""
    from ...recipes.rules import TEXT_TASKS

    with lightened_imports():
        from ..tasks import build_task as build_task
        from .trainer import Trainer as Trainer

        if plan.recipe.model.task in TEXT_TASKS:
            from transformers import PreTrainedModel as PreTrainedModel
        if plan.strategy.startswith("zero"):
            from ..machine.extensions import prepare_environment

            prepare_environment(
                plan.strategy, plan.offload, plan.accelerator, nvme=plan.recipe.strategy.nvme is not None
            )


def _has_default_schedule(recipe: Any) -> bool:
    chosen = recipe.optimizer.model_fields_set & {"schedule", "warmup"}
    return not chosen and all(technique.name != "lr_schedule" for technique in recipe.techniques)


def _evaluation(plan: Plan, task: Any) -> dict[str, Any]:
    from ..monitor.evaluations import NEVER

    wanted = plan.recipe.evaluation
    if (task.train is not None and task.validation is None) or not (wanted.at_end or wanted.every):
        return {"limit_val_batches": 0}
    return {"limit_val_batches": wanted.batches or 1.0, "check_val_every_n_epoch": None, "val_check_interval": NEVER}


def _wandb(recipe: Any) -> Mapping[str, Any] | None:
    if recipe.tracking.wandb == "off":
        return None
    return {"mode": recipe.tracking.wandb, "project": recipe.tracking.project}
