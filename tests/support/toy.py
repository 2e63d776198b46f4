"""A foreign LightningModule with its data, small enough to train a hundred times, and awkward on purpose.

Odd sizes (no parameter divides evenly among two ranks), dropout, frozen parameters, a buffer that training changes,
and samples that are read with a random part: whatever a resumed run fails to restore changes the final weights.
"""

import hashlib
import os

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

VOCAB, WIDTH, LENGTH, CLASSES = 29, 11, 16, 7
SAMPLES, GLOBAL_BATCH, ACCUMULATE = 72, 8, 2  # nine steps an epoch
DEVICE = os.environ.get("SHOESTRING_TEST_DEVICE", "cpu")  # or "cuda": make test-gpu
STEPS = 12  # ends in the middle of the second epoch


class Words(Dataset):
    """Samples {"input_ids": [16], "labels", "index"}. Reading one drops tokens at random, by the global generator."""

    def __init__(self, size: int = SAMPLES, noise: float = 0.2, distinct: int | None = None) -> None:
        draw = torch.Generator().manual_seed(1)
        self.ids = torch.randint(1, VOCAB, (distinct or size, LENGTH), generator=draw)
        self.size, self.noise = size, noise

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        ids = self.ids[index % len(self.ids)].clone()
        label = ids[0] % 2  # most classes never occur, which is quickly learned
        if self.noise:
            ids[torch.rand(LENGTH) < self.noise] = 0
        return {"input_ids": ids, "labels": label, "index": index}


def loader(world: int = 1, *, shuffle: bool = True, words: dict | None = None, **options: object) -> DataLoader:
    """Eight samples a step, in two micro-batches, however many ranks there are."""
    micro = GLOBAL_BATCH // ACCUMULATE // world
    return DataLoader(Words(**(words or {})), batch_size=micro, shuffle=shuffle, **options)


def held_out() -> DataLoader:
    return DataLoader(Words(16, noise=0.0), batch_size=4)


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.wide = nn.Linear(WIDTH, 2 * WIDTH + 1)
        self.narrow = nn.Linear(2 * WIDTH + 1, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.narrow(nn.functional.gelu(self.wide(self.norm(x)))))


class Toy(pl.LightningModule):
    def __init__(self, dropout: float = 0.1, lr: float = 1e-2, optimizer: str = "adamw") -> None:
        super().__init__()
        self.lr, self.optimizer = lr, optimizer
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Parameter(torch.randn(LENGTH, WIDTH), requires_grad=False)
        self.gain = nn.Parameter(torch.ones(1), requires_grad=False)  # one rank has all of it, and the others nothing
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.gain * self.embed(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        self.seen += 1
        self.logits = self.forward(batch["input_ids"])
        return nn.functional.cross_entropy(self.logits.float(), batch["labels"])

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        loss = nn.functional.cross_entropy(self.forward(batch["input_ids"]).float(), batch["labels"])
        self.log("val_loss", loss, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trainable = [p for p in self.parameters() if p.requires_grad]
        if self.optimizer == "sgd":
            return torch.optim.SGD(trainable, lr=self.lr, momentum=0.9)
        return torch.optim.AdamW(trainable, lr=self.lr)


def toy(**options: object) -> Toy:
    """Always the same initial weights."""
    torch.manual_seed(7)
    return Toy(**options)


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """The same for the same bits under the same names."""
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Explode(pl.Callback):
    """Ends a run in the middle of an accumulation window, as a bug in anybody's callback would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step and (batch_idx + 1) % trainer.accumulate_grad_batches:
            raise Exploded(f"after step {self.step}")


class Exploded(Exception):
    pass
