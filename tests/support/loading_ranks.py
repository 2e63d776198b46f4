"""What a rank does in the tests of loading: load a model of tens of megabytes, say what that took and what it is."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
from allocations import allocations
from tiny_tasks import Tiny

from shoestring.recipes.schema import AdapterSpec, ModelSpec
from shoestring.trainer import fit, plan
from shoestring.trainer.machine.extensions import prepare_environment
from shoestring.trainer.run.partitioning import partition
from shoestring.trainer.tasks.models import build_model
from shoestring.trainer.tasks.shared_weights import keep_from_sending
from shoestring.trainer.tasks.weight_dtypes import Kept

SHAPE: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3,
    "num_attention_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip
KEPT = {"fp32": Kept(), "bf16": Kept("bf16"), "nf4": Kept("bf16", "nf4")}


def built(spec: ModelSpec, kind: str, **where: Path) -> Any:
    torch.manual_seed(1)
    return build_model(spec, "causal-lm", tokenizer=None, sequence_length=8, kept=KEPT[kind], **where)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:12]


def loaded(spec: ModelSpec, kind: str, cuts: bool, folder: Path) -> dict[str, Any]:
    """Bytes at the peak, of the share that is kept, of the whole and of its largest weight; sums of the weights."""
    files = Path(str(spec.name)).glob("*.safetensors") if spec.name else ()
    with allocations({file.stat().st_size for file in files}) as seen:
        if not cuts:
            model = built(spec, kind, **({} if spec.adapter is None else {"cache": folder / "cache"}))
            if spec.adapter is not None:
                keep_from_sending(model.requires_grad_(False))
        else:
            model = built(spec, kind, cache=folder / "cache", passing=folder / "passing")
            zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
            config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
            partition(model, {**config, "bf16": {"enabled": kind != "fp32"}}, torch.device("cpu"))
    sums: dict[str, str] = {}
    sizes: list[int] = []
    share = 0
    for name, p in model.named_parameters():
        if cuts:
            share += p.ds_tensor.nbytes
            with deepspeed.zero.GatheredParameters([p]):
                sums[name] = digest(p.data)
                sizes.append(p.nbytes)
        else:
            sums[name] = digest(p.data)
            sizes.append(p.nbytes)
            share += p.nbytes
    return {
        "peak": seen.peak, "alive": seen.kept, "share": share, "whole": sum(sizes), "largest": max(sizes), "sums": sums,
        "sent": sorted(name for name, p in model.named_parameters() if not hasattr(p, "ds_optim_param")),
    }  # fmt: skip


def main(strategy: str, name: str, folder: Path) -> None:
    """Of each kind from files, and of new weights."""
    warnings.simplefilter("ignore")
    cuts = strategy == "zero3"
    if cuts:
        prepare_environment("zero3", "none", "cpu")
        deepspeed.init_distributed("gloo")
    adapter = AdapterSpec(rank=2) if strategy == "ddp" else None
    specs = {"files": ModelSpec(task="causal-lm", name=name, adapter=adapter)}
    specs["new"] = ModelSpec(task="causal-lm", config=SHAPE, adapter=adapter)
    results = {
        f"{source} {kind}": loaded(spec, kind, cuts, folder)
        for source, spec in specs.items()
        for kind in (("fp32", "bf16", "nf4") if source == "files" else ("fp32", "bf16"))
    }
    (folder / f"seen-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(results))


def train(strategy: str, world: int, folder: Path) -> None:
    """A few steps of a small recipe, from new weights."""
    warnings.simplefilter("ignore")
    recipe = Tiny(folder).recipe(
        budget={"steps": 3}, data={"micro_batch_size": 4}, strategy={"name": strategy, "devices": world},
        evaluation={"at_end": False}, tracking={"ledger": False},
    )  # fmt: skip
    fit(plan(recipe), run_dir=folder / strategy)
