"""Bytes a parameter of every optimizer under every strategy: what the plan claims, and what a run then holds.

    python benchmarks/optimizer_bytes.py [--write]

Three square matrices of 256, in float32, take two steps by each optimizer, on one process or on two. Counted are all
tensors of its state after that, a rank's share of them over all parameters. Seconds do not matter, so all strategies
run at once.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
from report import arguments, measured, page, publish, quiet, table, wrapped

RANKS, WIDTH, LAYERS = 2, 256, 3


def held(strategy: str, folder: Path) -> dict[str, float]:
    """On one rank: bytes of state a parameter, by optimizer."""
    import pytorch_lightning as pl
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from shoestring.recipes.schema import OptimizerSpec
    from shoestring.trainer import Trainer
    from shoestring.trainer.tasks.optimizers.cards import OPTIMIZERS
    from shoestring.trainer.tasks.optimizers.make import build_optimizer

    class Matrices(pl.LightningModule):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            self.net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))

        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return build_optimizer(self.named_parameters(), OptimizerSpec(name=self.name, lr=1e-4, momentum=0.9))

    quiet()
    seen, world = {}, int(os.environ["WORLD_SIZE"])
    data = DataLoader(TensorDataset(torch.randn(16, WIDTH)), batch_size=4)
    for name in OPTIMIZERS:
        trainer = Trainer(
            strategy=strategy, devices=world, accelerator="cpu", max_steps=2, max_epochs=-1, ledger=False,
            run_dir=folder / strategy / name, checkpoint_every=None,
        )  # fmt: skip
        trainer.fit(Matrices(name), data)
        optimizer = trainer.optimizers[0]
        kept = [v for each in getattr(optimizer, "optimizer", optimizer).state.values() for v in each.values()]
        size = sum(v.numel() * v.element_size() for v in kept if torch.is_tensor(v) and v.numel() > 1)
        seen[name] = size / (LAYERS * WIDTH**2)
    return seen


def start(strategy: str, world: int, folder: Path) -> list[subprocess.Popen[bytes]]:
    """This script on every rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"TORCHELASTIC_RUN_ID": strategy, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, __file__, "--one", strategy, str(folder)]
    return [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]


def claimed(strategy: str, name: str) -> float:
    """The plan's."""
    from shoestring.trainer.planning.memory import memory
    from shoestring.trainer.planning.needs import Inputs
    from shoestring.trainer.planning.sizes import Size
    from shoestring.trainer.tasks.optimizers.cards import OPTIMIZERS

    count = LAYERS * WIDTH**2
    terms = memory(Inputs(
        size=Size(parameters=count, trainable=count, active=count, inside=count, largest=WIDTH**2), length=1, micro=1,
        accumulate=1, devices=1 if strategy == "single" else RANKS, nodes=1, strategy=strategy, offload="none",
        accelerator="cpu", precision="fp32", optimizer=OPTIMIZERS[name],
    ))  # fmt: skip
    return next(term.bytes for term in terms.device if term.name == "optimizer states") / count


def main() -> None:
    parser = arguments("bytes a parameter of every optimizer, claimed and counted")
    parser.add_argument("--one", nargs=2, metavar=("STRATEGY", "FOLDER"))
    given = parser.parse_args()
    if given.one:
        strategy, folder = given.one[0], Path(given.one[1])
        (folder / f"{strategy}-{os.environ['RANK']}.json").write_text(json.dumps(held(strategy, folder)))
        return
    from shoestring.strategies import OFFLOADS
    from shoestring.trainer.tasks.optimizers.cards import OPTIMIZERS

    counted = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        worlds = {strategy: 1 if strategy == "single" else RANKS for strategy in OFFLOADS}
        started = [process for strategy, world in worlds.items() for process in start(strategy, world, folder)]
        codes = [process.wait() for process in started]
        if any(codes):
            sys.exit("a rank failed; its words are above")
        for strategy, world in worlds.items():
            ranks = [json.loads((folder / f"{strategy}-{rank}.json").read_text()) for rank in range(world)]
            counted[strategy] = {name: sum(rank[name] for rank in ranks) / world for name in OPTIMIZERS}
    rows = [
        [f"`{name}`", *(f"{claimed(each, name):.3g} / {counted[each][name]:.3g}" for each in OFFLOADS)]
        for name in OPTIMIZERS
    ]
    about = wrapped(
        f"What each rank ({RANKS}; 1 for `single`) keeps of a trained parameter beside its weight and gradient: the "
        f"plan's figure / the bytes counted after two steps. {LAYERS} matrices of {WIDTH} x {WIDTH} in float32. "
        "A matrix that lies across two ranks of zero1 or zero2, here the second of three, is kept whole by both "
        "where an optimizer keeps something of wholes; the plan counts it once."
    )
    publish(
        page("Bytes of optimizers", about, table(["claimed / counted", *OFFLOADS], rows),
             measured("optimizer_bytes.py --write")),
        __file__, given.write,
    )  # fmt: skip


if __name__ == "__main__":
    main()
