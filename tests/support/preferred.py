"""Preferences that can be learnt in a moment, and recipes that learn them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers

from shoestring.recipes import Recipe, recipe_from

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
GOOD, BAD = ("yes", "fine", "sure", "gladly"), ("no", "never", "hardly", "rarely")


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts of random numbers; an answer is preferred for its last word."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        numbers = [str(draw.randrange(1000)) for _ in range(draw.randint(1, 6))]
        prompt = f"Is {' and '.join(numbers)} good? "
        filler = " ".join(str(draw.randrange(10)) for _ in range(draw.randint(0, 4)))
        chosen, rejected = (f"{filler} {draw.choice(words)}" for words in (GOOD, BAD))
        made.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return made


def write(folder: Path, count: int = 160) -> Path:
    """The rows as a file; where one is there already, it."""
    path = folder / "pairs.jsonl"
    if not path.exists():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return path


def pretrained(folder: Path, **shape: Any) -> Path:
    """A folder with an untrained Llama of 320 tokens."""
    if not folder.exists():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(vocab_size=320, max_position_embeddings=128, **{**SHAPE, **shape})
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def recipe(folder: Path, loss: str = "dpo", *, adapter: bool = False, **sections: Any) -> Recipe:
    """A recipe that learns the rows; its sections are changed key by key."""
    values: dict[str, Any] = {
        "model": {
            "task": "preference", "name": str(pretrained(folder / "model")), "preference": {"loss": loss},
            "tokenizer": {"train": "bpe", "vocab_size": 320},
            "adapter": {"kind": "lora", "rank": 4, "alpha": 16} if adapter else None,
        },
        "data": {"source": str(write(folder)), "validation": 0.2, "sequence_length": 64, "batch_size": 16},
        "budget": {"steps": 40}, "optimizer": {"lr": 3e-3}, "strategy": {"name": "single", "devices": 1},
        "tracking": {"ledger": False}, "checkpoint": {"every": None},
    }  # fmt: skip
    for name, changes in sections.items():
        values[name] = {**values.get(name, {}), **changes} if isinstance(changes, dict) else changes
    return recipe_from(values, "preferred")
