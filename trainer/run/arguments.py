"""Arguments of our trainer and of Lightning's, brought to what `pl.Trainer` is to be given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning_fabric.plugins.environments import ClusterEnvironment, LightningEnvironment

from ...callbacks.contract import IncompatibleTechniques, Settings, Technique


def started_by_hand(plugins: Any) -> list[Any]:
    """The plugins with Lightning's own way to start ranks, unless the user has chosen one."""
    given = plugins if isinstance(plugins, list) else [] if plugins is None else [plugins]
    chosen = any(isinstance(plugin, ClusterEnvironment) for plugin in given)
    return given if chosen else [*given, LightningEnvironment()]


def strategy_name(strategy: Any, devices: Any, nodes: int) -> Any:
    """The name of one of our strategies, or what was given, for Lightning to understand."""
    if strategy != "auto":
        return strategy
    count = len(devices) if isinstance(devices, list | tuple) else devices
    if count in ("auto", -1, "-1"):
        count = max(1, torch.cuda.device_count())
    return "single" if int(count) * nodes == 1 else "ddp"


def accelerator(given: Any) -> str:
    if given in ("auto", "gpu", "cuda"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return given if isinstance(given, str) else type(given).__name__


def fold(techniques: Sequence[Technique], lightning: dict[str, Any]) -> Settings:
    """The settings techniques ask for; the user's own keyword arguments come first and may not contradict them."""
    precision = str(lightning.pop("precision", None) or "32-true")
    accumulate = lightning.pop("accumulate_grad_batches", 1)
    settings = Settings(precision=precision, accumulate_grad_batches=accumulate)
    for technique in techniques:
        settings = technique.edit(settings)
    if precision not in ("32-true", "32", settings.precision):
        raise IncompatibleTechniques(
            f"precision={precision!r} and a technique that sets {settings.precision!r} disagree. Keep one."
        )
    return settings


def dtype(precision: str) -> str:
    return "bf16" if "bf16" in precision else "fp16" if "16" in precision else "fp32"
