"""Accuracy of weights of 2 and 3 bits, trained for them or rounded, beside the baselines; run by quantization.py.

Digits of scikit-learn, MLP 64-128-128-10, weights of 2 and 3 bits and activations of 8. Low-bit training (QAT)
takes ten epochs more than rounding afterwards (PTQ), so PTQ is also shown after the same ten epochs. Every model is
scored as it is served.

Baselines: int8 PTQ (activations of 8 bits, weights within 7, right on any CPU; or all 8 bits, for VNNI); gradual
pruning to the bytes of the W2 or W3 file, in the same ten extra epochs from the same fp32 model, and in all forty
epochs from scratch; a small dense model 64-a-a-10 of at most those bytes, from scratch, forty epochs. Bytes are those
of the files that trainer/export/torch_file.py writes: codes packed to their 2 or 3 bits with float32 scales, int8 with
scales, or a bit mask and values (pruned), and biases in float32."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytorch_lightning as pl
import torch
from baselines import sparsity_for, width_for, written
from report import Runs, measured, paired, shown, table, verdict, wrapped
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from shoestring.callbacks import GradualPruning, QuantizationAware
from shoestring.trainer.export.encodings import Grid
from shoestring.trainer.export.quantize import quantize


class Digits(pl.LightningModule):
    """MLP 64-width-width-10, Adam with its rate decayed to zero."""

    def __init__(self, seed: int, width: int = 128) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )  # fmt: skip
        self.rate = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.rate)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(module: Digits, data: TensorDataset, epochs: int, rate: float, seed: int, *techniques: Any) -> Digits:
    module.rate = rate
    draw = torch.Generator().manual_seed(seed)
    pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(techniques),
    ).fit(module, DataLoader(data, batch_size=64, shuffle=True, generator=draw))  # fmt: skip
    return module.eval()


TITLE = "## Accuracy at 2 and 3 bits"
TEN, FORTY = "gradual pruning, ten more epochs", "gradual pruning, all epochs"
CLAIMS = [
    (f"W{bits} {scale}: QAT", other)
    for bits in (2, 3)
    for scale in ("absmax", "mse")
    for other in (f"W{bits} {scale}: PTQ", f"W{bits} {scale}: PTQ after the same extra epochs",
                  f"{TEN}, bytes of W{bits}", f"{FORTY}, bytes of W{bits}",
                  f"small dense, bytes of W{bits}", "int8 PTQ")
]  # fmt: skip


def accuracy(seeds: int, runs: Runs) -> str:
    """The section of the page."""
    results = [runs(f"accuracy {seed}", lambda seed=seed: one_seed(seed)) for seed in range(seeds)]
    points = {name: [run[name][0] for run in results] for name in results[0]}
    sizes = {name: statistics.mean(run[name][1] for run in results) for name in results[0]}
    rows = [[name, f"{sizes[name]:,.0f}", shown(each), ", ".join(f"{x:.2f}" for x in each)]
            for name, each in points.items()]  # fmt: skip
    judged = []
    for better, worse in CLAIMS:
        gaps = paired(points[better], points[worse])
        judged.append([f"{better} above {worse}", shown(gaps, sign=True), verdict(gaps)])
    tables = (table(["served as", "bytes", "accuracy, %", "each seed"], rows),
              table(["claim", "difference, points", "on these data"], judged))  # fmt: skip
    about = [wrapped(part) for part in (__doc__ or "").split("\n\n")[1:]]
    return "\n\n".join([
        f"{TITLE}, {seeds} seeds", measured("quantization.py accuracy"), *about, *("\n".join(each) for each in tables),
        wrapped("Learning rate and epochs are one choice, made once and tuned for no side. Intervals are 95 % of "
                "Student's t; differences are paired by seed."), "",
    ])  # fmt: skip


def into(page: str, section: str) -> str:
    """The page with its section of this title replaced by `section`."""
    before, _, after = page.partition(TITLE)
    return before + section + "\n" + (after[after.index("\n## ") + 1 :] if "\n## " in after else "")


def packed_bytes(net: nn.Module, bits: int, scale: str) -> int:
    """Of the file with the codes of `bits` bits packed, a scale for each output channel, and biases."""
    grid = Grid(bits, None, scale)
    return written(net, ways={name: grid for name, p in net.named_parameters() if p.ndim == 2})[0]


def one_seed(seed: int) -> dict[str, tuple[float, int]]:
    """(accuracy in percent on a quarter of the digits that is never trained on, bytes), by how the model was made."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x, held, y, labels = train_test_split(x / 16.0, y, test_size=0.25, stratify=y, random_state=seed)
    data = TensorDataset(torch.tensor(x, dtype=torch.float32), torch.tensor(y))
    held, labels = torch.tensor(held, dtype=torch.float32), torch.tensor(labels)

    def score(net: nn.Module) -> float:
        with torch.no_grad():
            return 100 * float((net(held).argmax(1) == labels).float().mean())

    def low(module: Digits, bits: int, scale: str) -> tuple[float, int]:
        served = quantize(module.net, bits, 8, scale=scale, compiled=False)
        return score(served), packed_bytes(module.net, bits, scale)

    base = train(Digits(seed), data, 30, 2e-3, seed)
    more = lambda *techniques: train(copy.deepcopy(base), data, 10, 1e-3, seed + 100, *techniques)  # noqa: E731
    longer = more()
    fp32, int8 = written(base.net)[0], written(base.net, "int8")[0]
    rows = {"fp32": (score(base.net), fp32), "fp32 after ten more epochs": (score(longer.net), fp32)}
    for name, module in (("int8 PTQ", base), ("int8 PTQ after the same extra epochs", longer)):
        rows[name] = (score(quantize(module.net, 8, 8, compiled=False)), int8)
        rows[f"{name}, all 8 bits"] = (score(quantize(module.net, 8, 8, cpu="vnni", compiled=False)), int8)
    for bits in (2, 3):
        for scale in ("absmax", "mse"):
            aware = more(QuantizationAware(weight_bits=bits, activation_bits=8, scale=scale))
            rows[f"W{bits} {scale}: PTQ"] = low(base, bits, scale)
            rows[f"W{bits} {scale}: PTQ after the same extra epochs"] = low(longer, bits, scale)
            rows[f"W{bits} {scale}: QAT"] = low(aware, bits, scale)
        limit = rows[f"W{bits} mse: QAT"][1]
        shrinks = GradualPruning(sparsity=sparsity_for(base.net, limit), distribution="erk")
        thinned, slowly = more(shrinks), train(Digits(seed), data, 40, 2e-3, seed, copy.deepcopy(shrinks))
        width = width_for(lambda width: Digits(seed, width).net, limit)
        little = train(Digits(seed, width), data, 40, 2e-3, seed)
        made = {TEN: thinned, FORTY: slowly, "small dense": little}
        for name, module in made.items():
            size, served = written(module.net, sparse=True)
            rows[f"{name}, bytes of W{bits}"] = (score(served), size)
    return rows
