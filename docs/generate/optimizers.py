"""The page of optimizers, from their cards."""

from __future__ import annotations

from shoestring.trainer.tasks.optimizers.cards import OPTIMIZERS, OptimizerCard

from .markdown import code, page, table


def page_text() -> str:
    rows = [[code(name), card.does, _bytes(card), _paper(card), _strategies(card)] for name, card in OPTIMIZERS.items()]
    return page(
        "# Optimizers",
        "`optimizer.name` is one of these. Bytes are what it keeps of a trained parameter at most, beside the weight "
        "and its gradient of 4 bytes each; ZeRO shares them out among ranks. A plan refuses an optimizer under a "
        "strategy that is not listed.",
        table(["name", "what it does", "bytes a parameter", "paper", "strategies"], rows),
        "`adamw`, `adam` and `sgd` step in one pass over memory (torch's fused kernels) on CPUs and on CUDA, and copy "
        "nothing. The others hold a copy of what they step at a time, which a plan counts.",
        "`muon` and `adafactor` read matrices as wholes: under ZeRO a matrix is gathered for its step, one at a time, "
        "and their results are those of one device. `muon` computes in float32 on a CPU, in bfloat16 on CUDA.",
        "`schedule_free_adamw` needs no falling learning rate: unless `optimizer.schedule` is given, the rate is "
        "constant after its warmup, and the budget may end at any moment. Validation and the final weights are those "
        "of the averaged point; checkpoints hold what is needed to go on.",
        "`adamw8bit` keeps parameters of fewer than 4096 elements in float32. Under ZeRO its blocks are those of the "
        "shards, so such a run resumes with the strategy and the number of ranks that it was saved with. On a CPU "
        "its step takes about 15 times that of `adamw`.",
    )


def _bytes(card: OptimizerCard) -> str:
    if not card.state_bytes:
        return "two vectors a matrix"
    other = "" if card.matrix_bytes is None else f"{card.matrix_bytes:.3g} of hidden matrices, else "
    return f"{other}{card.state_bytes:.3g}"


def _paper(card: OptimizerCard) -> str:
    return f"[arXiv {card.paper}](https://arxiv.org/abs/{card.paper})"


def _strategies(card: OptimizerCard) -> str:
    return ", ".join(map(code, card.strategies))
