"""The matrices of an encoder beside a decoder, as T5 and BART have them, from their configuration alone. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NAMES = {"out": "o", "fc1": "up", "fc2": "down", "wi": "up", "wi_0": "up", "wi_1": "gate", "wo": "down"}


@dataclass(frozen=True)
class Stacks:
    """Counts of both stacks together.

    matrices: by a name, (inputs, outputs, how many there are), those of attention over a source among them. small: what
    there is beside them and the embeddings: norms, biases, positions.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    queries: int
    matrices: Mapping[str, tuple[int, int, int]]
    small: int
    tied: bool

    @property
    def inside(self) -> int:
        """Weights of the matrices."""
        return sum(inputs * outputs * count for inputs, outputs, count in self.matrices.values())

    def named(self, targets: Sequence[str] | None) -> list[tuple[int, int]]:
        """Inputs and outputs of each matrix that a target names, by its last part; None: of all."""
        names = self.matrices if targets is None else [_name(target) for target in targets]
        present = [self.matrices[name] for name in names if name in self.matrices]
        return [(inputs, outputs) for inputs, outputs, count in present for _ in range(count)]


def stacks_of(config: Mapping[str, Any]) -> Stacks | None:
    """Those of a configuration; None where it does not tell."""
    hidden = config.get("d_model")
    encoders = config.get("encoder_layers") or config.get("num_layers")
    if not hidden or not encoders:
        return None
    decoders = config.get("decoder_layers") or config.get("num_decoder_layers") or encoders
    heads = config.get("encoder_attention_heads") or config.get("num_heads") or 1
    queries = heads * (config.get("d_kv") or hidden // heads)
    inner = config.get("encoder_ffn_dim") or config.get("d_ff") or 4 * hidden
    layers, attentions = encoders + decoders, encoders + 2 * decoders
    matrices = dict.fromkeys("qkv", (hidden, queries, attentions))
    matrices |= {"o": (queries, hidden, attentions), "up": (hidden, inner, layers), "down": (inner, hidden, layers)}
    if "gated" in str(config.get("feed_forward_proj")):
        matrices["gate"] = matrices["up"]
    norms = 2 * encoders + 3 * decoders
    if "d_kv" in config or "d_ff" in config:  # T5: positions are relative, and nothing has a bias
        small = 2 * heads * config.get("relative_attention_num_buckets", 32) + (norms + 2) * hidden
    else:  # BART
        biases = attentions * 4 * hidden + layers * (inner + hidden)
        small = biases + (norms + 2) * 2 * hidden + 2 * (config.get("max_position_embeddings", 1024) + 2) * hidden
    tied = bool(config.get("tie_word_embeddings", True))
    return Stacks(layers, hidden, inner, heads, queries, matrices, small, tied)


def _name(target: str) -> str:
    part = target.rpartition(".")[2].removesuffix("_proj")
    return NAMES.get(part, part)
