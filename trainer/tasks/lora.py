"""Low-rank adapters by PEFT: the base is frozen, two small matrices per linear layer are trained.

Source: Hu et al., LoRA, arXiv 2106.09685. PEFT keeps adapters in float32 by default, which stores a float32 copy of
every adapted layer's input: 65.5 bytes per hidden value and layer of a bf16 Llama against 43.2 for full fine-tuning
and 39.6 with bf16 adapters. Here they take the base's dtype unless the recipe says `dtype: float32`.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from .errors import TaskError, unknown

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

DEFAULTS = {"kind": "lora", "rank": 8, "alpha": 16, "dropout": 0.0, "targets": "all-linear", "dtype": "compute"}


def add_adapter(model: PreTrainedModel, adapter: Any, task: str) -> PeftModel:
    """Wrap a model so that only adapters (and a new classification head) are trained.

    adapter: the recipe's `model.adapter`; keys and defaults as in `DEFAULTS`. targets: "all-linear", or names of the
    modules to adapt.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    chosen = {name: _setting(adapter, name) for name in DEFAULTS}
    if chosen["kind"] != "lora":
        raise unknown("model.adapter.kind", chosen["kind"], ["lora"])
    if chosen["dtype"] not in ("compute", "float32"):
        raise unknown("model.adapter.dtype", chosen["dtype"], ["compute", "float32"])
    targets = _check_targets(model, chosen["targets"])
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM if task == "causal-lm" else TaskType.SEQ_CLS,
        r=chosen["rank"],
        lora_alpha=chosen["alpha"],
        lora_dropout=chosen["dropout"],
        target_modules=targets,
    )
    with warnings.catch_warnings():
        # PEFT 0.21 reads a name that transformers 5 has renamed
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        return get_peft_model(model, config, autocast_adapter_dtype=chosen["dtype"] == "float32")


def _setting(adapter: Any, name: str) -> Any:
    if isinstance(adapter, dict):
        return adapter.get(name, DEFAULTS[name])
    return getattr(adapter, name, DEFAULTS[name])


def _check_targets(model: torch.nn.Module, targets: Any) -> Any:
    """Every named target must match a module: PEFT only complains when none does."""
    if isinstance(targets, str):
        if targets != "all-linear":
            raise TaskError(f"model.adapter.targets: {targets!r} is neither all-linear nor a list of module names.")
        return targets
    present = {name.split(".")[-1] for name, module in model.named_modules() if not list(module.children())}
    full = {name for name, _ in model.named_modules()}
    for target in targets:
        if target not in present and not any(name.endswith(f".{target}") for name in full):
            raise unknown("model.adapter.targets", target, present)
    return list(targets)
