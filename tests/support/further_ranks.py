"""Runs that are asked things after each validation: one process, and what each of two ranks does."""

from __future__ import annotations

import json
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import adapted
from toy import Exploded

from shoestring.recipes import Recipe, recipe_from
from shoestring.trainer import Report, fit, plan

TOGETHER = ("zero3", "fsdp2")  # no rank alone has the model
STRATEGIES = ("ddp", *TOGETHER)
PROMPTS = ("Say one two.", "Say six six.")
SHAPE = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
         "num_attention_heads": 2, "max_position_embeddings": 128, "attention_dropout": 0.1}  # fmt: skip
WORDS = ("one", "two", "three", "four", "five", "six")


def recipe(home: Path, strategy: str = "single", **evaluation: Any) -> Recipe:
    """Six steps on chats, evaluated after every other one; dropout draws random numbers in each."""
    path = home / "chats.jsonl"
    pairs = [(f"Say {a} {b}.", f"{a} {b}!") for a in WORDS for b in WORDS]
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": said}] for question, said in pairs
    ]
    if not path.exists():
        path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    return recipe_from(
        {
            "model": {"task": "causal-lm", "config": SHAPE, "tokenizer": {"train": "bpe", "vocab_size": 320}},
            "data": {"source": str(path), "validation": 0.2, "sequence_length": 64, "batch_size": 8},
            "budget": {"steps": 6}, "optimizer": {"lr": 1e-2}, "checkpoint": {"every": "2 steps"},
            "strategy": {"name": strategy, "devices": 1 if strategy == "single" else 2},
            "evaluation": {"every": "2 steps", **evaluation},
        },
        "asked", allow_code=True,
    )  # fmt: skip


def trained(
    home: Path, name: str, strategy: str = "single", *, crash: bool = False, **evaluation: Any
) -> Report | None:
    """The run home/name, after a crash if wanted; the report on rank 0."""
    planned = plan(recipe(home, strategy, **evaluation))
    if crash:
        with suppress(Exploded):
            fit(planned, run_dir=home / name, callbacks=[adapted.Crash(5)])
        planned = plan(recipe(home, strategy, **evaluation))
    return fit(planned, run_dir=home / name)


def main(home: Path, evaluation: dict[str, Any]) -> None:
    warnings.simplefilter("ignore")
    for strategy in STRATEGIES:
        if strategy in TOGETHER:
            trained(home, f"{strategy}-plain", strategy)
        trained(home, f"{strategy}-asked", strategy, **evaluation)
