"""A recipe that trains adapters beside a small pretrained model, from a text of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import transformers
from toy import Exploded

from shoestring.files import replace_file
from shoestring.recipes import Recipe, recipe_from
from shoestring.trainer import fit, plan

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip


def pretrained(folder: Path, seed: int = 0, **shape: Any) -> Path:
    """A folder with a Llama of 320 tokens."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(vocab_size=320, **{**SHAPE, **shape})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Crash(pl.Callback):
    """Ends a run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise Exploded(f"after step {self.step}")


def recipe(home: Path, model: dict[str, Any], strategy: str = "single", **sections: Any) -> Any:
    texts = home / "texts"
    texts.mkdir(exist_ok=True)
    for i in range(20):
        replace_file(texts / f"{i}.txt", "\n".join(f"def f{j}(): return {i * j}" for j in range(20)))
    adapter = {"kind": "lora", "rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"], "dropout": 0.1}
    tokenizer = {"train": "bpe", "vocab_size": 320}
    return recipe_from(
        {
            "model": {"task": "causal-lm", "tokenizer": tokenizer, "adapter": adapter, **model},
            "data": {"source": str(texts), "validation": 0.1, "sequence_length": 32, "batch_size": 4},
            "budget": {"steps": 6}, "checkpoint": {"every": "2 steps"}, "tracking": {"ledger": False},
            "strategy": {"name": strategy, "devices": 1 if strategy == "single" else 2}, **sections,
        },
        "adapted",
    )  # fmt: skip


def whole_and_resumed(home: Path, model: dict[str, Any], strategy: str) -> None:
    """One training undisturbed in home/whole, and one that crashes after step 5 and is given again in home/broken."""
    given = recipe(home, model, strategy)
    fit(plan(given), run_dir=home / "whole")
    try:
        fit(plan(given), run_dir=home / "broken", callbacks=[Crash(5)])
    except Exploded:
        fit(plan(given), run_dir=home / "broken")


def classes_beside(folder: Path, **model: Any) -> Recipe:
    """A recipe of two classes beside a BERT whose files are those of a masked language model: no pooler is in them."""
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=320, intermediate_size=64, max_position_embeddings=64, **shape)
    transformers.BertForMaskedLM(config).save_pretrained(folder / "bert")
    (folder / "rows.csv").write_text("text,label\n" + "\n".join(f"row {i},{'ab'[i % 2]}" for i in range(80)))
    tokenizer = {"train": "bpe", "vocab_size": 320}
    model = {"task": "sequence-classification", "name": str(folder / "bert"), "tokenizer": tokenizer, **model}
    return recipe_from(
        {
            "model": {**model, "adapter": {"rank": 2}}, "budget": {"steps": 2}, "strategy": {"name": "single"},
            "data": {"source": str(folder / "rows.csv"), "sequence_length": 16, "batch_size": 8, "validation": 0.2},
            "tracking": {"ledger": False},
        },
        "classes",
    )  # fmt: skip
