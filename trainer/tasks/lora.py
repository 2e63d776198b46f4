"""Adapters by PEFT: the base is frozen, and small updates of its linear layers are trained.

Source: Hu et al., LoRA, arXiv 2106.09685; `recipes.adapters` has those of the other kinds. PEFT keeps adapters in
float32 by default, which stores a float32 copy of every adapted layer's input: 65.5 bytes per hidden value and layer of
a bf16 Llama against 43.2 for full fine-tuning and 39.6 with bf16 adapters. Here adapters are float32 weights as well,
whatever the base is, as all that trains; but they compute in what the run computes in, unless the recipe says `dtype:
float32`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...recipes.schema import AdapterSpec
from ..data.errors import unknown
from .adapter_kinds import FROM_BASE, config_of, shapes_shown, take_from_base
from .loftq import Show, begin_with_losses
from .quantized import dequantize

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def add_adapter(
    model: PreTrainedModel, adapter: AdapterSpec, task: str, read: Callable[[Show], None] | None = None
) -> PeftModel:
    """Wrap a model so that only adapters (and a new classification head) are trained.

    read: shows the weights that a quantized base was made of, for a start that looks at them.
    """
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    _check_targets(model, adapter.targets)
    with warnings.catch_warnings(), shapes_shown(model, adapter):
        # PEFT 0.21 reads a name that transformers 5 has renamed
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        adapted: Any = get_peft_model(model, config_of(adapter, task), autocast_adapter_dtype=False)
    if adapter.start in FROM_BASE:
        take_from_base(adapted, FROM_BASE[adapter.start])
    for p in adapted.parameters():
        if p.requires_grad:
            p.data = p.data.float()  # PEFT makes them in the base's dtype, and rounds every step of a bf16 weight away
    matrix_class = _Float32Linear if adapter.dtype == "float32" else _ComputeLinear
    for part in list(adapted.modules()):
        if isinstance(part, LoraLayer):
            part.cast_input_dtype_enabled = False  # or PEFT makes a float32 copy of the input
            for matrix in (*part.lora_A.values(), *part.lora_B.values()):
                matrix.__class__ = matrix_class
    if adapter.start == "loftq" and read is not None:
        begin_with_losses(adapted, read)
    return adapted  # type: ignore[no-any-return]


def adapter_names(model: torch.nn.Module, names: Iterable[str]) -> dict[str, str]:
    """What PEFT's own files call the weights of an adapter, by the names that `model` has for them."""
    from peft import get_peft_model_state_dict

    theirs = get_peft_model_state_dict(model, {name: name for name in names}, save_embedding_layers=False)
    return {ours: name for name, ours in theirs.items()}


class _ComputeLinear(torch.nn.Linear):
    """Computes in its input's dtype, or in autocast's, whatever the dtype of its weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(input, self.weight.to(input.dtype))


class _Float32Linear(torch.nn.Linear):
    """Computes in float32, under autocast too."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return torch.nn.functional.linear(input.float(), self.weight.float())


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """The model with its adapters added to its weights, in place, computing what it computed with them apart.

    A weight that an adapted layer shares with others (an output layer tied to embeddings) becomes its own first: the
    adapter was trained for that layer alone. Quantized layers become float32 ones.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    dequantize(model)
    users: dict[int, int] = {}
    for part in model.modules():
        for p in part._parameters.values():
            users[id(p)] = users.get(id(p), 0) + 1
    for part in model.modules():
        base: Any = part.base_layer if isinstance(part, BaseTunerLayer) else None
        weight = None if base is None else base._parameters.get("weight")
        if base is not None and weight is not None and users[id(weight)] > 1:
            base.weight = torch.nn.Parameter(weight.detach().clone(), weight.requires_grad)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*no longer tied after merging.*")
        return model.merge_and_unload()  # type: ignore[no-any-return, operator]


def _check_targets(model: torch.nn.Module, targets: str | Sequence[str]) -> None:
    """Every named target must match a module: PEFT only complains when none does."""
    if isinstance(targets, str):  # all-linear
        return
    present = {name.split(".")[-1] for name, module in model.named_modules() if not list(module.children())}
    full = {name for name, _ in model.named_modules()}
    for target in targets:
        if target not in present and not any(name.endswith(f".{target}") for name in full):
            raise unknown("model.adapter.targets", target, present)
