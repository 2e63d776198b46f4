"""Which sharded-state accessor a run has: its strategy decides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from torch import Tensor, nn

from .shards import NoShard, Shards

if TYPE_CHECKING:
    from .zero_shards import ZeroShards


def shards_of(trainer: pl.Trainer, module: pl.LightningModule) -> Shards:
    """The sharded-state accessor of this run: weights, gradients and optimizer states as this rank's slices.

    Args:
        trainer: Of any kind, with any strategy.
        module: Which it trains.

    Returns:
        The accessor: cheap after the first call; valid from `on_fit_start` to the end.

    Raises:
        NoShard: The strategy keeps its parameters where no accessor can reach.

    Example:
        >>> from pytorch_lightning.demos.boring_classes import BoringModel
        >>> class Look(pl.Callback):
        ...     def on_train_start(self, trainer, pl_module):
        ...         shards = shards_of(trainer, pl_module)
        ...         print({name: shards.master(name).shape for name in shards.slices})
        >>> quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        >>> pl.Trainer(fast_dev_run=True, callbacks=[Look()], **quiet).fit(BoringModel())
        {'layer.weight': torch.Size([64]), 'layer.bias': torch.Size([2])}
    """
    cached = getattr(trainer, "_shoestring_shards", None)
    if cached is None or cached[0] is not trainer.strategy.model:
        cached = (trainer.strategy.model, _open(trainer, module))
        trainer._shoestring_shards = cached  # type: ignore[attr-defined]
    return cached[1]


def shards_anew(trainer: pl.Trainer, module: pl.LightningModule) -> Shards:
    """`shards_of`, with parameters that have become trainable since: for what has to hold all of the run's state.

    Raises:
        NoShard: The strategy has made its optimizer without them, and they would never be trained.
    """
    shards = shards_of(trainer, module)
    new = [name for name, p in module.named_parameters() if p.requires_grad and name not in shards.slices]
    if not new:
        return shards
    if not shards.replicated:
        raise NoShard(
            f"{new[0]} has become trainable, and {type(trainer.strategy).__name__} shares out only what is trainable "
            "when the run starts: it would never be trained. Use ddp, or leave it trainable from the start."
        )
    trainer._shoestring_shards = None  # type: ignore[attr-defined]
    return shards_of(trainer, module)


def cut(trainer: pl.Trainer, module: pl.LightningModule, wholes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's slices of whole tensors, by parameter name. Also before the strategy has set up its model."""
    if getattr(trainer.strategy, "zero_stage_3", None) is None:  # not DeepSpeed: every rank holds everything
        return {name: whole.reshape(-1) for name, whole in wholes.items()}
    shards = shards_of(trainer, module)
    return shards.beside_masters({name: shards.slices[name].cut(whole).clone() for name, whole in wholes.items()})


def _open(trainer: pl.Trainer, module: pl.LightningModule) -> Shards:
    engine = getattr(trainer.strategy, "deepspeed_engine", None)
    if engine is None:
        if any(hasattr(p, "to_local") for p in module.parameters()):
            from .fully_sharded import FullyShardedShards

            return FullyShardedShards(module, list(trainer.optimizers))
        return Shards(module, list(trainer.optimizers))
    return shards_of_engine(module, engine)


def shards_of_engine(module: nn.Module, engine: Any) -> ZeroShards:
    """The accessor to what a DeepSpeed engine holds of a module.

    Raises:
        NoShard: It shares out nothing.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        raise NoShard("DeepSpeed stage 0 keeps no masters; use ddp, or zero1")
    from .zero_shards import Zero3Shards, Zero12Shards

    return Zero3Shards(module, engine) if stage == 3 else Zero12Shards(module, engine)
