"""Prompts that are completed while a model trains, to see what it learns to write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .generate import complete


@dataclass(frozen=True)
class Prompts:
    """Completes prompts by the likeliest tokens.

    module: a `CausalLM` or a `Preference`. chat: they are asked, by the tokenizer's chat template. max_new_tokens: of a
    completion.
    """

    module: Any
    tokenizer: Any
    prompts: Sequence[str]
    chat: bool
    max_new_tokens: int

    def texts(self, go_on: Callable[[], None]) -> list[dict[str, str]]:
        """Each `prompt` with its `text`; go_on: called between them. Under ZeRO-3 all ranks must call it alike."""
        written = []
        for number, prompt in enumerate(self.prompts):
            if number:
                go_on()
            text = complete(self.module, self.tokenizer, prompt, max_new_tokens=self.max_new_tokens, chat=self.chat)
            written.append({"prompt": prompt, "text": text})
        return written
