"""Strategies by name: single, ddp, zero1, zero2, zero3, fsdp2, on GPUs (NCCL) and on CPUs (gloo), with offload.

Lightning's DeepSpeedStrategy refuses any accelerator but CUDA by a guard, not by inability; the subclass below steps
past the guard, so every ZeRO path runs, and is tested, on machines without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import ShoestringError
from ...callbacks.contract import Settings
from ...strategies import NVME, NVME_BUFFERS, NVME_GROUP, OFFLOADS, ON_CUDA, PREFETCH, SETTINGS, Sharding, bucket
from ..machine.nvme import NvmeError, claim, problem, release

if TYPE_CHECKING:
    from pytorch_lightning.strategies import Strategy
    from torch.nn import Module


class UnknownStrategy(ShoestringError):
    """Not one of our strategies, or an offload or a setting that it does not have."""


def make_strategy(
    name: str | Strategy, *, accelerator: str, offload: str = "none", settings: Settings | None = None,
    sharding: Sharding | None = None, in_backward: bool = False, nvme: str | None = None,
) -> Strategy | str:  # fmt: skip
    """The Lightning strategy for `name` on `accelerator` ("cpu" or "cuda"); one that is not ours, as it was given.

    `in_backward`: parameters step one by one, and DDP keeps no buckets of gradients.
    `offload`: "optimizer" keeps optimizer state in host memory (ZeRO-2/3), "parameters" also the weights (ZeRO-3).
    `nvme`: a folder on a local drive that offloaded optimizer state lies in, in place of host memory (ZeRO-3).
    `settings`: their `strategy_options` go to its constructor; `sharding`: how ZeRO communicates.

    Raises:
        NvmeError: State cannot lie in that folder.
        ExtensionsError: DeepSpeed's asynchronous I/O cannot be built.
        UnknownStrategy: Something is asked for that the strategy does not have, or that is not ours to set.
    """
    if not isinstance(name, str) or name not in OFFLOADS:
        _only_ours(name, offload, settings or Settings(), sharding, nvme)
        return name
    settings, sharding = settings or Settings(), sharding or Sharding()
    if offload not in OFFLOADS[name]:
        able = [other for other, offloads in OFFLOADS.items() if offload in offloads]
        raise UnknownStrategy(
            f"offload {offload!r} needs {' or '.join(able)}" if able else
            f"offload {offload!r} is not among {', '.join(OFFLOADS['zero3'])}"
        )  # fmt: skip
    if nvme is not None and (name != NVME or offload != "optimizer"):
        raise UnknownStrategy(
            f"nvme is where {NVME} keeps what offload 'optimizer' names, and this is {name!r} with {offload!r}"
        )
    for setting in sharding.foreign_to(name):
        able = [other for other in OFFLOADS if other in SETTINGS[setting]]
        raise UnknownStrategy(f"{setting} does nothing with strategy {name!r}: it is for {', '.join(able)}")
    if sharding.quantized_weights and accelerator != "cuda":
        raise UnknownStrategy(f"quantized_weights {ON_CUDA}")
    stage = int(name[-1]) if name.startswith("zero") else 0
    backend = "nccl" if accelerator == "cuda" else "gloo"
    if name == "single":
        return "auto"
    if name == "ddp":
        from pytorch_lightning.strategies import DDPStrategy

        from .step_in_backward import ReducedInBackward

        kind = ReducedInBackward if in_backward else DDPStrategy
        return kind(process_group_backend=backend, **settings.strategy_options)
    if name == "fsdp2":
        if settings.precision.startswith("16"):
            raise UnknownStrategy("fp16 has a loss scale, which fsdp2 does not keep alike on ranks: use bf16, or zero3")
        from .fully_sharded import FullyShardedStrategy

        return FullyShardedStrategy(process_group_backend=backend, **settings.strategy_options)
    from ..machine.extensions import prepare_environment

    if nvme is not None and (fault := problem(Path(nvme))) is not None:
        raise NvmeError(f"strategy.nvme: {fault}")
    prepare_environment(name, offload, accelerator, nvme=nvme is not None)
    overlaps = sharding.overlaps(name, accelerator)
    return _zero_class()(
        config={
            **_config(
                stage,
                offload,
                {**_drive(nvme), "overlap_comm": overlaps, **_copies(sharding), **settings.strategy_options},
            ),
            **_sums(sharding.gradient_dtype, settings.precision),
        },
        sharding=sharding,
        drive=None if nvme is None else Path(nvme),
        process_group_backend=backend,
    )


def _only_ours(
    given: str | Strategy, offload: str, settings: Settings, sharding: Sharding | None, nvme: str | None
) -> None:
    """Raise `UnknownStrategy` where something is asked for that only strategies of our own are made with."""
    idle = [
        *[f"offload={offload!r}"] * (offload != "none"),
        *[f"nvme={nvme!r}"] * (nvme is not None),
        *["sharding=Sharding(…)"] * (sharding is not None),
        *[f"{key}={value!r}, of a technique," for key, value in settings.strategy_options.items()],
    ]
    if idle:
        kind = repr(given) if isinstance(given, str) else f"a {type(given).__name__} that was made outside"
        raise UnknownStrategy(
            f"strategy is {kind}, and {idle[0]} would do nothing: give that strategy its settings where it is made, "
            f"or name one of {', '.join(OFFLOADS)}"
        )


def _config(stage: int, offload: str, zero: Mapping[str, Any]) -> dict[str, Any]:
    zero_config: dict[str, Any] = {"stage": stage, "contiguous_gradients": True, **zero}
    if offload != "none":
        zero_config.setdefault("offload_optimizer", {"device": "cpu"})
    if offload == "parameters":
        zero_config["offload_param"] = {"device": "cpu"}
    return {
        "zero_optimization": zero_config,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's own optimizer steps offloaded state: nothing to compile
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only prints with it; the loaders decide
    }


def _drive(nvme: str | None) -> dict[str, Any]:
    """ZeRO-Infinity: what is stepped together is in memory together, so it is to be a small part."""
    if nvme is None:
        return {}
    swapped = {"device": "nvme", "buffer_count": NVME_BUFFERS}  # its path is each rank's own, see `ZeroStrategy`
    return {"offload_optimizer": swapped, "sub_group_size": NVME_GROUP}


def _plain_states(optimizer: Any) -> None:
    """`UnknownStrategy` where DeepSpeed's buffers would not hold what an optimizer keeps of a parameter."""
    from torch.optim import SGD, Adam

    from ..tasks.optimizers.lion import Lion

    if not isinstance(optimizer, Adam | SGD | Lion) or any(group.get("amsgrad") for group in optimizer.param_groups):
        raise UnknownStrategy(
            "with nvme the optimizer is torch's AdamW, Adam (without amsgrad) or SGD, or Lion, and this is a "
            f"{type(optimizer).__name__}: DeepSpeed keeps no other states on a drive. Leave nvme out, and they are in "
            "host memory."
        )


