"""What is known about techniques together, as data with its source; `compose` acts on it.

Compression has one order: structure, then sparsity, then quantization. What changes shapes acts first, zeros are chosen
among the weights that remain, and the grid is laid over what is left, with zero as one of its levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Techniques together: each of `first` with each of `second`.

    Args:
        first: Names of techniques.
        second: Names of techniques.
        verdict: "order" and "warn" both let `first` act before `second`.
        why: A clause, without a full stop.
        source: A paper or a document.
        fix: What to do about a warning or a refusal.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    verdict: Literal["order", "warn", "refuse"]
    why: str
    source: str
    fix: str = ""


ZEROS = (
    "gradual_pruning", "set", "rigl", "top_kast", "movement_pruning", "n_m", "snip", "grasp", "synflow",
    "lottery_ticket",
)  # fmt: skip

INTERACTIONS: tuple[Rule, ...] = (
    Rule(
        first=("lr_scaling",),
        second=("lr_schedule",),
        verdict="order",
        why="the schedule multiplies the learning rate that the scaling rule has set",
        source="arXiv 1706.02677 §2.2",
    ),
    Rule(
        first=("competence_curriculum",),
        second=("lr_schedule",),
        verdict="warn",
        why="gains of a data curriculum shrink under a decaying learning rate",
        source="arXiv 2511.18903",
        fix="add weight_averaging, which restores them, or use the wsd schedule",
    ),
    Rule(
        first=("sequence_length_warmup",),
        second=("lr_scaling",),
        verdict="order",
        why="short sequences early keep large batches with large learning rates stable",
        source="arXiv 2108.06084",
    ),
    # structure before sparsity before quantization
    Rule(
        first=("structured_pruning",),
        second=ZEROS,
        verdict="order",
        why="structure before sparsity: masks are cut with the weights, and zeros are a share of what is left",
        source="arXiv 2301.12900",
    ),
    Rule(
        first=("low_rank",),
        second=ZEROS,
        verdict="warn",
        why="the factors are pruned, and their product is dense again",
        source="arXiv 2103.03936",
        fix="use the factors of final/, or keep_factors",
    ),
    Rule(
        first=ZEROS,
        second=("quantization_aware",),
        verdict="order",
        why="prune before quantizing: the grid is laid over the weights that remain, and zero is one of its levels",
        source="arXiv 1510.00149",
    ),
    Rule(
        first=ZEROS,
        second=("weight_clustering",),
        verdict="order",
        why="what is left after pruning is clustered, and keep_zero leaves the zeros as they are",
        source="arXiv 1510.00149",
    ),
    Rule(
        first=ZEROS,
        second=("weight_averaging",),
        verdict="order",
        why="averages are taken of masked weights; a weight pruned to zero is zero in the average too",
        source="arXiv 1710.01878",
    ),
    Rule(
        first=("structured_pruning",),
        second=("quantization_aware", "weight_clustering"),
        verdict="order",
        why="structure before quantization: the grid fits what is left",
        source="arXiv 1510.00149",
    ),
    Rule(
        first=("low_rank",),
        second=("weight_clustering",),
        verdict="warn",
        why="the factors share a few values, and their product does not",
        source="arXiv 2103.03936",
        fix="use the factors of final/, or keep_factors",
    ),
    Rule(
        first=("low_rank",),
        second=("quantization_aware",),
        verdict="order",
        why="the factors are what is quantized",
        source="arXiv 2103.03936",
    ),
    Rule(
        first=("quantization_aware",),
        second=("weight_clustering",),
        verdict="refuse",
        why="both lay a grid over the same weights",
        source="arXiv 1510.00149",
        fix="Keep one.",
    ),
    # what follows the weights
    Rule(
        first=("structured_pruning",),
        second=("weight_averaging",),
        verdict="order",
        why="averages are cut with the weights, and go on from there",
        source="arXiv 2301.12900",
    ),
    Rule(
        first=("low_rank",),
        second=("weight_averaging",),
        verdict="order",
        why="what is averaged are the factors",
        source="arXiv 2103.03936",
    ),
    Rule(
        first=("weight_averaging",),
        second=("weight_clustering",),
        verdict="order",
        why="a mean of shared values is not shared: the average is clustered at the end",
        source="arXiv 1510.00149",
    ),
    Rule(
        first=("mixed_precision",),
        second=("quantization_aware",),
        verdict="order",
        why="weights are put on their grid first and cast to 16 bits as they enter the matrix product",
        source="torch.amp: autocast casts the inputs of each product",
    ),
    Rule(
        first=("distillation",),
        second=("low_rank", "structured_pruning", "quantization_aware"),
        verdict="order",
        why="teacher='initial' is the model as it is before it is made smaller",
        source="arXiv 1503.02531",
    ),
    # blocks
    Rule(
        first=("compiled_blocks",),
        second=("gradient_checkpointing",),
        verdict="order",
        why="what is computed again in backward is the compiled block",
        source="arXiv 2410.06511 §2.2.3",
    ),
    Rule(
        first=("structured_pruning",),
        second=("compiled_blocks",),
        verdict="order",
        why="blocks are compiled again with the shapes that are left of them",
        source="arXiv 2410.06511 §2.2.3",
    ),
    Rule(
        first=("compiled_blocks",),
        second=("early_exit",),
        verdict="order",
        why="exits replay what a compiled block returned",
        source="arXiv 2404.16710",
    ),
    Rule(
        first=("structured_pruning",),
        second=("gradient_checkpointing",),
        verdict="order",
        why="blocks recompute whatever is left of them",
        source="arXiv 1604.06174",
    ),
    Rule(
        first=("structured_pruning",),
        second=("early_exit",),
        verdict="order",
        why="exits leave from whatever is left of the blocks",
        source="arXiv 2404.16710",
    ),
    Rule(
        first=("gradient_checkpointing",),
        second=("early_exit",),
        verdict="order",
        why="exits replay what a block returned, so a block is recomputed once in backward, however many exits it has",
        source="arXiv 1604.06174",
    ),
    Rule(
        first=("distillation",),
        second=("early_exit",),
        verdict="order",
        why="each adds a term of its own to the loss of one forward; exits learn from labels, the last layer from both",
        source="arXiv 1503.02531 §2, 2404.16710 §4.1",
    ),
)
