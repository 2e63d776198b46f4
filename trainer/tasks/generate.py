"""Complete a prompt: the sample that a run ends with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...callbacks.forward.isolated_step import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .language import CausalLM


@torch.no_grad()
def complete(
    module: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> str:
    """The text that follows `prompt`, up to the end of the document or `max_new_tokens`.

    chat: what the assistant answers to it, by the tokenizer's chat template.

    temperature 0 takes the likeliest token; above, tokens are drawn by a generator of their own from `seed`, so the
    same arguments give the same text and the run's random numbers are untouched. Each token is one forward over the
    whole text, without a cache: right for a sample, slow for serving. Under ZeRO-3 all ranks must call it alike.
    """
    model: Any = module.model
    device = model.get_input_embeddings().weight.device
    if chat:
        prompt = str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        )
    opening = () if chat else module.opening
    ids = [*opening, *tokenizer(prompt, add_special_tokens=False)["input_ids"]] or [tokenizer.eos_token_id]
    window = getattr(model.config, "max_position_embeddings", None) or len(ids) + max_new_tokens
    generator = torch.Generator().manual_seed(seed)
    start = len(ids)
    with evaluating(model):
        for _ in range(max_new_tokens):
            rows = torch.tensor([ids[-window:]], device=device)
            logits = model(input_ids=rows, use_cache=False).logits[0, -1].float().cpu()
            ids.append(_choose(logits[: len(tokenizer)], temperature, generator))
            if ids[-1] == tokenizer.eos_token_id:
                break
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


def _choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
