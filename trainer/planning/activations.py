"""What a transformer's forward pass keeps for backward, in bytes. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from .sizes import Size

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}
# How much more than 16-bit weights and no adapter a block keeps, as measured on a Llama of 2.75 times as many
# intermediate as hidden values, in bytes of a token and hidden value: 43.2 there,
_AUTOCAST = 74.7 / 43.2  # with float32 weights under autocast, which keeps both copies
_FLOAT32 = 78.2 / 43.2
# and with LoRA in all linear layers, by the dtype of its matrices and whether they have dropout
_ADAPTED = {
    ("compute", False): 39.6 / 43.2, ("compute", True): 65.1 / 43.2,
    ("float32", False): 65.5 / 43.2, ("float32", True): 100.5 / 43.2,
}  # fmt: skip
LOGIT_BYTES = 16.0  # logits, their float32 copy, its logarithmic softmax, and the gradients of the three: 2 + 4 + 4 + 6


@dataclass(frozen=True)
class Checkpointing:
    """Which blocks are computed again in backward: one in `every` (0: none), in whole or but for its products."""

    every: int = 0
    mode: str = "full"

    @property
    def share(self) -> float:
        """Of all blocks."""
        return 1 / self.every if self.every else 0.0

    def kept(self, block: float, entry: float) -> float:
        """Bytes kept of a block on average: of `block`, all that it computes, or of what enters it."""
        again = max(entry, 0.5 * block) if self.mode == "selective" else entry
        return (1 - self.share) * block + self.share * again


def block_bytes(size: Size, precision: str, float32_weights: bool, adapter_dtype: str, dropout: bool) -> float:
    """Kept of one block and token.

    Args:
        size: The model's counts.
        precision: Of the computation.
        float32_weights: They are kept in float32, and autocast computes in that precision.
        adapter_dtype: compute | float32.
        dropout: Adapters drop parts of their inputs.
    """
    half = size.hidden * (20 + 4 * size.kv_share + 8 * size.intermediate / size.hidden) + 4 * size.heads
    adapted = (size.trainable or 0) < (size.parameters or 0)
    factor = _ADAPTED[adapter_dtype, dropout] if adapted else 1.0
    if precision == "fp32":
        return half * factor * _FLOAT32
    return half * factor * (_AUTOCAST if float32_weights else 1.0)


def logits_bytes(vocabulary: int, tokens: int) -> float:
    """At most alive between the last block and its gradient; not smaller where blocks are computed again."""
    return LOGIT_BYTES * vocabulary * tokens
