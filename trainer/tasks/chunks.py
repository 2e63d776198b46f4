"""When logits are computed some rows at a time, and how many: what a plan and a run agree on. No torch."""

from __future__ import annotations

from typing import Literal

CHUNK = 1 << 25  # logits that exist at a time: 128 MiB in float32
LARGE = 2 * CHUNK  # more than so many are cut into chunks

Chunked = bool | Literal["auto"]


def chunks_of(logits: float, chunked: Chunked) -> float:
    """Into how many chunks so many logits of a micro-batch are cut."""
    return max(1.0, logits / CHUNK) if chunked is True or (chunked == "auto" and logits > LARGE) else 1.0
