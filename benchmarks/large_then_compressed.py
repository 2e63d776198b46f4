"""Is a large model that was compressed better than a small one trained from scratch, at equal bytes on disk?

    python benchmarks/large_then_compressed.py [--seeds 5] [--record FILE] [--write]

The claim is that of "Train Large, Then Compress" (arXiv 2002.11794), which made it for transformers; here it is put to
scikit-learn's digits: 1,437 images for training, 360 for the test, split anew for each seed.

Fixed before the first run, and not changed after it: the large model is an MLP 64-300-100-10; 200 steps of 100 samples
(about 14 epochs); SGD with Nesterov momentum 0.1 / 0.9 and a cosine to zero, for every model, large or small; each
technique with the settings of its class but for the ones named in its row. Pruning, also the structured one, is within
the 200 steps; int8 is rounding afterwards, one scale per output channel, without any training. The small model has two
hidden layers of about 3:1, as wide as give no more bytes than the compressed model's file; both files are written by
trainer/export/torch_file.py (sparse weights as a bit mask and values) and scored as they are read back from there.

Three controls. Same training FLOPs: the small model trains for as many more steps as its steps cost fewer FLOPs; those
of the large one are the realised ones (callbacks/accounting/flops.py), in which masked weights cost as much as dense
ones, so pruning makes the large model's training no cheaper and only the structured cut does. Same epochs: the small
model has the same 200 steps. Same FLOPs, small in int8 too: the small model is rounded as well, which buys it a greater
width at the same bytes; this is the strictest of the three, and no part of the claim.

Differences are paired by seed: compressed minus small, in points of test accuracy, with the 95 % interval of Student's
t. "Appears" is: large then compressed above small. Each row is judged alone; of eighteen, about one differs by chance.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from baselines import written
from report import Runs, arguments, measured, page, paired, publish, quiet, shown, table, verdict, wrapped
from sparsity import BATCH, MLP, run, score, small_dense
from torch import nn

from shoestring.callbacks import GradualPruning, StructuredPruning
from shoestring.callbacks.accounting.flops import FlopCounter
from shoestring.callbacks.contract import Technique

LARGE, STEPS, CUT = (300, 100), 200, 0.5
# trained large model -> its technique; stored how -> (which of them, quantized to)
TRAINED: dict[str, Callable[[], list[Technique]]] = {
    "dense": list,
    "pruned 90 %": lambda: [GradualPruning(sparsity=0.9, distribution="erk")],
    "pruned 98 %": lambda: [GradualPruning(sparsity=0.98, distribution="erk")],
    "structured 75 %": lambda: [StructuredPruning(ratio=0.75, at=f"{CUT:.0%}")],
}
STORED: dict[str, tuple[str, str | None]] = {
    "int8 PTQ": ("dense", "int8"),
    "pruned 90 %": ("pruned 90 %", None),
    "pruned 90 %, int8": ("pruned 90 %", "int8"),
    "pruned 98 %": ("pruned 98 %", None),
    "structured 75 %": ("structured 75 %", None),
    "structured 75 %, int8": ("structured 75 %", "int8"),
}
# control -> (small model's steps cost as much as the large one's together, small model is stored as)
CONTROLS: dict[str, tuple[bool, str | None]] = {
    "Same training FLOPs": (True, None),
    "Same epochs": (False, None),
    "Same training FLOPs, small in int8 too": (True, "int8"),
}


def step_flops(net: nn.Module) -> float:
    """Realised FLOPs of one training step."""
    with FlopCounter() as counter:
        nn.functional.cross_entropy(net(torch.zeros(BATCH, 64)), torch.zeros(BATCH, dtype=torch.long)).backward()
    net.zero_grad()
    return counter.flops.realised


def one_seed(seed: int) -> dict[str, dict[str, Any]]:
    """Stored how -> figures of the large model and of the small ones."""
    large = {name: run(LARGE, techniques(), seed, STEPS)[0] for name, techniques in TRAINED.items()}
    rows: dict[str, dict[str, Any]] = {"dense": {"accuracy": score(large["dense"], seed)}}
    for name, (source, quantize) in STORED.items():
        size, served = written(large[source], quantize, sparse=True)
        spent = STEPS * (CUT * step_flops(MLP(LARGE).net) + (1 - CUT) * step_flops(served))
        rows[name] = {"bytes": size, "accuracy": score(served, seed)}
        rows[name] |= {control: small(size, spent, seed, *how) for control, how in CONTROLS.items()}
    return rows


def small(limit: int, spent: float, seed: int, match: bool, quantize: str | None) -> dict[str, Any]:
    """The dense model of at most `limit` bytes, trained for `spent` FLOPs, or for the large model's steps."""
    widths = small_dense(lambda w: written(MLP(w).net, quantize)[0] <= limit)
    steps = round(spent / step_flops(MLP(widths).net)) if match else STEPS
    size, served = written(run(widths, [], seed, steps)[0], quantize)
    return {"widths": widths, "bytes": size, "steps": steps, "accuracy": score(served, seed)}


def control_table(runs: list[dict[str, dict[str, Any]]], control: str) -> list[str]:
    rows = []
    for name in STORED:
        large = [run[name] for run in runs]
        little = [each[control] for each in large]
        points = [[each["accuracy"] for each in models] for models in (large, little)]
        gaps = paired(*points)
        rows.append([
            name, f"{mean(large, 'bytes'):,.0f}", shown(points[0]), "-".join(map(str, little[0]["widths"])),
            f"{mean(little, 'bytes'):,.0f}", f"{mean(little, 'steps'):,.0f}", shown(points[1]), shown(gaps, sign=True),
            verdict(gaps),
        ])  # fmt: skip
    head = ["large, then", "bytes", "accuracy, %", "small: hidden layers", "bytes, small", "steps, small",
            "accuracy of small, %", "difference, points", "on these data"]  # fmt: skip
    return table(head, rows)


def mean(rows: list[dict[str, Any]], key: str) -> float:
    return sum(each[key] for each in rows) / len(rows)


def written_page(runs: list[dict[str, dict[str, Any]]]) -> str:
    parts: list[Any] = [measured("large_then_compressed.py"), *map(wrapped, (__doc__ or "").split("\n\n")[2:])]
    dense = shown([run["dense"]["accuracy"] for run in runs])
    size = written(MLP(LARGE).net)[0]
    parts.append(wrapped(
        f"{len(runs)} seeds. The large model itself, float32, {size:,} bytes: {dense} %. Hidden layers of small models "
        "are those of the first seed. Where both are int8 PTQ, the small model at equal bytes is the large one itself."
    ))  # fmt: skip
    for control in CONTROLS:
        parts += [f"## {control}", control_table(runs, control)]
    return page("Large then compressed, against small from scratch", *parts)


def main() -> None:
    given = arguments(__doc__, seeds=5, recorded=True).parse_args()
    quiet()
    runs = Runs(given.record)
    text = written_page([runs(f"seed {seed}", lambda seed=seed: one_seed(seed)) for seed in range(given.seeds)])
    publish(text, __file__, given.write)


if __name__ == "__main__":
    main()
