"""One file for llama.cpp and what is built on it: weights, settings and vocabulary, written by the gguf package.

Weights are named as llama.cpp names them, vectors stay in float32, as its own converter leaves them, and the rows of
queries and keys of a Llama are put in the order that its rotary embedding takes. The file is read back by transformers,
which has a reader of its own, with its weights dequantized. llama.cpp itself is not run here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..machine.quiet import quiet
from .gguf_vocabulary import add_vocabulary
from .runtimes import LogitsFunction, eager, needed
from .trained import CannotExport, Trained

NAME = "model.gguf"
# --quantize -> the type of matrices there, and of the file
TYPES = {None: ("F32", "ALL_F32"), "float16": ("F16", "MOSTLY_F16"), "q8_0": ("Q8_0", "MOSTLY_Q8_0")}
TOLERANCES = {None: 1e-5, "float16": 5e-3, "q8_0": 5e-2}


@dataclass(frozen=True)
class Family:
    """Models that llama.cpp has one graph for. permuted: whether it wants the rows of queries and keys interleaved."""

    name: str
    permuted: bool
    biased: bool = False


FAMILIES = {
    "LlamaForCausalLM": Family("LLAMA", permuted=True),
    "MistralForCausalLM": Family("LLAMA", permuted=True),
    "Qwen2ForCausalLM": Family("QWEN2", permuted=False, biased=True),
    "Qwen3ForCausalLM": Family("QWEN3", permuted=False),
}


def write(trained: Trained, folder: Path, quantize: str | None) -> list[str]:
    """`model.gguf` in this folder, with what is to be known about it. `CannotExport` for a model of another family."""
    gguf: Any = needed("gguf")
    model: Any = trained.model
    family = _family(model)
    logging.getLogger("gguf").setLevel(logging.WARNING)
    arch = getattr(gguf.MODEL_ARCH, family.name)
    writer = gguf.GGUFWriter(folder / NAME, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_name(trained.recipe.name)
    writer.add_file_type(getattr(gguf.LlamaFileType, TYPES[quantize][1]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_settings(writer, model.config)
    add_vocabulary(writer, trained.task.tokenizer, model.config.vocab_size)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    wide: list[str] = []
    for name, weight in _weights(model, family):
        to = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if to is None:
            raise CannotExport(f"gguf: {type(model).__name__} has {name}, which llama.cpp has no place for.")
        kind = getattr(gguf.GGMLQuantizationType, TYPES[quantize][0] if weight.ndim > 1 else "F32")
        if kind == gguf.GGMLQuantizationType.Q8_0 and weight.shape[-1] % 32:
            kind, wide = gguf.GGMLQuantizationType.F16, [*wide, name]
        if kind == gguf.GGMLQuantizationType.F16 and float(weight.abs().max()) > torch.finfo(torch.float16).max:
            raise CannotExport(f"gguf: {name} has values that float16 cannot hold; leave --quantize out.")
        writer.add_tensor(to, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    notes = [f"{len(wide)} matrices in float16, whose rows are no multiple of 32, as {wide[0]}"] if wide else []
    if getattr(model.config, "sliding_window", None):
        notes.append(f"llama.cpp attends to all tokens, the model to the last {model.config.sliding_window:,}")
    return notes


def reload(folder: Path) -> LogitsFunction:
    """The file's model through transformers, dequantized to float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..tasks.models import _quietly

    quiet()
    gguf: Any = needed("gguf")
    reader = gguf.GGUFReader(folder / NAME)
    family = reader.get_field("general.architecture").contents()
    config = AutoConfig.from_pretrained(folder, gguf_file=NAME)
    # which transformers does not read for every family
    config.head_dim = reader.get_field(f"{family}.attention.key_length").contents()
    with _quietly():
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=NAME, config=config, dtype=torch.float32)
    model.config.use_cache = False
    return eager(model.eval())


def _family(model: Any) -> Family:
    name = type(model).__name__
    if name not in FAMILIES:
        raise CannotExport(f"gguf: {name} is not written; {', '.join(FAMILIES)} are.")
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise CannotExport(f"gguf: positions scaled by {kind!r} are not written; only plain rotary embeddings are.")
    family = FAMILIES[name]
    if not family.biased and (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)):
        raise CannotExport(f"gguf: a {name} with biases is not written.")
    if getattr(config, "hidden_act", "silu") != "silu":
        raise CannotExport(f"gguf: a {name} with hidden_act {config.hidden_act!r} is not written; with silu it is.")
    return family


def _add_settings(writer: Any, config: Any) -> None:
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _weights(model: Any, family: Family) -> Iterator[tuple[str, torch.Tensor]]:
    """Names as transformers has them, and weights in float32; one that others share is given once."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads or config.num_attention_heads}
    for name, parameter in model.named_parameters():
        weight = parameter.detach().float().cpu().contiguous()
        part = name.split(".")[-2]
        if family.permuted and part in heads:
            weight = interleaved(weight, heads[part])
        yield name, weight


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows [heads * width, in] of a matrix whose two halves of every head turn together, as pairs side by side."""
    halves = weight.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()
