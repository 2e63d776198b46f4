"""Quantization-aware training: learn weights that will be stored in low-bit form (arXiv 1712.05877)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ..accounting.clock import Duration, clock_of
from ..contract import Card, IncompatibleTechniques, Technique, require
from ..forward.forward_weights import ForwardWeights, straight_through
from ..parameters.accessor import shards_of
from ..parameters.cut import Cut
from ..parameters.layers import Layer, check_skip, quantizable
from .fake_quantization import (
    PRODUCT_BITS,
    SCALES,
    check_groups,
    fake_quantize_tokens,
    fake_quantize_weight,
    product_bits,
)
from .learned_steps import LearnedSteps

OFF = (None, 16)


@dataclass(kw_only=True, eq=False, repr=False)
class QuantizationAware(Technique, pl.Callback):
    """From `start` on, let linear and convolution layers compute with weights of `weight_bits` bits.

    The trained weights stay what they are, and what is saved. Validation during the fit sees the quantized model too,
    and `shoestring export --quantize trained` writes that one.

    torchao's `QATConfig` is not used: as of 0.18 it refuses the int8 product that is fast on CPUs, and it replaces
    layers of the model, which ZeRO-3's hooks do not follow in mid-run. So the grid is ours, and export puts it into
    torchao's tensors.

    It costs one more pass over the weights a forward, no communication and no state; zeros stay zero. Under ZeRO with
    16-bit weights the levels are rounded to that type. "lsq" keeps the steps on every rank, and sums their gradients
    over ranks in every step: one blocking collective of a float per step size, which gradient clipping does not see.

    Source: arXiv 1712.05877.

    Args:
        weight_bits: 2 to 8, or 16 (or None) for off.
        activation_bits: 8 quantizes what enters linear layers too, per token; None leaves it.
        cpu: With activation_bits=8, which CPUs are to compute the int8 products right: "any" trains weights of at most
            7 bits, since x86 without VNNI would overflow with 8; "vnni" trains all 8.
        group_size: Inputs that share a symmetric scale; None is one scale per output channel.
        scale: "absmax"; "mse", which clips and is better at 4 bits and fewer; or "lsq", whose steps are trained with
            the weights (arXiv 1902.08153) and on whose grid the weights end. "lsq" is not for frozen layers, nor for
            16-bit floats with loss scaling.
        scale_lr: Of "lsq": the steps' learning rate relative to their size, in units of the optimizer's.
        adapters: With PEFT LoRA, "apart" quantizes the frozen base and leaves the adapters beside it in full precision;
            "merged" trains them so that base + adapter, quantized as one, is good: x Q(W + BA) in place of x Q(W) + x
            BA. Adapter dropout is then noise on the difference. Not under ZeRO-3.
        start: Duration before which layers compute in full precision.
        skip: Patterns of parameter names to leave in full precision.

    Example:
        >>> import pytorch_lightning as pl
        >>> from shoestring.callbacks import QuantizationAware
        >>> trainer = pl.Trainer(max_steps=1000, callbacks=[QuantizationAware(weight_bits=4, group_size=32)])
    """

    card = Card(
        name="quantization_aware",
        does="trains weights, and activations, for 2 to 8 bits",
        paper="1712.05877",
        saves={"size"},
        reads={"weights"},
        writes={"numerics"},
        refuses={"model.dtype nf4 or int8"},  # whose weights are codes already
    )

    weight_bits: int | None = 8
    activation_bits: int | None = None
    cpu: str = "any"
    group_size: int | None = None
    scale: str = "absmax"
    scale_lr: float = 1.0
    adapters: str = "apart"
    start: str = "0%"
    skip: Sequence[str] = ()

    def check(self) -> None:
        require(self.weight_bits in (*OFF, *range(2, 9)), self, "weight_bits", "2 to 8, or 16 or None for off")
        require(self.activation_bits in (None, 8), self, "activation_bits", "8, or None for off")
        require(self.cpu in PRODUCT_BITS, self, "cpu", " | ".join(PRODUCT_BITS))
        legal = self.group_size is None or (isinstance(self.group_size, int) and self.group_size > 0)
        require(legal, self, "group_size", "a positive number of inputs, or None for one scale per output channel")
        require(self.scale in SCALES, self, "scale", " | ".join(SCALES))
        require(self.scale_lr >= 0, self, "scale_lr", "a number >= 0")
        require(self.adapters in ("apart", "merged"), self, "adapters", "apart | merged")
        require(self.adapters == "apart" or self.scale != "lsq", self, "scale", "absmax | mse with adapters='merged'")
        require(not isinstance(self.skip, str), self, "skip", "a list of patterns")
        Duration.parse(self.start)

    @property
    def grid_bits(self) -> int:
        """The bits of the grid on which weights are rounded; where they are rounded at all."""
        bits = int(self.weight_bits)  # type: ignore[arg-type]
        return bits if self.activation_bits is None else product_bits(bits, self.cpu)

    @classmethod
    def example(cls) -> Self:
        return cls(weight_bits=8, activation_bits=8)

    @classmethod
    def noop(cls) -> Self:
        return cls(weight_bits=16)

    # -- hooks ------------------------------------------------------------------------------------------------------
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._learned: LearnedSteps | None = None
        self._saved: Mapping[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the strategy has set up the model: ZeRO-3's own hooks gather a weight before ours look at it."""
        self._start = Duration.parse(self.start)
        self._batches = 0
        self._acting = False
        if self.weight_bits in OFF and self.activation_bits is None:
            return
        check_skip(pl_module, self.skip, self.card.name)
        layers = quantizable(pl_module, self.skip)
        if not layers:
            raise IncompatibleTechniques(
                f"quantization_aware finds no linear or convolution layer after skip={self.skip}"
            )
        self._fits(pl_module, layers)
        self._adapter = {name: used[0].adapter for name, used in layers.items()}
        if self.scale == "lsq" and self.weight_bits not in OFF:
            self._prepare_steps(trainer, pl_module, layers)
        self._install(pl_module, layers)
        self._look_at_clock(trainer, pl_module)

    def _install(self, module: pl.LightningModule, layers: dict[str, list[Layer]]) -> None:
        if self.weight_bits not in OFF:
            self._shown = ForwardWeights(module, layers, self._show)
        if self.activation_bits is not None:
            self._hook_inputs(layers)

    def _hook_inputs(self, layers: dict[str, list[Layer]]) -> None:
        for handle in self.__dict__.get("_inputs", []):
            handle.remove()
        self._inputs = [
            layer.register_forward_pre_hook(self._quantize_input, with_kwargs=True) for layer in self._linear(layers)
        ]

    def _look_at_clock(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._acting = clock_of(trainer).toward(self._start) >= 1.0
        if self._acting and self._learned is not None and not self._learned.steps:
            shards = shards_of(trainer, pl_module)
            for name in self._adapter:
                self._learned.begin(name, shards.whole(name).to(pl_module.device))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._batches < 2:
            self._batches += 1
            if self._batches == 2 and (shown := getattr(self, "_shown", None)):
                shown.check_used("quantization_aware")
        if not self._acting:
            self._look_at_clock(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if shown := self.__dict__.pop("_shown", None):
            shown.remove()
        for handle in self.__dict__.pop("_inputs", []):
            handle.remove()

    # -- learned steps ----------------------------------------------------------------------------------------------
    def _prepare_steps(self, trainer: pl.Trainer, module: pl.LightningModule, layers: dict[str, list[Layer]]) -> None:
        frozen = [name for name, used in layers.items() if not used[0].module.weight.requires_grad]
        if frozen:
            raise IncompatibleTechniques(
                f"quantization_aware: scale='lsq' moves weights onto the grid it learns, and {', '.join(frozen)} are "
                "frozen. Use scale='mse', or add them to skip."
            )
        if str(trainer.precision).startswith("16"):
            raise IncompatibleTechniques(
                f"quantization_aware: scale='lsq' trains beside the optimizer, whose loss scaling of "
                f"precision={trainer.precision!r} does not reach it. Use bfloat16, or scale='mse'."
            )
        self._learned = LearnedSteps(self.grid_bits, self.group_size)
        if self._saved:
            self._learned.load_state_dict(self._saved, module.device)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._learned is not None and self._acting and shards_of(trainer, pl_module).at_boundary():
            self._learned.descend(self.scale_lr * optimizer.param_groups[0]["lr"])

    @torch.no_grad()
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What layers have seen becomes what is there: no later look at the weights alone would find these steps."""
        if self._learned is None or not self._learned.steps:
            return
        shards = shards_of(trainer, pl_module)
        for name in self._learned.steps:
            where = shards.slices[name]
            self._learned.put_on_grid(name, shards.master(name), where.offset, where.numel)
        shards.publish()

    def on_cut(self, trainer: pl.Trainer, pl_module: pl.LightningModule, cut: Cut) -> None:
        """Somebody has cut the model: steps go with their channels, and groups that lost inputs begin anew."""
        if self._learned is None:
            return
        self._learned.forget_gradients()  # of the passes that chose the cut
        shards = shards_of(trainer, pl_module)
        for name in list(self._learned.steps):
            if not self._learned.cut(name, cut.kept.get(name, ())):
                self._learned.begin(name, shards.whole(name).to(pl_module.device))

    def on_reshape(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """ZeRO-3's new engine has new hooks that gather weights, and ours must come after them."""
        if shown := vars(self).get("_shown"):
            shown.reinstall()
        if "_inputs" in vars(self):
            self._hook_inputs(quantizable(pl_module, self.skip))

    def state_dict(self) -> dict[str, Any]:
        learned = getattr(self, "_learned", None)
        return learned.state_dict() if learned is not None and learned.steps else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

    # -- what layers see --------------------------------------------------------------------------------------------
    def _show(self, name: str, weight: Tensor) -> Tensor:
        if not self._acting:
            return weight
        bits = self.grid_bits
        if self._learned is not None:
            return self._learned.quantize(name, weight)
        adapter = self._adapter[name] if self.adapters == "merged" else None
        if adapter is None:
            return fake_quantize_weight(weight, bits, self.group_size, self.scale)
        with torch.no_grad():
            change = adapter_change(adapter, weight)
            merged = fake_quantize_weight(weight + change, bits, self.group_size, self.scale)
            shown = merged - change  # the adapter adds it again, and takes the gradient
        return straight_through(weight, shown)

    def _quantize_input(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._acting:
            return None
        if args:
            return (fake_quantize_tokens(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))  # a layer called as linear(input=x)
        return args, {**kwargs, name: fake_quantize_tokens(kwargs[name])}

    def _linear(self, layers: dict[str, list[Layer]]) -> list[nn.Module]:
        """Whose inputs are quantized; a merged adapter is to see what its base sees."""
        merged = self.adapters == "merged"
        linear = [u for used in layers.values() for u in used if isinstance(u.module, nn.Linear)]
        return [u.adapter if merged and u.adapter is not None else u.module for u in linear]

    def _fits(self, module: nn.Module, layers: dict[str, list[Layer]]) -> None:
        sharded = False
        for name, p in module.named_parameters():
            sharded |= hasattr(p, "ds_shape")
            if name in layers and self.weight_bits not in OFF:
                check_groups(torch.Size(getattr(p, "ds_shape", p.shape)), self.group_size, name)
        if self.adapters == "merged" and sharded and any(u.adapter for used in layers.values() for u in used):
            raise IncompatibleTechniques(
                "quantization_aware: adapters='merged' needs a layer's base and adapter weights at hand together, and "
                "zero3 gathers them one after another. Use zero2, or adapters='apart'."
            )


def adapter_change(adapter: Any, weight: Tensor) -> Tensor:
    """Return what the active adapters of a PEFT LoRA layer add to its base weight, in the weight's shape."""
    change = torch.zeros_like(weight)
    if adapter.disable_adapters or adapter.merged:
        return change
    for active in adapter.active_adapters:
        if active in adapter.lora_A:
            if getattr(adapter, "use_dora", {}).get(active):
                raise IncompatibleTechniques(
                    "quantization_aware: adapters='merged' knows LoRA, not DoRA. Use adapters='apart'."
                )
            change += adapter.get_delta_weight(active).to(change.dtype)
    return change
