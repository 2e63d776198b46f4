"""ZeRO-3 takes a model apart weight by weight, so that no rank ever holds more than its share and one of them.

DeepSpeed by itself moves the whole model to the device, in what it computes in, sends it to all ranks, and only then
takes it apart. Its `zero.Init` around a model's code would see to that earlier, but techniques and adapters are given
whole models to edit; here the weights are in the host's memory until they are cut, or in files (`shared_weights`).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.nn import Module


def partition(model: Module, config: Mapping[str, Any], device: torch.device) -> None:
    """Leave of every weight of `model` this rank's part, on `device` or where `config` offloads it to. Collective.

    Args:
        model: Its weights may be on the host; rank 0's count.
        config: DeepSpeed's.
        device: Where it is computed; buffers go there whole.
    """
    import torch
    from deepspeed.runtime.zero import Init
    from deepspeed.runtime.zero.partition_parameters import is_zero_param

    floats = {name: torch.bfloat16 if name == "bf16" else torch.float16 for name in ("bf16", "fp16")}
    wanted = next((floats[name] for name in floats if config.get(name, {}).get("enabled")), None)
    first: Any = next((p for p in model.parameters() if is_zero_param(p)), None)
    for p in model.parameters():
        if is_zero_param(p):
            continue
        if wanted is not None and p.is_floating_point() and p.element_size() > 1 and p.dtype != torch.float64:
            p.data = p.data.to(wanted)
        if first is None:
            Init(module=torch.nn.ParameterList([p]), config_dict_or_path=dict(config))
            first = p
        else:
            first.convert_to_zero_parameters(param_list=[p])
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def forget_files(model: Module, *, first_of_node: bool) -> None:
    """Remove the files in which weights lay until they were cut. Collective."""
    folder: Path | None = getattr(model, "passing", None)
    if folder is None:
        return
    import torch

    torch.distributed.barrier()
    if first_of_node:
        shutil.rmtree(folder, ignore_errors=True)
