"""Which sparse training works best, at settings where the papers' orderings are known to separate on small data.

    python benchmarks/sparsity.py [--seeds 5] [--write benchmarks/results/sparsity.md]

scikit-learn's digits, an MLP 64-300-100-10, 720 steps of 100 samples, SGD with Nesterov momentum 0.1 / 0.9, cosine to
zero: the same epochs for every row, and, as masked-dense training runs at full cost, the same executed FLOPs. Rows
are means over seeds with a 95 % interval (Student's t); an ordering is judged on the differences seed by seed. Settings
are the papers' (update interval 20, drop fraction 0.3, until 75 %); nothing was tuned.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import sqrt
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from shoestring.callbacks import SET, SNIP, GradualPruning, LotteryTicket, LRSchedule, RigL, SynFlow, TopKAST
from shoestring.callbacks.contract import Technique
from shoestring.trainer import Trainer

STEPS, BATCH = 720, 100
STUDENT_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
MOVES = {"every": 20, "drop_fraction": 0.3, "stop": "75%"}


class MLP(pl.LightningModule):
    """64-a-b-10 with ReLU."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        sizes = [64, *widths, 10]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True)


def small_dense(sparsity: float) -> tuple[int, int]:
    """Hidden widths in the ratio 3:1 with as many weights as the sparse model keeps."""
    kept = (1 - sparsity) * (64 * 300 + 300 * 100 + 100 * 10)
    width = next(w for w in range(1, 200) if 64 * 3 * w + 3 * w * w + 10 * w > kept) - 1
    return 3 * width, width


def techniques(sparsity: float) -> dict[str, Callable[[], tuple[Sequence[int], list[Technique]]]]:
    """Row -> (hidden widths, techniques)."""
    wide = (300, 100)
    return {
        "dense": lambda: (wide, []),
        "small dense": lambda: (small_dense(sparsity), []),
        "gradual": lambda: (wide, [GradualPruning(sparsity=sparsity, distribution="erk")]),
        "one-shot at 70 %": lambda: (wide, [GradualPruning(sparsity=sparsity, distribution="erk", ramp="one_shot")]),
        "lottery ticket": lambda: (wide, [LotteryTicket(sparsity=sparsity, rounds=3)]),
        "snip": lambda: (wide, [SNIP(sparsity=sparsity)]),
        "synflow": lambda: (wide, [SynFlow(sparsity=sparsity, samples=1)]),
        "top-kast": lambda: (wide, [TopKAST(sparsity=sparsity, backward_sparsity=max(0.0, sparsity - 0.3))]),
        "static, erk": lambda: (wide, [SET(sparsity=sparsity, drop_fraction=0.0)]),
        "set, erk": lambda: (wide, [SET(sparsity=sparsity, **MOVES)]),
        "set, uniform": lambda: (wide, [SET(sparsity=sparsity, distribution="uniform", **MOVES)]),
        "rigl, erk": lambda: (wide, [RigL(sparsity=sparsity, **MOVES)]),
        "rigl, uniform": lambda: (wide, [RigL(sparsity=sparsity, distribution="uniform", **MOVES)]),
    }


def data(seed: int) -> tuple[DataLoader, torch.Tensor, torch.Tensor]:
    x, y = load_digits(return_X_y=True)
    x = torch.tensor((x - x.mean()) / x.std(), dtype=torch.float32)
    parts = train_test_split(x.numpy(), y, test_size=0.2, random_state=seed, stratify=y)
    train_x, test_x, train_y, test_y = (torch.tensor(part) for part in parts)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(train_x, train_y), BATCH, shuffle=True, drop_last=True, generator=order)
    return loader, test_x, test_y


