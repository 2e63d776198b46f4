"""What a run was begun with and what it goes on with: where they differ, it is applied and said, or refused.

A changed setting that acts as the user has set it, such as a learning rate, is applied from the resumed step on. State
of other techniques or of another optimizer, as it is in the checkpoint, would mean something else: that is another run.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Any

import pytorch_lightning as pl

from ... import ShoestringError
from ...callbacks.contract import Technique
from ...callbacks.optimization.lr_scaling import scale_schedulers
from ...callbacks.optimization.lr_schedule import LRSchedule

_SCALED = ("lr", "initial_lr", "max_lr", "min_lr")  # by torch's schedulers, along with the rate
_PLAIN = (int, float, bool, str, type(None))


class ChangedRun(ShoestringError):
    """The run in this directory was begun with something else that cannot change amid a run."""


def settings_of(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """What the run is made of, as plain data. Asked before anything is restored."""
    techniques = [c for c in trainer.callbacks if isinstance(c, Technique)]  # type: ignore[attr-defined]
    return {
        "techniques": {t.card.name: str(t.settings()) for t in techniques if not getattr(t, "gives_way", False)},
        "optimizers": [type(getattr(o, "optimizer", o)).__name__ for o in trainer.optimizers],
        "groups": [[_settings(group) for group in o.param_groups] for o in trainer.optimizers],
        "trainer": {
            "precision": str(trainer.precision),
            "gradient_clip_val": trainer.gradient_clip_val,
            "gradient_clip_algorithm": str(trainer.gradient_clip_algorithm or ""),
        },
        "hyper-parameters": {key: str(value) for key, value in module.hparams.items()},
        "code": {type(module).__name__: _code(module)},
    }


def check(before: Mapping[str, Any], now: Mapping[str, Any], accept: bool) -> list[str]:
    """What has changed, a few words each.

    Raises:
        ChangedRun: Something that cannot change amid a run has, and nobody has accepted it.
    """
    other = [f"technique {text}" for text in _differences(before["techniques"], now["techniques"])]
    if before["optimizers"] != now["optimizers"]:
        other.append(f"optimizer {', '.join(before['optimizers'])} -> {', '.join(now['optimizers'])}")
    if [len(groups) for groups in before["groups"]] != [len(groups) for groups in now["groups"]]:
        raise ChangedRun("the optimizers have other parameter groups than in the checkpoint. Give another run_dir.")
    if other and not accept:
        raise ChangedRun(
            f"the run was begun with something else: {'; '.join(other)}. Give another run_dir, or accept_changes=True."
        )
    said = dict.fromkeys(text for *_, text in _groups(before, now))
    for kind in ("trainer", "hyper-parameters"):
        said |= dict.fromkeys(_differences(before[kind], now[kind]))
    changed = [name for name, code in now["code"].items() if before["code"].get(name, code) != code]
    return [*other, *said, *(f"the code of {name}" for name in changed)]


def apply(trainer: pl.Trainer, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Put settings of optimizers that have changed into what was restored."""
    ratios: dict[int, float] = {}
    for o, g, key, old, new, _ in _groups(before, now):
        group = trainer.optimizers[o].param_groups[g]
        if key != "lr" or not old:
            group[key] = new
            continue
        ratios[id(group)] = new / old
        for noted in group.keys() & _SCALED:
            group[noted] = group[noted] * new / old
    if not ratios:
        return
    scale_schedulers(trainer, ratios)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LRSchedule):
            callback.scale_peaks(trainer, ratios)


def _groups(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[int, int, str, Any, Any, str]]:
    for o, (old, new) in enumerate(zip(before["groups"], now["groups"], strict=True)):
        for g, (was, is_now) in enumerate(zip(old, new, strict=True)):
            for key in sorted(was.keys() & is_now.keys()):
                if was[key] != is_now[key]:
                    yield o, g, key, was[key], is_now[key], f"{key} {was[key]} -> {is_now[key]}"


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    texts = []
    for key in sorted(before.keys() | now.keys()):
        if key not in now:
            texts.append(f"{key} removed")
        elif key not in before:
            texts.append(f"{key} added")
        elif before[key] != now[key]:
            texts.append(f"{key} {before[key]} -> {now[key]}")
    return texts


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """What the user has set of a parameter group; what schedulers note there follows the rate."""
    own = {key: value for key, value in group.items() if key != "params" and key not in _SCALED[1:]}
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in own.items()
        if isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(isinstance(v, _PLAIN) for v in value))
    }


def _code(module: pl.LightningModule) -> str:
    try:
        return sha256(inspect.getsource(type(module)).encode()).hexdigest()
    except (OSError, TypeError):  # typed into an interpreter
        return ""
