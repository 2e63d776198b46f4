"""What is known about two techniques together, as data with its source; `compose` acts on it.

Compression has one order: structure, then sparsity, then quantization. What changes shapes acts first, zeros are chosen
among the weights that remain, and the grid is laid over what is left, with zero as one of its levels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Two techniques together."""

    first: str
    second: str
    verdict: Literal["order", "warn", "refuse"]  # "order" and "warn" both let `first` act before `second`
    why: str
    source: str
    fix: str = ""


ZEROS = (
    "gradual_pruning", "set", "rigl", "top_kast", "movement_pruning", "n_m", "snip", "grasp", "synflow",
    "lottery_ticket",
)  # fmt: skip
GRIDS = ("quantization_aware", "weight_clustering")


def _order(first: str, second: str, why: str, source: str) -> Rule:
    return Rule(first=first, second=second, verdict="order", why=why, source=source)


def _structure_sparsity_quantization() -> Iterator[Rule]:
    for zeros in ZEROS:
        yield _order(
            "structured_pruning", zeros,
            "structure before sparsity: masks are cut with the weights, and zeros are a share of what is left",
            "arXiv 2301.12900",
        )  # fmt: skip
        yield Rule(
            first="low_rank",
            second=zeros,
            verdict="warn",
            why="the factors are pruned, and their product is dense again",
            source="arXiv 2103.03936",
            fix="use the factors of final.safetensors, or keep_factors",
        )
        yield _order(
            zeros, "quantization_aware",
            "prune before quantizing: the grid is laid over the weights that remain, and zero is one of its levels",
            "arXiv 1510.00149",
        )  # fmt: skip
        yield _order(
            zeros, "weight_clustering",
            "what is left after pruning is clustered, and keep_zero leaves the zeros as they are",
            "arXiv 1510.00149",
        )  # fmt: skip
        yield _order(
            zeros, "weight_averaging",
            "averages are taken of masked weights; a weight pruned to zero is zero in the average too",
            "arXiv 1710.01878",
        )  # fmt: skip
    for grid in GRIDS:
        yield _order("structured_pruning", grid, "structure before quantization: the grid fits what is left",
                     "arXiv 1510.00149")  # fmt: skip
    yield Rule(
        first="low_rank",
        second="weight_clustering",
        verdict="warn",
        why="the factors share a few values, and their product does not",
        source="arXiv 2103.03936",
        fix="use the factors of final.safetensors, or keep_factors",
    )
    yield _order("low_rank", "quantization_aware", "the factors are what is quantized", "arXiv 2103.03936")
    yield Rule(
        first="quantization_aware",
        second="weight_clustering",
        verdict="refuse",
        why="both lay a grid over the same weights",
        source="arXiv 1510.00149",
        fix="Keep one.",
    )


INTERACTIONS: tuple[Rule, ...] = (
    _order("lr_scaling", "lr_schedule", "the schedule multiplies the learning rate that the scaling rule has set",
           "arXiv 1706.02677 §2.2"),
    Rule(
        first="competence_curriculum",
        second="lr_schedule",
        verdict="warn",
        why="gains of a data curriculum shrink under a decaying learning rate",
        source="arXiv 2511.18903",
        fix="add weight_averaging, which restores them, or use the wsd schedule",
    ),
    _order("sequence_length_warmup", "lr_scaling",
           "short sequences early keep large batches with large learning rates stable", "arXiv 2108.06084"),
    *_structure_sparsity_quantization(),
    _order("structured_pruning", "weight_averaging", "averages are cut with the weights, and go on from there",
           "arXiv 2301.12900"),
    _order("structured_pruning", "gradient_checkpointing", "blocks recompute whatever is left of them",
           "arXiv 1604.06174"),
    _order("structured_pruning", "early_exit", "exits leave from whatever is left of the blocks", "arXiv 2404.16710"),
    _order("low_rank", "weight_averaging", "what is averaged are the factors", "arXiv 2103.03936"),
    _order("weight_averaging", "weight_clustering",
           "a mean of shared values is not shared: the average is clustered at the end", "arXiv 1510.00149"),
    _order("mixed_precision", "quantization_aware",
           "weights are put on their grid first and cast to 16 bits as they enter the matrix product",
           "torch.amp: autocast casts the inputs of each product"),
    *(
        _order("distillation", smaller, "teacher='initial' is the model as it is before it is made smaller",
               "arXiv 1503.02531")
        for smaller in ("low_rank", "structured_pruning", "quantization_aware")
    ),
    _order("distillation", "early_exit",
           "each adds a term of its own to the loss of one forward; exits learn from labels, the last layer from both",
           "arXiv 1503.02531 §2, 2404.16710 §4.1"),
    _order("gradient_checkpointing", "early_exit",
           "exits replay what a block returned, so a block is recomputed once in backward, however many exits it has",
           "arXiv 1604.06174"),
)  # fmt: skip
