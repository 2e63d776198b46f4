"""What low rank really saves in CPU time, and what clustered weights cost in accuracy and take in bytes.

    python benchmarks/low_rank.py [--rounds 25] [--steps 600] [--record FILE] [--write]

Time: a pre-norm encoder (6 layers, d=384, 6 heads, ff=1536) with separate q, k, v, o, dense and with factors of ranks
192, 96 and 48 in every layer that shrinks by it. CPU time of the process, one thread, the median over rounds of A B C D
A B C D … in one process, so that a machine's drift hits all alike.

Size and accuracy: an MLP 64-128-128-10 on scikit-learn's digits (1,297 train, 500 test), 5 seeds of initial weights and
sample order, each trained three times for the same steps with a fully decayed rate: dense, and clustered from half-way
on with 16 and with 4 clusters. One-shot is k-means of the dense run's final weights, without training. Bytes are those
of the files that trainer/export/torch_file.py writes: packed indices, codebooks and float32 biases. Differences are
within seeds. Baselines: int8 PTQ of the dense run; gradual pruning (erk) to the bytes of either clustered file, stored
as bit mask and values; a small dense model 64-a-a-10 of those bytes; both with the same steps.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")
import pytorch_lightning as pl
import torch
from baselines import sparsity_for, width_for, written
from report import Runs, arguments, measured, page, paired, publish, quiet, shown, table, take_turns, verdict, wrapped
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from shoestring.callbacks import GradualPruning, WeightClustering
from shoestring.callbacks.compression.codebooks import clustered, kmeans_1d
from shoestring.callbacks.compression.factors import apply_low_rank, factorable, saves
from shoestring.callbacks.contract import Technique
from shoestring.trainer import Budget, Trainer
from shoestring.trainer.export.encodings import Codebook

RANKS = (192, 96, 48)
SEEDS, CLUSTERS = range(5), (16, 4)


# -- time --------------------------------------------------------------------------------------------------------------
class Layer(nn.Module):
    def __init__(self, d: int, heads: int, ff: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, ff), nn.Linear(ff, d)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, d = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(batch, length, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        seen = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, d)
        x = x + self.o(seen)
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


def encoder(rank: int | None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer(384, 6, 1536) for _ in range(6)))
    if rank:
        layers = {name: layer.weight.shape for name, layer in factorable(model).items()}
        apply_low_rank(model, {name: rank for name, shape in layers.items() if saves(shape, rank)})
    return model


def forward(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def training_step(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()
    model.zero_grad()


def time_table(rounds: int) -> list[str]:
    models = {"dense": encoder(None), **{f"rank {rank}": encoder(rank) for rank in RANKS}}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    cases = {
        "forward 1x128": (forward, torch.randn(1, 128, 384)),
        "forward 8x128": (forward, torch.randn(8, 128, 384)),
        "forward and backward 8x128": (training_step, torch.randn(8, 128, 384)),
    }
    times = {
        case: take_turns({name: partial(act, model, x) for name, model in models.items()}, rounds)
        for case, (act, x) in cases.items()
    }
    rows = ["| | parameters | " + " | ".join(f"{case}, ms | x" for case in cases) + " |"]
    rows.append("|---" * (2 + 2 * len(cases)) + "|")
    for name in models:
        cells = [f"{f[name]:.1f} | {f['dense'] / f[name]:.2f}" for f in times.values()]
        rows.append(f"| {name} | {sizes[name] / sizes['dense']:.3f} | " + " | ".join(cells) + " |")
    return rows


# -- size and accuracy -------------------------------------------------------------------------------------------------
class Digits(pl.LightningModule):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )  # fmt: skip

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.01)


def digits() -> tuple[TensorDataset, Tensor, Tensor]:
    """(training samples, test features, test labels)."""
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x, y = x.float() / 16, y.long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:-500], order[-500:]
    return TensorDataset(x[train], y[train]), x[test], y[test]


def trained(seed: int, steps: int, *techniques: Technique, width: int = 128) -> Digits:
    torch.manual_seed(seed)
    module = Digits(width)
    with tempfile.TemporaryDirectory() as home:
        Trainer(
            Budget(steps=steps), techniques=techniques, seed=seed, run_dir=home, ledger=False, accelerator="cpu",
            usd_per_device_hour=0.0, checkpoint_every=None,
        ).fit(module, DataLoader(digits()[0], batch_size=64, shuffle=True))  # fmt: skip
    return module


def accuracy(net: nn.Module) -> float:
    _, x, y = digits()
    with torch.no_grad():
        return 100 * (net(x).argmax(1) == y).float().mean().item()


def one_shot(dense: Digits, clusters: int, keep_zero: bool) -> Digits:
    module = Digits()
    module.load_state_dict(dense.state_dict())
    for p in module.parameters():
        if p.ndim == 2:
            p.data = clustered(p.data, kmeans_1d(p.data.flatten(), clusters, keep_zero=keep_zero, iterations=50))
    return module


def one_seed(seed: int, steps: int) -> dict[str, tuple[float, int]]:
    """(test accuracy in percent, bytes), by how the model was made."""
    dense = trained(seed, steps)
    size, served = written(dense.net, "int8")
    rows = {"dense": (accuracy(dense.net), written(dense.net)[0]), "int8 PTQ": (accuracy(served), size)}
    for clusters in CLUSTERS:
        technique = WeightClustering(clusters=clusters, start="50%", every=50)
        module = trained(seed, steps, technique)
        books = {name.removeprefix("net."): Codebook() for name in technique.codebooks()}
        limit, served = written(module.net, ways=books)
        rows[f"{clusters} clusters, trained"] = (accuracy(served), limit)
        for keep_zero, said in ((True, "zero kept"), (False, "zero not kept")):
            plain = one_shot(dense, clusters, keep_zero)
            rows[f"{clusters} clusters, one-shot, {said}"] = (accuracy(plain.net), limit)
        thinned = trained(seed, steps, GradualPruning(sparsity=sparsity_for(dense.net, limit), distribution="erk"))
        little = trained(seed, steps, width=width_for(lambda width: Digits(width).net, limit))
        for name, made in (("gradual pruning", thinned), ("small dense", little)):
            size, served = written(made.net, sparse=True)
            rows[f"{name}, bytes of {clusters} clusters"] = (accuracy(served), size)
    return rows


def accuracy_tables(steps: int, runs: Runs) -> list[str | list[str]]:
    seeds = [runs(f"{steps} steps, seed {seed}", lambda seed=seed: one_seed(seed, steps)) for seed in SEEDS]
    points = {name: [run[name][0] for run in seeds] for name in seeds[0]}
    rows = []
    for name, each in points.items():
        less = "" if name == "dense" else shown(paired(each, points["dense"]), sign=True)
        size, whole = (statistics.mean(run[key][1] for run in seeds) for key in (name, "dense"))
        rows.append([name, f"{size:,.0f}", f"{size / whole:.3f}", shown(each), less])
    judged = []
    for clusters in CLUSTERS:
        one_shots = [points[f"{clusters} clusters, one-shot, {said}"] for said in ("zero kept", "zero not kept")]
        best = [max(pair) for pair in zip(*one_shots, strict=True)]
        others = {
            "the better one-shot of each seed (by test accuracy, so in its favour)": best,
            "int8 PTQ": points["int8 PTQ"],
        }
        for name in ("gradual pruning", "small dense"):
            others[f"{name} of as many bytes"] = points[f"{name}, bytes of {clusters} clusters"]
        for name, each in others.items():
            gaps = paired(points[f"{clusters} clusters, trained"], each)
            judged.append([f"{clusters} clusters, trained, above {name}", shown(gaps, sign=True), verdict(gaps)])
    return [
        table(["", "bytes", "of dense", "test accuracy, %", "minus dense, points"], rows),
        table(["claim", "difference, points", "on these data"], judged),
    ]


def main() -> None:
    options = arguments(__doc__, recorded=True)
    options.add_argument("--rounds", type=int, default=25)
    options.add_argument("--steps", type=int, default=600)
    chosen = options.parse_args()
    quiet()
    tables = accuracy_tables(chosen.steps, Runs(chosen.record))
    text = page(
        "Low rank and weight clustering", measured("low_rank.py"), "## CPU time of an encoder with factored layers",
        wrapped(f"6 layers, d=384, 6 heads, ff=1536, float32, eager. Medians of {chosen.rounds} interleaved rounds of "
                "process CPU time. At rank 192 the square layers (384 x 384) stay dense, because factors would save "
                "nothing."),
        time_table(chosen.rounds), "## Clustered weights on digits",
        wrapped(f"MLP 64-128-128-10, {chosen.steps} steps of 64, {len(SEEDS)} seeds, mean and 95 % interval. "
                "Clustering from half-way on, codebooks fitted again every 50 steps. Gradual pruning (erk) and small "
                "dense models have the same steps and at most the bytes of the clustered file; int8 PTQ rounds the "
                "dense run. Bytes are those of the files."),
        *tables,
    )  # fmt: skip
    publish(text, __file__, chosen.write)


if __name__ == "__main__":
    main()
