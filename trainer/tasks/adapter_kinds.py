"""Adapters of every kind in PEFT's terms, beside quantized layers too, and starts that are taken out of the base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...recipes.schema import AdapterSpec
from ..data.errors import TaskError
from .quantized import QuantizedLinear

if TYPE_CHECKING:
    from peft import PeftConfig

_SETTINGS = {  # kind -> PEFT's class, and its names for `rank`, `alpha` and `dropout`
    "lora": ("LoraConfig", {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}),
    "dora": ("LoraConfig", {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}),
    "loha": ("LoHaConfig", {"rank": "r", "alpha": "alpha"}),
    "lokr": ("LoKrConfig", {"rank": "r", "alpha": "alpha"}),
    "gralora": ("GraloraConfig", {"rank": "r", "alpha": "alpha", "dropout": "gralora_dropout"}),
    "miss": ("MissConfig", {"rank": "r", "dropout": "miss_dropout"}),
    "hra": ("HRAConfig", {"rank": "r"}),
    "ia3": ("IA3Config", {}),
    "hira": ("HiraConfig", {"rank": "r", "dropout": "hira_dropout"}),
    "vera": ("VeraConfig", {"rank": "r", "dropout": "vera_dropout"}),
    "randlora": ("RandLoraConfig", {"rank": "r", "alpha": "randlora_alpha", "dropout": "randlora_dropout"}),
    "oft": ("OFTConfig", {"rank": "r"}),
    "shira": ("ShiraConfig", {"rank": "r"}),
}
_FIXED: dict[str, dict[str, Any]] = {  # what else PEFT is told
    "ia3": {"feedforward_modules": []},  # scales of outputs alone
    "vera": {"save_projection": False},  # random matrices that a fixed seed makes again
    "randlora": {"save_projection": False},
    "oft": {"oft_block_size": 0},  # by their number
    "shira": {"random_seed": 0},  # which weights are trained
}
_TASKS = {
    "causal-lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS", "token-classification": "TOKEN_CLS",
}  # fmt: skip
FROM_BASE = {"olora": "olora", "pissa": "pissa_niter_16"}  # start -> PEFT's name


def config_of(adapter: AdapterSpec, task: str) -> PeftConfig:
    """What PEFT is told; a start that is taken out of the base comes later."""
    import peft

    name, keys = _SETTINGS[adapter.kind]
    settings: dict[str, Any] = {theirs: getattr(adapter, ours) for ours, theirs in keys.items()}
    if name == "LoraConfig":
        start: Any = adapter.start if adapter.start in ("gaussian", "orthogonal") else True
        settings |= {"use_dora": adapter.kind == "dora", "use_rslora": adapter.rslora, "init_lora_weights": start}
    return getattr(peft, name)(  # type: ignore[no-any-return]
        task_type=_TASKS.get(task),  # others have no form of their own
        target_modules=adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets),
        **settings,
        **_FIXED.get(adapter.kind, {}),
    )


@contextmanager
def shapes_shown(model: nn.Module, adapter: AdapterSpec) -> Iterator[None]:
    """Meanwhile, quantized layers show a weight of the shape and a type that adapters are made for, without bytes."""
    shown = adapter.start == "orthogonal"  # it makes matrices of that type
    layers = [part for part in model.modules() if isinstance(part, QuantizedLinear)] if shown else []
    codes = [layer._parameters["weight"] for layer in layers]
    for layer in layers:
        weight = torch.zeros(1).expand(layer.out_features, layer.in_features)
        layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        for layer, code in zip(layers, codes, strict=True):
            layer._parameters["weight"] = code


def take_from_base(adapted: nn.Module, start: str) -> None:
    """Begin LoRA with what PEFT's `start` takes out of each weight, which keeps the rest.

    The rest of a quantized weight is quantized again, one layer after another.

    Raises:
        TaskError: A layer is no linear one, or has the weight of another.
    """
    from peft.tuners.lora import LoraLayer

    users: dict[int, int] = {}
    for module in adapted.modules():
        for p in module._parameters.values():
            users[id(p)] = users.get(id(p), 0) + 1
    layers: Any = [(name, part) for name, part in adapted.named_modules() if isinstance(part, LoraLayer)]
    part: Any
    places: list[torch.Tensor] = []
    for name, part in layers:
        base: Any = part.base_layer
        if not isinstance(base, nn.Linear) or users[id(base.weight)] > 1:
            what = "has the weight of another layer" if isinstance(base, nn.Linear) else f"is a {type(base).__name__}"
            raise TaskError(
                f"model.adapter.start: {start.split('_')[0]} takes a linear layer's own weight apart, and "
                f"{name.removeprefix('base_model.model.')} {what}. Leave it out of model.adapter.targets."
            )
        codes = base if isinstance(base, QuantizedLinear) else None
        if codes is not None:
            part.base_layer = codes.plain()
        else:  # olora changes it where it is, and a base that was changed is told by its place: nobody may take that
            places.append(base.weight.data)
            base.weight.data = base.weight.data.clone()
        begin: Any = getattr(part, f"{start.split('_')[0]}_init")
        with torch.no_grad():
            begin("default", *([start] if start != "olora" else []))
        if codes is not None:
            part.base_layer = QuantizedLinear(part.base_layer, codes.kind)
            part.base_layer.bias = codes.bias
