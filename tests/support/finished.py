"""Small finished runs of real recipes: a Llama, a GPT-2, a BERT classifier and a pruned perceptron, trained for a few
steps. One process trains each of them once and whoever asks later gets the same directory."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from shoestring.recipes import recipe_from
from shoestring.trainer import fit, plan

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
LANGUAGE = {"source": "python-stdlib", "limit": 12, "sequence_length": 32, "batch_size": 8, "validation": 0.2}
BPE = {"train": "bpe", "vocab_size": 384}
RECIPES: dict[str, dict[str, Any]] = {
    "llama": {
        "model": {
            "task": "causal-lm",
            "tokenizer": BPE,
            "config": {"model_type": "llama", "max_position_embeddings": 64, "tie_word_embeddings": True, **SHAPE},
        },
        "data": LANGUAGE,
        "techniques": [{"gradual_pruning": {"sparsity": 0.6, "start": "0%", "every": 1}}],
    },
    "gpt2": {
        "model": {
            "task": "causal-lm",
            "tokenizer": BPE,
            "config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
        },
        "data": {**LANGUAGE, "pack": False},
    },
    "bert": {
        "model": {
            "task": "sequence-classification",
            "tokenizer": BPE,
            "config": {"model_type": "bert", "max_position_embeddings": 64, **SHAPE},
        },
        "data": {
            "source": "python-packages", "args": {"packages": 3}, "limit": 240, "sequence_length": 24, "batch_size": 16,
            "validation": 0.2,
        },
    },
    "digits": {
        "model": {"task": "image-classification", "config": {"kind": "mlp", "hidden": [64]}},
        "data": {"source": "digits", "validation": 0.3, "batch_size": 64},
        "budget": {"steps": 120},
        "techniques": [{"gradual_pruning": {"sparsity": 0.9}}],
    },
    "cnn": {
        "model": {"task": "image-classification", "config": {"kind": "cnn", "channels": [8]}},
        "data": {"source": "digits", "validation": 0.3, "batch_size": 64},
        "budget": {"steps": 30},
    },
}  # fmt: skip


@cache
def finished(name: str, home: Path) -> Path:
    """The directory of the finished run `name` under `home`; it is in the ledger, too."""
    values = {"budget": {"steps": 12}, "optimizer": {"lr": 5e-3}, "strategy": {"name": "single"}, **RECIPES[name]}
    report = fit(plan(recipe_from(values, name)), run_dir=home / name)
    assert report is not None
    return report.run_dir
