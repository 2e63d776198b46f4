"""A finished run that has learnt chats by LoRA, beside a small Llama that any of its users can load."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
import transformers
from tokenizers_built import built

from shoestring.recipes import recipe_from
from shoestring.trainer import fit, plan

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def base(folder: Path, **shape: object) -> Path:
    """A folder with a Llama and a tokenizer that has a chat template."""
    tokenizer = built("byte_level")
    torch.manual_seed(0)
    settings = {**SHAPE, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True, **shape}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **ends, **settings)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def chatting(home: Path) -> Path:
    """The directory of the run, under `home`."""
    home.mkdir(parents=True, exist_ok=True)
    words = ("one", "two", "three", "four", "five", "six")
    chats = [
        {"messages": [{"role": "user", "content": f"Say {a} {b}."}, {"role": "assistant", "content": f"{a} {b}!"}]}
        for a in words
        for b in words
    ]
    (home / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    values = {
        "model": {"task": "causal-lm", "name": str(base(home / "base")), "adapter": {"rank": 8, "alpha": 32.0}},
        "data": {"source": str(home / "chats.jsonl"), "validation": 0.1, "sequence_length": 64, "batch_size": 8},
        "budget": {"steps": 12}, "optimizer": {"lr": 1e-2}, "strategy": {"name": "single"},
        "evaluation": {"generate": ["Say one two.", "Say six six."]},
    }  # fmt: skip
    report = fit(plan(recipe_from(values, "chatting")), run_dir=home / "run")
    assert report is not None
    return report.run_dir
