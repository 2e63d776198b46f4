"""The page of optimizers, from their cards."""

from __future__ import annotations

from shoestring.strategies import OFFLOADS
from shoestring.trainer.planning.memory import memory
from shoestring.trainer.planning.needs import Inputs
from shoestring.trainer.planning.sizes import Size
from shoestring.trainer.tasks.optimizers.cards import LARGEST_SIDE, OPTIMIZERS, OptimizerCard

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
        "3 % of what is claimed, masters within 1 %. What `soap`, `galore` and `apollo` keep of a whole matrix, here a "
        "square one, is on each rank that has a part of it: under zero1 and zero2 mostly one, under zero3 all. So are "
        "the two vectors of `adafactor`, which are not counted here. `benchmarks/results/optimizer_bytes.md` has what "
        "is claimed and what was counted side by side.",
        table(["", *map(code, OFFLOADS)], [*_common(), *_states()]),
        "## Beside them",
        "`adamw`, `adam` and `sgd` step in one pass over memory (torch's fused kernels) on CPUs and on CUDA, and copy "
        "nothing. The others hold a copy of what they step at a time, which a plan counts.",
        "`muon`, `adafactor`, `soap`, `galore` and `apollo` read matrices as wholes: under ZeRO a matrix is gathered "
        "for its step, one at a time, and their results are those of one device. `muon` computes in float32 on a CPU, "
        "in bfloat16 on CUDA. `muon`, `soap` and `galore` mix a matrix's elements: what prunes by masks refuses them.",
        f"`soap` turns no side of more than {LARGEST_SIDE:,} elements, and its first step finds the bases and moves "
        "nothing. The rank of `galore` and `apollo` is a quarter of the shorter side, and their projection is made "
        "anew every 200 steps. Where a gradient has fewer directions than these keep, as with few samples, rounding "
        "chooses the others: one device and several then part, each as good as the other.",
        "`schedule_free_adamw` needs no falling learning rate: unless `optimizer.schedule` is given, the rate is "
        "constant after its warmup, and the budget may end at any moment. Validation and the final weights are those "
        "of the averaged point; checkpoints hold what is needed to go on.",
        "`adamw8bit` keeps parameters of fewer than 4096 elements in float32. Under ZeRO its blocks are those of the "
        "shards, so such a run resumes with the strategy and the number of ranks that it was saved with. On a CPU "
        "its step takes about 15 times that of `adamw`. `adamw4bit` is the same with half a byte for each moment. Both "
        "are ours, so that masks reach both moments of an element; torchao's compile their step first, which may take "
        "most of a minute.",
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
    if card.side_bytes:
        return f"{card.bytes_of_matrices:.3g}, and {card.side_bytes:.3g} an element of the squares of a matrix's sides"
    if card.whole_bytes:
        return f"{card.bytes_of_matrices + card.whole_bytes:.3g} of hidden matrices, else {card.state_bytes:.3g}"
    other = "" if card.matrix_bytes is None else f"{card.matrix_bytes:.3g} of hidden matrices, else "
    return f"{other}{card.state_bytes:.3g}"


def _paper(card: OptimizerCard) -> str:
    return f"[arXiv {card.paper}](https://arxiv.org/abs/{card.paper})"


def _strategies(card: OptimizerCard) -> str:
    return ", ".join(map(code, card.strategies))
