"""Folders that transformers loads, and those that llama.cpp's converter starts from.

**What "gguf-ready" means.** `convert_hf_to_gguf.py` reads a Hugging Face folder: it finds its conversion by
`architectures` in config.json, maps the tensors of *.safetensors by their Hugging Face names, and takes the
vocabulary from the tokenizer's files. So the folder has all weights in ONE half-precision dtype (float16 where every
magnitude fits, else bfloat16), under those names, adapters merged. One thing is the converter's to decide and is noted
where it applies: it knows byte-level BPE tokenizers by a hash, so a vocabulary of your own stops it with "BPE
pre-tokenizer was not recognized" until its hash is added to `get_vocab_base_pre` with the value "gpt-2" (ours split
text as GPT-2 does). The converter itself is not run here.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from .runtimes import LogitsFunction, eager
from .trained import CannotExport, Trained

# conversions that llama.cpp registers under these names and that our tasks can train
ARCHITECTURES = frozenset({
    "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "GPT2LMHeadModel", "GPTNeoXForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
    "PhiForCausalLM", "Phi3ForCausalLM", "StableLmForCausalLM", "Starcoder2ForCausalLM", "OlmoForCausalLM",
    "Olmo2ForCausalLM", "BloomForCausalLM", "FalconForCausalLM", "BertForSequenceClassification",
})  # fmt: skip


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Model and tokenizer as transformers keeps them. An adapter is saved as an adapter."""
    if not hasattr(model, "save_pretrained"):
        raise CannotExport(f"export to hf takes a Hugging Face model, and this is a {type(model).__name__}")
    from transformers.utils import logging as remarks

    remarks.disable_progress_bar()
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def write(trained: Trained, folder: Path) -> list[str]:
    """The trained model in its own dtype, adapters merged."""
    save(trained.model, trained.task.tokenizer, folder)
    return []


def reload(trained: Trained, folder: Path) -> LogitsFunction:
    """The folder's model through transformers, from the disk alone."""
    return eager(load(folder, trained.recipe.model.form))


def expected(trained: Trained) -> LogitsFunction:
    return eager(trained.model)


def load(folder: Path, kind: str, dtype: Any = "auto") -> Any:
    """The model in a folder, for the task `kind`, in evaluation mode."""
    from ..tasks.models import _quietly, _with_attention, auto_class

    with _quietly():
        model = _with_attention("auto", auto_class(kind).from_pretrained, str(folder), dtype=dtype)
    model.config.use_cache = False
    return model.eval()


# -- half precision, for llama.cpp -----------------------------------------------------------------------------------
def half(trained: Trained) -> Any:
    """A copy of the model in the one dtype that is written."""
    model: Any = trained.model
    largest = max(float(p.detach().abs().max()) for p in model.parameters())
    dtype = torch.float16 if largest <= torch.finfo(torch.float16).max else torch.bfloat16
    cast = copy.deepcopy(model)
    kept = cast.state_dict().keys()
    for name, tensor in [*cast.named_parameters(), *cast.named_buffers()]:
        if name in kept and tensor.is_floating_point():  # rotary frequencies are made anew, in float32, by each load
            tensor.data = tensor.data.to(dtype)
    return cast


def write_half(trained: Trained, folder: Path) -> list[str]:
    """The folder that llama.cpp's converter reads, with what is still to be known about it."""
    model: Any = trained.model
    architecture = type(model).__name__
    if architecture not in ARCHITECTURES:
        raise CannotExport(
            f"llama.cpp's converter is not known to support {architecture}; "
            f"it supports {', '.join(sorted(ARCHITECTURES))}."
        )
    cast = half(trained)
    save(cast, trained.task.tokenizer, folder)
    notes = [f"weights in {str(cast.dtype).removeprefix('torch.')}"]
    if not isinstance(trained.recipe.model.tokenizer or trained.recipe.model.name, str):
        notes.append(
            "llama.cpp knows BPE tokenizers by a hash: add this one's to get_vocab_base_pre, as 'gpt-2', to convert"
        )
    return notes


def expected_half(trained: Trained) -> LogitsFunction:
    return eager(half(trained))