def accuracy(name: str, sparsity: float, seed: int) -> tuple[float, int]:
    """(test accuracy in percent, weights that are not 0)."""
    widths, chosen = techniques(sparsity)[name]()
    cycles = 4 if name == "lottery ticket" else 1
    torch.manual_seed(seed)
    module = MLP(widths)
    loader, test_x, test_y = data(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            techniques=[*chosen, LRSchedule(shape="cosine", cycles=cycles)], run_dir=folder, ledger=False, seed=seed,
            strategy="single", accelerator="cpu", max_steps=STEPS, max_epochs=-1, checkpoint_every=None,
            usd_per_device_hour=0.0,
        )  # fmt: skip
        trainer.observer.peak_flops = 1e9  # not asked for
        trainer.fit(module, loader)
    module.eval()
    with torch.no_grad():
        right = (module.net(test_x).argmax(1) == test_y).float().mean().item()
    return 100 * right, sum(int(m.weight.count_nonzero()) for m in module.net if isinstance(m, nn.Linear))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval."""
    return statistics.mean(values), STUDENT_95[len(values)] * statistics.stdev(values) / sqrt(len(values))


def shown(values: Sequence[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.2f} ± {half:.2f}"


# what papers say: (better, worse, sparsity, by at least (None: within) so many points, source)
CLAIMS: tuple[tuple[str, str, float, float | None, str], ...] = (
    ("set, erk", "static, erk", 0.98, 2.0, "1707.04780"),
    ("rigl, erk", "set, erk", 0.98, 2.0, "1911.11134"),
    ("rigl, erk", "set, erk", 0.8, None, "1911.11134, table 2: 74.6 and 72.9; ours: within 1 point"),
    ("rigl, erk", "set, erk", 0.9, None, "as above"),
    ("rigl, erk", "rigl, uniform", 0.98, 0.0, "1911.11134"),
    ("set, erk", "set, uniform", 0.98, 0.0, "1911.11134"),
    ("gradual", "one-shot at 70 %", 0.9, 0.0, "1710.01878"),
    ("gradual", "one-shot at 70 %", 0.98, 0.0, "1710.01878"),
)


def verdict(found: dict[tuple[str, float], list[float]], claim: tuple[str, str, float, float | None, str]) -> str:
    better, worse, sparsity, margin, source = claim
    gaps = [a - b for a, b in zip(found[better, sparsity], found[worse, sparsity], strict=True)]
    mean, half = interval(gaps)
    if margin is None:
        holds, said = abs(mean) <= 1.0, "about equal to"
    else:
        holds, said = mean >= margin, f"at least {margin:g} points over" if margin else "not below"
    sure = "" if margin is None or abs(mean) > half else "; the interval holds 0"
    return (
        f"| {better} {said} {worse} at {sparsity:.0%} | {mean:+.2f} ± {half:.2f} | "
        f"{'appears' if holds else 'does NOT appear'}{sure} | {source} |"
    )


def page(found: dict[tuple[str, float], list[float]], kept: dict[tuple[str, float], int], seeds: int) -> str:
    sparsities = sorted({sparsity for _, sparsity in found})
    rows = [f"| {'accuracy, %':18} | " + " | ".join(f"{s:.0%} sparse (weights left)" for s in sparsities) + " |"]
    rows.append("|---" * (len(sparsities) + 1) + "|")
    for name in techniques(0.9):
        cells = [f"{shown(found[name, s])} ({kept[name, s]:,})" for s in sparsities]
        rows.append(f"| {name:18} | " + " | ".join(cells) + " |")
    judged = ["| claim | difference, points | on these data | source (arXiv) |", "|---|---|---|---|"]
    judged += [verdict(found, claim) for claim in CLAIMS]
    return "\n".join(
        ["# Sparse training on digits", "", f"{seeds} seeds, mean ± 95 % interval.", "",
         (__doc__ or "").split("\n\n")[2], "", *rows, "", "## Do the papers' orderings appear?", "", *judged, ""]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.8, 0.9, 0.98])
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    found: dict[tuple[str, float], list[float]] = {}
    kept: dict[tuple[str, float], int] = {}
    for seed in range(given.seeds):
        for sparsity in given.sparsities:
            for name in techniques(sparsity):
                if name == "dense" and sparsity != given.sparsities[0]:
                    found.setdefault((name, sparsity), []).append(found[name, given.sparsities[0]][seed])
                    kept[name, sparsity] = kept[name, given.sparsities[0]]
                    continue
                reached, left = accuracy(name, sparsity, seed)
                found.setdefault((name, sparsity), []).append(reached)
                kept[name, sparsity] = left
                print(f"seed {seed} {sparsity:.0%} {name:18} {reached:6.2f} % {left:6} weights", flush=True)
    text = page(found, kept, given.seeds)
    print(text)
    if given.write:
        given.write.write_text(text)


if __name__ == "__main__":
    main()
