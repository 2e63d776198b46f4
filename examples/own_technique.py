"""A technique of your own, in about twenty lines: `python examples/own_technique.py`.

Gradient noise (after arXiv 1511.06807): add normal noise to every gradient, less and less of it as the run goes on.
A technique is a Lightning callback plus a *card*, which says what it reads and writes. From the card alone, `compose`
knows the order in which techniques act, and refuses those that do not go together.

In a recipe it is `- own_technique:GradientNoise: {scale: 0.01}`, with `--allow-code` on the command line.
"""

from typing import Any, Self

import pytorch_lightning as pl
import torch
from plain_lightning import Digits, accuracy, data
from torch.utils.data import DataLoader

from shoestring.callbacks import Card, Technique, clock_of
from shoestring.callbacks.contract import derive_seed, require


class GradientNoise(Technique, pl.Callback):
    """Normal noise of standard deviation `scale`, falling to zero towards the end of the run."""

    card = Card(
        name="gradient_noise",
        does="adds decaying noise to every gradient",
        paper="1511.06807",
        reads={"gradients"},
        writes={"gradients"},
    )

    def __init__(self, *, scale: float = 0.01) -> None:
        self.scale = scale  # store, nothing else

    def check(self) -> None:
        require(self.scale >= 0, self, "scale", "a number from 0")

    @classmethod
    def example(cls) -> Self:
        """The smallest instance that visibly acts: the contract suite trains it."""
        return cls(scale=0.1)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        left = 1 - clock_of(trainer).progress  # one clock for all: the share of the budget, or of max_epochs
        if self.scale * left == 0:  # strength 0 equals absence, bit for bit
            return
        # a generator of its own, made from the step: a resumed run draws the same noise, others' draws stay as they are
        draw = torch.Generator().manual_seed(derive_seed(0, self.card.name, trainer.global_step))
        for weight in pl_module.parameters():
            if weight.grad is not None:
                weight.grad += self.scale * left * torch.randn(weight.shape, generator=draw).to(weight.grad)


def main(scale: float = 0.01) -> Digits:
    pl.seed_everything(0)
    module = Digits()
    trainer = pl.Trainer(
        max_epochs=6,
        accelerator="cpu",
        callbacks=[GradientNoise(scale=scale)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data(), batch_size=32, shuffle=True))
    print(f"{GradientNoise(scale=scale)}: {accuracy(module):.1%} of the digits are read right")
    return module


if __name__ == "__main__":
    main()
