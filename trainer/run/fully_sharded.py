"""FSDP2: weights, gradients and optimizer state are shared out by rows, and gathered a block at a time.

torch's `fully_shard` puts DTensors in the place of parameters; a block's are gathered before it computes, forward and
backward, and let go after it. Nothing is patched: the same code runs on CPUs over gloo and on GPUs over NCCL.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.trainer.states import TrainerFn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ... import ShoestringError
from ...callbacks.forward.blocks import blocks
from ...callbacks.parameters.accessor import shards_of
from ..tasks.optimizers.stepping import Stepping
from ..tasks.optimizers.wholes import WholeStepping
from .same_start import check_dimensions, same_start


class CannotSave(ShoestringError):
    """A checkpoint of Lightning's own under a strategy whose ranks have parts of the weights."""


class _Root(nn.Module):
    """What is shared out beside the blocks: the user's module keeps its class, its name and its hooks."""

    def __init__(self, module: pl.LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class FullyShardedStrategy(DDPStrategy):
    """FSDP2 through Lightning.

    In bf16 the weights are gathered and computed with in bf16, and masters, sums of gradients and the optimizer's state
    are float32.
    """

    model: Any
    _root: _Root | None = None

    def setup(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn != TrainerFn.FITTING and self._root is not None and self._root.module is self.model:
            self.accelerator.setup(trainer)  # type: ignore[union-attr]
            self.model = self._root  # evaluated after a fit, which has shared it out
            self.setup_precision_plugin()
            return
        super().setup(trainer)

    def configure_ddp(self) -> None:
        """Share out what `setup` has brought to the device; begin with the weights of rank 0."""
        module: Any = self.model
        if self._root is None or self._root.module is not module:
            check_dimensions(module, "FSDP2")
            same_start(module)
            self._root = self._share_out(module)
        self.model = self._root

    def _share_out(self, module: pl.LightningModule) -> _Root:
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # autocast does, where it is due
        if str(self.precision_plugin.precision).startswith("bf16-mixed"):
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        alone = _apart(module)
        for block in alone:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        root = _Root(module)
        fully_shard(root, mesh=mesh, mp_policy=policy)
        root._get_fsdp_state()._lazy_init()  # type: ignore[operator]  # or what is called first would be the root
        inside = {part for block in alone for part in block.modules()}
        for part in module.modules():
            if part not in inside and part._parameters:
                part.register_forward_pre_hook(lambda part, _: _gather(root, part), prepend=True)
        return root

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
                group["fused"] = False  # which DTensors do not have
            if isinstance(optimizer, Stepping):
                optimizer.steps_slices = True
            if isinstance(optimizer, WholeStepping):
                optimizer.shards = lambda stepped: shards_of(trainer, self.lightning_module).held(stepped)  # type: ignore

    # -- weights outside of blocks stay gathered after a forward, for the backward; here none follows ------------------
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._let_go(super().validation_step(*args, **kwargs))

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._let_go(super().test_step(*args, **kwargs))

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._let_go(super().predict_step(*args, **kwargs))

    def _let_go(self, output: Any) -> Any:
        if self.model is self._root:
            self._root.reshard()  # type: ignore[union-attr, operator]
        return output

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Refuse: a rank would write its own rows for the whole."""
        raise CannotSave(
            f"{filepath}: Lightning's own checkpoints hold whole weights, and under fsdp2 no rank has them. The run "
            "directory has checkpoints, and the weights in final/; or use ddp."
        )


def _gather(root: Any, part: nn.Module) -> None:
    """Gather what is outside of blocks, where a layer is called outside of a step."""
    if any(hasattr(p, "to_local") for p in part._parameters.values()):
        root.unshard()


def _apart(module: nn.Module) -> list[nn.Module]:
    """The blocks that are gathered one after another: those that share no parameter with the rest of the model."""
    uses = Counter(id(p) for part in module.modules() for p in part.parameters(recurse=False))
    repeated = blocks(module)
    inside = [Counter(id(p) for part in block.modules() for p in part.parameters(recurse=False)) for block in repeated]
    return [block for block, own in zip(repeated, inside, strict=True) if own and all(uses[p] == own[p] for p in own)]
