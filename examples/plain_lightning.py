"""One technique in a trainer that you already have: `python examples/plain_lightning.py`.

A small network learns to read handwritten digits. `GradualPruning` is an ordinary Lightning callback: nothing about the
module, the data or the trainer knows of it. At the end nine of ten weights are exactly zero.
"""

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from shoestring.callbacks import GradualPruning


class Digits(pl.LightningModule):
    """Images [B, 64] -> scores of the ten digits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def data() -> TensorDataset:
    """1797 images of 8 x 8 pixels; they come with scikit-learn, nothing is downloaded."""
    digits = load_digits()
    return TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))


def accuracy(module: Digits) -> float:
    """The share of all images that is read right (most of them were trained on)."""
    images, labels = data().tensors
    with torch.no_grad():
        return (module.net(images).argmax(1) == labels).float().mean().item()


def main() -> Digits:
    pl.seed_everything(0)
    module = Digits()
    trainer = pl.Trainer(
        max_epochs=8,
        accelerator="cpu",
        callbacks=[GradualPruning(sparsity=0.9)],  # this line is all there is to add
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data(), batch_size=32, shuffle=True))

    weights = [layer.weight for layer in module.net if isinstance(layer, nn.Linear)]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    print(f"{zeros:.0%} of the weights are zero, {accuracy(module):.1%} of the digits are read right")
    return module


if __name__ == "__main__":
    main()
