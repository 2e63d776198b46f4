"""What a low-bit base costs in loss: LoRA beside MiniLM in fp32, bf16, int8 and nf4, on the same batches.

    python benchmarks/quantized_bases.py [--seeds 3] [--steps 60] [--record FILE] [--write]

The pretrained MiniLM (6 layers, 384 wide; 10.7 of its 22.7 million weights are in layers that are quantized) learns to
tell which package of the standard library a text is from, with LoRA of rank 8 in all linear layers and a new head. All
four begin with the same adapters and the same head and see the same batches. Beside the bf16 base all is computed in
bf16, as in a run, beside the others in float32. AdamW, rate 5e-4, a batch of 8 x 64 tokens.
"""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from report import Runs, arguments, measured, page, publish, quiet, shown, table, wrapped
from torch.utils.data import DataLoader

from shoestring.recipes import recipe_from
from shoestring.trainer.tasks import build_task

BASES = ("fp32", "bf16", "int8", "nf4")


def curves(steps: int, folder: Path, seed: int) -> dict[str, Any]:
    """By base: the loss of each step, the held-out loss after the last, and the bytes of the frozen weights."""
    by_base: dict[str, Any] = {}
    start: dict[str, torch.Tensor] = {}
    for base in BASES:
        precision = "bf16" if base == "bf16" else "fp32"
        task = build_task(
            recipe_from(
                {
                    "model": {
                        "task": "sequence-classification", "name": "minilm", "dtype": base,
                        "adapter": {"kind": "lora", "rank": 8},
                    },
                    "data": {"source": "python-packages", "sequence_length": 64, "validation": 0.1},
                    "budget": {"steps": steps}, "precision": precision,
                }
            ),
            workdir=folder, precision=precision,
        )  # fmt: skip
        model: Any = task.module.model
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        start = start or {name: p.detach().clone() for name, p in trained.items()}
        for name, p in trained.items():
            p.data.copy_(start[name])
        draw = torch.Generator().manual_seed(seed)
        batches = DataLoader(task.train, batch_size=8, shuffle=True, generator=draw, collate_fn=task.collate)  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(trained.values(), lr=5e-4)
        loss = partial(_loss, model, precision)
        torch.manual_seed(seed)  # of dropout
        losses = []
        for batch in islice(batches, steps):
            value = loss(batch)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(value))
        held = DataLoader(task.validation, batch_size=32, collate_fn=task.collate)  # type: ignore[arg-type]
        model.eval()
        with torch.no_grad():
            after = [float(loss(batch)) for batch in islice(held, 8)]
        frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        by_base[base] = {"losses": losses, "held out": sum(after) / len(after), "bytes": frozen}
    return by_base


def _loss(model: Any, precision: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    known = {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask", "labels")}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        return model(**known).loss  # type: ignore[no-any-return]


def _off(by_base: dict[str, Any], base: str) -> tuple[float, float]:
    """Percent off the curve beside fp32 on average, either way, and off its held-out loss, above it."""
    pairs = zip(by_base[base]["losses"], by_base["fp32"]["losses"], strict=True)
    curve = [abs(here - there) / there for here, there in pairs]
    return 100 * sum(curve) / len(curve), 100 * (by_base[base]["held out"] / by_base["fp32"]["held out"] - 1)


def main() -> None:
    parser = arguments("LoRA beside a low-bit base", seeds=3, recorded=True)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    quiet()
    runs, began = Runs(given.record), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        by_seed = [
            runs(f"seed {seed}, {given.steps} steps", partial(curves, given.steps, Path(folder), seed))
            for seed in range(given.seeds)
        ]
    rows, seconds = [], time.monotonic() - began
    for base in BASES:
        each = [_off(one, base) for one in by_seed]
        off = [shown([a for a, _ in each]), shown([b for _, b in each], sign=True)] if base != "fp32" else ["", ""]
        rows.append(
            [
                base, f"{by_seed[0][base]['bytes'] / 1e6:.1f}",
                shown([one[base]["losses"][-1] for one in by_seed], digits=3),
                shown([one[base]["held out"] for one in by_seed], digits=3),
                *off,
            ]
        )  # fmt: skip
    text = page(
        "LoRA beside a low-bit base",
        wrapped((__doc__ or "").split("\n\n", 2)[2]),
        wrapped(f"{given.seeds} seeds of batches, {given.steps} steps, {seconds:.0f} s. Means and 95 % intervals."),
        table(["base", "frozen MB", "last loss", "held-out loss", "curve off fp32, %", "held-out off fp32, %"], rows),
        measured("quantized_bases.py"),
    )
    publish(text, __file__, given.write)


if __name__ == "__main__":
    main()
