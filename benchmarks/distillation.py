"""Is a distilled student better than the same student alone? scikit-learn's digits, several seeds, equal steps.

    python benchmarks/distillation.py [--seeds 8] [--write benchmarks/results/distillation.md]

Three settings, of which the last two are controls:

  few labels        the student has 100 labels and the teacher's answers on 1197 images without labels; the teacher
                    was trained on all 1297 labels, as where labels are no longer at hand or not to be passed on
  teacher as poor   the same, but the teacher too had only the student's 100 labels: nothing but its size is new
  all labels        student and teacher both have all 1297 labels, the setting of arXiv 1503.02531 §3

Teacher 64-300-100-10, student 64-16-10, both by AdamW with a rate that falls linearly to 0. Per seed the split, the
student's first weights and its batches are the same alone and distilled, and so is the number of steps; the teacher's
own training is not among them. The difference is paired by seed; intervals are Student's t at 95 %. Nothing was chosen
by looking at test images: temperature 4 and weight 1 were fixed before the first run.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import pytorch_lightning as pl
import torch
from scipy.stats import t as student_t
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from shoestring.callbacks import Distillation, LRSchedule

TEST, LABELLED, BATCH, STEPS, TEACHER_STEPS, RATE = 500, 100, 64, 1000, 1500, 3e-3
SETTINGS = {"temperature": 4.0, "weight": 1.0, "teacher_dtype": "float32"}
NONE = -100  # no label: cross entropy passes over it


class Net(pl.LightningModule):
    """A ReLU network on 64 pixels; the loss is the mean cross entropy of the samples that have labels."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        sizes = [64, *widths, 10]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.model = nn.Sequential(*layers[:-1])

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return cross_entropy(self.model(batch["pixels"]), batch["labels"], ignore_index=NONE)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=RATE)


class Steps(Dataset[Any]):
    """One batch an index: half labelled, half from the images without labels (all labelled where there are none)."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, labelled: int, steps: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.x, self.y = x, y.clone()
        self.y[labelled:] = NONE
        half = BATCH if labelled == len(x) else BATCH // 2
        known = torch.randint(0, labelled, (steps, half), generator=draw)
        rest = torch.randint(labelled, len(x), (steps, half), generator=draw) if labelled < len(x) else known[:, :0]
        self.rows = torch.cat([known, rest], 1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rows = self.rows[index]
        return {"pixels": self.x[rows], "labels": self.y[rows]}


def split(seed: int) -> tuple[torch.Tensor, ...]:
    """Training pixels and labels, the first 100 of them stratified, then the test's."""
    digits = load_digits()
    x, y = digits.data.astype(np.float32) / 16, digits.target
    x, test_x, y, test_y = train_test_split(x, y, test_size=TEST, random_state=seed, stratify=y)
    first, rest = train_test_split(np.arange(len(x)), train_size=LABELLED, random_state=seed, stratify=y)
    order = np.concatenate([first, rest])
    return tuple(torch.from_numpy(part) for part in (x[order], y[order], test_x, test_y))


def train(module: Net, data: Steps, *techniques: pl.Callback) -> Net:
    """The module after one pass over the prepared steps."""
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=len(data), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[LRSchedule(shape="linear", warmup="2%"), *techniques],
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=None, shuffle=False))
    return module.eval()


@torch.no_grad()
def accuracy(module: Net, x: torch.Tensor, y: torch.Tensor) -> float:
    """Percent of `x` classified right."""
    return 100 * (module.model(x).argmax(-1) == y).float().mean().item()


def student(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net(16)


def teacher(x: torch.Tensor, y: torch.Tensor, labelled: int, seed: int) -> Net:
    torch.manual_seed(1000 + seed)
    return train(Net(300, 100), Steps(x[:labelled], y[:labelled], labelled, TEACHER_STEPS, 1000 + seed))


def run(seed: int) -> dict[str, dict[str, float]]:
    """setting -> accuracies in percent of this seed's teacher, lone student and distilled student, and CPU seconds."""
    x, y, *test = split(seed)
    size = len(x)
    found = {}
    teachers = {labelled: teacher(x, y, labelled, seed) for labelled in (size, LABELLED)}
    for name, taught, labelled in (
        ("few labels", size, LABELLED),
        ("teacher as poor", LABELLED, LABELLED),
        ("all labels", size, size),
    ):
        steps = Steps(x, y, labelled, STEPS, seed)
        began = time.process_time()
        alone = train(student(seed), steps)
        middle = time.process_time()
        distilled = train(student(seed), steps, Distillation(teacher=teachers[taught].model, **SETTINGS))
        found[name] = {
            "teacher": accuracy(teachers[taught], *test),
            "alone": accuracy(alone, *test),
            "distilled": accuracy(distilled, *test),
            "seconds alone": middle - began,
            "seconds distilled": time.process_time() - middle,
        }
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval."""
    half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(half)


def verdict(mean: float, half: float) -> str:
    if abs(mean) <= half:
        return "not told apart"
    return "distilled is better" if mean > 0 else "distilled is WORSE"


def report(runs: list[dict[str, dict[str, float]]]) -> str:
    """The page: one row a setting."""
    rows = []
    for name in runs[0]:
        columns = {key: [each[name][key] for each in runs] for key in runs[0][name]}
        difference = [d - a for d, a in zip(columns["distilled"], columns["alone"], strict=True)]
        said = ["{:.2f} ± {:.2f}".format(*interval(columns[key])) for key in ("teacher", "alone", "distilled")]
        wins = sum(d > 0 for d in difference)
        mean, half = interval(difference)
        cost = statistics.median(columns["seconds distilled"]) / statistics.median(columns["seconds alone"])
        rows.append(f"| {name} | {' | '.join(said)} | {mean:+.2f} ± {half:.2f} | {wins}/{len(runs)} | {cost:.2f}x | "
                    f"{verdict(mean, half)} |")  # fmt: skip
    expected = all("better" in row for row in rows[:1])
    ending = "appears" if expected else "DOES NOT appear"
    return "\n".join([
        "# Distilled student against the student alone", "",
        f"scikit-learn digits, {TEST} test images, {len(runs)} seeds, {STEPS} steps of {BATCH} samples for "
        f"each student; student 64-16-10, teacher 64-300-100-10 ({TEACHER_STEPS} steps of its own, not counted). "
        f"T = {SETTINGS['temperature']:g}, weight {SETTINGS['weight']:g}.",
        "Accuracy in percent, mean ± 95 % interval; the difference is paired by seed.", "",
        "| setting | teacher | alone | distilled | difference | wins | CPU time | verdict |",
        "|---|---|---|---|---|---|---|---|", *rows, "",
        f'The ordering "distilled above alone" {ending} where the teacher knows what the student cannot (few labels). '
        "The other rows are controls and stand as they came out.", "",
        f"2026-11-21, 2-core AMD EPYC CPU, one thread, torch {torch.__version__}, Python {platform.python_version()}. "
        "Made by `python benchmarks/distillation.py`, which says what each setting is.", "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--write", type=Path, default=Path(__file__).parent / "results" / "distillation.md")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds {options.seeds} gives no interval; use at least 2")
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    runs = []
    for seed in range(options.seeds):
        runs.append(run(seed))
        print(f"seed {seed}: {runs[-1]['few labels']}", flush=True)
    page = report(runs)
    print(page)
    options.write.parent.mkdir(parents=True, exist_ok=True)
    options.write.write_text(page)


if __name__ == "__main__":
    main()