def _copies(sharding: Sharding) -> dict[str, Any]:
    """ZeRO++."""
    hpz = {"zero_hpz_partition_size": sharding.hpz} if sharding.hpz > 1 else {}
    return {**hpz, **({"zero_quantized_weights": True} if sharding.quantized_weights else {})}


def _sums(dtype: str, precision: str) -> dict[str, Any]:
    """DeepSpeed's settings of what gradients are summed in; its own choice is that of the weights.

    A mean over N micro-batches and ranks loses up to log2 N of bfloat16's 8 bits.
    """
    if "bf16" not in precision:
        return {}
    return {"data_types": {"grad_accum_dtype": dtype}, "communication_data_type": dtype}


def _buckets(zero: dict[str, Any], sharding: Sharding, trained: int) -> None:
    """Give the sizes that are not fixed by `options`, for a model with so many trained weights."""
    wanted = {
        "reduce_bucket_size": (sharding.reduce_bucket, bucket(trained)),
        "allgather_bucket_size": (sharding.allgather_bucket, bucket(trained)),
        "stage3_prefetch_bucket_size": (sharding.prefetch, PREFETCH),
    }
    for key, (setting, derived) in wanted.items():
        zero.setdefault(key, derived if setting == "auto" else setting)


@contextmanager
def _one_kind_of_optimizer() -> Iterator[None]:
    """Let ZeRO-1 be ZeRO-1 in bfloat16 with float32 sums too.

    DeepSpeed would take another optimizer for it, with partitions of its own and a gradient that is whole in float32
    all the time.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION

    plain = DeepSpeedEngine._do_optimizer_sanity_check

    def check(self: Any, optimizer: Any) -> Any:
        chosen = plain(self, optimizer)
        return ZERO_OPTIMIZATION if self.zero_optimization() else chosen

    DeepSpeedEngine._do_optimizer_sanity_check = check
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = plain


def _zero_class() -> type[Strategy]:
    """Made on first use: DeepSpeed takes seconds to import."""
    import argparse

    import deepspeed
    from deepspeed.utils import groups
    from lightning_fabric.utilities.seed import reset_seed
    from pytorch_lightning.accelerators import CUDAAccelerator
    from pytorch_lightning.strategies import DeepSpeedStrategy
    from torch import Tensor
    from torch.optim import Optimizer

    from ...callbacks.parameters.accessor import shards_of_engine
    from ..machine.imports import import_deepspeeds_muon
    from ..tasks.optimizers.wholes import WholeStepping
    from .partitioning import forget_files, partition
    from .same_start import check_dimensions

    class ZeroStrategy(DeepSpeedStrategy):
        """DeepSpeedStrategy that also runs on CPUs over gloo."""

        def __init__(self, *, sharding: Sharding, drive: Path | None, **options: Any) -> None:
            super().__init__(**options)
            self.sharding = sharding
            self.drive = drive
            self._own_drive: Path | None = None

        cuts_window = False  # an epoch ends amid an accumulation window, and the engine is to step; see `cut_window`

        @property
        def handles_gradient_accumulation(self) -> bool:
            return not self.cuts_window

        def setup_environment(self) -> None:
            super(DeepSpeedStrategy, self).setup_environment()  # its own adds nothing but the CUDA guard

        def setup_distributed(self) -> None:
            groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # of an earlier run, where this process had one
            if isinstance(self.accelerator, CUDAAccelerator):
                super().setup_distributed()
                return
            reset_seed()
            self.set_world_ranks()
            self._init_deepspeed_distributed()

        def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
            # Lightning has divided the loss by the number of micro-batches; DeepSpeed would divide it once more
            return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

        def _setup_model_and_optimizer(
            self, model: Module, optimizer: Optimizer | None, lr_scheduler: Any = None
        ) -> tuple[Any, Any]:
            check_dimensions(model, "ZeRO")
            if not type(optimizer).__module__.startswith("deepspeed."):
                import_deepspeeds_muon()
            engine, zero = self._engine(model, optimizer, lr_scheduler)
            if isinstance(optimizer, WholeStepping):
                optimizer.shards = shards_of_engine(model, engine).held
            return engine, zero

        def _engine(self, model: Module, optimizer: Optimizer | None, lr_scheduler: Any) -> tuple[Any, Any]:
            trained = [p for p in model.parameters() if p.requires_grad]
            count = sum(getattr(p, "ds_numel", p.numel()) for p in trained)
            _buckets(self.config["zero_optimization"], self.sharding, count)
            if self.drive is not None:
                _plain_states(optimizer)
                self._own_drive = claim(self.drive)
                self.config["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(self._own_drive)
            if self.zero_stage_3:
                partition(model, self.config, self.root_device)
                forget_files(model, first_of_node=self.local_rank == 0)
            with _one_kind_of_optimizer():
                if isinstance(self.accelerator, CUDAAccelerator):
                    return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
                engine, zero, _, _ = deepspeed.initialize(
                    args=argparse.Namespace(device_rank=self.local_rank),  # a CPU device has no index to take it from
                    config=self.config,
                    model=model,
                    model_parameters=trained,
                    optimizer=optimizer,
                    lr_scheduler=lr_scheduler,
                    dist_init_required=False,
                )
                return engine, zero

        def teardown(self) -> None:
            super().teardown()
            if self._own_drive is not None:
                release(self._own_drive)
                self._own_drive = None

    return ZeroStrategy
