"""What a checkpoint holds of a run, taken from and put back into live objects.

Parameter-shaped state goes through the sharded-state accessor as slices; everything else is plain data. The same code
serves one device, DDP, ZeRO-1/2/3 and FSDP2, and any change between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import GradientAccumulationScheduler

from ... import ShoestringError
from ...callbacks.contract import SampleTable, Technique
from ...callbacks.parameters.accessor import shards_anew
from ...callbacks.parameters.shards import OF_A_WHOLE, Shards, Slice
from . import format as checkpoint
from .format import Piece, Pieces
from .random_states import rng_state


class AnotherModel(ShoestringError):
    """The checkpoint is not of this model."""


class OtherShards(ShoestringError):
    """The checkpoint's optimizer state goes with other shards."""


class OtherData(ShoestringError):
    """The checkpoint is of other training data."""


_COMMON = frozenset({
    "loops", "callbacks", "schedulers", "param_groups", "precision", "datamodule", "module", "accumulate", "trainable",
    "settings",
})  # fmt: skip
_OF_A_RANK = frozenset({"rng", "scalars", "loss_scaler"})
_OF_THE_MACHINE = frozenset({"fused", "foreach", "capturable"})  # how an optimizer computes here, not what


# -- taking --------------------------------------------------------------------------------------------------------
def trainable(module: pl.LightningModule) -> list[str]:
    """The names of parameters that train now."""
    return [name for name, p in module.named_parameters() if p.requires_grad]


