"""The adapters of a run on their own, as PEFT keeps them: `PeftModel.from_pretrained(base, folder)` puts them on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...recipes.adapters import CHANGE_BASE
from .runtimes import LogitsFunction, eager
from .trained import CannotExport, Trained


@dataclass(frozen=True)
class Adapter:
    """What PEFT saves of a model: weights under its names, and how they are put on."""

    weights: dict[str, Tensor]
    config: Any


def adapter_of(trained: Trained) -> Adapter:
    """The adapters of a model that has not merged them yet; `CannotExport` where they go with no base but their own."""
    import peft

    model: Any = trained.as_run
    if not isinstance(model, peft.PeftModel):
        raise CannotExport("--to peft: the run has trained no adapter. hf holds whole models.")
    start = trained.recipe.model.adapter.start if trained.recipe.model.adapter else "zero"
    if start in CHANGE_BASE:
        raise CannotExport(
            f"--to peft: the adapters began with model.adapter.start {start}, which changed the base's weights "
            "with them, and go with no other. hf holds both, merged."
        )
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.base_model_name_or_path = trained.recipe.model.name  # None: made from a config
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return Adapter({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, config)


def write(trained: Trained, adapter: Adapter, folder: Path) -> list[str]:
    """`adapter_model.safetensors` and `adapter_config.json`, and the tokenizer."""
    from safetensors.torch import save_file

    save_file(adapter.weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    adapter.config.save_pretrained(folder)
    if trained.task.tokenizer is not None:
        trained.task.tokenizer.save_pretrained(folder)
    notes = []
    if trained.recipe.model.dtype in ("nf4", "int8"):
        notes.append(
            f"trained beside a base in {trained.recipe.model.dtype}: on another base they compute something else"
        )
    if trained.recipe.model.name is None:
        notes.append("its base was made from model.config and seed and is in no file")
    return notes


def reload(trained: Trained, folder: Path) -> LogitsFunction:
    """The adapters from the disk, on the base that they were trained beside."""
    import peft

    from ..checkpoint.weights import base_of_weights
    from ..tasks import build_task

    outside = base_of_weights(trained.run_dir / trained.weights)
    floats = outside["floats"] if outside is not None else "fp32"
    task = build_task(trained.recipe, workdir=trained.run_dir, precision=floats, prepared=trained.task.prepared)
    adapted: Any = task.module.float().model
    return eager(peft.PeftModel.from_pretrained(adapted.unload(), str(folder), autocast_adapter_dtype=False).eval())
