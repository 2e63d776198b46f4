"""A tokenizer as llama.cpp keeps it: tokens in their order with what each is, merges, and how text is split first.

Byte-level BPE, as GPT-2 began it, is what most models since have; llama.cpp knows each way of splitting by a name.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from .runtimes import needed
from .trained import CannotExport

_LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# the regular expression that splits a text -> llama.cpp's name of it
SPLITS = {_LLAMA % "{1,3}": "llama-bpe", _LLAMA % "": "qwen2"}
GENERATION = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


def add_vocabulary(writer: Any, tokenizer: Any, size: int) -> None:
    """Add it to a `GGUFWriter`. size: of the model's embeddings, which may have rows to spare.

    `CannotExport` where llama.cpp would read texts as other tokens.
    """
    gguf: Any = needed("gguf")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
    split = _split(rules)
    added = tokenizer.added_tokens_decoder
    spelled = {number: token for token, number in tokenizer.get_vocab().items()}
    kinds = gguf.TokenType
    tokens, types = [], []
    for number in range(size):
        tokens.append(spelled.get(number, f"[PAD{number}]"))
        if number not in spelled:
            types.append(kinds.UNUSED)
        elif number in added:
            types.append(kinds.CONTROL if added[number].special else kinds.USER_DEFINED)
        else:
            types.append(kinds.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        special = gguf.SpecialVocab(Path(folder), load_merges=True, n_vocab=size)
    if isinstance(special.chat_template, str):
        special.chat_template = without_marks(special.chat_template)
    special.add_to_gguf(writer, quiet=True)


def without_marks(template: str) -> str:
    """A chat template without marks for training, which other engines than transformers do not know.

    Example:
        >>> without_marks("{%- generation %}{{ m }}{% endgeneration -%}")
        '{#- #}{{ m }}{# -#}'
    """
    return GENERATION.sub(r"{#\1 \2#}", template)


def _split(rules: dict[str, Any]) -> str:
    """What llama.cpp calls the way in which these rules split a text."""
    kind, settings = rules["model"].get("type"), rules["model"]
    steps = rules.get("pre_tokenizer") or {}
    parts = steps.get("pretokenizers", [steps])
    bytewise = bool(parts and parts[-1].get("type") == "ByteLevel" and not parts[-1].get("add_prefix_space"))
    if kind != "BPE" or settings.get("byte_fallback") or not bytewise:
        raise CannotExport(
            f"gguf: a tokenizer of the kind {kind} is not written; byte-level BPE is (as GPT-2, Llama 3)."
        )
    first, regex = parts[:-1], parts[-1].get("use_regex", True)
    if not first and regex:
        return "gpt-2"
    if len(first) == 1 and first[0].get("type") == "Digits" and first[0].get("individual_digits") and regex:
        return "smollm"
    pattern = first[0].get("pattern", {}).get("Regex") if len(first) == 1 else None
    if not regex and pattern in SPLITS:
        return SPLITS[pattern]
    raise CannotExport(
        "gguf: the tokenizer splits texts in a way that has no name there; GPT-2, Llama 3, Qwen 2 and SmolLM have."
    )