def common_state(
    trainer: pl.Trainer, module: pl.LightningModule, first: list[str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Rank 0's part: loops, callbacks, schedulers, parameter groups and what the module itself wants saved.

    first, settings: what was `trainable` when the fit began, and what `changes.settings_of` said.
    """
    module_state: dict[str, Any] = {"state_dict": {}}
    module.on_save_checkpoint(module_state)
    module_state.pop("state_dict", None)
    datamodule = trainer.datamodule
    return {
        "loops": trainer.fit_loop.state_dict(),
        "callbacks": {c.state_key: c.state_dict() for c in trainer.callbacks if c.state_dict()},
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "param_groups": [[_plain(group) for group in o.param_groups] for o in trainer.optimizers],
        "precision": trainer.precision_plugin.state_dict(),
        "datamodule": datamodule.state_dict() if datamodule is not None else {},
        "module": module_state,
        "settings": dict(settings),
        "trainable": {"first": first, "now": trainable(module)},
        "accumulate": trainer.accumulate_grad_batches,
    }


def rank_state(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """Each rank's part: random states, and the optimizer's states that are not shaped like parameters."""
    shards = shards_anew(trainer, module)
    scalars = {name: shards.scalars(name) for name in shards.slices}
    scaler = getattr(getattr(trainer.strategy.model, "optimizer", None), "loss_scaler", None)
    return {
        "rng": rng_state(),
        "scalars": {name: values for name, values in scalars.items() if values},
        "layout": _layout(trainer, shards),
        "loss_scaler": {k: v for k, v in vars(scaler).items() if isinstance(v, int | float | bool)} if scaler else {},
    }


def tensors(
    trainer: pl.Trainer, module: pl.LightningModule, left_out: frozenset[str] = frozenset()
) -> Iterator[tuple[str, Piece, torch.Tensor]]:
    """This rank's slices: master/, optimizer/<state>/, technique/<name>/<state>/, table/<technique>/, frozen/, and rank
    0's buffer/, each a view for its turn alone. Collective where a technique has tables. left_out: frozen weights that
    are not to be held."""
    shards = shards_anew(trainer, module)
    first = trainer.global_rank == 0
    if first or not shards.replicated:
        for name in shards.each():
            if (where := shards.slices[name]).length:
                yield f"master/{name}", *_piece(where, shards.master(name))
                for state, view in shards.state(name).items():
                    yield f"optimizer/{state}/{name}", *_piece(where, view)
        for technique in trainer.callbacks:
            if isinstance(technique, Technique):
                for state, named in technique.fragments().items():
                    for name, local in named.items():
                        if shards.slices[name].length:
                            key = f"technique/{technique.state_key}/{state}/{name}"
                            yield key, *_piece(shards.slices[name], local)
    for technique, name, table in _tables(trainer):
        if len(piece := table.share()):
            yield f"table/{technique}/{name}", Piece(table.offset, len(piece), (table.count,)), piece
    for name, (where, view) in shards.frozen().items():
        if name not in left_out and (first or where.length != where.numel) and where.length:
            yield f"frozen/{name}", *_piece(where, view)
    if first:
        for name, buffer in module.named_buffers():
            whole = Slice(0, buffer.numel(), buffer.shape)
            yield f"buffer/{name}", *_piece(whole, buffer.detach().reshape(-1))


def check(folder: Path, hashes: bool = True) -> None:
    """`DamagedCheckpoint` where a checkpoint is not as it was written, or lacks a part that `restore` puts back."""
    manifest = checkpoint.verify(folder, hashes)
    for name in ("state.pt", *(f"rank-{rank:05d}.pt" for rank in range(manifest["world_size"]))):
        if name not in manifest["files"]:
            raise checkpoint.DamagedCheckpoint(f"{folder}: {name} is not in the manifest")
        wanted = _COMMON if name == "state.pt" else _OF_A_RANK
        if lacking := sorted(wanted - checkpoint.read_state(folder / name).keys()):
            raise checkpoint.DamagedCheckpoint(f"{folder}: {name} lacks {', '.join(lacking)}")
    Pieces(folder, manifest["files"])


# -- putting back --------------------------------------------------------------------------------------------------
def restore(trainer: pl.Trainer, module: pl.LightningModule, folder: Path) -> dict[str, Any] | None:
    """Put a verified checkpoint back. Returns the random states to set when training starts, if they fit."""
    common = checkpoint.read_state(folder / "state.pt")
    manifest = checkpoint.read_manifest(folder)
    mine = folder / f"rank-{trainer.global_rank:05d}.pt"
    rank = checkpoint.read_state(mine if mine.exists() else folder / "rank-00000.pt")
    pieces = Pieces(folder, manifest["files"])
    first = trainable(module)
    if common["trainable"]["first"] == first:  # then what has become trainable since, or frozen, is so again
        with_moments = {key.removeprefix("master/") for key in pieces if key.startswith("master/")}
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in with_moments or parameter.requires_grad)
    shards = shards_anew(trainer, module)
    _fits(shards, pieces)
    scalars = _scalars(folder, manifest["world_size"], shards, rank)
    _check_blocks(rank.get("layout"), _layout(trainer, shards), scalars)
    _restore_parameters(shards, pieces, scalars)
    _restore_rest(module, shards, pieces)
    if common["trainable"]["first"] == first:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in common["trainable"]["now"])
    _restore_callbacks(trainer, common, pieces, shards)
    _restore_loops(trainer, module, common)
    scaler = getattr(getattr(trainer.strategy.model, "optimizer", None), "loss_scaler", None)
    for key, value in rank["loss_scaler"].items() if scaler is not None else ():
        setattr(scaler, key, value)
    return rank["rng"] if manifest["world_size"] == trainer.world_size else None


def _fits(shards: Shards, pieces: Pieces) -> None:
    for name, where in shards.slices.items():
        key = f"master/{name}"
        if key not in pieces:
            raise AnotherModel(f"the checkpoint has no {name}. It is of another model, or has other trainable parts.")
        if pieces.shape(key) != tuple(where.shape):
            raise AnotherModel(f"{name} has shape {tuple(where.shape)}, but in the checkpoint {pieces.shape(key)}.")
    for name in shards.frozen():
        if f"master/{name}" in pieces:
            raise AnotherModel(f"{name} is frozen, but in the checkpoint it is trained.")


def _restore_parameters(shards: Shards, pieces: Pieces, scalars: Mapping[str, Mapping[str, Any]]) -> None:
    states: dict[str, list[str]] = {}
    for key in pieces:
        if key.startswith("optimizer/"):
            _, state, name = key.split("/", 2)
            states.setdefault(name, []).append(state)
    with torch.no_grad():
        for name in shards.each(edited=True):
            if not (where := shards.slices[name]).length:
                continue
            shards.master(name).copy_(pieces.cut(f"master/{name}", where.offset, where.length))
            kept = {s: pieces.cut(f"optimizer/{s}/{name}", where.offset, where.length) for s in states.get(name, ())}
            shards.restore(name, kept, scalars.get(name, {}))
    shards.publish()


def _layout(trainer: pl.Trainer, shards: Shards) -> str:
    """Which parts of flattened parameters a rank has, in words."""
    return shards.layout if shards.replicated else f"{shards.layout} on {trainer.world_size} ranks"


def _check_blocks(saved: str | None, now: str, scalars: Mapping[str, Mapping[str, Any]]) -> None:
    """Vectors beside a state, such as the scales of its blocks, cannot be cut anew."""
    kept = ((key, v) for values in scalars.values() for key, v in values.items() if torch.is_tensor(v))
    vectors = (v for key, v in kept if v.numel() > 1 and not key.startswith(OF_A_WHOLE))
    if saved != now and next(vectors, None) is not None:
        raise OtherShards(
            f"the checkpoint's optimizer keeps state in blocks of {saved}, and this run has {now}. "
            "Resume it with the strategy and the number of ranks that it was saved with."
        )


def _scalars(folder: Path, world: int, shards: Shards, rank: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Step counts and their like for every parameter this rank needs; another rank's file may hold them."""
    scalars = dict(rank["scalars"])
    if all(name in scalars for name in shards.slices):
        return scalars
    for other in range(world):
        for name, values in checkpoint.read_state(folder / f"rank-{other:05d}.pt")["scalars"].items():
            scalars.setdefault(name, values)
    return scalars


def _restore_rest(module: pl.LightningModule, shards: Shards, pieces: Pieces) -> None:
    with torch.no_grad():
        for name, (where, view) in shards.frozen().items():
            if f"frozen/{name}" in pieces and where.length:
                view.copy_(pieces.cut(f"frozen/{name}", where.offset, where.length))
        for name, buffer in module.named_buffers():
            if f"buffer/{name}" in pieces:
                buffer.copy_(pieces.cut(f"buffer/{name}", 0, buffer.numel()).view(buffer.shape))


def _tables(trainer: pl.Trainer) -> Iterator[tuple[str, str, SampleTable]]:
    """(technique, name, table) of what techniques keep for each sample."""
    for technique in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(technique, Technique):
            for name, table in technique.tables().items():
                yield technique.state_key, name, table


def _restore_callbacks(trainer: pl.Trainer, common: Mapping[str, Any], pieces: Pieces, shards: Shards) -> None:
    for technique, name, table in _tables(trainer):
        if (key := f"table/{technique}/{name}") in pieces:
            if pieces.shape(key) != (table.count,):
                raise OtherData(f"{technique} kept {pieces.shape(key)[0]} samples, and the data has {table.count}")
            table.load(pieces.cut(key, table.offset, table.length))
    for callback in trainer.callbacks:
        if callback.state_key in common["callbacks"]:
            callback.load_state_dict(common["callbacks"][callback.state_key])
        if isinstance(callback, Technique):
            fragments: dict[str, dict[str, torch.Tensor]] = {}
            prefix = f"technique/{callback.state_key}/"
            for key in pieces:
                if key.startswith(prefix):
                    state, name = key.removeprefix(prefix).split("/", 1)
                    where = shards.slices[name]
                    fragments.setdefault(state, {})[name] = pieces.cut(key, where.offset, where.length)
            if fragments:
                callback.load_fragments({s: shards.beside_masters(named) for s, named in fragments.items()})


def _restore_loops(trainer: pl.Trainer, module: pl.LightningModule, common: Mapping[str, Any]) -> None:
    trainer.fit_loop.load_state_dict(common["loops"])
    epochs = trainer.fit_loop.epoch_progress.current
    if epochs.ready == epochs.completed:  # saved between epochs: the next one starts as any other
        trainer.fit_loop.epoch_loop.restarting = False
    changing = any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks)  # type: ignore[attr-defined]
    if common["accumulate"] != trainer.accumulate_grad_batches and not changing:
        _rescale(trainer, trainer.accumulate_grad_batches / common["accumulate"])
    for optimizer, groups in zip(trainer.optimizers, common["param_groups"], strict=True):
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            group.update({key: value for key, value in saved.items() if key not in _OF_THE_MACHINE})
    for config, state in zip(trainer.lr_scheduler_configs, common["schedulers"], strict=True):
        config.scheduler.load_state_dict(state)
    trainer.precision_plugin.load_state_dict(common["precision"])
    if trainer.datamodule is not None:
        trainer.datamodule.load_state_dict(common["datamodule"])
    module.on_load_checkpoint({"state_dict": {}, **common["module"]})


def _rescale(trainer: pl.Trainer, factor: float) -> None:
    """Lightning counts micro-batches: another accumulation means other counts for the same optimizer step."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    for counts in (progress.total, progress.current):
        unfinished = counts.processed - counts.completed
        for field in ("ready", "started", "processed"):
            setattr(counts, field, round(getattr(counts, field) * factor))
        counts.completed = counts.processed - unfinished


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    legal = (int, float, bool, str, tuple, list, type(None), torch.Tensor)
    return {key: value for key, value in group.items() if key != "params" and isinstance(value, legal)}


def _piece(where: Slice, view: torch.Tensor) -> tuple[Piece, torch.Tensor]:
    return Piece(where.offset, where.length, tuple(where.shape)), view
