"""Strategies by name, and what each can offload to host memory: for recipes, which check it, and the trainer."""

from __future__ import annotations

OFFLOADS: dict[str, tuple[str, ...]] = {
    "single": ("none",),
    "ddp": ("none",),
    "zero1": ("none",),
    "zero2": ("none", "optimizer"),
    "zero3": ("none", "optimizer", "parameters"),
}
