"""Data of any size at once, for steps that are about speed and memory; and a run of a recipe that is given as data."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import Dataset

from shoestring.recipes import load_recipe
from shoestring.trainer import fit, plan

LLAMA_1B = {  # Llama 3.2 1B: 1.24 billion parameters
    "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256, "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_3B = {**LLAMA_1B, "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24}  # Llama 3.2 3B
LLAMA_HALF_B = {**LLAMA_1B, "hidden_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 16,
                "num_key_value_heads": 4, "intermediate_size": 6144, "vocab_size": 32000}  # fmt: skip
TINY = {**LLAMA_1B, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "vocab_size": 512}  # fmt: skip


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """`count` rows of `length` random tokens, packed: nothing is padded."""

    def __init__(self, count: int, length: int, vocabulary: int) -> None:
        self.count, self.length, self.vocabulary = count, length, vocabulary

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= self.count:
            raise IndexError(index)
        draw = torch.Generator().manual_seed(index)
        ids = torch.randint(0, self.vocabulary, (self.length,), generator=draw)
        return {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(self.length)}


def blocks(count: int, length: int, vocabulary: int) -> tuple[Blocks, None]:
    """For `data.source`."""
    return Blocks(count, length, vocabulary), None


def recipe_of(name: str, config: Mapping[str, Any], *, length: int, batch: int, steps: int, **sections: Any) -> Any:
    """A recipe for a new model of `config` on random tokens; `sections` are laid upon it."""
    whole: dict[str, Any] = {
        "name": name,
        "model": {"task": "causal-lm", "config": dict(config)},
        "data": {
            "source": "random_tokens:blocks", "sequence_length": length, "batch_size": batch,
            "args": {"count": batch * (steps + 2), "length": length, "vocabulary": config["vocab_size"]},
        },
        "budget": {"steps": steps},
        "tracking": {"ledger": False, "log_every": 1},
        "checkpoint": {"every": None},
        "evaluation": {"at_end": False},
    }  # fmt: skip
    for section, values in sections.items():
        mapping = isinstance(values, Mapping) and isinstance(whole.get(section), Mapping)
        whole[section] = {**whole[section], **values} if mapping else values
    path = Path(f"{name}.json")
    path.write_text(json.dumps(whole))
    return load_recipe(path, allow_code=True)


class StepTimes(pl.Callback):
    """Seconds of each optimizer step, the device waited for."""

    def __init__(self) -> None:
        self.first: float | None = None  # on the clock
        self.seconds: list[float] = []
        self.loss = float("nan")  # of the last micro-batch
        self.allocated = 0  # bytes before the first step
        self.bytes_kept = 0  # of all parameters of the module

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.bytes_kept = sum(p.untyped_storage().nbytes() for p in module.parameters())
        if torch.cuda.is_available():
            self.allocated = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now, self.loss = time.perf_counter(), float(outputs["loss"])
        self.first = now if self.first is None else self.first
        self.seconds.append(now - self._began)
        self._began = now


def run(recipe: Any, run_dir: str, *callbacks: pl.Callback, saves: bool = False) -> tuple[Any, Any]:
    """(the plan, the summary) of a recipe that was run here."""
    made = plan(recipe)
    given = [*callbacks] if saves else [*callbacks, Unsaved()]
    report = fit(made, run_dir=run_dir, callbacks=given, enable_progress_bar=False)
    return made, report.summary if report is not None else {}


class Unsaved(pl.Callback):
    """No checkpoints and no final weights: they have a step of their own."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        trainer.monitor.checkpoints.due = lambda trainer: False
        trainer.monitor.checkpoints.keep_weights = lambda *arguments: None
