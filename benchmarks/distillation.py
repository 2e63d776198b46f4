"""Is a distilled student better than the same student alone? scikit-learn's digits, several seeds, equal steps.

    python benchmarks/distillation.py [--seeds 8] [--record FILE] [--write]

Three settings, of which the last two are controls:

  few labels        the student has 100 labels and the teacher's answers on 1197 images without labels; the teacher
                    was trained on all 1297 labels, as where labels are no longer at hand or not to be passed on
  teacher as poor   the same, but the teacher too had only the student's 100 labels: nothing but its size is new
  all labels        student and teacher both have all 1297 labels, the setting of arXiv 1503.02531 §3

Teacher 64-300-100-10, student 64-16-10, both by AdamW with a rate that falls linearly to 0. Per seed the split, the
student's first weights and its batches are the same alone and distilled, and so is the number of steps; the teacher's
own training is not among them. The difference is paired by seed; intervals are Student's t at 95 %. Nothing was chosen
by looking at test images: temperature 4 and weight 1 were fixed before the first run.

Baselines of the same setting. "Alone" is the small dense model: the student's own shape, so the same bytes. "Teacher in
int8" is the teacher rounded, without training. "Teacher pruned" goes on from the teacher's weights for the student's
number of steps on the student's batches and labels, pruned gradually over the first 70 % of them down to as many
weights as the student has; its file is larger than the student's all the same, since the mask of the teacher's 50,200
weights alone takes 6,275 bytes. Bytes are those of the files that trainer/export/torch_file.py writes.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from itertools import pairwise
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import pytorch_lightning as pl
import torch
from baselines import written
from report import Runs, arguments, measured, page, paired, publish, quiet, shown, table, verdict, wrapped
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from shoestring.callbacks import Distillation, GradualPruning, LRSchedule

TEST, LABELLED, BATCH, STEPS, TEACHER_STEPS, RATE = 500, 100, 64, 1000, 1500, 3e-3
SETTINGS = {"temperature": 4.0, "weight": 1.0, "teacher_dtype": "float32"}
KEPT = (64 * 16 + 16 * 10) / (64 * 300 + 300 * 100 + 100 * 10)  # the student's weights as a share of the teacher's
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
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Percent of `x` classified right."""
    return 100 * (model(x).argmax(-1) == y).float().mean().item()


def student(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net(16)


def teacher(x: torch.Tensor, y: torch.Tensor, labelled: int, seed: int) -> Net:
    torch.manual_seed(1000 + seed)
    return train(Net(300, 100), Steps(x[:labelled], y[:labelled], labelled, TEACHER_STEPS, 1000 + seed))


def run(seed: int) -> dict[str, dict[str, float]]:
    """setting -> accuracies in percent of this seed's models, their bytes, and CPU seconds."""
    x, y, *test = split(seed)
    size = len(x)
    row = {}
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
        seconds = {"seconds alone": middle - began, "seconds distilled": time.process_time() - middle}
        row[name] = seconds | stored(teachers[taught], pruned(teachers[taught], steps), alone, distilled, test)
    return row


def pruned(taught: Net, steps: Steps) -> Net:
    """The teacher trained on, down to as many weights as the student has."""
    shrinks = GradualPruning(sparsity=1 - KEPT, distribution="erk", start="0%", end="70%")
    return train(copy.deepcopy(taught).train(), steps, shrinks)


def stored(taught: Net, thinned: Net, alone: Net, distilled: Net, test: list[torch.Tensor]) -> dict[str, float]:
    """Accuracy and bytes of each model as it is read back from its file."""
    row = {}
    for name, module, quantize in (
        ("teacher", taught, None), ("teacher in int8", taught, "int8"), ("teacher pruned", thinned, None),
        ("alone", alone, None), ("distilled", distilled, None),
    ):  # fmt: skip
        size, served = written(module.model, quantize, sparse=True)
        row |= {name: accuracy(served, *test), f"{name}, bytes": size}
    return row


MODELS = ("teacher", "teacher in int8", "teacher pruned", "alone", "distilled")


def report(runs: list[dict[str, dict[str, float]]]) -> str:
    """The page: one row a setting, then one a setting and baseline."""
    rows, beside, first = [], [], ""
    for name in runs[0]:
        columns = {key: [each[name][key] for each in runs] for key in runs[0][name]}
        gaps = paired(columns["distilled"], columns["alone"])
        first = first or verdict(gaps)
        cost = statistics.median(columns["seconds distilled"]) / statistics.median(columns["seconds alone"])
        wins = f"{sum(gap > 0 for gap in gaps)}/{len(runs)}"
        models = [shown(columns[key]) for key in MODELS]
        rows.append(
            [f"{name}: distilled above alone", *models, shown(gaps, sign=True), wins, f"{cost:.2f}x", verdict(gaps)]
        )
        for other in ("teacher in int8", "teacher pruned"):
            gaps = paired(columns["distilled"], columns[other])
            beside.append([f"{name}: distilled above {other}", shown(gaps, sign=True), verdict(gaps)])
    sizes = ", ".join(
        f"{key} {statistics.mean(run['few labels'][f'{key}, bytes'] for run in runs):,.0f}" for key in MODELS
    )
    outcome = "appears" if first.startswith("appears") else "does NOT appear"
    return page(
        "Distilled student against the student alone", measured("distillation.py"),
        wrapped(f"{len(runs)} seeds, {TEST} test images. Accuracy in percent, mean ± 95 % interval. Bytes: {sizes}."),
        table(["setting", *MODELS, "difference, points", "wins", "CPU time", "on these data"], rows),
        wrapped(f'The ordering "distilled above alone" {outcome} where the teacher knows what the student cannot (few '
                "labels). The other rows are controls and stand as they came out. CPU time is that of training "
                "distilled over alone, the teacher's own training not counted."),
        "## Against the other baselines",
        wrapped("The teacher in int8 has some ten times the student's bytes; the pruned one two to three times."),
        table(["claim", "difference, points", "on these data"], beside), "## What each row is", *_settings(),
    )  # fmt: skip


def _settings() -> list[str]:
    """The docstring, its list of settings left as it is."""
    return [part if part.startswith("  ") else wrapped(part) for part in (__doc__ or "").split("\n\n")[2:]]


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], seeds=8, recorded=True)
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds {options.seeds} gives no interval; use at least 2")
    quiet()
    runs = Runs(options.record)
    text = report([runs(f"seed {seed}", lambda seed=seed: run(seed)) for seed in range(options.seeds)])
    publish(text, __file__, options.write)


if __name__ == "__main__":
    main()
