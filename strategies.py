"""Strategies by name, what each can offload, and which settings each has: for recipes and for the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

OFFLOADS: dict[str, tuple[str, ...]] = {
    "single": ("none",),
    "ddp": ("none",),
    "zero1": ("none",),
    "zero2": ("none", "optimizer"),
    "zero3": ("none", "optimizer", "parameters"),
    "fsdp2": ("none",),
}
NVME = "zero3"  # the strategy whose optimizer state can lie on a drive
NVME_GROUP = 50_000_000  # elements of a rank that are in memory at a time, with a tensor for each of NVME_BUFFERS
NVME_BUFFERS = 4  # masters, gradients, two states
ASKED_FOR = frozenset({"fsdp2"})  # what no plan chooses or proposes by itself
_ZERO = ("zero1", "zero2", "zero3")
SETTINGS: dict[str, tuple[str, ...]] = {  # of `Sharding`: the strategies that have it
    "gradient_dtype": _ZERO,
    "overlap": _ZERO,
    "reduce_bucket": _ZERO,
    "allgather_bucket": ("zero1", "zero2"),
    "prefetch": ("zero3",),
    "hpz": ("zero3",),
    "quantized_weights": ("zero3",),
}
ON_CUDA = "needs GPUs: DeepSpeed's kernels for it are for CUDA alone"
LARGEST_BUCKET = 100_000_000  # elements: 200 MB and more, where links are at their full speed long since
PREFETCH = 50_000_000  # elements: DeepSpeed's own


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How ZeRO sums gradients, and how much it communicates at once. Sizes in elements.

    Attributes:
        gradient_dtype: What gradients are summed in, over micro-batches and ranks, where weights are bf16.
        overlap: Whether gradients are reduced while backward goes on; auto: with zero3 on GPUs, where it costs no
            second bucket.
        reduce_bucket: Of gradients reduced together; auto: `bucket`.
        allgather_bucket: Of weights gathered together after a step; auto: `bucket`.
        prefetch: Of weights gathered ahead of their use; auto: DeepSpeed's own 50 million.
        hpz: So many neighbouring ranks hold a second copy of the weights among them, which backward gathers from, so
            that it does not leave their node (hpZ of ZeRO++, arXiv 2306.10209); 1: no copy.
        quantized_weights: Weights are gathered in 8 bits (qwZ of ZeRO++); on CUDA only, as DeepSpeed's kernels are.
    """

    gradient_dtype: Literal["fp32", "bf16"] = "fp32"
    overlap: bool | Literal["auto"] = "auto"
    reduce_bucket: int | Literal["auto"] = "auto"
    allgather_bucket: int | Literal["auto"] = "auto"
    prefetch: int | Literal["auto"] = "auto"
    hpz: int = 1
    quantized_weights: bool = False

    def overlaps(self, strategy: str, accelerator: str) -> bool:
        """Whether communication overlaps with backward; on a CPU both would want the same cores."""
        if self.overlap == "auto":
            return strategy == "zero3" and accelerator == "cuda"
        return self.overlap

    def foreign_to(self, strategy: str) -> Iterator[str]:
        """Names of what is set here and does nothing under `strategy`."""
        for field in fields(self):
            if getattr(self, field.name) != field.default and strategy not in SETTINGS[field.name]:
                yield field.name


def bucket(trained: float) -> int:
    """Elements of a bucket, if nobody says: all that a model trains, at most `LARGEST_BUCKET`.

    DeepSpeed would take 500 million, however small the model, and allocates them whole. Even, as it asks for.
    """
    return max(2, min(LARGEST_BUCKET, int(trained) + int(trained) % 2))
