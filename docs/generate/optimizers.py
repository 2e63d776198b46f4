"""The page of optimizers, from their cards."""

from __future__ import annotations

from shoestring.strategies import OFFLOADS
from shoestring.trainer.planning.memory import memory
from shoestring.trainer.planning.needs import Inputs
from shoestring.trainer.planning.sizes import Size
from shoestring.trainer.tasks.optimizers.cards import OPTIMIZERS, OptimizerCard

from .markdown import code, page, table

MATRICES = Size(parameters=10**6, trainable=10**6, active=10**6, inside=10**6, largest=10**4)
RANKS = 2


def page_text() -> str:
    rows = [[code(name), card.does, _bytes(card), _paper(card), _strategies(card)] for name, card in OPTIMIZERS.items()]
    return page(
        "# Optimizers",
        "`optimizer.name` is one of these. Bytes are what it keeps of a trained parameter at most, beside the weight "
        "and its gradient of 4 bytes each; ZeRO shares them out among ranks. A plan refuses an optimizer under a "
        "strategy that is not listed.",
        table(["name", "what it does", "bytes a parameter", "paper", "strategies"], rows),
        "## Bytes a parameter",
        f"What each of {RANKS} ranks keeps of a trained parameter of a hidden matrix, in fp32 (one rank for `single`). "
        "Weights, masters and gradients are there whatever the optimizer is; its state comes on top. These are the "
        "plan's figures. The test suite trains with every optimizer under every strategy and counts: states are within "
        "3 % of what is claimed, masters within 1 %. `adafactor` keeps its two vectors, which are not counted here, on "
        "each rank that has a part of the matrix.",
        table(["", *map(code, OFFLOADS)], [*_common(), *_states()]),
        "## Beside them",
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


def _terms(strategy: str, card: OptimizerCard) -> dict[str, float]:
    kept = memory(Inputs(
        size=MATRICES, length=1, micro=1, accumulate=1, devices=1 if strategy == "single" else RANKS, nodes=1,
        strategy=strategy, offload="none", accelerator="cuda", precision="fp32", optimizer=card,
    ))  # fmt: skip
    return {term.name: term.bytes / 10**6 for term in kept.device}


def _common() -> list[list[str]]:
    each = [_terms(strategy, OPTIMIZERS["adamw"]) for strategy in OFFLOADS]
    names = {"weights": "weights", "master weights": "masters of ZeRO", "gradients": "gradients"}
    names["gradient buckets"] = "buckets of DDP"
    return [[shown, *(f"{terms.get(name, 0):.3g}" for terms in each)] for name, shown in names.items()]


def _states() -> list[list[str]]:
    return [
        [f"state of {code(name)}", *(f"{_terms(strategy, card)['optimizer states']:.3g}" for strategy in OFFLOADS)]
        for name, card in OPTIMIZERS.items()
    ]


def _bytes(card: OptimizerCard) -> str:
    if not card.state_bytes:
        return "two vectors a matrix"
    other = "" if card.matrix_bytes is None else f"{card.matrix_bytes:.3g} of hidden matrices, else "
    return f"{other}{card.state_bytes:.3g}"


def _paper(card: OptimizerCard) -> str:
    return f"[arXiv {card.paper}](https://arxiv.org/abs/{card.paper})"


def _strategies(card: OptimizerCard) -> str:
    return ", ".join(map(code, card.strategies))
