"""Where a model's position numbers begin."""

from __future__ import annotations

import torch


def first_position(model: torch.nn.Module) -> int:
    """The position number of a text's first token: 0, or in RoBERTa's family the one after the padding's own.

    There, `max_position_embeddings` counts the unused numbers, too: 514 are 512 tokens.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0
