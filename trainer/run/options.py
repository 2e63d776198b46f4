"""The keyword arguments of `pl.Trainer` that our `Trainer` passes on: typed, so that a misspelt one fails a checker."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, TypedDict

if TYPE_CHECKING:
    from pathlib import Path

    from pytorch_lightning import Callback
    from pytorch_lightning.accelerators import Accelerator
    from pytorch_lightning.loggers import Logger
    from pytorch_lightning.profilers import Profiler


class LightningOptions(TypedDict, total=False):
    """All that `pl.Trainer` takes, but for `strategy`, `devices` and `num_nodes`, which `Trainer` has itself.

    What each of them means stands in Lightning's documentation of `pl.Trainer`; a test compares the names.
    """

    # where and how it computes
    accelerator: str | Accelerator
    precision: int | str | None
    plugins: object  # one or a list of precision, environment, checkpoint and layer-sync plugins
    sync_batchnorm: bool
    deterministic: bool | Literal["warn"] | None
    benchmark: bool | None
    inference_mode: bool
    detect_anomaly: bool
    # how long
    max_epochs: int | None
    min_epochs: int | None
    max_steps: int
    min_steps: int | None
    max_time: str | timedelta | dict[str, int] | None
    fast_dev_run: int | bool
    overfit_batches: int | float
    # steps and data
    accumulate_grad_batches: int
    gradient_clip_val: int | float | None
    gradient_clip_algorithm: str | None
    limit_train_batches: int | float | None
    use_distributed_sampler: bool
    reload_dataloaders_every_n_epochs: int
    # evaluation
    limit_val_batches: int | float | None
    limit_test_batches: int | float | None
    limit_predict_batches: int | float | None
    val_check_interval: int | float | str | timedelta | dict[str, int] | None
    check_val_every_n_epoch: int | None
    num_sanity_val_steps: int | None
    # what is shown and kept
    callbacks: list[Callback] | Callback | None
    logger: Logger | Iterable[Logger] | bool | None
    log_every_n_steps: int | None
    profiler: Profiler | str | None
    enable_checkpointing: bool | None
    enable_progress_bar: bool | None
    enable_model_summary: bool | None
    enable_autolog_hparams: bool
    default_root_dir: str | Path | None
    model_registry: str | None
    barebones: bool
