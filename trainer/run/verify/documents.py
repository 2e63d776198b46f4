"""Packed rows taken apart: every document in a row of its own, with the same targets."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ....callbacks.forward.training_step import SAMPLE_WEIGHTS

IGNORED = -100


def is_packed(batch: Any) -> bool:
    """Whether rows of a batch hold several documents: positions that start again."""
    positions = batch.get("position_ids") if isinstance(batch, Mapping) else None
    return isinstance(positions, Tensor) and positions.ndim == 2 and bool((positions[:, 1:] == 0).any())


def apart(batch: Mapping[str, Any], positions: Tensor) -> dict[str, Any]:
    """The same targets as of a packed batch, from documents that cannot see each other: they share no row.

    The token after a document's last one is predicted from it, so each row ends with the token that begins the next
    document; nothing is predicted from there.

    Args:
        batch: With `input_ids` and `labels` [B, T].
        positions: [B, >= T], 0 where a document begins.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    length = ids.shape[1]
    pieces = [
        (row, start, min(end + 1, length))
        for row in range(len(ids))
        for start, end in _documents(positions[row, :length])
        if min(end + 1, length) - start > 1  # a token alone predicts nothing
    ]
    others = {key: value for key, value in batch.items() if key not in ("input_ids", "labels", "position_ids")}
    if SAMPLE_WEIGHTS in others:
        others[SAMPLE_WEIGHTS] = others[SAMPLE_WEIGHTS][[row for row, _, _ in pieces]]
    return {
        **others,
        "input_ids": pad_sequence([ids[row, start:end] for row, start, end in pieces], batch_first=True),
        "labels": pad_sequence([labels[row, a:b] for row, a, b in pieces], batch_first=True, padding_value=IGNORED),
    }


def _documents(positions: Tensor) -> list[tuple[int, int]]:
    """Begin and end of each document in a row's positions [T]."""
    begins = [0, *(torch.nonzero(positions[1:] == 0).flatten() + 1).tolist(), len(positions)]
    return list(pairwise(begins))
